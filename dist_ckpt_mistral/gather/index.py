"""The tensor index that every reader returns: the tensors of a checkpoint, and the position of their bytes in files."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

import numpy as np

from dist_ckpt_mistral.errors import FormatError, PlanError
from dist_ckpt_mistral.gather import dtypes
from dist_ckpt_mistral.gather.boxes import (
    IntArray,
    Overlaps,
    equal_rows,
    grid_cuts,
    grid_overlaps,
    intersect,
    require_tiling,
)
from dist_ckpt_mistral.gather.dtypes import Shape
from dist_ckpt_mistral.storage.local import DerivedFile


@dataclass(frozen=True, kw_only=True, eq=False)
class IndexedTensor:
    """A global tensor and its chunks. Each chunk is a contiguous row-major array in one file.

    ``dtype`` is a torch name, ``global_shape`` is in elements. ``offsets`` and ``shapes`` (int64 ``[chunks, ndim]``)
    are the chunks' boxes in elements, in ascending order of the offsets. ``files`` (int64 ``[chunks]``) are the numbers
    of their files in the index, and ``positions`` (int64 ``[chunks]``) their first bytes in these files.
    """

    name: str
    dtype: str
    global_shape: Shape
    offsets: IntArray
    shapes: IntArray
    files: IntArray
    positions: IntArray

    @classmethod
    def build(
        cls,
        name: str,
        dtype: str,
        global_shape: Shape,
        chunks: Iterable[tuple[Shape, Shape, int, int]],
    ) -> IndexedTensor:
        """Make a tensor from chunks ``(offset, shape, file, position)`` in any order."""
        rows = sorted(chunks)
        ndim = len(global_shape)
        return cls(
            name=name,
            dtype=dtype,
            global_shape=global_shape,
            offsets=np.array([row[0] for row in rows], dtype=np.int64).reshape(len(rows), ndim),
            shapes=np.array([row[1] for row in rows], dtype=np.int64).reshape(len(rows), ndim),
            files=np.array([row[2] for row in rows], dtype=np.int64),
            positions=np.array([row[3] for row in rows], dtype=np.int64),
        )

    @classmethod
    def whole(cls, name: str, dtype: str, shape: Shape, *, file: int, position: int) -> IndexedTensor:
        """Make a tensor that is stored in one chunk."""
        return cls.build(name, dtype, shape, [((0,) * len(shape), shape, file, position)])

    @property
    def num_bytes(self) -> int:
        """Size of the global tensor in bytes."""
        return math.prod(self.global_shape) * dtypes.itemsize_bytes(self.dtype)

    @property
    def num_chunks(self) -> int:
        """Number of stored chunks."""
        return len(self.files)

    def shares_bytes(self, other: IndexedTensor) -> bool:
        """Whether another tensor of the same index has the same chunks at the same positions."""
        columns = ("offsets", "shapes", "files", "positions")
        return self.dtype == other.dtype and all(
            np.array_equal(getattr(self, name), getattr(other, name)) for name in columns
        )

    @functools.cached_property
    def _cuts(self) -> tuple[IntArray, ...] | None:
        """The cuts of each axis if the chunks are the cells of a grid."""
        return grid_cuts(self.offsets, self.shapes, self.global_shape)

    def require_whole(self, what: str) -> None:
        """Raise PlanError unless the chunks cover every element exactly once. ``what`` begins the message."""
        if self._cuts is None:  # the cells of a grid cover every element once
            require_tiling(self.offsets, self.shapes, self.global_shape, what)

    def overlaps(self, lows: IntArray, highs: IntArray) -> Overlaps:
        """Return the overlaps of the boxes ``[lows, highs)`` (in elements, ``[boxes, ndim]``) with the chunks."""
        if self._cuts is not None:
            return grid_overlaps(lows, highs, self._cuts)
        return intersect(lows, highs, self.offsets, self.offsets + self.shapes)


class JoinedTensors:
    """The chunks of several whole tensors with equally many axes as one table: those of the first tensor come first.

    A model has thousands of tensors, many of them in one chunk. numpy then takes the boxes of all of them at once.
    """

    def __init__(self, tensors: Sequence[IndexedTensor]) -> None:
        """Join ``tensors``. One that is repeated has its chunks in the table once."""
        self._tensors = tuple(tensors)
        joined = dict.fromkeys(tensors)
        rows = dict(zip(joined, accumulate((tensor.num_chunks for tensor in joined), initial=0), strict=False))
        self.first_rows = np.array([rows[tensor] for tensor in tensors], dtype=np.int64)
        self.offsets = np.concatenate([tensor.offsets for tensor in rows])
        self.shapes = np.concatenate([tensor.shapes for tensor in rows])
        self.files = np.concatenate([tensor.files for tensor in rows])
        self.positions = np.concatenate([tensor.positions for tensor in rows])

    def overlaps(self, tensors: IntArray, lows: IntArray, highs: IntArray) -> Overlaps:
        """Return the overlaps of boxes inside the tensors with their chunks, which are numbered as in this table.

        ``tensors`` (int64 ``[boxes]``) are the numbers of the boxes' tensors, in the order in which they were given.
        """
        num_chunks = np.array([tensor.num_chunks for tensor in self._tensors], dtype=np.int64)[tensors]
        single = np.flatnonzero((num_chunks == 1) & (lows < highs).all(axis=1))  # a box without elements meets nothing
        parts = [Overlaps(single, self.first_rows[tensors[single]], lows[single], highs[single])]
        several = np.flatnonzero(num_chunks > 1)  # a tensor without chunks has the first row of the one after it
        for equal in equal_rows(self.first_rows[tensors[several], None]):
            boxes = several[equal]
            tensor = tensors[boxes[0]]
            found = self._tensors[tensor].overlaps(lows[boxes], highs[boxes])
            parts.append(Overlaps(boxes[found.box], self.first_rows[tensor] + found.chunk, found.low, found.high))
        return Overlaps(*map(np.concatenate, zip(*parts, strict=True)))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TensorIndex:
    """Tensors by name, and the files of their chunks. Files ``len(files)`` and up are the ``derived`` ones."""

    files: tuple[Path, ...]
    tensors: Mapping[str, IndexedTensor]
    derived: tuple[DerivedFile, ...] = ()

    def joined(self, other: TensorIndex, names: Iterable[str]) -> TensorIndex:
        """Return this index with the tensors ``names`` of another one appended. They must be new to this one.

        Raises PlanError if this index has derived files, or one of the tensors needs them.
        """
        num_files = len(self.files)
        added = {name: replace(other.tensors[name], files=other.tensors[name].files + num_files) for name in names}
        if self.derived or any(other.tensors[name].files.max(initial=0) >= len(other.files) for name in added):
            raise PlanError("indexes of derived files cannot be joined")
        return TensorIndex(files=(*self.files, *other.files), tensors={**self.tensors, **added})


def unblocked(stored: IndexedTensor, shape: Shape) -> IndexedTensor:
    """Return a tensor of ``shape`` (in elements) that is ``stored`` as flat blocks, with chunks for the same bytes.

    Each stored chunk is a range of the elements of one block; in ``shape``, it may consist of several boxes. Raises
    FormatError if the blocks do not fit the shape, or a chunk spans more than one block.
    """
    block = _block_shape(stored, shape)
    if (stored.shapes[:, :-1] != 1).any():
        raise FormatError(f"a chunk of {stored.name!r} spans more than one block of {list(block)}")
    itemsize = dtypes.itemsize_bytes(stored.dtype)
    columns = (stored.offsets.tolist(), stored.shapes[:, -1].tolist(), stored.files.tolist(), stored.positions.tolist())
    return IndexedTensor.build(
        stored.name,
        stored.dtype,
        shape,
        [
            (
                tuple(i * extent + inner for i, extent, inner in zip(block_index, block, offset, strict=True)),
                extents,
                file,
                position + (at - start) * itemsize,
            )
            for (*block_index, start), count, file, position in zip(*columns, strict=True)
            for offset, extents, at in boxes_of_range(block, start, start + count)
        ],
    )


def _block_shape(stored: IndexedTensor, shape: Shape) -> Shape:
    """Return the shape of one block in elements."""
    *grid, numel = stored.global_shape
    if len(grid) == len(shape) and all(blocks and not size % blocks for size, blocks in zip(shape, grid, strict=True)):
        block = tuple(size // blocks for size, blocks in zip(shape, grid, strict=True))
        if math.prod(block) == numel:
            return block
    raise FormatError(
        f"{stored.name!r} is stored as {list(stored.global_shape)}, which are not equal blocks of {list(shape)}. "
        "The checkpoint's metadata contradicts itself."
    )


def as_range_of_blocks(shape: Shape, offset: Shape, extents: Shape) -> tuple[Shape, Shape, Shape]:
    """Return the stored (shape, offset, extents) of a block in a tensor that is stored as flat blocks.

    ``shape`` is the tensor's own, ``offset`` and ``extents`` are the block's in it. The inverse of ``unblocked``.
    """
    numel = math.prod(extents)
    grid = tuple(size // extent for size, extent in zip(shape, extents, strict=True))
    block_index = tuple(start // extent for start, extent in zip(offset, extents, strict=True))
    return (*grid, numel), (*block_index, 0), (*(1,) * len(grid), numel)


def boxes_of_range(shape: Shape, start: int, stop: int) -> Iterator[tuple[Shape, Shape, int]]:
    """Split the elements ``[start, stop)`` of a row-major array into as few boxes as possible, in their order.

    Yields (offset, extents, number of the first element). On every axis these are part of a row, whole rows, and part
    of a row.
    """
    if start >= stop:
        return
    if len(shape) < 2:  # noqa: PLR2004  (a range of a vector is a box)
        yield (start,) * len(shape), (stop - start,) * len(shape), start
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row
    if first > last:  # the range lies inside one row
        yield from _within_row(shape, last, start, stop)
        return
    yield from _within_row(shape, first - 1, start, first * row)
    if first < last:
        yield (first, *(0,) * (len(shape) - 1)), (last - first, *shape[1:]), first * row
    yield from _within_row(shape, last, last * row, stop)


def _within_row(shape: Shape, row: int, start: int, stop: int) -> Iterator[tuple[Shape, Shape, int]]:
    """Yield the boxes of a range that lies inside one row of the first axis."""
    before = row * math.prod(shape[1:])
    for offset, extents, at in boxes_of_range(shape[1:], start - before, stop - before):
        yield (row, *offset), (1, *extents), before + at
