"""Small FP8 models as Mistral releases them, and what transformers loads from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from hf_models import random_model, saved
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.quantizers import quantizer_finegrained_fp8

if TYPE_CHECKING:
    import pytest

WEIGHTS: Final = "model.safetensors"
#: As in config.json of Ministral 3 Instruct, and of a release with blocks.
PER_TENSOR: Final[dict[str, Any]] = {
    "quant_method": "fp8",
    "activation_scheme": "static",
    "weight_block_size": None,
    "modules_to_not_convert": ["lm_head"],
}
PER_BLOCK: Final = PER_TENSOR | {"activation_scheme": "dynamic", "weight_block_size": [4, 4]}


def is_quantized(name: str) -> bool:
    """Whether releases quantize the tensor of this name: the projections of layers, not their norms."""
    return "_proj." in name


def save_fp8(
    folder: Path,
    told: dict[str, Any],
    *,
    scale_dtype: torch.dtype = torch.float32,
    scale_shape: tuple[int, ...] = (),
    **sizes: Any,  # noqa: ANN401  (of the model's configuration)
) -> Path:
    """Save a model whose projections are FP8; ``told`` becomes its quantization_config."""
    saved(random_model(**sizes), folder)
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for name, tensor in load_file(folder / WEIGHTS).items():
        tensors[name] = tensor
        if is_quantized(name):
            block, shape = told["weight_block_size"], scale_shape
            if block:
                shape = tuple(-(-size // each) for size, each in zip(tensor.shape, block, strict=True))
            tensors[name] = tensor.to(torch.float8_e4m3fn)
            scales = torch.rand(shape, generator=generator) + 0.01
            tensors[name.replace("weight", "weight_scale_inv")] = scales.to(scale_dtype)
            if told["activation_scheme"] == "static":
                tensors[name.replace("weight", "activation_scale")] = torch.tensor(0.25)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    tell(folder, quantization_config=told)
    return folder


def tell(folder: Path, **changes: object) -> None:
    """Change keys of config.json."""
    content = json.loads((folder / "config.json").read_bytes()) | changes
    (folder / "config.json").write_text(json.dumps(content))


def in_transformers(
    folder: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype = torch.bfloat16
) -> dict[str, torch.Tensor]:
    """The state dict of the model as transformers loads it on a CPU: dequantized to ``dtype``.

    It asks for accelerate before it does, and then needs nothing of it. Weights that are not FP8 it leaves as they are,
    whatever ``dtype``.
    """
    monkeypatch.setattr(quantizer_finegrained_fp8, "is_accelerate_available", lambda: True)
    state = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).state_dict()
    return {name: tensor if is_quantized(name) else tensor.to(dtype) for name, tensor in state.items()}
