"""Tensors as regular grids of cells, each one contiguous run of stored bytes: what chunked array formats ask for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np

from dist_ckpt_mistral.errors import UnsupportedFormatError
from dist_ckpt_mistral.gather import dtypes
from dist_ckpt_mistral.gather.boxes import IntArray, row_major_strides, unrolled
from dist_ckpt_mistral.gather.dtypes import Shape
from dist_ckpt_mistral.gather.index import IndexedTensor, TensorIndex
from dist_ckpt_mistral.gather.links import Link
from dist_ckpt_mistral.gather.plan import only_dtype

#: A tensor of more cells would make an index that is no longer small.
MOST_CELLS: Final = 1 << 17
#: Cells are read whole: larger ones would read much more than is asked for.
_MOST_CELL_BYTES: Final = 8 << 20


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CellGrid:
    """A tensor of ``shape``, cut into cells of ``cell_shape``, all of the same size; the last may reach beyond it.

    ``cells`` (int64 ``[cells, ndim]``) are the places in the grid. ``files`` and ``positions`` (int64 ``[cells]``) are
    the number of the file of each cell and its first byte there, in ``num_bytes`` row-major bytes of ``dtype``.
    """

    shape: Shape
    cell_shape: Shape
    dtype: str
    cells: IntArray
    files: IntArray
    positions: IntArray

    @property
    def num_bytes(self) -> int:
        """Size of one cell in bytes."""
        return int(np.prod(self.cell_shape)) * dtypes.itemsize_bytes(self.dtype)


class _Regions(NamedTuple):
    """The overlaps of links with stored chunks ``[regions]``: boxes of the target, and where each begins in its file.

    ``low`` and ``extent`` have the axes of the target. ``chunk`` are the extents of the stored chunk on these axes, 1
    on those that it does not have, and ``strides`` its strides in bytes, 0 there.
    """

    low: IntArray
    extent: IntArray
    chunk: IntArray
    strides: IntArray
    files: IntArray
    positions: IntArray


def cell_grid(index: TensorIndex, name: str, shape: Shape, links: Sequence[Link]) -> CellGrid:
    """Cut the tensor ``name`` into cells of one size that are contiguous where they are stored.

    They are the largest of up to 8 MiB. ``links`` lead to the tensor from those of ``index`` and cover it; they may
    reach beyond its end on the first axis.

    Raises:
        UnsupportedFormatError: That takes more than ``MOST_CELLS`` cells.
        TensorMismatchError: Its parts are stored in several dtypes.
    """
    dtype = only_dtype(index, links)
    parts = [_regions(index.tensors[link.source], link, len(shape)) for link in links]
    regions = _Regions(*map(np.concatenate, zip(*parts, strict=True)))
    step = np.gcd.reduce(np.concatenate([regions.low, regions.low + regions.extent]), axis=0)
    cut = np.flatnonzero((regions.chunk > step).any(axis=0))  # axes on which a cell is only a part of its chunk
    if cut.size:
        step[: cut[-1]] = 1
    _divide(step, dtypes.itemsize_bytes(dtype))
    counts = regions.extent // step
    if (total := int(counts.prod(axis=1).sum())) > MOST_CELLS:
        raise UnsupportedFormatError(
            f"{name!r} would be cut into {total} cells of {step.tolist()}: expected at most {MOST_CELLS}"
        )
    region, at = unrolled(counts)
    cells = regions.low[region] // step + at
    used = (cells * step < np.array(shape)).all(axis=1)
    region, at = region[used], at[used]
    return CellGrid(
        shape=shape,
        cell_shape=tuple(step.tolist()),
        dtype=dtype,
        cells=cells[used],
        files=regions.files[region],
        positions=regions.positions[region] + (at * step * regions.strides[region]).sum(axis=1),
    )


def _divide(step: IntArray, itemsize: int) -> None:
    """Divide contiguous cells of extents ``step`` into equal contiguous parts of at most ``_MOST_CELL_BYTES``."""
    for axis in range(len(step)):  # a part of the first axis that has an extent is contiguous
        num_bytes = int(step.prod()) * itemsize
        if num_bytes <= _MOST_CELL_BYTES:
            return
        extent = int(step[axis])
        least = min(extent, -(-num_bytes // _MOST_CELL_BYTES))
        step[axis] = extent // next(parts for parts in range(least, extent + 1) if extent % parts == 0)


def _regions(stored: IndexedTensor, link: Link, ndim: int) -> _Regions:
    """The overlaps of one link with the chunks of its source."""
    shared, source_ndim = len(link.shape), len(stored.global_shape)
    low = np.array([link.source_offset], dtype=np.int64)
    extent = np.ones_like(low)
    extent[0, source_ndim - shared :] = link.shape
    found = stored.overlaps(low, low + extent)
    strides = row_major_strides(stored.shapes[found.chunk], dtypes.itemsize_bytes(stored.dtype))
    inside = found.low - stored.offsets[found.chunk]
    target = np.tile(np.array(link.target_offset, dtype=np.int64), (len(found.chunk), 1))
    target[:, ndim - shared :] += (found.low - low)[:, source_ndim - shared :]
    return _Regions(
        low=target,
        extent=_padded((found.high - found.low)[:, source_ndim - shared :], ndim, 1),
        chunk=_padded(stored.shapes[found.chunk][:, source_ndim - shared :], ndim, 1),
        strides=_padded(strides[:, source_ndim - shared :], ndim, 0),
        files=stored.files[found.chunk],
        positions=stored.positions[found.chunk] + (inside * strides).sum(axis=1),
    )


def _padded(columns: IntArray, ndim: int, value: int) -> IntArray:
    """``columns`` ``[n, axes]`` with leading axes of ``value``, so that there are ``ndim``."""
    padded = np.full((len(columns), ndim), value, dtype=np.int64)
    padded[:, ndim - columns.shape[1] :] = columns
    return padded
