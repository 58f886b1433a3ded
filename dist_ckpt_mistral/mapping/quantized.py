"""Quantized weights in Hugging Face files: FP8 numbers and their scales. Other quantization is refused by name.

The tensors decide whether a model is quantized, not config.json. Scales are called ``NAME_scale_inv`` by transformers
(5.23, integrations/finegrained_fp8.py) and in Mistral's releases, ``NAME_scale`` by compressed-tensors and AutoFP8. In
all of them a value is the number times its scale, ``inv`` or not. Only FP8 kernels use the scales of activations.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from dist_ckpt_mistral.errors import TensorMismatchError, UnsupportedModelError
from dist_ckpt_mistral.formats.safetensors import FileTensor
from dist_ckpt_mistral.gather import dtypes
from dist_ckpt_mistral.gather.dequantize import ScaledTensor, scaled_tensor
from dist_ckpt_mistral.messages import listed
from dist_ckpt_mistral.model.config.mistral_config import MistralConfig
from dist_ckpt_mistral.model.config.quantization import (
    BlockShape,
    described_method,
    is_readable,
    next_step,
    weight_block_size,
)

_LOG = logging.getLogger(__name__)

FP8: Final = "float8_e4m3fn"
_SUFFIXES: Final = ("_scale_inv", "_scale")
_OF_ACTIVATIONS: Final = re.compile(r"(.*[._])?((activation|input|output)_scale|[qkv]_scale|kv_scale)$")
_LEFT_OVER: Final = (
    "%s: config.json describes quantized weights (%s), but no tensor is quantized: they are read as they are, and "
    "quantization_config is left out of what is written"
)
_WHY_SCALES: Final = "scales of FP8 weights, multiplied into them"
_WHY_ACTIVATIONS: Final = "scales of activations, which only FP8 kernels use"

#: Names of tensors in files of other quantization methods, as their tools and transformers 5.23 write them.
_OTHERS: Final = (
    (re.compile(r".*\.(qweight|qzeros|g_idx)$"), "by GPTQ or AWQ"),
    (re.compile(r".*\.(weight_global_scale|weight_scale_2|input_global_scale)$"), "to NVFP4"),
    (re.compile(r".*\.(weight_packed|weight_zero_point|weight_g_idx)$"), "by compressed-tensors to integers"),
    (re.compile(r".*\.((nested_)?absmax|(nested_)?quant_map|quant_state\.\w+|SCB)$"), "by bitsandbytes"),
    (re.compile(r".*\.weight_scales$"), "by EETQ"),
    (re.compile(r".*_(blocks|scales)$"), "to MXFP4"),
)
_OTHER_DTYPES: Final = ("int8", "uint8", "int16", "int32", "int64", "float8_e5m2")


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantized:
    """The FP8 weights with their scales, the dtype of their values, and the ignored tensors with the reasons.

    All fields are empty for a model that is not quantized.
    """

    weights: tuple[ScaledTensor, ...] = ()
    dtype: str = ""
    ignored: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        """A summary in a few words."""
        return f"{len(self.weights)} FP8 weights with scales, read as {self.dtype}"

    @property
    def note(self) -> str:
        """What is read and what is ignored, in a sentence."""
        activations = sum(reason == _WHY_ACTIVATIONS for _, reason in self.ignored)
        left = f"; {activations} scales of activations stay behind" if activations else ""
        return (
            f"{self}: each number times its scale, as transformers does{left}. "
            "What is written of them, config.json included, is not quantized"
        )


def match_quantized(
    tensors: Iterable[FileTensor], config: MistralConfig, where: str, dtype: str | None = None
) -> Quantized:
    """Find the FP8 weights among ``tensors``, and the scales of each.

    ``dtype`` is the dtype of their values; by default the one that ``config`` names, or else bfloat16. A
    ``quantization_config`` without quantized tensors is ignored with a warning: merging an adapter leaves it behind.

    Raises:
        UnsupportedModelError: The weights are quantized by another method.
        TensorMismatchError: Scales are missing, belong to no weight or do not fit (it lists all).
    """
    raw = config.hf_config or {}
    by_name = {tensor.name: tensor for tensor in tensors}
    numbers = [tensor for tensor in by_name.values() if tensor.dtype == FP8]
    scales = {name: by_name[name] for name in by_name if name.endswith(_SUFFIXES)}
    _refuse_others(by_name.values(), raw, where, is_quantized=bool(numbers or scales))
    if not numbers:
        if not scales and (method := described_method(raw)):
            _LOG.warning(_LEFT_OVER, where, method)
        return Quantized()
    of_activations = [name for name in by_name if _OF_ACTIVATIONS.match(name)]
    scale_names = _pairs(numbers, scales.keys() - set(of_activations), where)
    weights = _scaled(scale_names, scales, weight_block_size(raw, where), where)
    ignored = dict.fromkeys(scale_names.values(), _WHY_SCALES) | dict.fromkeys(of_activations, _WHY_ACTIVATIONS)
    dtype = dtype or (config.dtype if config.dtype in dtypes.WEIGHT_DTYPES else "bfloat16")
    return Quantized(weights=weights, dtype=dtype, ignored=tuple(sorted(ignored.items())))


def _refuse_others(tensors: Iterable[FileTensor], raw: Mapping[str, Any], where: str, *, is_quantized: bool) -> None:
    """Raise UnsupportedModelError if a tensor, or config.json, is of another quantization method.

    config.json counts only if ``is_quantized``: there are FP8 numbers or scales.
    """
    others = ((how, tensor.name) for tensor in tensors if (how := _other_method(tensor)))
    how, name = next(others, ("", ""))
    if how or (is_quantized and not is_readable(raw)):
        method = f"{described_method(raw)} in config.json" if described_method(raw) else ""
        signs = ", ".join(filter(None, (repr(name) if name else "", method)))
        raise UnsupportedModelError(
            f"{where} holds weights that are quantized{f' {how}' if how else ''} ({signs}), which cannot be read: "
            f"only FP8 ({FP8}, with scales) can. {next_step(raw)}"
        )


def _other_method(tensor: FileTensor) -> str:
    """The quantization method that a tensor's name or dtype shows, other than FP8; empty if it shows none."""
    how = next((how for pattern, how in _OTHERS if pattern.match(tensor.name)), "")
    if not how and tensor.dtype in _OTHER_DTYPES and not tensor.name.endswith(_SUFFIXES):
        how = f"to {tensor.dtype}"
    return how


def _pairs(numbers: list[FileTensor], scales: set[str], where: str) -> dict[FileTensor, str]:
    """The name of each weight's scales. Raises TensorMismatchError unless they pair up one to one."""
    candidates = {tensor: [tensor.name + end for end in _SUFFIXES if tensor.name + end in scales] for tensor in numbers}
    problems = {
        "of them have no scales": [tensor.name for tensor, names in candidates.items() if not names],
        "of them have two tensors of scales": [tensor.name for tensor, names in candidates.items() if len(names) > 1],
        "tensors of scales have no FP8 weight": sorted(scales.difference(*candidates.values())),
    }
    _raise_any([f"{len(names)} {what}: {listed(names)}" for what, names in problems.items() if names], where)
    return {tensor: names[0] for tensor, names in candidates.items()}


def _scaled(
    scale_names: Mapping[FileTensor, str], scales: Mapping[str, FileTensor], block_size: BlockShape | None, where: str
) -> tuple[ScaledTensor, ...]:
    """Each weight with the grid of its scales. Raises TensorMismatchError if scales do not fit."""
    weights: list[ScaledTensor] = []
    problems: list[str] = []
    blocks = f"blocks of {list(block_size)}" if block_size else "equal blocks"
    for weight, scale in ((weight, scales[name]) for weight, name in scale_names.items()):
        found = scaled_tensor(weight.name, weight.shape, scale.name, scale.shape, block_size)
        if found is not None and scale.dtype in dtypes.WEIGHT_DTYPES:
            weights.append(found)
        elif found is not None:
            expected = ", ".join(dtypes.WEIGHT_DTYPES)
            problems.append(f"dtype of {scale.name!r}: expected one of {expected}, got {scale.dtype}")
        else:
            problems.append(
                f"shape of {scale.name!r}: expected one scale, or one for each of {blocks} of {list(weight.shape)}, "
                f"got {list(scale.shape)}"
            )
    _raise_any(problems, where)
    return tuple(weights)


def _raise_any(problems: list[str], where: str) -> None:
    if problems:
        raise TensorMismatchError(
            f"the FP8 weights ({FP8}) in {where} cannot be dequantized: {'; '.join(problems)}. "
            "Check that all files of the model are there and belong together."
        )
