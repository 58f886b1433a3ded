"""N-dimensional boxes: intersection, exact tiling, and the byte runs that two row-major arrays share.

A box is an offset and a shape in elements. Many boxes are two int64 arrays ``[n, ndim]``, one row per box.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dist_ckpt_mistral.errors import PlanError
from dist_ckpt_mistral.shapes import Shape

IntArray = npt.NDArray[np.int64]


class Run(NamedTuple):
    """``rows`` pieces of ``row_bytes`` bytes, ``source_stride`` and ``target_stride`` bytes apart in each array."""

    source_start: int
    source_stride: int
    target_start: int
    target_stride: int
    rows: int
    row_bytes: int


def intersect(
    lows: IntArray, highs: IntArray, low: Sequence[int], high: Sequence[int]
) -> tuple[IntArray, IntArray, IntArray]:
    """Which of the boxes ``[lows, highs)`` meet the box ``[low, high)``, and where: (indices, lows, highs)."""
    inner_lows = np.maximum(lows, np.asarray(low, dtype=np.int64))
    inner_highs = np.minimum(highs, np.asarray(high, dtype=np.int64))
    hit = np.flatnonzero((inner_lows < inner_highs).all(axis=1))
    return hit, inner_lows[hit], inner_highs[hit]


def require_tiling(offsets: IntArray, shapes: IntArray, global_shape: Shape, what: str) -> None:
    """Raise PlanError unless the boxes cover every element of ``global_shape`` exactly once.

    ``what`` begins the message, which names the first gap, overlap or box outside.
    """
    ends = offsets + shapes
    outside = np.flatnonzero(
        (offsets < 0).any(axis=1) | (shapes < 0).any(axis=1) | (ends > np.array(global_shape)).any(axis=1)
    )
    if outside.size:
        box = _describe(offsets[outside[0]], ends[outside[0]])
        raise PlanError(f"{what}: {box} lies outside the tensor of shape {list(global_shape)}")
    if not math.prod(global_shape) or grid_cuts(offsets, shapes, global_shape) is not None:
        return
    filled = np.flatnonzero((shapes > 0).all(axis=1))
    lows, highs = offsets[filled], ends[filled]
    fault = _first_fault(lows, highs, (), tuple(global_shape))
    if fault is not None:
        raise PlanError(f"{what}: {fault}")


def grid_cuts(offsets: IntArray, shapes: IntArray, global_shape: Shape) -> tuple[list[int], ...] | None:
    """Of boxes that are the cells of a grid over all of ``global_shape``, where each axis is cut; else None.

    The cuts of an axis are the starts of its cells and, last, its extent. In ascending order of their offsets, the
    boxes are the cells in row-major order.
    """
    ends = offsets + shapes
    cell = np.zeros(len(offsets), dtype=np.int64)
    cuts: list[list[int]] = []
    for axis, extent in enumerate(global_shape):
        starts = np.unique(offsets[:, axis])
        place = np.searchsorted(starts, offsets[:, axis])
        if not starts.size or starts[0] != 0 or not np.array_equal(ends[:, axis], np.append(starts[1:], extent)[place]):
            return None
        cell = cell * starts.size + place
        cuts.append([*starts.tolist(), extent])
    cells = math.prod(len(axis_cuts) - 1 for axis_cuts in cuts)
    return tuple(cuts) if cells == len(offsets) == np.unique(cell).size else None


def grid_cells(
    cuts: Sequence[list[int]], low: Sequence[int], high: Sequence[int]
) -> Iterator[tuple[int, Shape, Shape]]:
    """The cells of a grid that meet the box ``[low, high)``: (number in row-major order, low and high of the meet)."""
    axes = []
    for axis_cuts, start, stop in zip(cuts, low, high, strict=True):
        first, last = bisect.bisect_right(axis_cuts, start) - 1, bisect.bisect_left(axis_cuts, stop)
        axes.append([(i, max(start, axis_cuts[i]), min(stop, axis_cuts[i + 1])) for i in range(first, last)])
    for cells in itertools.product(*axes):
        number = 0
        for (i, _, _), axis_cuts in zip(cells, cuts, strict=True):
            number = number * (len(axis_cuts) - 1) + i
        yield number, tuple([cell[1] for cell in cells]), tuple([cell[2] for cell in cells])


def _first_fault(lows: IntArray, highs: IntArray, prefix: tuple[tuple[int, int], ...], extents: Shape) -> str | None:
    """Walk the axes: between two neighbouring cuts the boxes that span them must tile the remaining axes."""
    if not extents or not len(lows):
        if len(lows) == 1:
            return None
        slab = _describe([a for a, _ in prefix] + [0] * len(extents), [b for _, b in prefix] + list(extents))
        return f"nothing is stored for {slab}" if not len(lows) else f"{len(lows)} boxes overlap at {slab}"
    axis = len(prefix)
    cuts = np.unique(np.concatenate([[0, extents[0]], lows[:, axis], highs[:, axis]]))
    for start, stop in itertools.pairwise(cuts.tolist()):
        spanning = (lows[:, axis] <= start) & (highs[:, axis] >= stop)
        fault = _first_fault(lows[spanning], highs[spanning], (*prefix, (start, stop)), extents[1:])
        if fault is not None:
            return fault
    return None


def _describe(low: Sequence[int] | IntArray, high: Sequence[int] | IntArray) -> str:
    return "[" + ", ".join(f"{a}:{b}" for a, b in zip(low, high, strict=True)) + "]"


def shared_runs(
    box: Shape, source_start: int, source_strides: Shape, target_start: int, target_strides: Shape, itemsize: int
) -> Iterator[Run]:
    """The byte runs of a box that two row-major arrays share.

    ``box`` is in elements; starts and strides (those of the last ``len(box)`` axes), like ``itemsize``, in bytes.
    Neighbouring axes that are contiguous in both arrays become one run; two axes that are not become a strided run;
    further ones are unrolled.
    """
    axes = [axis for axis in zip(box, source_strides, target_strides, strict=True) if axis[0] != 1]
    row_bytes = itemsize
    while axes and axes[-1][1] == axes[-1][2] == row_bytes:
        row_bytes *= axes.pop()[0]
    rows, source_stride, target_stride = axes.pop() if axes else (1, row_bytes, row_bytes)
    for index in itertools.product(*(range(extent) for extent, _, _ in axes)):
        yield Run(
            source_start + sum(i * axis[1] for i, axis in zip(index, axes, strict=True)),
            source_stride,
            target_start + sum(i * axis[2] for i, axis in zip(index, axes, strict=True)),
            target_stride,
            rows,
            row_bytes,
        )


@functools.lru_cache(maxsize=4096)
def row_major_strides(shape: Shape, itemsize: int) -> Shape:
    """Byte strides of a row-major array of ``shape`` elements."""
    strides = [itemsize] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * shape[axis + 1]
    return tuple(strides)
