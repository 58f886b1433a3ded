"""Configurations, layouts and records of an import that cannot be are refused with every value that is wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import refusal
from spoilable import FC1, edit_json


def test_shapes_against_the_config(genuine: Path, hf: Path, tmp_path: Path) -> None:
    """A config of other sizes is refused with every tensor that it does not fit; a larger vocabulary too."""
    edit_json(tmp_path / "config.json", intermediate_size=97, vocab_size=257)
    line = refusal(tmp_path, "to-hf", genuine, tmp_path / "out", "--config", tmp_path / "config.json")
    assert f"shape of {FC1}: expected [4, 194, 64], got [4, 192, 64]" in line
    assert "shape of decoder.layers.mlp.linear_fc2.weight: expected [4, 64, 97], got [4, 64, 96]" in line
    for key in ("embedding.word_embeddings.weight", "output_layer.weight"):
        assert f"shape of {key}: expected at least [257, 64], got [256, 64]" in line
    edit_json(hf / "config.json", num_key_value_heads=1, num_hidden_layers=3)
    line = refusal(tmp_path, "from-hf", hf, tmp_path / "out")
    assert "shape of model.layers.0.self_attn.k_proj.weight: expected [10, 24], got [20, 24]" in line
    assert "9 tensors are missing: model.layers.2." in line
    edit_json(hf / "config.json", num_key_value_heads=2, num_hidden_layers=1)
    assert "9 tensors are unknown to the table: model.layers.1." in refusal(tmp_path, "from-hf", hf, tmp_path / "out")


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda record: record.update(version=99), "has version 99: this release reads version 1. Update it."),
        (lambda record: record.pop("hf_config"), "has no hf_config"),
        (lambda record: record.update(hf_config={"model_type": "llama"}), "model_type 'llama'"),
        (lambda record: record.update(hf_files=[1]), "the layout of the Hugging Face files"),
        (lambda record: rename_file(record, "../model.safetensors"), "names '../model.safetensors'"),
        (lambda record: rename_file(record, "/tmp/model.safetensors"), "names '/tmp/model.safetensors'"),  # noqa: S108
        (lambda record: rename_file(record, "config.json"), "names 'config.json'"),
        (
            lambda record: record["hf_files"]["headers"].update({"model.safetensors": "{"}),
            "the header of model.safetensors",
        ),
    ],
)
def test_damaged_memory_of_the_import(
    edit: Callable[[dict[str, Any]], object], expected: str, ckpt: Path, tmp_path: Path
) -> None:
    """What an import left in the common state is checked like any input: nothing is written where it says."""
    common_file = ckpt / "release" / "common.pt"
    common = torch.load(common_file, weights_only=False)
    edit(common["content_metadata"]["dist_ckpt_mistral"])
    torch.save(common, common_file)
    assert expected in refusal(tmp_path, "to-hf", ckpt, tmp_path / "out")


def rename_file(record: dict[str, Any], name: str) -> None:
    """Give the only file another name."""
    headers = record["hf_files"]["headers"]
    headers[name] = headers.pop("model.safetensors")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"hidden_size": 24.0}, "hidden_size must be a positive integer, got 24.0"),
        ({"hidden_size": math.nan}, "hidden_size must be a positive integer, got nan"),
        ({"vocab_size": True}, "vocab_size must be a positive integer, got True"),
        ({"vocab_size": "50"}, "vocab_size must be a positive integer, got '50'"),
        ({"intermediate_size": -20}, "intermediate_size must be a positive integer, got -20"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive integer, got 0"),
        ({"num_attention_heads": [4]}, "num_attention_heads must be a positive integer, got [4]"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 must be a multiple of num_key_value_heads=3"),
        ({"head_dim": 2.5}, "head_dim must be a positive integer, got 2.5"),
        ({"head_dim": ..., "hidden_size": 26}, "hidden_size=26 is not a multiple of num_attention_heads=4"),
        ({"sliding_window": 0}, "sliding_window must be a positive integer or null, got 0"),
        ({"sliding_window": False}, "sliding_window must be a positive integer or null, got False"),
        ({"max_position_embeddings": None}, "max_position_embeddings must be a positive integer, got None"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps must be a positive number, got nan"),
        ({"rms_norm_eps": math.inf}, "rms_norm_eps must be a positive number, got inf"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps must be a positive number, got '1e-5'"),
        ({"rope_parameters": {"rope_theta": 10**400}}, "rope_theta must be a positive number, got 1000"),
        ({"rope_parameters": {"rope_theta": -1}}, "rope_theta must be a positive number, got -1"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings must be true or false, got 'no'"),
        ({"dtype": "float99"}, "dtype must be one of"),
        ({"dtype": ["bfloat16"]}, "dtype must be one of"),
        ({"vocab_size": ..., "hidden_size": None}, "lacks vocab_size, hidden_size"),
        (
            {"vocab_size": -1, "head_dim": 0, "sliding_window": -2},
            "vocab_size must be a positive integer, got -1; head_dim must be a positive integer, got 0; sliding_window",
        ),
    ],
)
def test_configs_whose_sizes_do_not_fit(
    changes: dict[str, object], expected: str, hf: Path, genuine: Path, tmp_path: Path
) -> None:
    """Every size that is none, contradicts another or is missing is named, all of a config together."""
    edit_json(hf / "config.json", **changes)
    for arguments in (("from-hf", hf, tmp_path / "out"), ("to-hf", genuine, tmp_path / "out", "--config", hf)):
        line = refusal(tmp_path, *arguments)
        assert expected in line
        assert str(hf / "config.json") in line


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"null", b'{"a": 1, "a": 2}', b"[" * 100_000])
def test_configs_that_are_no_json(content: bytes, hf: Path, tmp_path: Path) -> None:
    """A config.json that is no JSON object is named."""
    (hf / "config.json").write_bytes(content)
    line = refusal(tmp_path, "from-hf", hf, tmp_path / "out")
    assert f"in {hf / 'config.json'}" in line
    assert "JSON" in line


def test_layouts_that_do_not_fit(hf: Path, tmp_path: Path) -> None:
    """A cut that Megatron could not load is refused with its reasons."""
    line = refusal(tmp_path, "from-hf", hf, tmp_path / "out", "--tp", 3, "--pp", 3, "--ep", 2)
    assert "num_attention_heads=4 is not divisible by tp=3" in line
    assert "num_hidden_layers=2 is not divisible by 3 pipeline stages" in line
    assert "ep=2 needs experts" in line
