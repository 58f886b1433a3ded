"""``verify`` where no byte changed: parts that are missing, sums that never were, and formats of others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from command_line import run
from fp8_models import PER_BLOCK, save_fp8
from genuine import folder, shards, truth
from hf_models import megatron_tensors
from plain_models import SIZES
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save
from torch_reading import edited_metadata

import dist_ckpt_mistral as dcm


def test_a_checkpoint_saved_without_checksums(tmp_path: Path) -> None:
    """The CRC-32 may be left out: that is said, such a checkpoint is not damaged, and it can be exported."""
    case, directory = folder("td_0192"), tmp_path / "plain"
    config = json.loads((case / "config.json").read_bytes())
    tensors = megatron_tensors(truth("td_0192"), SIZES | config)
    torch.serialization.set_crc32_options(compute_crc32=False)
    try:
        with pytest.warns(UserWarning, match="in a single process"):
            save(dict(tensors), storage_writer=FileSystemWriter(directory), no_dist=True)
    finally:
        torch.serialization.set_crc32_options(compute_crc32=True)
    (directory / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    outcome = run("verify", directory, "--config", case)
    assert outcome.code == 0
    assert any("parts of files that were stored without a checksum" in line for line in outcome.out)
    assert not any("by their CRC-32" in line for line in outcome.out)
    dcm.to_hf(directory, tmp_path / "out", config=case)
    assert dcm.compare(tmp_path / "out", case / "checkpoint", config=case).is_equal


def test_tensors_that_are_not_there(tmp_path: Path) -> None:
    """Missing and unknown tensors, chunks that are gone or overlap: all are found at once."""
    directory = shutil.copytree(shards("td_0161"), tmp_path / "copy")
    fc1, fc2 = (f"decoder.layers.mlp.linear_fc{number}.weight" for number in (1, 2))
    qkv, norm = "decoder.layers.self_attention.linear_qkv.weight", "decoder.final_layernorm.weight"
    with edited_metadata(directory) as metadata:
        described = metadata.state_dict_metadata
        described["decoder.more"] = described.pop(norm)
        for chunks in (described[fc1].chunks, described[qkv].chunks):
            chunks.pop()
        described[fc2].chunks[0].offsets = described[fc2].chunks[1].offsets
        for index in list(metadata.storage_data):
            if index.fqn == norm:
                metadata.storage_data[type(index)("decoder.more", index.offset)] = metadata.storage_data.pop(index)
            if index.fqn == qkv and index.offset not in {chunk.offsets for chunk in described[qkv].chunks}:
                del metadata.storage_data[index]
    outcome = run("verify", directory, "--config", folder("td_0161"))
    assert outcome.code == 3
    assert f"1 tensor is missing: {norm}; 1 tensor is unknown to the table: decoder.more [64]." in outcome.out[0]
    by_key = {line.split(": ")[1]: line for line in outcome.out if line.startswith(".metadata: ")}
    assert set(by_key) == {fc1, fc2, qkv} == {line.split(": ")[1].partition(" (")[0] for line in by_key.values()}
    assert "nothing is stored for" in by_key[qkv]


@pytest.mark.parametrize("case", ["td_0161", "zarr_ckpt"])
def test_common_state_that_is_not_there(case: str, tmp_path: Path) -> None:
    """Of what Megatron itself saved no manifest tells that common.pt is missing, without which it loads nothing."""
    directory = shutil.copytree(shards(case), tmp_path / "copy")
    (directory / "common.pt").unlink()
    outcome = run("verify", directory, "--config", folder(case))
    line = "not checked: the common state: there is no common.pt, and Megatron loads nothing without"
    assert (outcome.code, outcome.out.count(line)) == (0, 1)


def test_what_cannot_be_told_is_no_damage(tmp_path: Path) -> None:
    """Without a configuration the checksums are still checked, and it is said what was not."""
    outcome = run("verify", folder("td_0161") / "checkpoint")
    assert outcome.code == 0
    assert any("not checked: whether all tensors of the model are there: " in line for line in outcome.out)
    for path, reason in ((tmp_path / "none", "there is no such directory"), (tmp_path, "it is empty")):
        outcome = run("verify", path)
        assert (outcome.code, outcome.out) == (1, [])
        assert reason in outcome.err[0]


def test_another_format_is_no_damage(tmp_path: Path) -> None:
    """Arrays of another kind than Megatron's are refused by name; a backend that never was is damage."""
    outcomes = {}
    array = {"zarr_format": 2, "shape": [1], "chunks": [1], "dtype": "<f4", "order": "C", "filters": None}
    array |= {"compressor": {"id": "blosc"}}
    (tmp_path / "output_layer.weight").mkdir()
    (tmp_path / "output_layer.weight" / ".zarray").write_text(json.dumps(array))
    for backend in ("zarr", "torch_dis4"):
        (tmp_path / "metadata.json").write_text(json.dumps({"sharded_backend": backend, "sharded_backend_version": 1}))
        outcomes[backend] = run("verify", tmp_path)
    assert (outcomes["zarr"].code, outcomes["zarr"].out) == (1, [])
    assert "output_layer.weight: expected None, got {'id': 'blosc'}" in outcomes["zarr"].err[0]
    assert outcomes["torch_dis4"].code == 3
    assert "metadata.json says sharded_backend 'torch_dis4'" in outcomes["torch_dis4"].out[0]


def test_quantized_files(tmp_path: Path) -> None:
    """Files with FP8 weights and scales are whole too, and a missing scale is found."""
    save_fp8(tmp_path / "hf", PER_BLOCK)
    outcome = run("verify", tmp_path / "hf")
    assert (outcome.code, outcome.out[0]) == (0, "checked: that all 21 tensors of the model are there")
    path, scale = tmp_path / "hf" / "model.safetensors", "model.layers.0.self_attn.q_proj.weight_scale_inv"
    save_file({name: tensor for name, tensor in load_file(path).items() if name != scale}, path)
    outcome = run("verify", tmp_path / "hf")
    assert outcome.code == 3
    assert scale.removesuffix("_scale_inv") in outcome.out[0]
