"""What every reader yields: the tensors of a checkpoint and where the bytes of each lie."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from dist_ckpt_mistral.errors import FormatError, PlanError
from dist_ckpt_mistral.gather import dtypes
from dist_ckpt_mistral.gather.boxes import IntArray, Meets, grid_cuts, grid_meets, intersect, require_tiling
from dist_ckpt_mistral.gather.dtypes import Shape
from dist_ckpt_mistral.storage.local import DerivedFile


@dataclass(frozen=True, kw_only=True, eq=False)
class IndexedTensor:
    """One global tensor and the chunks that store it; every chunk is a contiguous row-major array in one file.

    ``dtype`` is a torch name and ``global_shape`` in elements. Of chunk ``i``, ``offsets[i]`` and ``shapes[i]`` (int64
    ``[chunks, ndim]``) are its box in elements, ``files[i]`` the number of its file in the index and ``positions[i]``
    the byte in that file where it starts. Chunks are in ascending order of their offsets.
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
        """From chunks ``(offset, shape, file, position)`` in any order."""
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
        """A tensor that lies in one piece in one file."""
        return cls.build(name, dtype, shape, [((0,) * len(shape), shape, file, position)])

    @property
    def num_bytes(self) -> int:
        """Size of the global tensor."""
        return math.prod(self.global_shape) * dtypes.itemsize_bytes(self.dtype)

    @property
    def num_chunks(self) -> int:
        """Number of stored chunks."""
        return len(self.files)

    def shares_bytes(self, other: IndexedTensor) -> bool:
        """Whether another tensor of the same index lies in the same places."""
        columns = ("offsets", "shapes", "files", "positions")
        return self.dtype == other.dtype and all(
            np.array_equal(getattr(self, name), getattr(other, name)) for name in columns
        )

    @functools.cached_property
    def _cuts(self) -> tuple[IntArray, ...] | None:
        return grid_cuts(self.offsets, self.shapes, self.global_shape)

    def require_whole(self, what: str) -> None:
        """Raise PlanError, which begins with ``what``, unless the chunks cover every element exactly once."""
        if self._cuts is None:  # the cells of a grid do
            require_tiling(self.offsets, self.shapes, self.global_shape, what)

    def meeting(self, lows: IntArray, highs: IntArray) -> Meets:
        """The chunks that meet the boxes ``[lows, highs)`` (in elements, ``[boxes, ndim]``), and where."""
        if self._cuts is not None:
            return grid_meets(lows, highs, self._cuts)
        return intersect(lows, highs, self.offsets, self.offsets + self.shapes)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TensorIndex:
    """Tensors by name, and the files that their chunks lie in: some may be ``derived``, counted on from ``files``."""

    files: tuple[Path, ...]
    tensors: Mapping[str, IndexedTensor]
    derived: tuple[DerivedFile, ...] = ()

    def joined(self, other: TensorIndex, names: Iterable[str]) -> TensorIndex:
        """This index with the tensors ``names`` of another one behind it, which this one does not have.

        Raises PlanError if either takes derived files to read them.
        """
        files_before = len(self.files)
        added = {name: replace(other.tensors[name], files=other.tensors[name].files + files_before) for name in names}
        if self.derived or any(other.tensors[name].files.max(initial=0) >= len(other.files) for name in added):
            raise PlanError("indexes of derived files cannot be joined")
        return TensorIndex(files=(*self.files, *other.files), tensors={**self.tensors, **added})


def in_own_shape(stored: IndexedTensor, shape: Shape) -> IndexedTensor:
    """The tensor of ``shape`` (in elements) that is ``stored`` as ranges of blocks: more chunks, of the same bytes.

    Raises FormatError where blocks do not fit the shape, or a chunk reaches over more than one block.
    """
    block = _block(stored, shape)
    if (stored.shapes[:, :-1] != 1).any():
        raise FormatError(f"a chunk of {stored.name!r} reaches over more than one block of {list(block)}")
    itemsize = dtypes.itemsize_bytes(stored.dtype)
    columns = (stored.offsets.tolist(), stored.shapes[:, -1].tolist(), stored.files.tolist(), stored.positions.tolist())
    return IndexedTensor.build(
        stored.name,
        stored.dtype,
        shape,
        [
            (
                tuple(i * extent + inner for i, extent, inner in zip(where, block, offset, strict=True)),
                extents,
                file,
                position + (at - start) * itemsize,
            )
            for (*where, start), count, file, position in zip(*columns, strict=True)
            for offset, extents, at in boxes_of_range(block, start, start + count)
        ],
    )


def _block(stored: IndexedTensor, shape: Shape) -> Shape:
    """The shape of one block."""
    *grid, numel = stored.global_shape
    if len(grid) == len(shape) and all(blocks and not size % blocks for size, blocks in zip(shape, grid, strict=True)):
        block = tuple(size // blocks for size, blocks in zip(shape, grid, strict=True))
        if math.prod(block) == numel:
            return block
    raise FormatError(
        f"{stored.name!r} is stored as {list(stored.global_shape)}, which are no equal blocks of {list(shape)}. "
        "The checkpoint's metadata contradicts itself."
    )


def as_range_of_blocks(shape: Shape, offset: Shape, extents: Shape) -> tuple[Shape, Shape, Shape]:
    """(shape, offset, extents) under which one of the equal blocks of a tensor is stored, and the tensor with it."""
    numel = math.prod(extents)
    grid = tuple(size // extent for size, extent in zip(shape, extents, strict=True))
    where = tuple(start // extent for start, extent in zip(offset, extents, strict=True))
    return (*grid, numel), (*where, 0), (*(1,) * len(grid), numel)


def boxes_of_range(shape: Shape, start: int, stop: int) -> Iterator[tuple[Shape, Shape, int]]:
    """The fewest boxes that the elements ``[start, stop)`` of a row-major array fill, in their order.

    Yields (offset, extents, number of the first element): part of a row, whole rows, part of a row, on every axis.
    """
    if start >= stop:
        return
    if len(shape) < 2:  # noqa: PLR2004  (no rows: a range is a box)
        yield (start,) * len(shape), (stop - start,) * len(shape), start
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row
    if first > last:  # inside one row
        yield from _within_row(shape, last, start, stop)
        return
    yield from _within_row(shape, first - 1, start, first * row)
    if first < last:
        yield (first, *(0,) * (len(shape) - 1)), (last - first, *shape[1:]), first * row
    yield from _within_row(shape, last, last * row, stop)


def _within_row(shape: Shape, row: int, start: int, stop: int) -> Iterator[tuple[Shape, Shape, int]]:
    before = row * math.prod(shape[1:])
    for offset, extents, at in boxes_of_range(shape[1:], start - before, stop - before):
        yield (row, *offset), (1, *extents), before + at
