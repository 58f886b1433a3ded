"""The quantization that a Hugging Face config.json describes, and whether this package can read such weights.

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

#: Keys of config.json that describe quantization: the second is that of older compressed-tensors, which vLLM reads too;
#: the third is that of MLX (mlx_lm utils.py, quantize_model).
_KEYS: Final = ("quantization_config", "compression_config", "quantization")
#: Key of the language model in a multimodal model's config.json.
_TEXT: Final = "text_config"
#: Formats of compressed-tensors with FP8 weights beside their scales.
_FLOAT_FORMATS: Final = ("float-quantized", "naive-quantized")
_HUB_ID: Final = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def quantization_of(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """The quantization in a config.json or in its ``text_config``; empty if neither describes one."""
    text = raw.get(_TEXT)
    described = next((raw[key] for key in _KEYS if raw.get(key)), None)
    if described is None:
        return quantization_of(text) if isinstance(text, Mapping) else {}
    return described if isinstance(described, Mapping) else {"quant_method": described}


def unquantized(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a config.json without its quantization, for weights that have been dequantized."""
    kept = {key: value for key, value in raw.items() if key not in _KEYS or not value}
    if isinstance(kept.get(_TEXT), Mapping):
        kept[_TEXT] = unquantized(kept[_TEXT])
    return kept


def described_method(raw: Mapping[str, Any]) -> str:
    """The name of the quantization in a config.json, for messages; empty if it describes none."""
    described = quantization_of(raw)
    layout = described.get("format")
    form = f", format {layout!r}" if layout is not None else ""
    return f"quant_method {described.get('quant_method')!r}{form}" if described else ""


def is_readable(raw: Mapping[str, Any]) -> bool:
    """Whether this package reads weights with the quantization of a config.json; true if it describes none."""
    described = quantization_of(raw)
    method = described.get("quant_method")
    compressed = method == "compressed-tensors" and described.get("format") in _FLOAT_FORMATS
    return not described or method == "fp8" or compressed


def next_step(raw: Mapping[str, Any]) -> str:
    """The advice in an error about quantized weights that cannot be read."""
    origin = raw.get("_name_or_path")
    named = isinstance(origin, str) and _HUB_ID.fullmatch(origin)
    return f"Start from the unquantized release{f': config.json names {origin} as its origin' if named else ''}."


def weight_block_size(raw: Mapping[str, Any], where: str) -> BlockShape | None:
    """(rows, columns) that share one scale; None if config.json has none, as for one scale per tensor.

    Raises ConfigError for anything but two positive integers or null; ``where`` names the file in the message.
    """
    block = quantization_of(raw).get("weight_block_size")
    if block is None:
        return None
    if not isinstance(block, list) or len(block) != 2 or not all(map(is_positive_int, block)):  # noqa: PLR2004  (rows and columns)
        raise ConfigError(f"weight_block_size in {where}: expected two positive integers or null, got {block!r}")
    return block[0], block[1]
