"""What a Hugging Face config.json says of quantized weights, and which of them can be read. The tensors tell more.

Sources: ``quantization_config`` of transformers 5.23 (utils/quantization_config.py), which Mistral's FP8 releases have
too, and the ``compression_config`` of older compressed-tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final, TypeAlias

from dist_ckpt_mistral.errors import ConfigError
from dist_ckpt_mistral.model.config.parts import is_positive_int

BlockShape: TypeAlias = tuple[int, int]

#: Where a config.json speaks of quantization: older compressed-tensors had a key of its own, which vLLM reads too, and
#: so has MLX (mlx_lm utils.py, quantize_model).
_KEYS: Final = ("quantization_config", "compression_config", "quantization")
#: Where the rest of a multimodal model's config.json describes its language model.
_TEXT: Final = "text_config"
#: What compressed-tensors calls FP8 weights beside their scales.
_FLOAT_FORMATS: Final = ("float-quantized", "naive-quantized")
_HUB_ID: Final = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def quantization_of(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a config.json, or the part of it about the language model, says of quantization; empty for nothing."""
    text = raw.get(_TEXT)
    found = next((raw[key] for key in _KEYS if raw.get(key)), None)
    if found is None:
        return quantization_of(text) if isinstance(text, Mapping) else {}
    return found if isinstance(found, Mapping) else {"quant_method": found}


def unquantized(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json that says nothing of quantization, as is true of weights once they are dequantized."""
    kept = {key: value for key, value in raw.items() if key not in _KEYS or not value}
    if isinstance(kept.get(_TEXT), Mapping):
        kept[_TEXT] = unquantized(kept[_TEXT])
    return kept


def described_method(raw: Mapping[str, Any]) -> str:
    """How a config.json calls the quantization that it describes, in an error or a note; empty if it describes none."""
    described = quantization_of(raw)
    layout = described.get("format")
    form = f", format {layout!r}" if layout is not None else ""
    return f"quant_method {described.get('quant_method')!r}{form}" if described else ""


def is_readable(raw: Mapping[str, Any]) -> bool:
    """Whether weights can be read that are quantized as a config.json describes, which may say nothing of it."""
    described = quantization_of(raw)
    method = described.get("quant_method")
    compressed = method == "compressed-tensors" and described.get("format") in _FLOAT_FORMATS
    return not described or method == "fp8" or compressed


def next_step(raw: Mapping[str, Any]) -> str:
    """What to do about quantized weights that cannot be read."""
    origin = raw.get("_name_or_path")
    named = isinstance(origin, str) and _HUB_ID.fullmatch(origin)
    return f"Start from the unquantized release{f': config.json names {origin} as its origin' if named else ''}."


def weight_block_size(raw: Mapping[str, Any], where: str) -> BlockShape | None:
    """Rows and columns that share one scale; None where config.json does not say, as for one scale per tensor."""
    told = quantization_of(raw).get("weight_block_size")
    if told is None:
        return None
    if not isinstance(told, list) or len(told) != 2 or not all(map(is_positive_int, told)):  # noqa: PLR2004  (rows and columns)
        raise ConfigError(f"weight_block_size in {where}: expected two positive integers or null, got {told!r}")
    return told[0], told[1]
