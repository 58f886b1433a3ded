"""``verify --stored``: all that two checkpoints store, held against each other by Megatron's own keys."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from bounded import bounded
from command_line import run
from genuine import folder, shards

import dist_ckpt_mistral as dcm
from dist_ckpt_mistral.formats.torch_dist.archive_writer import pickled_archive

OLD = ("zarr_ckpt", "optzarr_0123", "moe_zarr_0153", "fsms_zarr_0153", "dpzero_zarr_0153")
RESHARDED = ("opt_plain_0161", "opt_fr_0192", "opt_fsms_0140", "moe_grouped_0161", "common_0192")


@pytest.mark.parametrize("case", OLD)
def test_what_was_migrated_is_the_same(case: str, tmp_path: Path) -> None:
    """Optimizer state, objects with tensors and common state count, and no configuration is needed."""
    dcm.migrate(shards(case), tmp_path / "new", output=dcm.Output(max_file_bytes=50_000))
    outcome = dcm.compare_stored(shards(case), tmp_path / "new")
    assert outcome.is_equal, outcome.differences
    arrays = [path for path in shards(case).glob("*/.zarray") if path.is_file() and path.stat().st_size]
    assert outcome.num_tensors == len(arrays) > 0
    line = run("verify", shards(case), tmp_path / "new", "--stored").out[-1]
    assert line.startswith(f"equal: {outcome.num_tensors} tensors, ")


@pytest.mark.parametrize("case", RESHARDED)
def test_what_was_resharded_is_the_same(case: str, tmp_path: Path) -> None:
    """However tensors are cut: as ranges of blocks, per expert, for another layout."""
    config = folder(case) / "config.json"
    dcm.reshard(shards(case), tmp_path / "new", dcm.ParallelLayout(tp=4), config=config)
    outcome = dcm.compare_stored(shards(case), tmp_path / "new")
    assert outcome.is_equal, outcome.differences


@pytest.mark.parametrize(
    ("pattern", "named"),
    [
        ("optimizer.state.exp_avg.output_layer.weight/1.0", "optimizer.state.exp_avg.output_layer.weight"),
        ("decoder.layers.mlp.linear_fc1.weight/3.2.0", "decoder.layers.mlp.linear_fc1.weight"),
    ],
)
def test_a_bit_of_a_tensor(pattern: str, named: str, tmp_path: Path) -> None:
    """One flipped bit, of optimizer state too, is a difference that has the key of its tensor."""
    copy = shutil.copytree(shards("optzarr_0123"), tmp_path / "copy")
    chunk = copy / pattern
    chunk.chmod(0o644)
    content = bytearray(chunk.read_bytes())
    content[5] ^= 1
    chunk.write_bytes(content)
    outcome = run("verify", shards("optzarr_0123"), copy, "--stored")
    assert outcome.code == 3
    assert outcome.out[0].startswith(f"{named}: bits differ from byte ")
    assert outcome.out[-1].startswith("DIFFERENT in 1 entry: 36 tensors, ")


def test_objects(tmp_path: Path) -> None:
    """Of an object, its pickle and the data of its tensors are compared; of the common state too."""
    copy = shutil.copytree(shards("dpzero_zarr_0153"), tmp_path / "copy")
    changed = next(copy.glob("*param_state/shard_0_1.pt"))
    value = torch.load(changed, weights_only=False)
    tensor = next(each for each in _tensors(value) if each.numel() > 1)
    tensor.view(-1)[0] += 1
    changed.chmod(0o644)
    torch.save(value, changed)
    (copy / "common.pt").unlink()
    torch.save({"iteration": 8}, copy / "common.pt")
    gone = next(copy.glob("rng_state/shard_0.1*"))
    gone.unlink()
    found = {each.name: each.what for each in dcm.compare_stored(shards("dpzero_zarr_0153"), copy).differences}
    assert found.pop("common.pt").startswith("an object whose pickle has the SHA-256 ")
    assert found.pop(f"rng_state/{gone.stem}") == "only in A"
    lost = [name for name in found if name.startswith(f"rng_state/{gone.stem} data/")]
    assert {found.pop(name) for name in lost} == {"only in A"}
    assert [name.partition(" ")[0] for name in found] == [f"{changed.parent.name}/shard_0_1"]
    assert all(what.startswith("bits differ from byte 0 ") for what in found.values())


def _tensors(value: object) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def test_shapes_dtypes_and_keys() -> None:
    """Tensors that only one side has, or in another dtype, are named all together; as JSON too."""
    outcome = run("verify", shards("zarr_ckpt"), shards("optzarr_0123"), "--stored", "--json")
    assert outcome.code == 3
    told = json.loads("\n".join(outcome.out))
    by_name = {each["mcore_key"]: each["what"] for each in told["differences"]}
    assert by_name["decoder.final_layernorm.weight"] == "float32 [64] in A, bfloat16 [64] in B"
    assert by_name["optimizer.state.exp_avg.output_layer.weight"] == "only in B"
    assert told["not_compared"] == ["files beside the shards"]


def test_a_long_pickle_takes_no_memory(tmp_path: Path) -> None:
    """Of a legacy object's pickle, however many opcodes it has, one at a time is looked at."""
    old = shutil.copytree(shards("zarr_ckpt"), tmp_path / "old")
    pickled = b"\x80\x02" + b"N0" * 1_500_000 + b"N."
    (old / "long").mkdir()
    (old / "long" / "shard_0_1.pt").write_bytes(pickled_archive(pickled))
    outcome = bounded("verify", old, old, "--stored")
    assert (outcome.returncode, outcome.stdout.splitlines()[-1].partition(":")[0]) == (0, "equal"), outcome


def test_usage(tmp_path: Path) -> None:
    """It takes two checkpoints and nothing that is about a model."""
    ckpt = shards("td_0161")
    for more in ([], [ckpt, "--logits"], [ckpt, "--config", folder("td_0161")]):
        assert run("verify", ckpt, *more, "--stored").code == 2
    outcome = run("verify", ckpt, tmp_path, "--stored")
    assert (outcome.code, len(outcome.err)) == (1, 1)
    assert "is not a Megatron checkpoint that can be read: it is empty" in outcome.err[0]
