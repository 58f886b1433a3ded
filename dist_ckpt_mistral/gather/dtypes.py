"""Names and sizes of element types in torch, safetensors and numpy, and shapes. Its import needs none of the three."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from reprlib import repr as short
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from dist_ckpt_mistral.errors import ConfigError, FormatError

if TYPE_CHECKING:
    import numpy as np

#: torch name (without ``torch.``) -> (name in safetensors 0.8, size in bytes).
_TABLE = {
    "float64": ("F64", 8),
    "float32": ("F32", 4),
    "float16": ("F16", 2),
    "bfloat16": ("BF16", 2),
    "float8_e4m3fn": ("F8_E4M3", 1),
    "float8_e5m2": ("F8_E5M2", 1),
    "int64": ("I64", 8),
    "int32": ("I32", 4),
    "int16": ("I16", 2),
    "int8": ("I8", 1),
    "uint8": ("U8", 1),
    "bool": ("BOOL", 1),
}
_FROM_SAFETENSORS = {name: dtype for dtype, (name, _) in _TABLE.items()}

#: Dtypes of model weights, which ``--dtype`` accepts.
WEIGHT_DTYPES = ("bfloat16", "float16", "float32")
#: All torch names that this package can store.
KNOWN_DTYPES = tuple(_TABLE)
#: Extents in elements.
Shape: TypeAlias = tuple[int, ...]
#: Largest number of elements that is accepted from a file. The bytes of so many elements, and the sum of two such byte
#: counts, fit into 63 bits, as numpy and the operating system require.
MOST: Final = 1 << 59


@dataclass(frozen=True, slots=True)
class TorchDtype:
    """Represents a torch dtype in objects to be pickled: ``TorchDtype("bfloat16")`` becomes ``torch.bfloat16``."""

    name: str


def itemsize_bytes(dtype: str) -> int:
    """Return the size of one element of ``dtype`` (a torch name) in bytes."""
    return _TABLE[dtype][1]


def to_numpy(dtype: str) -> np.dtype[Any]:
    """Return numpy's dtype of a torch name."""
    import ml_dtypes  # noqa: F401, PLC0415  (registers bfloat16 and float8 with numpy; only conversions need numbers)
    import numpy as np  # noqa: PLC0415  (--help needs the names alone)

    return np.dtype(dtype)


def to_safetensors(dtype: str) -> str:
    """Return the safetensors name of a torch name: ``bfloat16`` -> ``BF16``."""
    return _TABLE[dtype][0]


def from_safetensors(name: object, where: str) -> str:
    """Return the torch name of a safetensors name: ``BF16`` -> ``bfloat16``. ``where`` names the tensor in errors."""
    if not isinstance(name, str) or name not in _FROM_SAFETENSORS:
        raise FormatError(
            f"unknown dtype for {where}: expected one of {', '.join(_FROM_SAFETENSORS)}, got {short(name)}"
        )
    return _FROM_SAFETENSORS[name]


def require_known(name: object, where: str) -> str:
    """Return ``name``. Raises FormatError if it is not in ``KNOWN_DTYPES``; ``where`` names the tensor."""
    if not isinstance(name, str) or name not in _TABLE:
        raise FormatError(f"unknown dtype for {where}: expected one of {', '.join(_TABLE)}, got {short(name)}")
    return name


def require_weight_dtype(dtype: str | None) -> None:
    """Raise ConfigError if ``dtype`` is neither None nor in ``WEIGHT_DTYPES``."""
    if dtype is not None and dtype not in WEIGHT_DTYPES:
        raise ConfigError(f"dtype {dtype!r} is not supported: expected one of {', '.join(WEIGHT_DTYPES)}")


def is_countable(shape: Iterable[int]) -> bool:
    """Whether the product of the extents, with 1 in place of 0, is at most ``MOST``."""
    return math.prod(extent or 1 for extent in shape) <= MOST
