"""From one element type to another: the values, how many of them did not survive, and types that hold all of another.

Values are rounded to nearest even, float64 to float32 first, and what is too large becomes infinite: bit for bit as
``tensor.to(dtype)`` of torch 2.13. NaN stays NaN. Its sign and payload may change, and differ from torch's, whose own
depend on the processor and on where in a tensor the element stands.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from dist_ckpt_mistral.gather import dtypes
from dist_ckpt_mistral.gather.index import IndexedTensor
from dist_ckpt_mistral.storage.local import SourceFiles

_FLOATS: Final = ("float16", "bfloat16", "float32", "float64")
#: Pairs of a dtype and another that has all of its range: between these no value is lost.
_WITHIN: Final = {
    ("float16", "bfloat16"),
    *((narrow, wide) for narrow in ("float16", "bfloat16") for wide in ("float32", "float64")),
    ("float32", "float64"),
}


class Lost(NamedTuple):
    """How many values a conversion destroyed: finite ones that became infinite or NaN, others that became zero."""

    overflowed: int = 0
    vanished: int = 0

    def plus(self, other: Lost) -> Lost:
        """Those of both."""
        return Lost(self.overflowed + other.overflowed, self.vanished + other.vanished)


NOTHING: Final = Lost()


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The numpy dtype of a torch name."""
    import ml_dtypes  # noqa: F401, PLC0415  (registers bfloat16 and float8; only conversions need it)

    return np.dtype(name)


def cast(band: memoryview, source: str, target: str) -> tuple[memoryview, Lost]:
    """Values of dtype ``source`` (a torch name) in dtype ``target``, and how many of them were lost."""
    if source == target:
        return band, NOTHING
    values = np.frombuffer(band, dtype=numpy_dtype(source))
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = values.astype(np.float32) if source == "float64" else values  # as torch: c10/util/Half.h takes float
        converted = rounded.astype(numpy_dtype(target))
        lost = NOTHING if (source, target) in _WITHIN else _lost(values, converted)
    return converted.view(np.uint8).data, lost


def _lost(values: npt.NDArray[Any], converted: npt.NDArray[Any]) -> Lost:
    """Most bands end without a zero and an infinity, which the largest and the smallest of their bits tell at once."""
    bits = converted.view(f"u{converted.itemsize}") << 1  # without the sign
    infinity = np.array(np.inf, converted.dtype).view(bits.dtype) << 1
    if bits.max() < infinity and bits.min() > 0:
        return NOTHING
    return Lost(
        overflowed=int(np.count_nonzero((bits >= infinity) & np.isfinite(values))),
        vanished=int(np.count_nonzero((bits == 0) & (values != 0))),
    )


def widest(names: Sequence[str]) -> str | None:
    """The least dtype that holds all values of these dtypes; None if there is none, as for integers among floats."""
    if not set(names) <= {*_FLOATS}:
        return None
    return next(
        wide for wide in ("float32", "float64") if all(name == wide or (name, wide) in _WITHIN for name in names)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class WidenedFile:
    """Values of ``stored_dtype`` from byte ``position`` of file ``file`` on, as a file of them in the wider ``dtype``.

    A ``DerivedFile``. Buffers hold whole values.
    """

    file: int
    position: int
    stored_dtype: str
    dtype: str

    def read_into(self, files: SourceFiles, position: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with values, from byte ``position`` of them on."""
        itemsize, stored_itemsize = dtypes.itemsize_bytes(self.dtype), dtypes.itemsize_bytes(self.stored_dtype)
        stored = np.empty(len(buffer) // itemsize, dtype=numpy_dtype(self.stored_dtype))
        files.read_into(self.file, self.position + position // itemsize * stored_itemsize, stored.view(np.uint8).data)
        np.frombuffer(buffer, dtype=numpy_dtype(self.dtype))[:] = stored


def widened(tensor: IndexedTensor, dtype: str, first_file: int) -> tuple[IndexedTensor, list[WidenedFile]]:
    """``tensor`` in a wider ``dtype``: each chunk is a file, counted on from ``first_file``."""
    files = [
        WidenedFile(file=file, position=position, stored_dtype=tensor.dtype, dtype=dtype)
        for file, position in zip(tensor.files.tolist(), tensor.positions.tolist(), strict=True)
    ]
    numbers = np.arange(first_file, first_file + len(files), dtype=np.int64)
    return replace(tensor, dtype=dtype, files=numbers, positions=np.zeros_like(numbers)), files
