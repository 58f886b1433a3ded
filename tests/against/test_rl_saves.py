"""What frameworks for reinforcement learning save: a genuine checkpoint of verl 0.9.1, TP2 x PP2 on four ranks.

verl's own MegatronCheckpointManager wrote it (fixtures/scripts/rl/verl_save.py): weights, optimizer and generators
as three checkpoints, config.json beside the weights. The truth is the Hugging Face model that the ranks held.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from command_line import refusal, run
from genuine import folder
from safetensors.torch import load_file
from torch_reading import described
from transformers import AutoConfig

import dist_ckpt_mistral as dcm
from dist_ckpt_mistral.errors import ConfigError, TensorMismatchError


@pytest.fixture(scope="module")
def actor() -> Path:
    """The folder that verl calls by the role."""
    return folder("verl_091") / "actor"


@pytest.fixture(scope="module")
def true() -> Path:
    """The tensors of the live model."""
    return folder("verl_091") / "truth.safetensors"


def test_the_weights_export_with_the_configuration_beside_them(actor: Path, true: Path, tmp_path: Path) -> None:
    """Verl's ``huggingface/`` describes the shards in ``dist_ckpt/``: no --config, and every tensor bit for bit."""
    shards = actor / "model" / "dist_ckpt"
    done = dcm.to_hf(shards, tmp_path / "hf")
    assert Path(done.config_from) == actor / "model" / "huggingface" / "config.json"
    assert described(load_file(tmp_path / "hf" / "model.safetensors")) == described(load_file(true))
    configs = [AutoConfig.from_pretrained(path).to_dict() for path in (tmp_path / "hf", folder("verl_091"))]
    assert configs[0] | {"_name_or_path": ""} == configs[1] | {"_name_or_path": ""}
    assert (tmp_path / "hf" / "generation_config.json").is_file()
    assert run("inspect", shards).code == run("verify", shards).code == 0
    assert run("verify", shards, tmp_path / "hf").code == 0


def test_the_weights_are_cut_anew(actor: Path, true: Path, tmp_path: Path) -> None:
    """What ``reshard`` writes of them is the same model, and keeps the names of the tensors."""
    dcm.reshard(actor / "model" / "dist_ckpt", tmp_path / "cut", dcm.ParallelLayout())
    dcm.to_hf(tmp_path / "cut", tmp_path / "hf", config=actor / "model" / "huggingface")
    assert described(load_file(tmp_path / "hf" / "model.safetensors")) == described(load_file(true))


@pytest.mark.parametrize("command", [("to-hf",), ("reshard", "--tp", "1")], ids=lambda command: command[0])
def test_the_folder_around_is_called_by_its_name(command: tuple[str, ...], actor: Path, tmp_path: Path) -> None:
    """Whoever gives ``actor`` is told where in it the weights are; in ``model``, too."""
    line = refusal(tmp_path, command[0], actor, tmp_path / "out", *command[1:])
    assert "it is a checkpoint of verl, whose weights lie in its folder model. Give model/dist_ckpt, or" in line
    line = refusal(tmp_path, command[0], actor / "model", tmp_path / "out", *command[1:])
    assert "it is a checkpoint of verl, whose weights lie in a folder of it. Give its folder dist_ckpt." in line


def test_without_a_configuration_it_is_asked_for(actor: Path, true: Path, tmp_path: Path) -> None:
    """Without its mbridge, verl saves no config.json."""
    copied = shutil.copytree(actor / "model" / "dist_ckpt", tmp_path / "model" / "dist_ckpt")
    with pytest.raises(ConfigError, match=r"Give the model's config\.json with --config"):
        dcm.to_hf(copied, tmp_path / "hf")
    dcm.to_hf(copied, tmp_path / "hf", config=folder("verl_091") / "config.json")
    assert described(load_file(tmp_path / "hf" / "model.safetensors")) == described(load_file(true))


def test_a_checkpoint_of_the_optimizer_alone_is_not_a_model(actor: Path, tmp_path: Path) -> None:
    """Its tensors are named as missing, and nothing is written."""
    with pytest.raises(TensorMismatchError, match=r"tensors are missing: decoder\.|tensors are missing"):
        dcm.to_hf(actor / "optimizer" / "dist_ckpt", tmp_path / "hf", config=folder("verl_091") / "config.json")
    assert not (tmp_path / "hf").exists()
