"""What Megatron-Bridge's training saves: genuine saves of 0.6.2 at TP2 x PP2 on four ranks, after a step of training.

The truth is what Bridge itself exports of the live model. Two are its Ministral 3, whose vision tower is part of the
model, trained or frozen; the other has Bridge's own export beside the shards (``also_save_hf_checkpoint``).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from command_line import run
from genuine import BRIDGE, folder, shards, truth
from torch_reading import described, hf_tensors, load_tensors
from transformers import AutoConfig

import dist_ckpt_mistral as dcm
from dist_ckpt_mistral.errors import ConfigError
from dist_ckpt_mistral.model.args.bridge import hf_config_of

VISION = ("vision_tower.", "multi_modal_projector.")
MULTIMODAL = [case for case in BRIDGE if case != "bridge_train_0062"]
FROM = {
    "bridge_train_0062": "iter_0000007/hf/config.json",
    **dict.fromkeys(MULTIMODAL, "hf_config in run_config.yaml inside the checkpoint"),
}


@pytest.mark.parametrize("case", BRIDGE)
def test_a_save_exports_by_itself(case: str, tmp_path: Path) -> None:
    """Without any other file: the whole model bit for bit, and a config.json that transformers reads as the original.

    Vision tower and projector come out of the checkpoint, not from the original model.
    """
    done = dcm.to_hf(folder(case) / "checkpoint", tmp_path / "hf")
    assert done.config_from.endswith(FROM[case])
    assert described(hf_tensors(tmp_path / "hf")) == described(truth(case))
    theirs, ours = (AutoConfig.from_pretrained(path).to_dict() for path in (folder(case), tmp_path / "hf"))
    assert ours | {"_name_or_path": ""} == theirs | {"_name_or_path": ""}


@pytest.mark.parametrize("case", BRIDGE)
def test_a_save_is_sound_and_equals_its_export(case: str, tmp_path: Path) -> None:
    """``inspect`` finds no problem, ``verify`` no damage, and no difference from what was exported."""
    root = folder(case) / "checkpoint"
    dcm.to_hf(root, tmp_path / "hf")
    assert json.loads("\n".join(run("inspect", root, "--json").out))["problems"] == []
    assert run("verify", root).code == 0
    assert run("verify", root, tmp_path / "hf").code == 0
    with dcm.open_checkpoint(root) as opened:
        assert described(dict(opened)) == described(truth(case))


@pytest.mark.parametrize("layout", [dcm.ParallelLayout(), dcm.ParallelLayout(pp=2)], ids=["tp1", "pp2"])
@pytest.mark.parametrize("case", BRIDGE)
def test_a_save_is_cut_anew(case: str, layout: dcm.ParallelLayout, tmp_path: Path) -> None:
    """Weights, vision tower and optimizer state come along under the same names, as torch DCP reads them."""
    dcm.reshard(folder(case) / "checkpoint", tmp_path / "cut", layout)
    assert described(load_tensors(tmp_path / "cut" / "iter_0000007")) == described(load_tensors(shards(case)))
    assert run("verify", folder(case) / "checkpoint", tmp_path / "cut", "--stored").code == 0
    dcm.to_hf(tmp_path / "cut", tmp_path / "hf")
    assert described(hf_tensors(tmp_path / "hf")) == described(truth(case))


@pytest.mark.parametrize("case", BRIDGE)
def test_master_weights_round_to_the_weights(case: str, tmp_path: Path) -> None:
    """The float32 weights of Bridge's optimizer, rounded as its step does, are those of the live model.

    Of a frozen vision tower the optimizer keeps none: the weights themselves stand for them.
    """
    dcm.to_hf(folder(case) / "checkpoint", tmp_path / "hf", weights="master")
    masters, true = hf_tensors(tmp_path / "hf"), truth(case)
    assert described({name: tensor.bfloat16() for name, tensor in masters.items()}) == described(true)
    frozen = {name for name, tensor in masters.items() if tensor.dtype != torch.float32}
    is_frozen = case == "bridge_frozen_0062"
    assert frozen == {name for name in true if is_frozen and name.startswith(VISION)}
    assert any(not torch.equal(tensor, true[name].float()) for name, tensor in masters.items())


@pytest.mark.parametrize("case", MULTIMODAL)
def test_bridges_model_and_its_hugging_face_configuration(
    case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Bridge 0.6.2 trains every Ministral 3 with the YaRN of the released ones, and the export says so."""
    dcm.to_hf(folder(case) / "checkpoint", tmp_path / "hf")
    assert "run_config.yaml inside the checkpoint says otherwise: yarn.factor: 4.0 and 16.0" in caplog.text


@pytest.mark.parametrize("case", MULTIMODAL)
def test_the_sizes_of_a_vision_tower_can_be_given(case: str, tmp_path: Path) -> None:
    """Where run_config.yaml is gone, the config.json of the whole model serves; without any, the error asks for it."""
    root = shutil.copytree(folder(case) / "checkpoint", tmp_path / "root")
    (root / "iter_0000007" / "run_config.yaml").unlink()
    with pytest.raises(ConfigError, match=r"Give the model's config\.json with --config"):
        dcm.to_hf(root, tmp_path / "hf")
    dcm.to_hf(root, tmp_path / "hf", config=folder(case) / "config.json")
    assert described(hf_tensors(tmp_path / "hf")) == described(truth(case))


def test_bridges_own_export_is_a_model_by_itself(tmp_path: Path) -> None:
    """The folder that ``also_save_hf_checkpoint`` leaves imports like any model, and equals the shards around it."""
    root = folder("bridge_train_0062") / "checkpoint"
    sidecar = root / "iter_0000007" / "hf"
    assert run("verify", root, sidecar).code == 0
    dcm.from_hf(sidecar, tmp_path / "root")
    assert run("verify", tmp_path / "root", root).code == 0
    dcm.to_hf(root, tmp_path / "hf")
    written = {path.name for path in (tmp_path / "hf").iterdir()}
    assert {path.name for path in sidecar.iterdir()} <= written


def test_hugging_face_configurations_in_either_form() -> None:
    """As arguments of their class, and as those of ``from_dict`` (megatron-core's own serializer): the same."""
    config = {"model_type": "mistral3", "dtype": {"_target_": "torch.bfloat16", "_call_": False}, "layers": [{"a": 1}]}
    expected = {"model_type": "mistral3", "dtype": "bfloat16", "layers": [{"a": 1}]}
    of_class = {"_target_": "transformers.models.mistral3.configuration_mistral3.Mistral3Config", **config}
    of_dict = {"_target_": "transformers.Mistral3Config.from_dict", "_call_": True, "config_dict": config}
    for written in (of_class, of_dict):
        assert hf_config_of({"model": {"hf_config": written}}, "here") == expected
    for other in (None, "mistral3"):
        assert hf_config_of({"model": {"hf_config": other}}, "here") is None
    assert hf_config_of({}, "here") is None


def test_endless_configurations_are_refused() -> None:
    """A mapping in itself, and aliases that multiply, as YAML can make them: an error, at once."""
    loop: dict[str, object] = {}
    loop["again"] = loop
    bomb: object = "x"
    for _ in range(9):
        bomb = [bomb] * 9
    for absurd in (loop, {"a": bomb}):
        with pytest.raises(ConfigError, match="hf_config in here is nested too deep, or has more than 10000 values"):
            hf_config_of({"model": {"hf_config": absurd}}, "here")
