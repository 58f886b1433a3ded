"""Whatever is no checkpoint, no Hugging Face directory or no Mistral model is refused by what it is."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import refusal
from genuine import folder
from spoilable import FC1, edit_json
from transformers import LlamaConfig


@pytest.mark.parametrize("command", ["to-hf", "inspect"])
@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (None, "there is no such directory"),
        ({}, "it is empty"),
        (
            {"iter_0000001/metadata.json": "", "iter_0000002/metadata.json": "", "release/x": ""},
            "nor metadata.json, but iterations. Give one of its folders iter_0000001, iter_0000002",
        ),
        ({"latest_checkpointed_iteration.txt": "12"}, "names iter_0000012, which is absent"),
        ({"latest_checkpointed_iteration.txt": "../../etc"}, "should hold an iteration or 'release', got '../../etc'"),
        ({"latest_checkpointed_iteration.txt": ""}, "should hold an iteration or 'release', got ''"),
        ({".metadata": "x"}, ".metadata is not a readable pickle"),
        ({"metadata.json": '{"sharded_backend": []}'}, "says sharded_backend []: expected 'torch_dist'"),
        ({"metadata.json": "{}"}, "says sharded_backend None: expected 'torch_dist'"),
        (
            {"metadata.json": '{"sharded_backend": "zip"}'},
            "says sharded_backend 'zip': expected 'torch_dist' or",
        ),
        ({"metadata.json": '{"sharded_backend": "torch_dist"}'}, ".metadata is missing: the save was not finished"),
        ({"metadata.json": "[1]"}, "invalid JSON in {path}/metadata.json: expected an object, got list"),
        ({"metadata.json": '{"sharded_backend": "torch_dist"}', ".metadata": ""}, ".metadata is not a readable pickle"),
    ],
)
def test_no_checkpoint(command: str, files: dict[str, str] | None, expected: str, tmp_path: Path) -> None:
    """Whatever is no checkpoint is told apart and named."""
    path = tmp_path / "given"
    for name, content in (files or {}).items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(content)
    if files == {}:
        path.mkdir()
    line = refusal(tmp_path, command, path, *([tmp_path / "out"] if command == "to-hf" else []))
    assert str(path) in line
    assert expected.replace("{path}", str(path)) in line


def test_no_hugging_face_directory(hf: Path, tmp_path: Path) -> None:
    """A missing directory, a lone file, a directory without weights, and one with weights in another format."""
    assert "there is no such directory" in refusal(tmp_path, "from-hf", tmp_path / "none", tmp_path / "out")
    line = refusal(tmp_path, "from-hf", hf / "model.safetensors", tmp_path / "out")
    assert "model.safetensors is not a Hugging Face model directory" in line
    (hf / "model.safetensors").rename(hf / "pytorch_model.bin")
    line = refusal(tmp_path, "from-hf", hf, tmp_path / "out")
    assert "holds neither model.safetensors nor model.safetensors.index.json" in line
    assert "weights in a format that is not read (pytorch_model.bin)" in line
    (hf / "pytorch_model.bin").rename(hf / "model.safetensors")
    (hf / "config.json").unlink()
    assert f"there is no config.json at {hf} (" in refusal(tmp_path, "from-hf", hf, tmp_path / "out")


def test_mixed_up_directions(hf: Path, ckpt: Path, tmp_path: Path) -> None:
    """A Hugging Face directory is not exported, and a checkpoint is not imported."""
    for command in ("to-hf", "reshard", "migrate"):
        line = refusal(tmp_path, command, hf, tmp_path / "out")
        assert f"{hf} is not a Megatron checkpoint" in line
        assert line.endswith("it is a Hugging Face directory. from-hf makes a checkpoint of it.")
    for path in (ckpt, ckpt / "release"):
        line = refusal(tmp_path, "from-hf", path, tmp_path / "out")
        assert f"{ckpt / 'release'} is not a Hugging Face model directory: it is a Megatron checkpoint. to-hf " in line


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "mistral_large4"}, "has no layers that share latents"),
        (LlamaConfig().to_dict(), "model_type 'llama'"),
        ({"model_type": ["mistral"]}, "model_type ['mistral']"),
        ({"model_type": None}, "model_type None"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"architectures": ["MistralForSequenceClassification"]}, "'MistralForSequenceClassification'"),
        ({"is_causal": False}, "is_causal=False"),
    ],
)
def test_another_architecture(config: dict[str, Any], expected: str, hf: Path, genuine: Path, tmp_path: Path) -> None:
    """Another model type, activation, head or attention is refused by name, from files and as --config."""
    edit_json(hf / "config.json", **config)
    for arguments in (("from-hf", hf, "out"), ("to-hf", genuine, tmp_path / "out", "--config", hf)):
        line = refusal(tmp_path, *arguments)
        assert expected in line
        assert str(hf / "config.json") in line


def test_a_checkpoint_of_another_architecture(genuine: Path, tmp_path: Path) -> None:
    """A genuine mixture of experts is no dense model: each tensor that differs is named."""
    moe = folder("moe_grouped_0161")
    line = refusal(tmp_path, "to-hf", moe / "checkpoint", tmp_path / "out", "--config", tmp_path / "config.json")
    assert f"2 tensors are missing: {FC1}, decoder.layers.mlp.linear_fc2.weight" in line
    assert "3 tensors are unknown to the table" in line
    for name in ("experts.experts.linear_fc1", "experts.experts.linear_fc2", "router"):
        assert f"decoder.layers.mlp.{name}.weight [" in line
    assert genuine.is_dir()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_experts": 8, "moe_latent_size": 8}, "moe_latent_size=8"),
        ({"multi_latent_attention": True}, "multi_latent_attention=True"),
        ({"normalization": "LayerNorm", "swiglu": False}, "normalization='LayerNorm', swiglu=False"),
        ({"add_qkv_bias": True}, "add_qkv_bias=True"),
        ({"num_layers": None, "norm_epsilon": None}, "lack num_layers, norm_epsilon. Give the model's config.json"),
        (
            {"vocab_size": None, "padded_vocab_size": None},
            "do not tell the vocabulary size. Give config.json with --config",
        ),
        ({"window_size": "wide"}, "window_size in the checkpoint's args: expected (before, after), got 'wide'"),
        ({"hidden_size": 64.0}, "hidden_size must be a positive integer, got 64.0"),
    ],
)
def test_args_of_another_architecture(changes: dict[str, object], expected: str, tmp_path: Path) -> None:
    """Where Megatron's own args are the configuration, whatever is not Mistral in them is named."""
    root = shutil.copytree(folder("mlm_0161") / "checkpoint", tmp_path / "ckpt")
    common_file = root / "iter_0000000" / "common.pt"
    common = torch.load(common_file, weights_only=False)
    vars(common["args"]).update({"vocab_size": 250} | changes)
    torch.save(common, common_file)
    assert expected in refusal(tmp_path, "to-hf", root, tmp_path / "out")
