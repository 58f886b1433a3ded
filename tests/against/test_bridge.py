"""Checkpoints of Megatron-Bridge: its directory layout, its train states, and run_config.yaml beside the shards."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import subprocess
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import yaml
from bridge_files import PROVIDER, run_config, save_train_state
from command_line import refusal, run
from genuine import folder, shards, truth
from safetensors.torch import load_file
from torch_reading import described
from transformers import AutoConfig

import dist_ckpt_mistral as dcm
from dist_ckpt_mistral.convert.from_hf import from_hf
from dist_ckpt_mistral.convert.to_hf import to_hf
from dist_ckpt_mistral.errors import FormatError, OutputError
from dist_ckpt_mistral.formats.checkpoint_directory import MAX_STEP, read_step
from dist_ckpt_mistral.formats.places import resolve_directory
from dist_ckpt_mistral.formats.torch_dist.writer import untrained
from dist_ckpt_mistral.model.args.bridge import to_run_config
from dist_ckpt_mistral.model.config.mistral_config import MistralConfig


@pytest.fixture
def bridge_root(tmp_path: Path) -> Path:
    """A root as Bridge leaves it: an iteration with run_config.yaml, and both trackers. Its shards are genuine."""
    root = tmp_path / "bridge"
    iteration = shutil.copytree(shards("td_0161"), root / "iter_0000005")
    (iteration / "run_config.yaml").write_text(yaml.safe_dump(run_config()))
    save_train_state(root, 5)
    shutil.copy(root / "latest_train_state.pt", iteration / "train_state.pt")
    (root / "latest_checkpointed_iteration.txt").write_text("5")
    return root


def test_a_bridge_checkpoint_exports_by_itself(bridge_root: Path, tmp_path: Path) -> None:
    """Without any other file the root exports to the live model, bit for bit, and says where its sizes are from."""
    done = to_hf(bridge_root, tmp_path / "hf")
    assert done.config_from == "run_config.yaml inside the checkpoint"
    assert described(load_file(tmp_path / "hf" / "model.safetensors")) == described(truth("td_0161"))
    written, true = (json.loads((path / "config.json").read_bytes()) for path in (tmp_path / "hf", folder("td_0161")))
    keys = [key for key in true if key not in ("dtype", "bos_token_id", "eos_token_id")]
    assert {key: written[key] for key in keys} == {key: true[key] for key in keys}


def test_a_genuine_save_exports_inspects_and_verifies(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What Bridge 0.6.2 saved is the live model bit for bit, and to transformers its config.json is the original."""
    root = folder("bridge_0062") / "checkpoint"
    done = to_hf(root, tmp_path / "hf")
    assert done.config_from == "run_config.yaml inside the checkpoint"
    assert described(load_file(tmp_path / "hf" / "model.safetensors")) == described(truth("bridge_0062"))
    configs = [AutoConfig.from_pretrained(path).to_dict() for path in (tmp_path / "hf", folder("bridge_0062"))]
    assert configs[0] | {"_name_or_path": ""} == configs[1] | {"_name_or_path": ""}
    assert "has no bos_token_id, eos_token_id and pad_token_id: transformers takes its defaults" in caplog.text
    report = json.loads("\n".join(run("inspect", root, "--json").out))
    assert (report["config_from"], report["problems"]) == (done.config_from, [])
    assert run("verify", root).code == 0
    assert run("verify", root, tmp_path / "hf").code == 0


def state_of(path: Path) -> dict[str, tuple[torch.dtype, object]]:
    """A train state as Bridge reads it (training/utils/checkpoint_utils.py, ``read_train_state``, 0.6)."""
    return {name: (value.dtype, value.item()) for name, value in torch.load(path, weights_only=True).items()}


@pytest.mark.parametrize("step", [0, 500, MAX_STEP - 1])
def test_train_states_are_those_of_bridge(step: int, tmp_path: Path) -> None:
    """What torch reads is what a genuine save of an untrained model holds, in the same order, with the step."""
    genuine = state_of(folder("bridge_0062") / "checkpoint" / "latest_train_state.pt")
    (tmp_path / "latest_train_state.pt").write_bytes(untrained(step))
    assert [*state_of(tmp_path / "latest_train_state.pt").items()] == [
        *(genuine | {"step": (torch.int64, step)}).items()
    ]
    assert read_step(tmp_path / "latest_train_state.pt") == step


#: What Bridge looks at, and makes of it, without an iteration by name. The first: ``AutoBridge.load_megatron_model``
#: (models/conversion/auto_bridge.py, 0.6.2). The second: training (training/checkpointing.py,
#: ``_resolve_checkpoint_iteration`` and ``read_metadata``, which refuses the iteration 0 of Megatron-LM's tracker).
def found_by_auto_bridge(root: Path) -> Path:
    """The directory that AutoBridge takes."""
    steps = [path for path in root.iterdir() if path.is_dir() and path.name.startswith("iter_")]
    return max(steps, key=lambda path: int(path.name.removeprefix("iter_")))


def found_by_training(root: Path) -> tuple[int, bool]:
    """The iteration from which Bridge trains, and whether it is a release, which has no training state."""
    if (root / "latest_train_state.pt").exists():
        return int(torch.load(root / "latest_train_state.pt", weights_only=True)["step"]), False
    told = (root / "latest_checkpointed_iteration.txt").read_text()
    assert told == "release" or int(told) > 0
    return (0, True) if told == "release" else (int(told), False)


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model in Hugging Face's files: the truth of the genuine save."""
    path = tmp_path_factory.mktemp("bridge") / "hf"
    path.mkdir()
    shutil.copy(folder("bridge_0062") / "config.json", path)
    shutil.copy(folder("bridge_0062") / "truth.safetensors", path / "model.safetensors")
    return path


@pytest.mark.parametrize(("iteration", "name"), [(None, "release"), (7, "iter_0000007")])
def test_bridge_finds_what_from_hf_wrote(iteration: int | None, name: str, hf: Path, tmp_path: Path) -> None:
    """By default Megatron-LM's release is what all of Bridge finds; with an iteration, both know it by that."""
    root = tmp_path / "root"
    from_hf(hf, root, iteration=iteration)
    assert found_by_auto_bridge(root).resolve() == (root / name).resolve()
    assert found_by_training(root) == (iteration or 0, iteration is None)
    assert resolve_directory(root).name == name
    files = {path.name for path in root.iterdir() if not path.is_symlink()}
    assert files == {name, "hf", "latest_checkpointed_iteration.txt"}
    assert state_of(root / name / "train_state.pt")["step"] == (torch.int64, iteration or 0)
    assert run("verify", root, hf).code == 0
    from_hf(
        hf, root, iteration=iteration, output=dcm.Output(overwrite=True)
    )  # one checkpoint, although two names lead to it
    dcm.reshard(root, tmp_path / "cut", dcm.ParallelLayout(tp=2, pp=2))
    assert found_by_auto_bridge(tmp_path / "cut").resolve() == (tmp_path / "cut" / name).resolve()
    assert found_by_training(tmp_path / "cut") == found_by_training(root)


def test_the_link_for_bridge_is_made_anew_by_a_resumed_run(
    hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that fails when all is written but the checksums leaves the link, and the next one goes on."""
    with monkeypatch.context() as patch:
        patch.setattr("dist_ckpt_mistral.convert.output.write_checksums", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            from_hf(hf, tmp_path / "root")
    from_hf(hf, tmp_path / "root", output=dcm.Output(resume=True))
    assert (tmp_path / "root" / "iter_0000000").readlink() == Path("release")


@pytest.mark.parametrize(("code", "published"), [(errno.EPERM, True), (errno.ENOSPC, False)])
def test_file_systems_without_links(
    code: int,
    hf: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    *,
    published: bool,
) -> None:
    """Where there are no links, the import is as good for everyone else, and says what to give Bridge."""

    def refuse(self: Path, *_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code), str(self))

    monkeypatch.setattr(Path, "symlink_to", refuse)
    if published:
        from_hf(hf, tmp_path / "root")
        assert "give AutoBridge of Megatron-Bridge release itself" in caplog.text
    else:
        with pytest.raises(OutputError, match="No space left on device"):
            from_hf(hf, tmp_path / "root")
    assert (tmp_path / "root").exists() == published


def test_run_config_says_what_bridge_itself_says(hf: Path) -> None:
    """Of the same model, every field has the value of the genuine save, but for the class and its fusions."""
    config = MistralConfig.from_hf(hf)
    written = to_run_config(config, dtype="bfloat16", tp=1, pp=1, ep=1)["model"]
    genuine = yaml.safe_load((shards("bridge_0062") / "run_config.yaml").read_text())["model"]
    assert {name for name in written if written[name] != genuine[name]} == {"_target_"}


def test_a_given_configuration_comes_first_and_megatrons_args_last(bridge_root: Path, tmp_path: Path) -> None:
    """A damaged run_config.yaml is no obstacle where --config tells the model; beside args alone it is an error."""
    iteration = bridge_root / "iter_0000005"
    (iteration / "run_config.yaml").write_text("not a configuration")
    to_hf(bridge_root, tmp_path / "hf", config=folder("td_0161"))
    copied = shutil.copytree(shards("mlm_0161"), tmp_path / "mlm")
    (copied / "run_config.yaml").write_text("not a configuration")
    with pytest.raises(FormatError, match=r"invalid YAML in .*run_config\.yaml"):
        to_hf(copied, tmp_path / "mlm_hf")
    (copied / "run_config.yaml").unlink()
    assert to_hf(copied, tmp_path / "mlm_hf").config_from == "the args inside the checkpoint"


@pytest.mark.parametrize("trackers", [["latest_train_state.pt"], ["latest_checkpointed_iteration.txt"]])
def test_either_tracker_names_the_latest_iteration(trackers: list[str], bridge_root: Path) -> None:
    """Bridge's train state alone is enough, and so is the tracker of Megatron-LM."""
    for name in {"latest_train_state.pt", "latest_checkpointed_iteration.txt"} - set(trackers):
        (bridge_root / name).unlink()
    (bridge_root / "iter_0000003").mkdir()
    assert resolve_directory(bridge_root).name == "iter_0000005"


def test_trackers_that_disagree_are_told(bridge_root: Path, tmp_path: Path) -> None:
    """Nothing is guessed where the two name different iterations, or one that is absent."""
    save_train_state(bridge_root, 3)
    line = refusal(tmp_path, "inspect", bridge_root)
    assert "latest_checkpointed_iteration.txt names iter_0000005, latest_train_state.pt names iter_0000003" in line
    (bridge_root / "latest_checkpointed_iteration.txt").unlink()
    assert "latest_train_state.pt names iter_0000003, which is absent" in refusal(tmp_path, "inspect", bridge_root)


class Evil:
    """Would run a command when it is unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        """Ask for a command."""
        return subprocess.getoutput, ("touch evil",)


@pytest.mark.parametrize(
    ("state", "complaint"),
    [
        ({"step": 5}, "it has no step, an int64 scalar"),
        ({"step": torch.tensor(5.0)}, "it has no step, an int64 scalar"),
        ({"step": torch.tensor([5])}, "it has no step, an int64 scalar"),
        ({"step": torch.tensor([1, 5])[1]}, "it has no step, an int64 scalar"),
        ({"step": torch.tensor(-5)}, "expected a number of iterations"),
        ({"steps": torch.tensor(5)}, "it has no step, an int64 scalar"),
        ([torch.tensor(5)], "it has no step, an int64 scalar"),
        (Evil(), "getoutput, which is outside the allowlist"),
        (OrderedDict(step=torch.tensor(5)), None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_train_states_are_read_without_trust(
    state: object, complaint: str | None, bridge_root: Path, tmp_path: Path
) -> None:
    """A train state that is none, or that asks for more than tensors, is refused in one line."""
    (bridge_root / "latest_checkpointed_iteration.txt").unlink()
    torch.save(state, bridge_root / "latest_train_state.pt")
    if complaint is None:
        assert resolve_directory(bridge_root).name == "iter_0000005"
    else:
        assert complaint in refusal(tmp_path, "inspect", bridge_root)


def test_every_truncated_train_state_is_refused(bridge_root: Path, tmp_path: Path) -> None:
    """However much of the file is there, it is either the whole step or our error; random bytes are no state either."""
    path = bridge_root / "latest_train_state.pt"
    (bridge_root / "latest_checkpointed_iteration.txt").unlink()
    whole = path.read_bytes()
    for length in {*range(0, len(whole), 97), len(whole) - 1}:
        path.write_bytes(whole[:length])
        assert "latest_train_state.pt" in refusal(tmp_path, "inspect", bridge_root)
    path.write_bytes(pickle.dumps({"step": 5}))
    assert "is not a torch.save archive" in refusal(tmp_path, "inspect", bridge_root)


BOMB = "\n".join(["a0: &a0 [x, x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 40))])
MERGES = "\n".join(
    ["a0: &a0 {x: 1}", *(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, 40))]
)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (f"{BOMB}\nmodel: {{num_layers: *a39}}", "lacks share_embeddings"),
        (
            f"{BOMB}\nmodel:\n{PROVIDER.replace('num_layers: 4', 'num_layers: *a39').replace(chr(10), chr(10) + '  ')}",
            "num_hidden_layers must be a positive integer, got 'a list'",
        ),
        (MERGES, "merge keys '<<'"),
        ("model: {num_layers: 1, num_layers: 2}", "duplicate keys or merge keys 'num_layers'"),
        ("model: !!python/object/apply:subprocess.getoutput [touch evil]", "invalid YAML"),
        ("model: !!python/name:os.system", "invalid YAML"),
        ("model: &m {m: *m}", "lacks share_embeddings"),
        ("model: [1, 2]", "has no section model"),
        ("- 1", "expected a mapping, got list"),
        ("", "expected a mapping, got NoneType"),
        ("model: {", "invalid YAML"),
        ("a: \x01", "invalid YAML"),
        (b"\xff\xfe", "invalid YAML"),
        ("model: 2026-99-99", "invalid YAML"),
        ("model: {num_layers: " + "9" * 5000 + "}", "invalid YAML"),
        ("[" * 100_000, "invalid YAML"),
        ("x: " + "y" * (1 << 20), "too large"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else None,
)
def test_hostile_yaml_is_refused(content: str | bytes, complaint: str, bridge_root: Path, tmp_path: Path) -> None:
    """Nothing is executed, expanded or guessed, and one line says what is wrong."""
    path = bridge_root / "iter_0000005" / "run_config.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    line = refusal(tmp_path, "to-hf", bridge_root, tmp_path / "hf")
    assert complaint in line
    assert len(line) < 2000
    assert not Path("evil").exists()


def test_inspection_names_run_config(bridge_root: Path) -> None:
    """The report says the configuration and where it is from."""
    told = json.loads("\n".join(run("inspect", bridge_root, "--json").out))
    assert (told["config_from"], told["config"]["vocab_size"]) == ("run_config.yaml inside the checkpoint", 250)
    assert told["problems"] == []
