"""Grids of contiguous cells: what a reader of chunked arrays puts together is the tensor, on any cut of it."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import dist_ckpt_mistral as dcm
from dist_ckpt_mistral.gather import grids
from dist_ckpt_mistral.gather.grids import CellGrid, cell_grid
from dist_ckpt_mistral.gather.index import IndexedTensor, TensorIndex
from dist_ckpt_mistral.gather.links import Link, whole

Array = np.ndarray[Any, Any]


def stored(values: Array, cuts: list[list[int]]) -> tuple[TensorIndex, bytes]:
    """A tensor that is cut at ``cuts`` on every axis into chunks in one file, and the content of that file."""
    content, chunks = b"xyz", []
    edges = [[*itertools.pairwise([0, *cut, extent])] for cut, extent in zip(cuts, values.shape, strict=True)]
    for cell in itertools.product(*edges):
        box = values[tuple(slice(low, high) for low, high in cell)]
        chunks.append((tuple(low for low, _ in cell), box.shape, 0, len(content)))
        content += box.tobytes() + b"-"
    tensor = IndexedTensor.build("stored", "int32", values.shape, chunks)
    return TensorIndex(files=(Path("file"),), tensors={"stored": tensor}), content


def put_together(grid: CellGrid, content: bytes) -> Array:
    """The tensor as Zarr defines it: every cell in its place, the last ones cut."""
    padded = [-(-extent // step) * step for extent, step in zip(grid.shape, grid.cell_shape, strict=True)]
    array = np.full(padded, -1, dtype="<i4")
    for cell, position in zip(grid.cells.tolist(), grid.positions.tolist(), strict=True):
        place = tuple(slice(at * step, (at + 1) * step) for at, step in zip(cell, grid.cell_shape, strict=True))
        part = content[position : position + grid.num_bytes]
        array[place] = np.frombuffer(part, "<i4").reshape(grid.cell_shape)
    assert len({tuple(cell) for cell in grid.cells.tolist()}) == len(grid.cells)
    return array[tuple(map(slice, grid.shape))]


@st.composite
def cut_tensors(draw: st.DrawFn) -> tuple[Array, list[list[int]]]:
    """An array of up to three axes, and where it is cut on each."""
    shape = tuple(draw(st.lists(st.integers(1, 12), min_size=1, max_size=3)))
    cuts = [sorted(draw(st.sets(st.integers(1, extent - 1), max_size=3))) if extent > 1 else [] for extent in shape]
    return np.arange(1, math.prod(shape) + 1, dtype="<i4").reshape(shape), cuts


@given(cut_tensors(), st.integers(4, 200))
def test_cells_make_up_the_tensor(cut: tuple[Array, list[list[int]]], most_bytes: int) -> None:
    """However it is cut, each element is in one cell, each cell is one run of bytes, and no longer than it may be."""
    values, cuts = cut
    index, content = stored(values, cuts)
    with mock.patch.object(grids, "_MOST_CELL_BYTES", most_bytes):
        grid = cell_grid(index, "target", values.shape, [whole("stored", values.shape)])
    assert np.array_equal(put_together(grid, content), values)
    assert grid.num_bytes <= max(most_bytes, 4)


@given(cut_tensors(), st.data())
def test_rows_in_another_order(cut: tuple[Array, list[list[int]]], data: st.DataObject) -> None:
    """Blocks of rows that change places, as query, key and value do."""
    values, cuts = cut
    index, content = stored(values, cuts)
    rows = len(values)
    middle = data.draw(st.integers(0, rows))
    blocks = [(middle, 0, rows - middle), (0, rows - middle, middle)]
    rest, origin = values.shape[1:], (0,) * (values.ndim - 1)
    links = [
        Link(
            source="stored",
            source_offset=(source, *origin),
            target="target",
            target_offset=(target, *origin),
            shape=(count, *rest),
        )
        for source, target, count in blocks
        if count
    ]
    grid = cell_grid(index, "target", values.shape, links)
    assert np.array_equal(put_together(grid, content), np.concatenate([values[middle:], values[:middle]]))


@given(cut_tensors(), st.integers(1, 12))
def test_rows_that_only_pad(cut: tuple[Array, list[list[int]]], rows: int) -> None:
    """Links that reach beyond the end of the tensor: the last cell may have rows behind it, and none begins there."""
    values, cuts = cut
    rows = min(rows, len(values))
    index, content = stored(values, cuts)
    grid = cell_grid(index, "target", (rows, *values.shape[1:]), [whole("stored", values.shape)])
    assert np.array_equal(put_together(grid, content), values[:rows])


def test_a_tensor_of_a_stack() -> None:
    """One layer of a stack, and the experts of one layer, have their own axes."""
    values = np.arange(2 * 3 * 4 * 5, dtype="<i4").reshape(2, 3, 4, 5)
    index, content = stored(values, [[1], [1, 2], [2], []])
    layer = Link(source="stored", source_offset=(1, 0, 0, 0), target="target", target_offset=(0, 0, 0), shape=(3, 4, 5))
    grid = cell_grid(index, "target", (3, 4, 5), [layer])
    assert grid.cell_shape == (1, 2, 5)
    assert np.array_equal(put_together(grid, content), values[1])
    expert = Link(source="stored", source_offset=(1, 2, 1, 0), target="target", target_offset=(0, 0), shape=(3, 5))
    grid = cell_grid(index, "target", (3, 5), [expert])
    assert np.array_equal(put_together(grid, content), values[1, 2, 1:])


def test_too_many_cells_are_refused() -> None:
    """A tensor that would be cut into rows of one element each is named, with the number."""
    values = np.arange(64, dtype="<i4")
    index, _ = stored(values, [[1]])
    refused = pytest.raises(dcm.UnsupportedFormatError, match=r"'target' would be cut into 64 cells of \[1\]")
    with mock.patch.object(grids, "MOST_CELLS", 63), refused:
        cell_grid(index, "target", (64,), [whole("stored", (64,))])
