"""Tensors stored as flat ranges of equal blocks, presented in their own shape: a range of a block is a few boxes.

Megatron's ``fully_sharded_model_space`` (distributed optimizer, to 0.14) stores a tensor of shape [X, Y, Z], of which
every rank has a block [x, y, z], as [X/x, Y/y, Z/z, xyz]: leading indices count blocks, and data-parallel ranks cut the
last axis anywhere (mcore dist_checkpointing/strategies/resharding.py, 0.14).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from dist_ckpt_mistral import dtypes
from dist_ckpt_mistral.errors import FormatError
from dist_ckpt_mistral.gather.tensor_index import IndexedTensor
from dist_ckpt_mistral.shapes import Shape


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
