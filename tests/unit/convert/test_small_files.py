"""The small files beside the weights: which travel with a model, which stay behind, and whose bytes come back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import refusal, run, tree
from fp8_models import PER_TENSOR, save_fp8
from genuine import folder
from hf_models import random_model, saved
from plain_models import contents
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import CHAT_TEMPLATE_DIR, find_adapter_config_file

import dist_ckpt_mistral as dcm
from dist_ckpt_mistral.errors import FormatError
from dist_ckpt_mistral.formats.small_files import folders_beside
from dist_ckpt_mistral.megatron.hf_inference import load_tokenizer
from dist_ckpt_mistral.storage.paths import leads_outside

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
PRIVATE = "none of your business"
#: What tools write beside weights that they quantized, sharded, adapted or turned into another format.
OF_OTHER_WEIGHTS = (
    "hf_quant_config.json",
    "quantize_config.json",
    "quant_config.json",
    "quantization_config.json",
    "quant_model_description.json",
    "recipe.yaml",
    "pytorch_model.bin.index.json",
    "consolidated.safetensors.index.json",
    "model.safetensors.index.fp16.json",
    "adapter_config.json",
    "adapter_model.safetensors",
    "openvino_config.json",
    "genai_config.json",
    "training_args.bin",
    "optimizer.pt",
    "rng_state_0.pth",
)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in several files, with a tokenizer that has two chat templates, as transformers saves them."""
    hf = saved(random_model(), tmp_path_factory.mktemp("small") / "hf", max_shard_size=5000)
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"?": 0, "a": 1, "b": 2}, "?")))
    words.chat_template = {"default": "plain", "tool_use": "with tools"}
    words.save_pretrained(hf)
    return hf


@pytest.fixture
def hf(original: Path, tmp_path: Path) -> Path:
    """The same, to be changed."""
    return shutil.copytree(original, tmp_path / "hf")


@pytest.fixture(scope="module")
def imported(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint that an import makes of it."""
    ckpt = tmp_path_factory.mktemp("small") / "ckpt"
    dcm.from_hf(original, ckpt)
    return ckpt


def trained(to: Path) -> Path:
    """A genuine checkpoint without anything of Hugging Face."""
    return shutil.copytree(folder("td_0161") / "checkpoint", to)


def pretended_tokenizer(place: Path, content: str = "{}") -> Path:
    """A directory with the files that a tokenizer has."""
    place.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (place / name).write_text(content)
    return place


def test_chat_templates_travel(hf: Path, imported: Path, tmp_path: Path) -> None:
    """The library finds every template again after import, reshard and export, and after an export with --config."""
    dcm.reshard(imported, tmp_path / "cut", dcm.ParallelLayout(tp=2))
    dcm.to_hf(tmp_path / "cut", tmp_path / "out")
    dcm.to_hf(trained(tmp_path / "trained"), tmp_path / "given", config=_with_tokenizer_of(hf, tmp_path / "dir"))
    expected = AutoTokenizer.from_pretrained(hf).chat_template
    assert set(expected) == {"default", "tool_use"}
    for out in ("out", "given"):
        assert (tmp_path / out / CHAT_TEMPLATE_DIR / "tool_use.jinja").read_text() == "with tools"
        assert AutoTokenizer.from_pretrained(tmp_path / out).chat_template == expected
    assert contents(tmp_path / "out") == contents(hf)


def _with_tokenizer_of(hf: Path, to: Path) -> Path:
    shutil.copytree(hf, to, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    shutil.copy(folder("td_0161") / CONFIG, to)
    return to


def test_a_note_is_printed_once(hf: Path, tmp_path: Path) -> None:
    """A command that reads one configuration several times says once what it has to say about it."""
    config = json.loads((hf / CONFIG).read_text())
    (hf / CONFIG).write_text(json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "modeling.Model"}}))
    dcm.from_hf(hf, tmp_path / "ckpt")
    for command in (("to-hf", tmp_path / "ckpt", tmp_path / "out"), ("verify", hf, tmp_path / "ckpt")):
        lines = run(*command).err
        assert any("auto_map names code of its own" in line for line in lines)
        assert len(lines) == len(set(lines)), lines


def test_other_folders_are_named(hf: Path, tmp_path: Path) -> None:
    """An import leaves folders behind that no tokenizer has, and names them; those of git and of tools are no news."""
    for name in ("onnx", "original", ".cache"):
        (hf / name).mkdir()
    outcome = run("from-hf", hf, tmp_path / "ckpt", "--no-sync")
    assert outcome.err == [f"folders in {hf} stay behind, as they belong to no tokenizer: onnx, original"]


@pytest.mark.parametrize("way", ["from-hf", "--config", "of an older import", "reshard"])
def test_what_describes_other_weights_stays_behind(way: str, hf: Path, imported: Path, tmp_path: Path) -> None:
    """Neither a new checkpoint nor an export has files that describe weights which are not there; all are named."""
    ckpt = shutil.copytree(imported, tmp_path / "ckpt")
    place = {"from-hf": hf, "--config": hf}.get(way, ckpt / "release" / "hf")
    no_adapters = [name for name in OF_OTHER_WEIGHTS if way != "from-hf" or not name.startswith("adapter_")]
    for name in no_adapters:
        (place / name).write_text("{}")
    command: dict[str, list[object]] = {
        "from-hf": ["from-hf", hf],
        "--config": ["to-hf", ckpt, "--config", hf],
        "of an older import": ["to-hf", ckpt],
        "reshard": ["reshard", ckpt, "--tp", 2],
    }
    outcome = run(command[way][0], command[way][1], tmp_path / "out", *command[way][2:], "--no-sync")
    assert outcome.code == 0, outcome.err
    assert {Path(name).name for name in tree(tmp_path / "out")}.isdisjoint(OF_OTHER_WEIGHTS)
    for name in no_adapters:
        assert any(f"{name} " in line and "stays behind" in line for line in outcome.err), (name, outcome.err)


@pytest.mark.parametrize("is_quantized", [True, False])
def test_params_json_may_describe_quantized_weights(is_quantized: bool, tmp_path: Path) -> None:
    """Mistral AI's params.json travels, but not where it says FP8 of weights that were imported as their values."""
    hf = save_fp8(tmp_path / "hf", PER_TENSOR)
    (hf / "params.json").write_text(
        json.dumps({"quantization": {"qformat_weight": "fp8_e4m3"} if is_quantized else {}})
    )
    outcome = run("from-hf", hf, tmp_path / "ckpt", "--no-sync")
    assert (tmp_path / "ckpt" / "release" / "hf" / "params.json").is_file() is not is_quantized
    assert any("params.json describes quantized weights" in line for line in outcome.err) is is_quantized


def test_an_adapter_is_refused(hf: Path, tmp_path: Path) -> None:
    """Beside a model transformers would find and apply an adapter: no command takes the weights without it."""
    (hf / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    assert find_adapter_config_file(str(hf)) is not None
    for command in (("from-hf", hf, tmp_path / "ckpt"), ("verify", hf, hf)):
        line = refusal(tmp_path, *command)
        assert "it holds an adapter of PEFT, such as LoRA (adapter_config.json)" in line
        assert "merge_and_unload" in line
    with pytest.raises(FormatError, match="it holds an adapter of PEFT"):
        dcm.inspect(hf)


#: Where tokenizers may lie: a name, and the place from the iteration's directory.
PLACES = {
    "given": "../given",
    "import": "hf",
    "bridge": "tokenizer",
    "nemo": "../context/tokenizer",
    "newer nemo": "../context/nemo_tokenizer",
}


@pytest.mark.parametrize("first", PLACES)
def test_which_tokenizer_counts(first: str, tmp_path: Path) -> None:
    """That of --config, of an import, of Megatron-Bridge, of NeMo 2, in this order; the line says which it is."""
    step = trained(tmp_path / "iter_0000007")
    names = [*PLACES][[*PLACES].index(first) :]
    for name in names:
        pretended_tokenizer(step / PLACES[name], name)
        (step / PLACES[name] / CHAT_TEMPLATE_DIR).mkdir()
        (step / PLACES[name] / CHAT_TEMPLATE_DIR / "x.jinja").write_text(name)
    config = tmp_path / "given"
    config.mkdir(exist_ok=True)
    shutil.copy(folder("td_0161") / CONFIG, config)
    outcome = run("to-hf", step, tmp_path / "out", "--config", config, "--no-sync")
    found = (step / PLACES[first]).resolve()
    assert outcome.err[-1] == f"tokenizer: {found}"
    for name in ("tokenizer.json", f"{CHAT_TEMPLATE_DIR}/x.jinja"):
        assert (tmp_path / "out" / name).read_text() == first
    if first != "given":
        flags = dcm.megatron_args(step, config=config / CONFIG).flags
        assert Path(flags[flags.index("--tokenizer-model") + 1]).resolve() == found


def test_a_config_directory_without_a_tokenizer(imported: Path, original: Path, tmp_path: Path) -> None:
    """Its small files count, and the checkpoint's tokenizer comes along with what else the checkpoint has."""
    config = tmp_path / "given"
    config.mkdir()
    shutil.copy(original / CONFIG, config)
    (config / "generation_config.json").write_text("{}")
    dcm.to_hf(imported, tmp_path / "out", config=config)
    expected = contents(original) | {"generation_config.json": b"{}"}
    assert contents(tmp_path / "out") == expected


def test_the_tokenizer_of_a_checkpoint_is_read(hf: Path, tmp_path: Path) -> None:
    """The tokenizer that was saved with a checkpoint is read to generate; a folder of that name is none itself."""
    step = trained(tmp_path / "ckpt")
    shutil.copytree(hf, step / "tokenizer", ignore=shutil.ignore_patterns("*.safetensors"))
    (step / "hf" / "tokenizer").mkdir(parents=True)
    places = folders_beside(step)
    assert places == (step / "hf", step / "tokenizer")
    assert load_tokenizer(places)("a b")["input_ids"] == AutoTokenizer.from_pretrained(hf)("a b")["input_ids"]


def _linked(place: Path, to: Path) -> None:
    """A link to ``to`` in the place of whatever is there."""
    if place.is_dir():
        shutil.rmtree(place)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(to)


@pytest.mark.parametrize(
    "place",
    ["hf", "tokenizer", "../context/tokenizer", "hf/additional_chat_templates", "hf/a", "hf/tokenizer.json", "x"],
)
@pytest.mark.parametrize("command", ["to-hf", "reshard", "megatron-args"])
def test_links_in_a_strangers_checkpoint(command: str, place: str, imported: Path, tmp_path: Path) -> None:
    """No command enters a folder that is a link out of the checkpoint, nor copies what such a link leads to."""
    ckpt = shutil.copytree(imported, tmp_path / "ckpt")
    secret = pretended_tokenizer(tmp_path / "secret", PRIVATE)
    (secret / "id.jinja").write_text(PRIVATE)
    step = ckpt / "release"
    is_file = place.endswith(".json")
    if is_file:
        (step / place).unlink()
    _linked(step / place, secret / "tokenizer.json" if is_file else secret)
    output = [] if command == "megatron-args" else [tmp_path / "out", "--no-sync"]
    outcome = run(command, ckpt, *output)
    assert outcome.code == 0, outcome.err
    found = tree(tmp_path / "out") if output else {}
    assert not any(content is not None and PRIVATE.encode() in content for content in found.values())
    assert str(secret) not in "\n".join(outcome.out)
    if command == "to-hf" and place not in {"x", "hf/a"}:
        assert any("is a link out of" in line and Path(place).name in line for line in outcome.err)


@pytest.mark.parametrize("place", ["additional_chat_templates", "additional_chat_templates/x.jinja", "notes"])
@pytest.mark.parametrize("way", ["from-hf", "--config"])
def test_links_in_a_strangers_model(way: str, place: str, hf: Path, imported: Path, tmp_path: Path) -> None:
    """An import and an export with --config copy nothing from behind a link out of the directory, either."""
    secret = pretended_tokenizer(tmp_path / "secret", PRIVATE)
    (secret / "id.jinja").write_text(PRIVATE)
    _linked(hf / place, secret / "id.jinja" if "." in place else secret)
    command = ("from-hf", hf, tmp_path / "out") if way == "from-hf" else ("to-hf", imported, tmp_path / "out")
    outcome = run(*command, *([] if way == "from-hf" else ["--config", hf]), "--no-sync")
    assert outcome.code == 0, outcome.err
    assert not any(content is not None and PRIVATE.encode() in content for content in tree(tmp_path / "out").values())
    if place != "notes":
        assert f"{hf / place} is a link out of its directory: it stays behind" in outcome.err


def test_a_tracker_that_names_a_link(imported: Path, tmp_path: Path) -> None:
    """A root whose iteration lies elsewhere would export another's checkpoint; who trusts it gives the directory."""
    root = tmp_path / "root"
    shutil.copytree(imported, root, ignore=shutil.ignore_patterns("release"))
    (root / "release").symlink_to(imported / "release")
    for command in (("to-hf", root, tmp_path / "out"), ("verify", root, imported), ("reshard", root, tmp_path / "out")):
        line = refusal(tmp_path, *command)
        assert f"names release, a link out of {root}. Give its target if you trust it: {imported / 'release'}" in line
    assert run("verify", root / "release", imported).code == 0
    (root / "release").unlink()
    shutil.copytree(imported / "release", root / "iter_0000001")
    (root / "release").symlink_to("iter_0000001")
    assert run("verify", root, imported).code == 0


def test_a_manifest_that_names_files_behind_a_link(imported: Path, tmp_path: Path) -> None:
    """A check neither reads nor lists what lies in a folder that is a link out of the directory."""
    ckpt = shutil.copytree(imported, tmp_path / "ckpt")
    secret = pretended_tokenizer(tmp_path / "secret", PRIVATE)
    (ckpt / "release" / "more").symlink_to(secret)
    assert run("verify", ckpt).code == 0
    manifest = {"algorithm": "sha256", "files": {"more/tokenizer.json": "0" * 64}}
    (ckpt / "release" / "integrity.json").write_text(json.dumps(manifest))
    outcome = run("verify", ckpt)
    assert outcome.code == 3
    told = [line for line in outcome.out if "more/tokenizer.json" in line]
    assert told
    assert "its folder is a link out of the directory" in told[0]


def test_blobs_of_the_hub_cache(tmp_path: Path) -> None:
    """Links into the blobs of a snapshot's own repository, or that repositories share, stay inside; others do not."""
    cache, other = tmp_path / "hub", tmp_path / "hub" / "models--private" / "blobs"
    snapshot = cache / "models--x" / "snapshots" / "1"
    shared = cache / "blobs" / "ab"
    for place in (snapshot / CHAT_TEMPLATE_DIR, cache / "models--x" / "blobs", shared, other):
        place.mkdir(parents=True)
    for path in (cache / "models--x" / "blobs" / "1", shared / "2", other / "3"):
        path.write_text("x")
    (cache / "models--x" / "blobs" / "2").symlink_to("../../blobs/ab/2")  # as for all files that come through Xet
    (snapshot / "own").symlink_to("../../blobs/1")
    (snapshot / "shared").symlink_to("../../blobs/2")
    (snapshot / CHAT_TEMPLATE_DIR / "own").symlink_to("../../../blobs/1")
    (snapshot / "private").symlink_to(other / "3")
    (snapshot / "cache").symlink_to(cache / "models--private")
    outside = {path.name for path in snapshot.rglob("*") if leads_outside(path, snapshot)}
    assert outside == {"private", "cache"}
    (snapshot / "hf").symlink_to(snapshot)
    assert leads_outside(snapshot / "private", snapshot / "hf")
    elsewhere = tmp_path / "blobs"  # such names alone make no cache
    shutil.copytree(other, elsewhere)
    (tmp_path / "ckpt").mkdir()
    (tmp_path / "ckpt" / "3").symlink_to(elsewhere / "3")
    (tmp_path / "snapshots").mkdir()
    assert leads_outside(tmp_path / "ckpt" / "3", tmp_path / "ckpt")


Change = Callable[[dict[str, Any]], dict[str, Any]]
#: How an index may be written: what is changed of transformers' own, and how the JSON is laid out.
WRITERS: dict[str, tuple[Change, dict[str, Any]]] = {
    "transformers": (lambda index: index, {"indent": 2, "sort_keys": True}),
    "mergekit": (lambda index: index | {"metadata": {"mergekit_version": "0.1.0"}}, {}),
    "mlx": (lambda index: index | {"metadata": {"total_size": 7, "total_parameters": 3}}, {"indent": 4}),
    "no metadata": (lambda index: {"weight_map": index["weight_map"]}, {"separators": (",", ":")}),
    "metadata null": (lambda index: index | {"metadata": None}, {"indent": "\t"}),
    "other order": (
        lambda index: {"weight_map": dict(reversed(index["weight_map"].items())), "extra": [1]} | index,
        {},
    ),
}


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
@pytest.mark.parametrize("writer", WRITERS)
def test_an_index_of_any_writer_comes_back(writer: str, end: str, hf: Path, tmp_path: Path) -> None:
    """The bytes of the index come back, whatever it says of sizes; with another dtype what it says is true."""
    change, layout = WRITERS[writer]
    index = json.loads((hf / INDEX).read_bytes())
    text = json.dumps(change(index), **layout).replace("\n", end or "\n") + end
    (hf / INDEX).write_bytes(text.encode())
    dcm.from_hf(hf, tmp_path / "ckpt", tp=2)
    dcm.to_hf(tmp_path / "ckpt", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(hf)
    dcm.to_hf(tmp_path / "ckpt", tmp_path / "wide", dtype="float32", output=dcm.Output(max_file_bytes=5000))
    said = json.loads((tmp_path / "wide" / INDEX).read_bytes())
    assert said["metadata"]["total_size"] == 2 * index["metadata"]["total_size"]


@pytest.mark.parametrize(
    ("said", "dtype"),
    [
        ({}, None),
        ({"torch_dtype": None}, None),
        ({"torch_dtype": "float16"}, "float32"),
        ({"dtype": "float32"}, "bfloat16"),
    ],
)
def test_a_config_of_any_dtype_comes_back(said: dict[str, Any], dtype: str | None, hf: Path, tmp_path: Path) -> None:
    """An unchanged round trip gives the text of config.json, whatever dtype it says; ``--dtype`` makes it true."""
    content = json.loads((hf / CONFIG).read_bytes())
    content = {key: value for key, value in content.items() if key != "dtype"} | said
    text = json.dumps(content, indent=1).replace("\n", "\r\n").encode()
    (hf / CONFIG).write_bytes(text)
    dcm.from_hf(hf, tmp_path / "ckpt")
    for config, out in ((None, "out"), (hf, "given"), (hf / CONFIG, "file")):
        dcm.to_hf(tmp_path / "ckpt", tmp_path / out, config=config)
        assert contents(tmp_path / out) == contents(hf)
    dcm.to_hf(tmp_path / "ckpt", tmp_path / "half", dtype="float16")
    told = json.loads((tmp_path / "half" / CONFIG).read_bytes())
    assert told.get("dtype", told.get("torch_dtype")) in ({"float16"} if dtype else {"float16", None})
    assert "total_size" not in told


def test_the_config_of_an_export_of_training(tmp_path: Path) -> None:
    """With --config DIR its text is exported where it is true of the trained weights, and made true where it is not."""
    step, given = trained(tmp_path / "ckpt"), tmp_path / "given"
    given.mkdir()
    content = json.loads((folder("td_0161") / CONFIG).read_bytes())
    key = "dtype" if "dtype" in content else "torch_dtype"
    for number, dtype in enumerate((content[key], None, "float16")):
        text = json.dumps(content | {key: dtype}, indent=3).encode()
        (given / CONFIG).write_bytes(text)
        dcm.to_hf(step, tmp_path / f"out{number}", config=given)
        written = (tmp_path / f"out{number}" / CONFIG).read_bytes()
        assert (written == text) is (dtype != "float16")
        assert json.loads(written)[key] in {content[key], None}


def test_a_config_that_describes_quantized_weights(tmp_path: Path) -> None:
    """The description of a quantized release in --config does not lie beside trained weights, and a line says so."""
    content = json.loads((folder("td_0161") / CONFIG).read_bytes())
    (tmp_path / CONFIG).write_text(json.dumps(content | {"quantization_config": PER_TENSOR}))
    outcome = run("to-hf", trained(tmp_path / "ckpt"), tmp_path / "out", "--config", tmp_path / CONFIG, "--no-sync")
    assert json.loads((tmp_path / "out" / CONFIG).read_bytes()) == content
    what = f"{CONFIG} describes quantized weights (quant_method 'fp8')"
    assert f"{what}: that is left out, these are not quantized" in outcome.err


def test_an_index_of_one_file_comes_back(tmp_path: Path) -> None:
    """So does an index that names model.safetensors alone, which transformers would not write."""
    hf = saved(random_model(), tmp_path / "hf")
    dcm.from_hf(hf, tmp_path / "before")
    dcm.to_hf(tmp_path / "before", tmp_path / "without")
    assert not (tmp_path / "without" / INDEX).exists()
    with dcm.open_checkpoint(tmp_path / "before") as checkpoint:
        names = list(checkpoint)
    (hf / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, "model.safetensors")}))
    dcm.from_hf(hf, tmp_path / "ckpt")
    dcm.to_hf(tmp_path / "ckpt", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(hf)


def test_an_index_that_is_not_true_any_more(imported: Path, original: Path, tmp_path: Path) -> None:
    """Where files of a checkpoint's folder were changed, or it is from an older release, the index is made anew."""
    for number, text in enumerate((None, json.dumps({"weight_map": {"a": "b.safetensors"}}), '{"weight_map": []}')):
        ckpt = shutil.copytree(imported, tmp_path / f"ckpt{number}")
        (ckpt / "release" / "hf" / INDEX).unlink()
        if text is not None:
            (ckpt / "release" / "hf" / INDEX).write_text(text)
        dcm.to_hf(ckpt, tmp_path / f"out{number}")
        written = json.loads((tmp_path / f"out{number}" / INDEX).read_bytes())
        assert written == json.loads((original / INDEX).read_bytes())
