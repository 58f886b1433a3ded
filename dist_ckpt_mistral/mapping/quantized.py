"""Quantized weights in Hugging Face files: FP8 numbers beside their scales; everything else is refused by name.

The tensors tell, whatever config.json says. Scales are called ``NAME_scale_inv`` by transformers (5.23,
integrations/finegrained_fp8.py) and in Mistral's releases, ``NAME_scale`` by compressed-tensors and AutoFP8; in all of
them a value is the number times its scale, ``inv`` or not. Scales of activations serve FP8 kernels alone.
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

#: What tensors are called in files of other methods, as their own tools and transformers 5.23 write them.
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
    """FP8 weights with their scales, the dtype of their values, and the tensors that are none of the model's, with why.

    All of it is empty for a model that is not quantized.
    """

    weights: tuple[ScaledTensor, ...] = ()
    dtype: str = ""
    ignored: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        """What there is, in a few words."""
        return f"{len(self.weights)} FP8 weights with scales, read as {self.dtype}"

    @property
    def note(self) -> str:
        """What becomes of it, in full."""
        activations = sum(reason == _WHY_ACTIVATIONS for _, reason in self.ignored)
        left = f"; {activations} scales of activations stay behind" if activations else ""
        return (
            f"{self}: each number times its scale, as transformers does{left}. "
            "What is written of them, config.json included, is not quantized"
        )


def match_quantized(
    tensors: Iterable[FileTensor], config: MistralConfig, where: str, dtype: str | None = None
) -> Quantized:
    """Find the FP8 weights among ``tensors``, and the scales of each; there may be none.

    Their values are to be of ``dtype``, else of the one that ``config`` names, else bfloat16. What config.json says of
    quantization counts only where a tensor is quantized: else it was left over, as where an adapter was merged. Raises
    UnsupportedModelError for weights that are quantized in another way, and TensorMismatchError that lists every scale
    that is missing, left over or does not fit.
    """
    told = config.hf_config or {}
    by_name = {tensor.name: tensor for tensor in tensors}
    numbers = [tensor for tensor in by_name.values() if tensor.dtype == FP8]
    scales = {name: by_name[name] for name in by_name if name.endswith(_SUFFIXES)}
    _refuse_others(by_name.values(), told, where, is_quantized=bool(numbers or scales))
    if not numbers:
        if not scales and (method := described_method(told)):
            _LOG.warning(_LEFT_OVER, where, method)
        return Quantized()
    of_activations = [name for name in by_name if _OF_ACTIVATIONS.match(name)]
    held = _pairs(numbers, scales.keys() - set(of_activations), where)
    weights = _scaled(held, scales, weight_block_size(told, where), where)
    ignored = dict.fromkeys(held.values(), _WHY_SCALES) | dict.fromkeys(of_activations, _WHY_ACTIVATIONS)
    dtype = dtype or (config.dtype if config.dtype in dtypes.WEIGHT_DTYPES else "bfloat16")
    return Quantized(weights=weights, dtype=dtype, ignored=tuple(sorted(ignored.items())))


def _refuse_others(tensors: Iterable[FileTensor], raw: Mapping[str, Any], where: str, *, is_quantized: bool) -> None:
    """Raise UnsupportedModelError at the first sign of another method, in tensors or in what config.json says of them.

    ``is_quantized`` says that there are FP8 numbers or scales.
    """
    signs = ((how, tensor.name) for tensor in tensors if (how := _other_method(tensor)))
    how, name = next(signs, ("", ""))
    if how or (is_quantized and not is_readable(raw)):
        said = f"{described_method(raw)} in config.json" if described_method(raw) else ""
        named = ", ".join(filter(None, (repr(name) if name else "", said)))
        raise UnsupportedModelError(
            f"{where} holds weights that are quantized{f' {how}' if how else ''} ({named}), which cannot be read: "
            f"only FP8 ({FP8}, with scales) can. {next_step(raw)}"
        )


def _other_method(tensor: FileTensor) -> str:
    """By what a tensor's name or dtype says that it is quantized, if not to FP8; empty if it says nothing."""
    how = next((how for pattern, how in _OTHERS if pattern.match(tensor.name)), "")
    if not how and tensor.dtype in _OTHER_DTYPES and not tensor.name.endswith(_SUFFIXES):
        how = f"to {tensor.dtype}"
    return how


def _pairs(numbers: list[FileTensor], scales: set[str], where: str) -> dict[FileTensor, str]:
    """The name of the scales of every weight. Raises TensorMismatchError unless all have just one, and all belong."""
    held = {tensor: [tensor.name + end for end in _SUFFIXES if tensor.name + end in scales] for tensor in numbers}
    problems = {
        "of them have no scales": [tensor.name for tensor, names in held.items() if not names],
        "of them have two tensors of scales": [tensor.name for tensor, names in held.items() if len(names) > 1],
        "tensors of scales have no FP8 weight": sorted(scales.difference(*held.values())),
    }
    _raise_any([f"{len(names)} {what}: {listed(names)}" for what, names in problems.items() if names], where)
    return {tensor: names[0] for tensor, names in held.items()}


def _scaled(
    held: Mapping[FileTensor, str], scales: Mapping[str, FileTensor], block_size: BlockShape | None, where: str
) -> tuple[ScaledTensor, ...]:
    """How scales lie over the weights. Raises TensorMismatchError where they do not fit."""
    weights: list[ScaledTensor] = []
    problems: list[str] = []
    blocks = f"blocks of {list(block_size)}" if block_size else "equal blocks"
    for weight, scale in ((weight, scales[name]) for weight, name in held.items()):
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
