"""A root's folder hf describes every iteration: who writes it, which description serves, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
from command_line import refusal, run, tree
from plain_models import contents, save_model

import dist_ckpt_mistral as dcm
from dist_ckpt_mistral.errors import ConfigError, OutputError, TensorMismatchError
from dist_ckpt_mistral.formats import small_files
from dist_ckpt_mistral.formats.torch_dist import common_state, writer
from dist_ckpt_mistral.messages import human_bytes

TEMPLATES: Final = "additional_chat_templates/tool_use.jinja"
#: What an iteration of training has of a model: its shards and their metadata.
SHARDS: Final = (".metadata", "metadata.json", "__0_0.distcp")


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in several files, with a tokenizer, chat templates and a generation config."""
    hf = save_model(tmp_path_factory.mktemp("described") / "hf", max_shard_size=5000)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (hf / name).write_text("{}")
    (hf / "chat_template.jinja").write_text("plain")
    (hf / TEMPLATES).parent.mkdir()
    (hf / TEMPLATES).write_text("with tools")
    return hf


@pytest.fixture(scope="module")
def imported(hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root that an import makes of it."""
    root = tmp_path_factory.mktemp("described") / "root"
    dcm.from_hf(hf, root)
    return root


def trained(imported: Path, root: Path, *iterations: int) -> Path:
    """A root with iterations that hold weights and nothing that describes them."""
    for iteration in iterations:
        directory = root / f"iter_{iteration:07d}"
        directory.mkdir(parents=True)
        for name in SHARDS:
            shutil.copy(imported / "release" / name, directory)
    (root / "latest_checkpointed_iteration.txt").write_text(str(iterations[-1]))
    return root


def save_common(iteration: Path, **state: Any) -> None:  # noqa: ANN401  (values of all types)
    """Give an iteration a common state."""
    (iteration / "common.pt").write_bytes(writer.common_state({"args": {}, "iteration": 1, **state}))


def test_every_iteration_is_described(hf: Path, imported: Path, tmp_path: Path) -> None:
    """After describe, each iteration exports with no flags, and all files are the original ones, byte for byte."""
    root = trained(imported, tmp_path / "root", 5, 10)
    assert "describe" in refusal(tmp_path, "to-hf", root, tmp_path / "none")
    outcome = run("describe", hf, root)
    assert outcome.code == 0, outcome.err
    files = [path for path in (root / "hf").rglob("*") if path.is_file() and path.name != "checksums.json"]
    size = human_bytes(sum(path.stat().st_size for path in files))
    result, follows = outcome.out
    expected = rf"wrote 8 files \({size}\) to {root / 'hf'} in \d+\.\d+ s; the model agrees with iter_0000010"
    assert re.fullmatch(expected, result)
    assert follows == f"export an iteration with: dist-ckpt-mistral to-hf {root} HF_DIR"
    for place in (root, root / "iter_0000005"):
        out = tmp_path / f"out of {place.name}"
        outcome = run("to-hf", place, out)
        assert f"configuration: {root / 'hf' / 'config.json'}" in outcome.err
        assert f"tokenizer: {root / 'hf'}" in outcome.err
        assert contents(out) == contents(hf)


def test_an_import_describes_later_iterations(hf: Path, imported: Path, tmp_path: Path) -> None:
    """An import leaves the root's folder, which serves iterations that training saves beside, and alone."""
    root = shutil.copytree(imported, tmp_path / "root", symlinks=True)
    trained(imported, root, 7)
    dcm.to_hf(root, tmp_path / "beside")
    shutil.rmtree(root / "release")
    done = dcm.to_hf(root, tmp_path / "alone")
    assert done.config_from == str(root / "hf" / "config.json")
    assert contents(tmp_path / "beside") == contents(tmp_path / "alone") == contents(hf)


def test_the_places_in_their_order(hf: Path, imported: Path, tmp_path: Path) -> None:
    """Each description serves once those before it are gone; --config comes before them all."""
    root = trained(imported, shutil.copytree(imported, tmp_path / "root", symlinks=True), 7)
    iteration = root / "iter_0000007"
    shutil.copytree(imported / "release" / "hf", iteration / "hf")
    shutil.copy(imported / "release" / "run_config.yaml", iteration)
    kept = shutil.copytree(hf, tmp_path / "kept", ignore=shutil.ignore_patterns("*.safetensors*"))
    state = common_state.read(imported / "release", None)
    args = state["args"] | {"tokenizer_model": str(kept), "tokenizer_type": "HuggingFaceTokenizer"}
    record = dcm.hf_content_metadata(dcm.MistralConfig.from_hf(hf), hf)

    def left(**state: object) -> Callable[[], None]:
        return lambda: save_common(iteration, **state)

    def gone(place: Path) -> Callable[[], object]:
        return lambda: shutil.rmtree(place) if place.is_dir() else place.unlink()

    steps: list[tuple[Callable[[], object], str]] = [
        (left(args=args | record, content_metadata=record), "the Hugging Face configuration inside the checkpoint"),
        (left(args=args | record), "the Hugging Face configuration inside the args in the checkpoint"),
        (left(args=args), str(iteration / "hf" / "config.json")),
        (gone(iteration / "hf"), str(root / "hf" / "config.json")),
        (gone(root / "hf" / "config.json"), str(root / "hf" / "dist_ckpt_mistral.json")),
        (gone(root / "hf"), str(root / "release" / "hf" / "config.json")),
        (gone(root / "release"), "run_config.yaml inside the checkpoint"),
        (gone(iteration / "run_config.yaml"), str(kept / "config.json")),
        (gone(kept), "the args inside the checkpoint"),
    ]
    for change, source in steps:
        change()
        done = dcm.to_hf(iteration, tmp_path / "out", output=dcm.Output(dry_run=True))
        assert done.config_from == source
        given = dcm.to_hf(iteration, tmp_path / "out", config=hf, output=dcm.Output(dry_run=True))
        assert given.config_from == f"the given configuration {hf / 'config.json'}"


@pytest.mark.parametrize("place", ["root", "release", "record"])
def test_what_contradicts_the_checkpoint_is_no_description(
    place: str, hf: Path, imported: Path, tmp_path: Path
) -> None:
    """A folder of the root or the release that reads rows otherwise than another description is an error."""
    root = trained(imported, shutil.copytree(imported, tmp_path / "root", symlinks=True), 7)
    save_common(root / "iter_0000007", args=common_state.read(imported / "release", None)["args"])
    file = {"root": "hf/config.json", "release": "release/hf/config.json", "record": "hf/dist_ckpt_mistral.json"}[place]
    content = json.loads((root / file).read_text())
    (content["hf_config"] if place == "record" else content)["num_attention_heads"] = 2
    (root / file).write_text(json.dumps(content))
    line = refusal(tmp_path, "to-hf", root, tmp_path / "out")
    assert str(root / file) in line
    assert "num_attention_heads" in line
    assert run("to-hf", root, tmp_path / "out", "--config", hf, "--override-config").code == 0


def test_every_difference_is_named(hf: Path, imported: Path, tmp_path: Path) -> None:
    """A model that contradicts the latest iteration is not left in its root: all values are named, and both sources."""
    root = trained(imported, tmp_path / "root", 7)
    args = common_state.read(imported / "release", None)["args"]
    save_common(root / "iter_0000007", args=args, content_metadata=dcm.hf_content_metadata(_config(hf)))
    other = _changed(hf, tmp_path / "other", num_attention_heads=2, head_dim=20, rms_norm_eps=0.125)
    line = refusal(tmp_path, "describe", other, root)
    for text in ("num_attention_heads: 2 and 4", "head_dim: 20 and 10", "rms_norm_eps: 0.125 and 1e-06"):
        assert text in line
    assert "the Hugging Face configuration inside the checkpoint" in line
    assert "the args inside the checkpoint" in line


def test_tensors_are_compared_where_nothing_else_describes(hf: Path, imported: Path, tmp_path: Path) -> None:
    """In a root whose iterations describe nothing, shapes tell that the model is another."""
    root = trained(imported, tmp_path / "root", 7)
    before = tree(root)
    with pytest.raises(TensorMismatchError, match=r"linear_fc1\.weight"):
        dcm.describe(save_model(tmp_path / "other", intermediate_size=28), root)
    assert tree(root) == before
    assert dcm.describe(hf, root).compared == root / "iter_0000007"


def _config(hf: Path) -> dcm.MistralConfig:
    return dcm.MistralConfig.from_hf(hf)


def _changed(hf: Path, to: Path, **changes: object) -> Path:
    """The small files of a model, with another config.json."""
    shutil.copytree(hf, to, ignore=shutil.ignore_patterns("*.safetensors*"))
    if changes:
        (to / "config.json").write_text(json.dumps(json.loads((hf / "config.json").read_text()) | changes))
    return to


def test_a_description_is_replaced_only_on_request(hf: Path, imported: Path, tmp_path: Path) -> None:
    """Without --overwrite the old folder stays; with it, the old one does not count and goes as a whole."""
    root = trained(imported, tmp_path / "root", 7)
    wrong = _changed(hf, root / "hf", num_attention_heads=2)
    (wrong / "stale.txt").write_text("old")
    assert "exists" in refusal(tmp_path, "describe", hf, root)
    before = tree(root)
    outcome = run("describe", hf, root, "--overwrite", "--dry-run")
    assert (outcome.code, tree(root)) == (0, before)
    assert re.fullmatch(r"would write 8 files \(\S+ kB\) to .*/hf; the model agrees with iter_0000007", outcome.out[0])
    assert run("describe", hf, root, "--overwrite").code == 0
    assert outcome.out[1:] == [f"  {name}  {human_bytes(len(text))}" for name, text in _files(root / "hf").items()]
    assert not (root / "hf" / "stale.txt").exists()
    dcm.to_hf(root, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(hf)


def _files(folder: Path) -> dict[str, bytes]:
    return {name: text for name, text in tree(folder).items() if text is not None and name != "checksums.json"}


def test_a_failed_description_leaves_nothing(
    hf: Path, imported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If writing fails in the middle, the root is as it was."""
    root = trained(imported, tmp_path / "root", 7)
    before = tree(root)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(small_files, "write_small_files", fail)
    with pytest.raises(OutputError, match="No space left"):
        dcm.describe(hf, root)
    assert tree(root) == before


def test_only_roots_are_described(hf: Path, imported: Path, tmp_path: Path) -> None:
    """One iteration, a model and nothing are refused with advice; an empty directory may become a root."""
    root = trained(imported, tmp_path / "root", 7)
    assert f"Give the root around it, {root}" in refusal(tmp_path, "describe", hf, root / "iter_0000007")
    assert "is not a Megatron checkpoint" in refusal(tmp_path, "describe", hf, hf)
    assert "there is no such directory" in refusal(tmp_path, "describe", hf, tmp_path / "nothing")
    assert "there is no such directory" in refusal(tmp_path, "describe", tmp_path / "nothing", root)
    (tmp_path / "new").mkdir()
    outcome = run("describe", hf, tmp_path / "new")
    assert outcome.code == 0
    assert outcome.err == [f"{tmp_path / 'new'} holds no checkpoint yet: there is nothing to compare the model with"]
    trained(imported, tmp_path / "new", 3)
    dcm.to_hf(tmp_path / "new", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(hf)


def test_small_files_alone_describe(hf: Path, imported: Path, tmp_path: Path) -> None:
    """A model without its weights describes, too: only the division into files is lost, and that is said."""
    root = trained(imported, tmp_path / "root", 7)
    outcome = run("describe", _changed(hf, tmp_path / "small"), root)
    assert [line for line in outcome.err if "exports will be divided into files of the usual size" in line]
    dcm.to_hf(root, tmp_path / "out")
    assert _without_weights(tmp_path / "out") == _without_weights(hf)
    assert dcm.compare(hf, tmp_path / "out").is_equal


def _without_weights(folder: Path) -> dict[str, bytes]:
    return {name: text for name, text in contents(folder).items() if "safetensors" not in name}


def test_an_import_never_removes_what_was_trained(hf: Path, imported: Path, tmp_path: Path) -> None:
    """Even with --overwrite, an import into a root with another iteration is refused, and names describe."""
    root = trained(imported, tmp_path / "root", 7)
    line = refusal(tmp_path, "from-hf", hf, root, "--overwrite")
    assert "iter_0000007" in line
    assert "use describe" in line
    dcm.from_hf(hf, tmp_path / "again")
    assert run("from-hf", hf, tmp_path / "again", "--overwrite").code == 0


def test_a_tokenizer_that_args_name(hf: Path, imported: Path, tmp_path: Path) -> None:
    """A genuine save names the folder of its tokenizer: that brings tokenizer and generation config, nothing else."""
    root = trained(imported, tmp_path / "root", 7)
    kept = shutil.copytree(hf, tmp_path / "kept")
    (kept / "id_rsa").write_text("private")
    args = common_state.read(imported / "release", None)["args"] | {"tokenizer_model": str(kept)}
    save_common(root / "iter_0000007", args=args)
    outcome = run("to-hf", root, tmp_path / "out")
    assert f"tokenizer: {kept}, which tokenizer_model in the checkpoint's args names" in outcome.err
    assert f"configuration: {kept / 'config.json'}" in outcome.err
    assert _without_weights(tmp_path / "out") == _without_weights(hf)
    save_common(root / "iter_0000007", args=args | {"rotary_base": 5000})
    outcome = run("to-hf", root, tmp_path / "other")
    assert any(str(kept / "config.json") in line and "rope_theta: 10000 and 5000" in line for line in outcome.err)
    assert "configuration: the args inside the checkpoint" in outcome.err
    assert {"tokenizer.json", TEMPLATES} < set(contents(tmp_path / "other"))
    assert "generation_config.json" not in contents(tmp_path / "other")


@pytest.mark.parametrize("name", ["", "relative", "\0", "/nowhere", None, 5])
def test_names_of_no_tokenizer_are_left_alone(name: object, imported: Path, tmp_path: Path) -> None:
    """Whatever else args name as tokenizer is not followed."""
    root = trained(imported, tmp_path / "root", 7)
    args = common_state.read(imported / "release", None)["args"] | {"tokenizer_model": name}
    save_common(root / "iter_0000007", args=args)
    assert run("to-hf", root, tmp_path / "out").code == 0


def test_a_link_out_of_the_root_is_not_followed(hf: Path, imported: Path, tmp_path: Path) -> None:
    """A folder hf that is a link elsewhere describes nothing."""
    root = trained(imported, tmp_path / "root", 7)
    (root / "hf").symlink_to(hf)
    outcome = run("to-hf", root, tmp_path / "out")
    assert outcome.code == 1
    assert any("is a link out of the checkpoint" in line for line in outcome.err)
    before = contents(hf)
    for options in ((), ("--overwrite",)):
        line = refusal(tmp_path, "describe", hf, root, *options)
        assert f"{root / 'hf'} is a link out of {root}, so no command would read what is written there" in line
    assert contents(hf) == before


def test_a_damaged_record_is_named(imported: Path, tmp_path: Path) -> None:
    """A record of another version, or without a configuration, is an error that names its file."""
    root = trained(imported, shutil.copytree(imported, tmp_path / "root", symlinks=True), 7)
    file = root / "hf" / "dist_ckpt_mistral.json"
    for content, what in (({"version": 2}, "has version 2"), ({"version": 1}, "has no hf_config"), ([], "JSON")):
        file.write_text(json.dumps(content))
        line = refusal(tmp_path, "to-hf", root, tmp_path / "out")
        assert str(file) in line
        assert what in line


def test_what_is_resharded_stays_described(hf: Path, imported: Path, tmp_path: Path) -> None:
    """A resharded iteration has the description of its root with it."""
    root = trained(imported, tmp_path / "root", 7)
    dcm.describe(hf, root)
    dcm.reshard(root, tmp_path / "cut", dcm.ParallelLayout(tp=2))
    assert _files(tmp_path / "cut" / "hf") == _files(root / "hf")
    dcm.to_hf(tmp_path / "cut", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(hf)


def test_a_folder_beside_a_bare_directory_is_not_its_description(hf: Path, imported: Path, tmp_path: Path) -> None:
    """Only a directory with an iteration's name has a root: of any other, the folder hf beside is another model's."""
    trained(imported, tmp_path / "root", 7)
    (tmp_path / "root" / "iter_0000007").rename(tmp_path / "root" / "weights")
    shutil.copytree(hf, tmp_path / "root" / "hf")
    with pytest.raises(ConfigError, match="holds neither a Hugging Face configuration"):
        dcm.to_hf(tmp_path / "root" / "weights", tmp_path / "out")
