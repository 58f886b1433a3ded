"""Convert values to another element type, count the values that are lost, and find a type that holds all values.

Results are bit for bit those of ``tensor.to(dtype)`` of torch 2.13: values are rounded to nearest even (float64 to
float32 first), and values that are too large become infinite. NaN stays NaN, but its sign and payload may differ from
torch's, which depend on the processor and on the position in the tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from dist_ckpt_mistral.gather import dtypes
from dist_ckpt_mistral.gather.index import IndexedTensor
from dist_ckpt_mistral.storage.local import Readable
from dist_ckpt_mistral.storage.remote_reads import Wanted

_FLOATS: Final = ("float16", "bfloat16", "float32", "float64")
#: (dtype, another one with at least its range): no value overflows or becomes zero.
_WITHIN: Final = {
    ("float16", "bfloat16"),
    *((narrow, wide) for narrow in ("float16", "bfloat16") for wide in ("float32", "float64")),
    ("float32", "float64"),
}


class Lost(NamedTuple):
    """Numbers of values lost in a conversion: finite ones that became infinite or NaN, others that became zero."""

    overflowed: int = 0
    vanished: int = 0

    def plus(self, other: Lost) -> Lost:
        """Add the numbers of two conversions."""
        return Lost(self.overflowed + other.overflowed, self.vanished + other.vanished)


NOTHING: Final = Lost()


def cast(band: memoryview, source: str, target: str) -> tuple[memoryview, Lost]:
    """Convert values of dtype ``source`` (a torch name) to ``target``, and count those that are lost."""
    if source == target:
        return band, NOTHING
    values = np.frombuffer(band, dtype=dtypes.to_numpy(source))
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = values.astype(np.float32) if source == "float64" else values  # as torch: c10/util/Half.h takes float
        converted = rounded.astype(dtypes.to_numpy(target))
        lost = NOTHING if (source, target) in _WITHIN else _lost(values, converted)
    return converted.view(np.uint8).data, lost


def _lost(values: npt.NDArray[Any], converted: npt.NDArray[Any]) -> Lost:
    """Count the values that a conversion lost."""
    bits = converted.view(f"u{converted.itemsize}") << 1  # without the sign
    infinity = np.array(np.inf, converted.dtype).view(bits.dtype) << 1
    if bits.max() < infinity and bits.min() > 0:  # neither zero nor infinity nor NaN, as in most bands
        return NOTHING
    return Lost(
        overflowed=int(np.count_nonzero((bits >= infinity) & np.isfinite(values))),
        vanished=int(np.count_nonzero((bits == 0) & (values != 0))),
    )


def widest(names: Sequence[str]) -> str | None:
    """Return float32 or float64, the smaller one that holds all values of these dtypes; None if not all are floats."""
    if not set(names) <= {*_FLOATS}:
        return None
    return next(
        wide for wide in ("float32", "float64") if all(name == wide or (name, wide) in _WITHIN for name in names)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class WidenedFile:
    """A virtual file (``DerivedFile``): values of ``stored_dtype`` in another file, converted to a wider ``dtype``.

    The stored values begin at byte ``position`` of file ``file``. Only whole values can be read.
    """

    file: int
    position: int
    stored_dtype: str
    dtype: str

    def read_into(self, files: Readable, position: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with converted values, from byte ``position`` of this file on."""
        itemsize, stored_itemsize = dtypes.itemsize_bytes(self.dtype), dtypes.itemsize_bytes(self.stored_dtype)
        stored = np.empty(len(buffer) // itemsize, dtype=dtypes.to_numpy(self.stored_dtype))
        files.read_into(self.file, self.position + position // itemsize * stored_itemsize, stored.view(np.uint8).data)
        np.frombuffer(buffer, dtype=dtypes.to_numpy(self.dtype))[:] = stored

    def stored(self, position: int, num_bytes: int) -> list[Wanted]:
        """Return the stored bytes of converted values."""
        itemsize, stored_itemsize = dtypes.itemsize_bytes(self.dtype), dtypes.itemsize_bytes(self.stored_dtype)
        start = self.position + position // itemsize * stored_itemsize
        return [Wanted(self.file, start, start + num_bytes // itemsize * stored_itemsize)]


def widened(tensor: IndexedTensor, dtype: str, first_file: int) -> tuple[IndexedTensor, list[WidenedFile]]:
    """Return ``tensor`` in a wider ``dtype``, and one virtual file per chunk, numbered from ``first_file`` on."""
    files = [
        WidenedFile(file=file, position=position, stored_dtype=tensor.dtype, dtype=dtype)
        for file, position in zip(tensor.files.tolist(), tensor.positions.tolist(), strict=True)
    ]
    numbers = np.arange(first_file, first_file + len(files), dtype=np.int64)
    return replace(tensor, dtype=dtype, files=numbers, positions=np.zeros_like(numbers)), files
