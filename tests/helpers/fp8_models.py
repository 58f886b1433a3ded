"""Small FP8 models as Mistral releases them, and what transformers loads from them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from hf_models import random_model, saved
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers import quantizer_finegrained_fp8

if TYPE_CHECKING:
    import pytest

Tensors = dict[str, torch.Tensor]
WEIGHTS: Final = "model.safetensors"
Q: Final = "model.layers.0.self_attn.q_proj.weight"
#: As in config.json of Ministral 3 Instruct, and of a release with blocks.
PER_TENSOR: Final[dict[str, Any]] = {
    "quant_method": "fp8",
    "activation_scheme": "static",
    "weight_block_size": None,
    "modules_to_not_convert": ["lm_head"],
}
PER_BLOCK: Final = PER_TENSOR | {"activation_scheme": "dynamic", "weight_block_size": [4, 4]}


def edit(folder: Path, change: Callable[[Tensors], object]) -> None:
    """Change the tensors of the model in ``folder``."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def is_quantized(name: str) -> bool:
    """Whether releases quantize the tensor of this name: the projections of layers, experts included."""
    return "_proj" in name or ".w1." in name or ".w2." in name or ".w3." in name


def save_fp8(
    folder: Path,
    told: dict[str, Any],
    *,
    model: PreTrainedModel | None = None,
    scale_dtype: torch.dtype = torch.float32,
    scale_shape: tuple[int, ...] = (),
    **sizes: Any,  # noqa: ANN401  (of the model's configuration)
) -> Path:
    """Save a model whose projections are FP8; ``told`` becomes its quantization_config.

    Without blocks there is a scale of ``scale_shape`` for a matrix, or one for each matrix of a stack.
    """
    saved(random_model(**sizes) if model is None else model, folder)
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for name, tensor in load_file(folder / WEIGHTS).items():
        tensors[name] = tensor
        if is_quantized(name):
            *stack, rows, columns = tensor.shape
            shape = (*stack, 1, 1) if stack else scale_shape
            if told["weight_block_size"]:
                block = told["weight_block_size"]
                shape = (*stack, -(-rows // block[0]), -(-columns // block[1]))
            tensors[name] = tensor.to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = (torch.rand(shape, generator=generator) + 0.01).to(scale_dtype)
            if told["activation_scheme"] == "static":
                scale = name.replace("weight", "activation_scale") if not stack else f"{name}_activation_scale"
                tensors[scale] = torch.full(tuple(stack), 0.25)
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
