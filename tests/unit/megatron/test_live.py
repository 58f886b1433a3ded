"""The live gather in a process of its own rank. tests/against/test_live_export.py has several."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import hf_models
import pytest
import torch
from multimodal_models import MULTIMODAL
from remote_folders import files_of, get_folder
from safetensors.torch import load_file

import dist_ckpt_mistral as dcm
from dist_ckpt_mistral.storage.memory import MemoryStore

pytestmark = [pytest.mark.megatron, pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("empty_stores")]

_OUT = "memory://bucket/out"


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
    dcm.save_hf(model, original, f"{_OUT}/multimodal", output=dcm.Output(max_file_bytes=100_000))
    dcm.save_hf(model, original, tmp_path / "cut", output=dcm.Output(max_file_bytes=100_000))
    assert get_folder(f"{_OUT}/multimodal") == files_of(tmp_path / "cut")
    with pytest.raises(dcm.TensorMismatchError, match="describes a vision tower and a projector besides"):
        dcm.save_hf(model, dcm.MistralConfig.from_hf(original), tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("part_bytes", [1001, 8 << 20])
def test_a_store_gets_what_a_directory_gets(
    model: Any,  # noqa: ANN401
    part_bytes: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Headers, tensors, converted values and sums are streamed, byte for byte, and config.json comes last."""
    monkeypatch.setattr("dist_ckpt_mistral.convert.streamed_files.part_bytes_of", lambda _: part_bytes)
    written: list[str] = []
    write = MemoryStore.write

    def noted(self: MemoryStore, key: str, data: bytes, *, only_new: bool = False) -> str | None:
        written.append(key)
        return write(self, key, data, only_new=only_new)

    monkeypatch.setattr(MemoryStore, "write", noted)
    output = dcm.Output(max_file_bytes=6_000, sha256=True)
    options: dict[str, Any] = {"dtype": "bfloat16", "allow_lossy": True, "output": output}
    local = dcm.save_hf(model, tmp_path / "hf_dir", tmp_path / "out", **options)
    done = dcm.save_hf(model, tmp_path / "hf_dir", f"{_OUT}/hf", **options)
    assert len(done.files) == len(local.files) > 2
    assert get_folder(f"{_OUT}/hf") == files_of(tmp_path / "out")
    assert written[-2:] == ["out/hf/model.safetensors.index.json", "out/hf/config.json"]


@pytest.mark.parametrize("number", [0, 1])
def test_a_store_that_fails_gets_nothing(
    model: Any,  # noqa: ANN401
    number: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The error is the store's own, nothing is left of what was written before, and the model can be saved again."""
    count = 0
    upload = MemoryStore.upload

    def failing(self: MemoryStore, key: str, parts: Iterable[bytes], *arguments: int, **options: int) -> str | None:
        nonlocal count
        count += 1
        if count > number:
            next(iter(parts))
            raise dcm.OutputError("cannot write it: the store is full")
        return upload(self, key, parts, *arguments, **options)

    monkeypatch.setattr("dist_ckpt_mistral.convert.streamed_files.part_bytes_of", lambda _: 5000)
    with monkeypatch.context() as broken:
        broken.setattr(MemoryStore, "upload", failing)
        with pytest.raises(dcm.OutputError, match="the store is full") as caught:
            dcm.save_hf(model, tmp_path / "hf_dir", f"{_OUT}/hf", output=dcm.Output(max_file_bytes=6_000))
    assert "Nothing was published." in caught.value.__notes__
    assert not get_folder(f"{_OUT}/hf")
    dcm.save_hf(model, tmp_path / "hf_dir", f"{_OUT}/hf")
    assert dcm.compare(f"{_OUT}/hf", tmp_path / "hf_dir").is_equal
