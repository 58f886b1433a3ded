"""Present a matrix plus products of low rank, W + scale * B A, as a virtual file, so that the plan can copy it.

A value is ``float32(w) + scale * (B A)`` in float32, rounded once more, to the element type of the file. Each element
of B A is a sum over the rank, in its order, of products that are added with one rounding each (fused multiply-add).
That is what torch 2.13 computes on x86 CPUs, bit for bit, and it does not depend on how the matrices are divided;
numpy's own matrix product does. A fused multiply-add is computed in float64 and rounded to float32: two roundings,
which give another result than one where the first ends halfway between two float32 values (an estimate: one in 2**29).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from dist_ckpt_mistral.errors import FormatError
from dist_ckpt_mistral.gather import dtypes
from dist_ckpt_mistral.gather.dtypes import Shape
from dist_ckpt_mistral.storage.local import SourceFiles

FloatArray = npt.NDArray[np.float32]
#: Elements of B A that are computed at a time: their float64 values fit in a core's L2 cache.
_BLOCK_ELEMS: Final = 32 << 10


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Product:
    """``scale * (b @ a)``, to be added to the box of a matrix that begins at ``row`` and ``column``.

    ``b`` is float32 ``[rows, rank]``, ``a`` float32 ``[rank, columns]``.
    """

    row: int
    column: int
    scale: float
    b: FloatArray
    a: FloatArray

    def add_to(self, values: FloatArray, first_row: int) -> None:
        """Add it to ``values``, which are whole rows of the matrix from ``first_row`` on."""
        columns = slice(self.column, self.column + self.a.shape[1])
        low, high = max(0, first_row - self.row), min(len(self.b), first_row + len(values) - self.row)  # rows of b
        a = self.a.astype(np.float64)
        block_rows = max(1, _BLOCK_ELEMS // max(1, a.shape[1]))
        for start in range(low, high, block_rows):
            end, moved = min(high, start + block_rows), self.row - first_row
            values[moved + start : moved + end, columns] += _product(self.b[start:end], a) * np.float32(self.scale)


def _product(b: FloatArray, a: npt.NDArray[np.float64]) -> FloatArray:
    """Return ``b @ a``, with the rounding that this module describes."""
    total = np.zeros((len(b), a.shape[1]), dtype=np.float32)
    wide = np.empty(total.shape, dtype=np.float64)
    for column, row in zip(b.T.astype(np.float64), a, strict=True):
        np.multiply(column[:, np.newaxis], row, out=wide)
        np.add(wide, total, out=wide)
        total[...] = wide
    return total


@dataclass(frozen=True, slots=True)
class ZerosFile:
    """A virtual file (``DerivedFile``) of zeros, of any length."""

    def read_into(self, files: SourceFiles, position: int, buffer: memoryview) -> None:  # noqa: ARG002
        """Fill ``buffer`` with zeros."""
        buffer[:] = bytes(len(buffer))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MergedFile:
    """A virtual file (``DerivedFile``): a stored matrix with ``products`` added, in ``dtype``, in row-major order.

    The matrix of ``stored_dtype`` and ``shape`` (rows and columns, in elements) begins at byte ``position`` of file
    ``file``. Only whole values can be read. ``where`` names the matrix in errors.
    """

    file: int
    position: int
    stored_dtype: str
    shape: Shape
    dtype: str
    products: Sequence[Product]
    where: str

    def read_into(self, files: SourceFiles, position: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with values, from byte ``position`` of this file on.

        Raises FormatError if a finite value becomes infinite.
        """
        values = np.frombuffer(buffer, dtype=dtypes.to_numpy(self.dtype))
        columns, first = self.shape[1], position // values.itemsize
        low_row, high_row = first // columns, -(-(first + values.size) // columns)
        stored = np.empty(values.size, dtype=dtypes.to_numpy(self.stored_dtype))
        files.read_into(self.file, self.position + first * stored.itemsize, stored.view(np.uint8).data)
        rows = np.zeros((high_row - low_row, columns), dtype=np.float32)
        wanted = rows.reshape(-1)[first - low_row * columns :][: values.size]
        wanted[:] = stored
        was_finite = np.isfinite(wanted).all()
        for product in self.products:
            product.add_to(rows, low_row)
        with np.errstate(over="ignore", invalid="ignore"):
            values[...] = wanted
        if was_finite and not np.isfinite(values).all():
            raise FormatError(
                f"{self.where} has values that {self.dtype} cannot hold once the adapter is merged. Give --dtype "
                "float32 or --dtype bfloat16."
            )
