"""Hugging Face files whose headers, index or tensors are wrong are refused with the tensor and the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import refusal, run
from safetensors.torch import load_file, save_file
from spoilable import edit_json

import dist_ckpt_mistral as dcm


def edit_header(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change the header of a safetensors file, not its data."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def test_missing_hugging_face_tensors_are_all_listed(hf: Path, tmp_path: Path) -> None:
    """The same for a Hugging Face file: missing, unknown and misshapen tensors in one line."""
    tensors = load_file(hf / "model.safetensors")
    tensors["lm_head.bias"] = tensors.pop("model.norm.weight")
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(20, 23)
    del tensors["model.layers.0.self_attn.k_proj.weight"]
    save_file(tensors, hf / "model.safetensors")
    line = refusal(tmp_path, "from-hf", hf, tmp_path / "out")
    assert "2 tensors are missing: model.layers.0.self_attn.k_proj.weight, model.norm.weight" in line
    assert "1 tensor is unknown to the table: lm_head.bias [24]" in line
    assert "shape of model.layers.1.mlp.up_proj.weight: expected [20, 24], got [20, 23]" in line


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda h: h["model.norm.weight"].update(dtype="F4"), "unknown dtype for 'model.norm.weight'"),
        (lambda h: h["model.norm.weight"].update(dtype=None), "got None"),
        (lambda h: h["model.norm.weight"].update(shape=[12, -2]), "bad shape or data_offsets of 'model.norm.weight'"),
        (lambda h: h["model.norm.weight"].update(shape=[24.0]), "got [24.0]"),
        (lambda h: h["model.norm.weight"].update(shape=[True] * 24), "bad shape or data_offsets"),
        (lambda h: h["model.norm.weight"].update(shape=[12]), "expected 24 bytes (bfloat16 [12])"),
        (lambda h: h["model.norm.weight"].update(data_offsets=[0]), "got [24] and [0]"),
        (lambda h: h["model.norm.weight"].update(data_offsets=[8, 0]), "size mismatch for 'model.norm.weight'"),
        (lambda h: h.update({"model.norm.weight": "x"}), "bad header entry of 'model.norm.weight'"),
        (lambda h: shift(h, -48), "'model.norm.weight' in {path} overlap or leave a gap"),
        (lambda h: shift(h, 48), "'model.norm.weight' in {path} overlap or leave a gap"),
    ],
)
def test_damaged_headers(edit: Callable[[dict[str, Any]], object], expected: str, hf: Path, tmp_path: Path) -> None:
    """Unknown dtypes, sizes that are none, overlaps and gaps in a safetensors header: the tensor and file are named."""
    edit_header(hf / "model.safetensors", edit)
    line = refusal(tmp_path, "from-hf", hf, tmp_path / "out")
    assert str(hf / "model.safetensors") in line
    assert expected.replace("{path}", str(hf / "model.safetensors")) in line


def shift(header: dict[str, Any], num_bytes: int) -> None:
    """Move the last tensor of a file."""
    entry = header["model.norm.weight"]
    assert entry["data_offsets"][1] == max(e["data_offsets"][1] for n, e in header.items() if n != "__metadata__")
    entry["data_offsets"] = [at + num_bytes for at in entry["data_offsets"]]


def test_names_that_stand_twice(hf: Path, many: Path, tmp_path: Path) -> None:
    """JSON with a key twice is refused, wherever it stands: which one holds is anybody's guess."""
    content = (hf / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].rstrip()
    double = (
        header[:-1] + b',"model.norm.weight":' + json.dumps(json.loads(header)["model.norm.weight"]).encode() + b"}"
    )
    (hf / "model.safetensors").write_bytes(len(double).to_bytes(8, "little") + double + content[8 + length :])
    line = refusal(tmp_path, "from-hf", hf, tmp_path / "out")
    assert f"duplicate JSON keys 'model.norm.weight' in {hf / 'model.safetensors'}" in line
    for name, key in (("model.safetensors.index.json", "weight_map"), ("config.json", "vocab_size")):
        text = (many / name).read_text()
        (many / name).write_text(text.rstrip()[:-1] + f', "{key}": 1}}')
        assert f"duplicate JSON keys '{key}' in {many / name}" in refusal(tmp_path, "from-hf", many, tmp_path / "out")
        (many / name).write_text(text)


def test_an_index_that_names_absent_files(many: Path, tmp_path: Path) -> None:
    """All files that the index names and that are not there are listed."""
    gone = sorted(many.glob("*.safetensors"))[1:3]
    for path in gone:
        path.unlink()
    line = refusal(tmp_path, "from-hf", many, tmp_path / "out")
    assert f"names files that are absent: {gone[0].name}, {gone[1].name}. Get them first." in line


@pytest.mark.parametrize(
    ("weight_map", "expected"),
    [
        ({"model.norm.weight": "../hf/model.safetensors"}, "'../hf/model.safetensors'"),
        ({"model.norm.weight": "/etc/passwd"}, "'/etc/passwd'"),
        ({"model.norm.weight": "config.json"}, "'config.json'"),
        ({"model.norm.weight": 3}, "names 3"),
        ({"model.norm.weight": None}, "names None"),
        ({}, "has no weight_map"),
        (["model.safetensors"], "has no weight_map"),
        ({"model.norm.weight": "model-00001-of-00007.safetensors"}, "disagree about"),
    ],
)
def test_an_index_that_names_other_files(weight_map: object, expected: str, many: Path, tmp_path: Path) -> None:
    """Only plain names of .safetensors files beside the index are followed, and they must hold what it says."""
    edit_json(many / "model.safetensors.index.json", weight_map=weight_map)
    line = refusal(tmp_path, "from-hf", many, tmp_path / "out")
    assert str(many) in line
    assert expected in line


def test_element_types_that_do_not_go_together(hf: Path, tmp_path: Path) -> None:
    """Queries, keys and values become one tensor, so they must be of one dtype, or ``--dtype`` chooses one."""
    tensors = load_file(hf / "model.safetensors")
    tensors["model.layers.1.self_attn.v_proj.weight"] = tensors["model.layers.1.self_attn.v_proj.weight"].half()
    save_file(tensors, hf / "model.safetensors")
    line = refusal(tmp_path, "from-hf", hf, tmp_path / "out")
    assert "'decoder.layers.self_attention.linear_qkv.weight'" in line
    assert "float16: model.layers.1.self_attn.v_proj.weight. Give --dtype" in line
    assert run("from-hf", hf, tmp_path / "out", "--dtype", "float32").code == 0
    dcm.to_hf(tmp_path / "out", tmp_path / "exported")
    found = load_file(tmp_path / "exported" / "model.safetensors")
    assert all(found[name].equal(tensor.float()) for name, tensor in tensors.items())


def test_element_types_that_no_archive_has(hf: Path, tmp_path: Path) -> None:
    """float8 numbers that no scales make weights are refused: torch's typed storages cannot say them."""
    tensors = load_file(hf / "model.safetensors")
    save_file({name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items()}, hf / "model.safetensors")
    line = refusal(tmp_path, "from-hf", hf, tmp_path / "out")
    assert (
        f"the FP8 weights (float8_e4m3fn) in {hf} cannot be dequantized: {len(tensors)} of them have no scales" in line
    )
