"""The live gather in a process of its own rank. tests/against/test_live_export.py has several."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import hf_models
import pytest
import torch
from multimodal_models import MULTIMODAL
from safetensors.torch import load_file

import dist_ckpt_mistral as dcm

pytestmark = [pytest.mark.megatron, pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def model(tmp_path: Path) -> Any:  # noqa: ANN401  (megatron is untyped)
    """A GPTModel with the weights in ``hf_dir``."""
    hf_models.saved(hf_models.random_model(), tmp_path / "hf_dir")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dcm.load_model(tmp_path / "hf_dir", device="cpu")


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def test_what_is_yielded_is_a_copy(model: Any) -> None:  # noqa: ANN401
    """Changing an exported tensor does not change the model."""
    config = dcm.MistralConfig.from_hf(hf_models.random_model().config.to_dict())
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for _, tensor in dcm.export_weights(model, config):
        tensor.zero_()
    assert [name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])] == []


def test_a_multimodal_model_is_saved_with_its_vision_tower(tmp_path: Path) -> None:
    """The language model comes from memory, the tower from the directory; a configuration alone has none."""
    original = MULTIMODAL["mistral small 3"].save(tmp_path / "hf_dir")
    model = dcm.load_model(original, device="cpu")
    dcm.save_hf(model, original, tmp_path / "out")
    expected, written = _tensors(original), _tensors(tmp_path / "out")
    assert any("vision_tower" in name for name in expected)
    assert written.keys() == expected.keys()
    assert [name for name, tensor in written.items() if not torch.equal(tensor, expected[name])] == []
    assert (tmp_path / "out" / "tekken.json").read_bytes() == (original / "tekken.json").read_bytes()
    with pytest.raises(dcm.TensorMismatchError, match="describes a vision tower and a projector besides"):
        dcm.save_hf(model, dcm.MistralConfig.from_hf(original), tmp_path / "none")
    assert not (tmp_path / "none").exists()
