"""N-dimensional boxes: intersection, exact tiling, and the byte runs that two row-major arrays share.

A box is an offset and a shape in elements. A list of boxes is two int64 arrays ``[n, ndim]``, with one row per box.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from dist_ckpt_mistral.errors import PlanError
from dist_ckpt_mistral.gather.dtypes import Shape

#: A message lists at most this many faults of one tensor.
_MAX_FAULTS: Final = 20
IntArray = npt.NDArray[np.int64]


class Runs(NamedTuple):
    """Strided copies as columns ``[runs]``: each copies ``rows`` pieces of ``row_bytes`` bytes.

    ``box`` is the row number of the box that a run belongs to. Starts and strides are in bytes.
    """

    box: IntArray
    source_start: IntArray
    source_stride: IntArray
    target_start: IntArray
    target_stride: IntArray
    rows: IntArray
    row_bytes: IntArray


class Overlaps(NamedTuple):
    """Overlaps of boxes and chunks: the row numbers of both ``[n]``, and their intersections ``[low, high)``."""

    box: IntArray
    chunk: IntArray
    low: IntArray
    high: IntArray


def ascending(rows: IntArray) -> IntArray:
    """Return the row numbers that sort ``rows`` ``[n, k]`` in ascending order."""
    return np.lexsort(rows.T[::-1]) if rows.shape[1] else np.arange(len(rows))


def equal_rows(rows: IntArray) -> list[IntArray]:
    """Return the row numbers of ``rows`` ``[n, k]``, one array for each group of equal rows."""
    order = ascending(rows)
    ordered = rows[order]
    return np.split(order, np.flatnonzero((ordered[1:] != ordered[:-1]).any(axis=1)) + 1) if len(rows) else []


def distinct(values: IntArray) -> IntArray:
    """Return the distinct values ``[n]`` in ascending order. ``np.unique`` would import ``numpy.ma``, which is slow."""
    ordered = np.sort(values)
    is_first = np.ones(len(ordered), dtype=bool)
    is_first[1:] = ordered[1:] != ordered[:-1]
    firsts: IntArray = ordered[is_first]
    return firsts


def intersect(lows: IntArray, highs: IntArray, chunk_lows: IntArray, chunk_highs: IntArray) -> Overlaps:
    """Return the overlaps of the boxes ``[lows, highs)`` with chunks in any arrangement."""
    empty = np.empty(0, dtype=np.int64)
    overlaps = [Overlaps(empty, empty, lows[:0], lows[:0])]
    for box, (low, high) in enumerate(zip(lows, highs, strict=True)):
        inner_lows, inner_highs = np.maximum(chunk_lows, low), np.minimum(chunk_highs, high)
        hit = np.flatnonzero((inner_lows < inner_highs).all(axis=1))
        overlaps.append(Overlaps(np.full(len(hit), box), hit, inner_lows[hit], inner_highs[hit]))
    return Overlaps(*map(np.concatenate, zip(*overlaps, strict=True)))


def require_tiling(offsets: IntArray, shapes: IntArray, global_shape: Shape, what: str) -> None:
    """Raise PlanError unless the boxes cover every element of ``global_shape`` exactly once.

    The message begins with ``what`` and lists the gaps, overlaps and boxes outside, at most 20 of them.
    """
    if len(offsets) == 1 and grid_cuts(offsets, shapes, global_shape) is not None:
        return  # the same at less cost
    ends = offsets + shapes
    outside = np.flatnonzero(
        (offsets < 0).any(axis=1) | (shapes < 0).any(axis=1) | (ends > np.array(global_shape)).any(axis=1)
    )
    if outside.size:
        boxes = _joined(_describe(offsets[box], ends[box]) for box in outside)
        raise PlanError(f"{what}: {boxes} lies outside the tensor of shape {list(global_shape)}")
    if not math.prod(global_shape) or grid_cuts(offsets, shapes, global_shape) is not None:
        return
    filled = np.flatnonzero((shapes > 0).all(axis=1))
    faults = _joined(_faults(offsets[filled], ends[filled], tuple(global_shape)))
    if faults:
        raise PlanError(f"{what}: {faults}")


def _joined(faults: Iterable[str]) -> str:
    """Join the first 20 faults with commas, then "and more"."""
    first = [*itertools.islice(faults, _MAX_FAULTS + 1)]
    return ", ".join([*first[:_MAX_FAULTS], *(["and more"] if len(first) > _MAX_FAULTS else [])])


def grid_cuts(offsets: IntArray, shapes: IntArray, global_shape: Shape) -> tuple[IntArray, ...] | None:
    """Return the cuts of each axis if the boxes are the cells of a grid over ``global_shape``, otherwise None.

    The cuts of an axis are the starts of its cells, and its extent at the end. Sorted by their offsets, the boxes are
    the cells in row-major order.
    """
    if len(offsets) == 1:  # the same at less cost, for the many tensors that are stored whole
        is_whole = not offsets.any() and tuple(shapes[0].tolist()) == tuple(global_shape)
        return tuple(np.array([0, extent]) for extent in global_shape) if is_whole else None
    ends = offsets + shapes
    cell = np.zeros(len(offsets), dtype=np.int64)
    cuts: list[IntArray] = []
    for axis, extent in enumerate(global_shape):
        starts = distinct(offsets[:, axis])
        index = np.searchsorted(starts, offsets[:, axis])
        axis_cuts = np.append(starts, extent)
        if not starts.size or starts[0] != 0 or not np.array_equal(ends[:, axis], axis_cuts[index + 1]):
            return None
        cell = cell * starts.size + index
        cuts.append(axis_cuts)
    num_cells = math.prod(len(axis_cuts) - 1 for axis_cuts in cuts)
    return tuple(cuts) if num_cells == len(offsets) == distinct(cell).size else None


def grid_overlaps(lows: IntArray, highs: IntArray, cuts: Sequence[IntArray]) -> Overlaps:
    """Return the overlaps of the boxes ``[lows, highs)`` with the cells of a grid, numbered in row-major order."""
    first, last = np.empty_like(lows), np.empty_like(lows)
    for axis, axis_cuts in enumerate(cuts):
        first[:, axis] = np.searchsorted(axis_cuts, lows[:, axis], side="right") - 1
        last[:, axis] = np.searchsorted(axis_cuts, highs[:, axis], side="left")
    box, cell = unrolled(np.where(lows < highs, last - first, 0))  # a box without elements meets nothing
    cell += first[box]
    low, high, chunk = lows[box], highs[box], np.zeros(len(box), dtype=np.int64)
    for axis, axis_cuts in enumerate(cuts):
        low[:, axis] = np.maximum(low[:, axis], axis_cuts[cell[:, axis]])
        high[:, axis] = np.minimum(high[:, axis], axis_cuts[cell[:, axis] + 1])
        chunk = chunk * (len(axis_cuts) - 1) + cell[:, axis]
    return Overlaps(box, chunk, low, high)


def unrolled(extents: IntArray) -> tuple[IntArray, IntArray]:
    """Return all index tuples of ``n`` arrays with the shapes ``extents`` ``[n, ndim]``.

    The result is the number of the array ``[total]`` and the indices ``[total, ndim]``, in row-major order.
    """
    counts = extents.prod(axis=1)
    owner = np.repeat(np.arange(len(extents)), counts)
    rest = np.arange(len(owner)) - np.repeat(counts.cumsum() - counts, counts)
    index = np.empty((len(owner), extents.shape[1]), dtype=np.int64)
    for axis in reversed(range(extents.shape[1])):
        rest, index[:, axis] = np.divmod(rest, extents[owner, axis])
    return owner, index


def _faults(lows: IntArray, highs: IntArray, extents: Shape) -> Iterator[str]:
    """Yield the gaps and overlaps of the boxes ``[lows, highs)`` in row-major order of their first elements.

    After each one, a box is added that corrects it (with a negative weight for an overlap), to find the next.
    """
    weights = np.ones(len(lows), dtype=np.int64)
    while (at := _first_miscovered(lows, highs, weights, extents)) is not None:
        low, high, count = _slab(lows, highs, weights, at, extents)
        region = _describe(low, high)
        yield f"{count} boxes overlap at {region}" if count else f"nothing is stored for {region}"
        lows, highs = np.concatenate([lows, [low]]), np.concatenate([highs, [high]])
        weights = np.append(weights, 1 - count)


def _slab(
    lows: IntArray, highs: IntArray, weights: IntArray, at: Shape, extents: Shape
) -> tuple[list[int], list[int], int]:
    """Return the box from element ``at`` on that the same boxes cover entirely, and the sum of their weights."""
    low, high = [], []
    for axis, start in enumerate(at):
        stops = np.concatenate([[extents[axis]], lows[:, axis], highs[:, axis]])
        stop = int(stops[stops > start].min())
        spanning = (lows[:, axis] <= start) & (highs[:, axis] >= stop)
        low.append(start if len(lows) else 0)
        high.append(stop if len(lows) else extents[axis])
        lows, highs, weights = lows[spanning], highs[spanning], weights[spanning]
    return low, high, int(weights.sum())


def _first_miscovered(lows: IntArray, highs: IntArray, weights: IntArray, extents: Shape) -> Shape | None:
    """Return the first element, in row-major order, whose boxes' weights do not add up to 1; None if there is none.

    The indicator of a box is the signed sum, over its corners, of the indicators of the orthants that begin there, and
    those of different corners are linearly independent. So the boxes tile the tensor if and only if the signed corners
    of all boxes, minus those of the tensor, cancel out; the first corner that is left is the first element to be
    reported. Axes that no box cuts are left out, which keeps the 2^axes corners of each box few.
    """
    cut = np.flatnonzero(((lows != 0) | (highs != np.array(extents, dtype=np.int64))).any(axis=0))
    whole = np.array(extents, dtype=np.int64)[None, cut]
    corners = np.concatenate([np.zeros_like(whole), lows[:, cut]])
    opposite = np.concatenate([whole, highs[:, cut]])
    signs = np.append(-1, weights)
    for axis in range(len(cut)):
        further = corners.copy()
        further[:, axis] = opposite[:, axis]
        corners, signs = np.concatenate([corners, further]), np.concatenate([signs, -signs])
        opposite = np.concatenate([opposite, opposite])
    order = ascending(corners)
    ordered = corners[order]
    firsts = np.append(0, np.flatnonzero((ordered[1:] != ordered[:-1]).any(axis=1)) + 1)
    remaining = np.flatnonzero(np.add.reduceat(signs[order], firsts))
    if not remaining.size:
        return None
    at = np.zeros(len(extents), dtype=np.int64)
    at[cut] = ordered[firsts[remaining[0]]]
    return tuple(at.tolist())


def _describe(low: Sequence[int] | IntArray, high: Sequence[int] | IntArray) -> str:
    """Format a box as slices: ``[0:4, 8:16]``."""
    return "[" + ", ".join(f"{a}:{b}" for a, b in zip(low, high, strict=True)) + "]"


def shared_runs(
    boxes: IntArray,
    source_start: IntArray,
    source_strides: IntArray,
    target_start: IntArray,
    target_strides: IntArray,
    itemsize: int,
) -> Runs:
    """Return the byte runs that copy boxes from one row-major array each to another.

    ``boxes`` are shapes ``[n, ndim]`` in elements; starts ``[n]``, strides ``[n, ndim]`` and ``itemsize`` are in bytes.
    The last axes that are contiguous in both arrays become the row of a run, the axis before them becomes its stride,
    and the remaining axes are unrolled into separate runs.
    """
    row_bytes = np.full(len(boxes), itemsize, dtype=np.int64)
    rows, source_stride, target_stride = np.ones_like(row_bytes), np.zeros_like(row_bytes), np.zeros_like(row_bytes)
    is_strided = np.zeros(len(boxes), dtype=bool)
    unrolled_extents = boxes.copy()
    for axis in reversed(range(boxes.shape[1])):
        extent, in_source, in_target = boxes[:, axis], source_strides[:, axis], target_strides[:, axis]
        is_joined = ~is_strided & ((extent == 1) | ((in_source == row_bytes) & (in_target == row_bytes)))
        is_new = ~is_strided & ~is_joined
        np.copyto(row_bytes, row_bytes * extent, where=is_joined)
        np.copyto(rows, extent, where=is_new)
        np.copyto(source_stride, in_source, where=is_new)
        np.copyto(target_stride, in_target, where=is_new)
        is_strided |= is_new
        unrolled_extents[is_joined | is_new, axis] = 1
    np.copyto(source_stride, row_bytes, where=~is_strided)
    np.copyto(target_stride, row_bytes, where=~is_strided)
    box, index = unrolled(unrolled_extents)
    return Runs(
        box,
        source_start[box] + (index * source_strides[box]).sum(axis=1),
        source_stride[box],
        target_start[box] + (index * target_strides[box]).sum(axis=1),
        target_stride[box],
        rows[box],
        row_bytes[box],
    )


def row_major_strides(shapes: IntArray, itemsize: int) -> IntArray:
    """Return the strides in bytes ``[n, ndim]`` of row-major arrays with the shapes ``[n, ndim]`` in elements."""
    strides = np.full_like(shapes, itemsize)
    for axis in reversed(range(shapes.shape[1] - 1)):
        strides[:, axis] = strides[:, axis + 1] * shapes[:, axis + 1]
    return strides
