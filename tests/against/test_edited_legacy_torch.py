"""Edited files of the legacy per-rank torch format: other ways to save are read, and what is wrong is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from command_line import run
from genuine import described_file, folder, shards, true_bytes
from legacy_files import STEP, inert_pickle, options

import dist_ckpt_mistral as dcm
from dist_ckpt_mistral.errors import (
    ConfigError,
    FormatError,
    TensorMismatchError,
    UnsafePickleError,
    UnsupportedFormatError,
)
from dist_ckpt_mistral.formats.stored_checkpoint import open_stored

Edit = Callable[[dict[str, Any]], object]


def edited(case: str, to: Path, edit: Edit, rank: int = 0) -> Path:
    """A copy of a genuine case in which the content of one rank's archive is another."""
    directory = shutil.copytree(shards(case), to / STEP)
    file = sorted(directory.glob("mp_rank_*"))[rank] / "model_optim_rng.pt"
    content = torch.load(file, map_location="cpu", weights_only=False, pickle_module=inert_pickle())
    content = {name: value for name, value in content.items() if name not in ("rng_state", "rerun_state_machine")}
    content["args"] = type(content["args"])(
        **{n: v for n, v in vars(content["args"]).items() if type(v) in (type(None), bool, int, float, str)}
    )
    edit(content)
    torch.save(content, file)
    return directory


QKV = "decoder.layers.0.self_attention.linear_qkv.weight"
FC2 = "decoder.layers.1.mlp.linear_fc2.weight"


def as_parts_of_one_storage(content: dict[str, Any]) -> None:
    """Lay the tensors of a model into one buffer, as DDP does."""
    tensors = {name: value for name, value in content["model"].items() if isinstance(value, torch.Tensor)}
    buffer = torch.cat([torch.zeros(5, dtype=torch.bfloat16), *(each.reshape(-1) for each in tensors.values())])
    at = 5
    for name, tensor in tensors.items():
        content["model"][name] = buffer[at : at + tensor.numel()].view(tensor.shape)
        at += tensor.numel()


def as_parameters(content: dict[str, Any]) -> None:
    """Save parameters instead of tensors, as state dicts with ``keep_vars`` are."""
    for name, tensor in content["model"].items():
        if isinstance(tensor, torch.Tensor):
            content["model"][name] = torch.nn.Parameter(tensor)


def as_release_without_args(content: dict[str, Any]) -> None:
    """Leave nothing but the model and its version."""
    model = content["model"]
    content.clear()
    content.update(checkpoint_version=3.0, model=model)


@pytest.mark.parametrize("edit", [as_parts_of_one_storage, as_parameters, as_release_without_args])
def test_other_ways_to_save_the_same(edit: Edit, tmp_path: Path) -> None:
    """Views of one buffer, parameters, and an archive without args are read as the same model."""
    case = "legacy_tp2pp2_0192"
    directory = edited(case, tmp_path, edit)
    dcm.to_hf(directory, tmp_path / "hf", **options(case))
    assert described_file(tmp_path / "hf" / "model.safetensors") == true_bytes(case)


def transposed(content: dict[str, Any]) -> None:
    """Save a weight column by column."""
    content["model"][QKV] = content["model"][QKV].t().contiguous().t()


def with_grouped_experts(content: dict[str, Any]) -> None:
    """Have a GroupedMLP in place of a MLP."""
    content["model"]["decoder.layers.0.mlp.experts.weight1"] = torch.zeros(2, 2)


#: What is wrong -> (edit of a rank's content, error, what it says).
WRONG: Final[dict[str, tuple[Edit, type[Exception], str]]] = {
    "columns": (transposed, UnsupportedFormatError, "is a view of a storage with the strides"),
    "missing": (lambda c: c["model"].pop(QKV), TensorMismatchError, "1 tensor is missing: mp_rank_00_000/0/" + QKV),
    "unknown": (
        lambda c: c["model"].update(bias=torch.zeros(3)),
        TensorMismatchError,
        r"1 tensor is unknown to the table: mp_rank_00_000/0/bias \[3\]",
    ),
    "twice": (
        lambda c: c["model"].update(
            {"decoder.layers.0.self_attention.linear_qkv.layer_norm_weight": torch.zeros(64, dtype=torch.bfloat16)}
        ),
        TensorMismatchError,
        "holds one tensor twice",
    ),
    "shape": (
        lambda c: c["model"].update({FC2: c["model"][FC2][:, :-1].contiguous()}),
        TensorMismatchError,
        rf"shape of mp_rank_00_000/0/{FC2}: expected \[64, 48\] \(tp=2, pp=2, pp_layers=\(2, 2\)\), got \[64, 47\]",
    ),
    "dtype": (
        lambda c: c["model"].update({FC2: c["model"][FC2].float()}),
        TensorMismatchError,
        "expected one, got bfloat16, float32",
    ),
    "layers": (
        lambda c: [c["model"].pop(name) for name in [*c["model"]] if ".layers.1." in name],
        FormatError,
        r"has \[2\] layers in its model chunks: expected \[1\]",
    ),
    "old order of rows": (
        lambda c: c.update(checkpoint_version=1.0),
        UnsupportedFormatError,
        r"checkpoint_version for .*: expected 2\.0 or newer",
    ),
    "other layout": (
        lambda c: c["args"].__dict__.update(tensor_model_parallel_size=4),
        FormatError,
        "expected those of tp=4, pp=2",
    ),
    "no model": (lambda c: c.pop("model"), FormatError, "expected a model, or model0 and on, got neither"),
    "two models": (lambda c: c.update(model0={}), FormatError, "got model, model0"),
    "grouped experts": (with_grouped_experts, UnsupportedFormatError, "experts of GroupedMLP"),
    "a program": (lambda c: c.update(extra=print), UnsafePickleError, r"asks for __builtin__\.print"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_named(wrong: str, tmp_path: Path) -> None:
    """Tensors that are missing, unknown or of another shape, and what the ranks contradict each other in."""
    edit, error, expected = WRONG[wrong]
    case = "legacy_tp2pp2_0192"
    directory = edited(case, tmp_path, edit)
    with pytest.raises(error, match=expected):
        dcm.to_hf(directory, tmp_path / "hf", **options(case))
    with pytest.raises(error, match=expected):
        dcm.migrate(directory, tmp_path / "new", **options(case))
    assert not (tmp_path / "hf").exists()


def test_configurations_that_contradict_the_args(tmp_path: Path) -> None:
    """The args of the ranks are compared with ``--config``, as everywhere."""
    content = json.loads((folder("legacy_tp2pp2_0192") / "config.json").read_bytes())
    other = tmp_path / "config.json"
    other.write_text(json.dumps(content | {"num_key_value_heads": 2}))
    with pytest.raises(ConfigError, match="num_key_value_heads"):
        dcm.to_hf(shards("legacy_tp2pp2_0192"), tmp_path / "hf", config=other)


def _spoil(directory: Path, what: str) -> None:
    first, *_, last = sorted(directory.glob("mp_rank_*"))
    if what == "folder":
        shutil.rmtree(last)
    elif what == "file":
        (last / "model_optim_rng.pt").unlink()
    elif what == "truncated":
        data = (last / "model_optim_rng.pt").read_bytes()
        (last / "model_optim_rng.pt").write_bytes(data[: len(data) // 2])
    elif what == "one more":
        shutil.copytree(first, directory / "mp_rank_02_000")
    elif what == "of another":
        shutil.copytree(first, directory / "mp_rank_00")
    elif what == "name":
        shutil.copytree(first, directory / "mp_rank_00_000_old")
    elif what == "before 1.6":
        torch.save({"model": {}}, last / "model_optim_rng.pt", _use_new_zipfile_serialization=False)
    else:
        (last / "model_optim_rng.pt").rename(directory.parent / "elsewhere.pt")
        (last / "model_optim_rng.pt").symlink_to(directory.parent / "elsewhere.pt")


@pytest.mark.parametrize(
    ("what", "error", "expected"),
    [
        ("folder", FormatError, "are missing: mp_rank_01_001"),
        ("file", FormatError, "mp_rank_01_001/model_optim_rng.pt is missing"),
        ("truncated", FormatError, "or it is truncated"),
        ("one more", FormatError, "expected those of tp=2, pp=2"),
        ("of another", FormatError, "folders of two checkpoints, mp_rank_00 and mp_rank_01_001"),
        ("name", FormatError, r"mp_rank_00_000_old: expected folders called mp_rank_TT\[_PPP\]\[_EEE\]"),
        ("before 1.6", UnsupportedFormatError, "the format that torch.save had before version 1.6"),
        ("link", FormatError, "is a link out of"),
    ],
)
def test_folders_that_are_not_whole(what: str, error: type[Exception], expected: str, tmp_path: Path) -> None:
    """Ranks that are missing or too many, and archives that are cut off or are none, are named."""
    case = "legacy_tp2pp2_0192"
    directory = shutil.copytree(shards(case), tmp_path / STEP)
    _spoil(directory, what)
    with pytest.raises(error, match=expected):
        dcm.to_hf(directory, tmp_path / "hf", **options(case))


def test_copies_that_differ(tmp_path: Path) -> None:
    """``verify`` finds a norm that differs between tensor parallel ranks; the first rank's is the model's."""
    case, norm = "legacy_tp2pp2_0192", "decoder.layers.0.input_layernorm.weight"
    directory = edited(case, tmp_path, lambda content: content["model"][norm].add_(1), rank=2)
    outcome = run("verify", directory, "--config", folder(case) / "config.json")
    assert outcome.code == 3
    assert any(f"mp_rank_01_000/0/{norm}" in line and "differs from" in line for line in outcome.out)


def test_tied_heads_that_differ(tmp_path: Path) -> None:
    """A head that is not the embeddings, although the args tie them, is no model to export."""
    case = "legacy_vpp_tied_0192"
    directory = edited(case, tmp_path, lambda content: content["model1"]["output_layer.weight"].add_(1), rank=1)
    with pytest.raises(
        TensorMismatchError, match=r"contradicts itself: 'mp_rank_00_001/1/output_layer\.weight' differs"
    ):
        dcm.to_hf(directory, tmp_path / "hf", **options(case))


def test_one_bit_in_any_tensor_is_found(tmp_path: Path) -> None:
    """The checksums in a rank's archive find a flipped bit, and say in which tensor it is."""
    case = "legacy_tp2pp2_0192"
    directory = shutil.copytree(shards(case), tmp_path / STEP)
    stored = open_stored(directory)
    file = directory / "mp_rank_01_001" / "model_optim_rng.pt"
    number = [*stored.file_bytes].index("mp_rank_01_001/model_optim_rng.pt")
    key = f"mp_rank_01_001/0/{FC2}"
    chunks = stored.chunks(key)
    assert chunks.files.tolist() == [number]
    data = bytearray(file.read_bytes())
    data[int(chunks.positions[0]) + 100] ^= 1
    file.write_bytes(data)
    outcome = run("verify", directory, "--config", folder(case) / "config.json", "--json")
    assert outcome.code == 3
    (finding,) = json.loads("".join(outcome.out))["findings"]
    assert finding["file"] == "mp_rank_01_001/model_optim_rng.pt"
    assert finding["tensor"] == "decoder.layers.mlp.linear_fc2.weight"
    assert finding["hf_names"] == ["model.layers.3.mlp.down_proj.weight"]
    assert "have the CRC-32" in finding["what"]
