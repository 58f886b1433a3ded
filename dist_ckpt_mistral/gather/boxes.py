"""N-dimensional boxes: intersection, exact tiling, and the byte runs that two row-major arrays share.

A box is an offset and a shape in elements. Many boxes are two int64 arrays ``[n, ndim]``, one row per box.
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

#: More faults of one tensor than this are not told.
_MOST_FAULTS: Final = 20
IntArray = npt.NDArray[np.int64]


class Runs(NamedTuple):
    """Strided copies as columns: ``rows`` pieces of ``row_bytes`` bytes, so many bytes apart in each of two arrays.

    ``box`` says which of the given boxes a run belongs to; starts and strides are in bytes.
    """

    box: IntArray
    source_start: IntArray
    source_stride: IntArray
    target_start: IntArray
    target_stride: IntArray
    rows: IntArray
    row_bytes: IntArray


class Meets(NamedTuple):
    """Where boxes meet chunks: the numbers of both, and the box ``[low, high)`` that they share."""

    box: IntArray
    chunk: IntArray
    low: IntArray
    high: IntArray


def ascending(rows: IntArray) -> IntArray:
    """The order in which the rows of ``[n, k]`` ascend."""
    return np.lexsort(rows.T[::-1]) if rows.shape[1] else np.arange(len(rows))


def equal_rows(rows: IntArray) -> list[IntArray]:
    """The numbers of the rows of ``[n, k]`` in groups of equal ones."""
    order = ascending(rows)
    ordered = rows[order]
    return np.split(order, np.flatnonzero((ordered[1:] != ordered[:-1]).any(axis=1)) + 1) if len(rows) else []


def intersect(lows: IntArray, highs: IntArray, chunk_lows: IntArray, chunk_highs: IntArray) -> Meets:
    """Where the boxes ``[lows, highs)`` meet chunks of any arrangement."""
    none = np.empty(0, dtype=np.int64)
    found = [Meets(none, none, lows[:0], lows[:0])]
    for box, (low, high) in enumerate(zip(lows, highs, strict=True)):
        inner_lows, inner_highs = np.maximum(chunk_lows, low), np.minimum(chunk_highs, high)
        hit = np.flatnonzero((inner_lows < inner_highs).all(axis=1))
        found.append(Meets(np.full(len(hit), box), hit, inner_lows[hit], inner_highs[hit]))
    return Meets(*map(np.concatenate, zip(*found, strict=True)))


def require_tiling(offsets: IntArray, shapes: IntArray, global_shape: Shape, what: str) -> None:
    """Raise PlanError unless the boxes cover every element of ``global_shape`` exactly once.

    ``what`` begins the message, which names all gaps, overlaps or boxes outside, up to a number that one can read.
    """
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
    told = [*itertools.islice(faults, _MOST_FAULTS + 1)]
    return ", ".join([*told[:_MOST_FAULTS], *(["and more"] if len(told) > _MOST_FAULTS else [])])


def grid_cuts(offsets: IntArray, shapes: IntArray, global_shape: Shape) -> tuple[IntArray, ...] | None:
    """Of boxes that are the cells of a grid over all of ``global_shape``, where each axis is cut; else None.

    The cuts of an axis are the starts of its cells and, last, its extent. In ascending order of their offsets, the
    boxes are the cells in row-major order.
    """
    ends = offsets + shapes
    cell = np.zeros(len(offsets), dtype=np.int64)
    cuts: list[IntArray] = []
    for axis, extent in enumerate(global_shape):
        starts = np.unique(offsets[:, axis])
        place = np.searchsorted(starts, offsets[:, axis])
        axis_cuts = np.append(starts, extent)
        if not starts.size or starts[0] != 0 or not np.array_equal(ends[:, axis], axis_cuts[place + 1]):
            return None
        cell = cell * starts.size + place
        cuts.append(axis_cuts)
    cells = math.prod(len(axis_cuts) - 1 for axis_cuts in cuts)
    return tuple(cuts) if cells == len(offsets) == np.unique(cell).size else None


def grid_meets(lows: IntArray, highs: IntArray, cuts: Sequence[IntArray]) -> Meets:
    """Where the boxes ``[lows, highs)`` meet the cells of a grid, which count in row-major order."""
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
    return Meets(box, chunk, low, high)


def unrolled(extents: IntArray) -> tuple[IntArray, IntArray]:
    """All index tuples of arrays with the shapes ``extents`` ``[n, ndim]``: (number of the array, indices)."""
    counts = extents.prod(axis=1)
    owner = np.repeat(np.arange(len(extents)), counts)
    rest = np.arange(len(owner)) - np.repeat(counts.cumsum() - counts, counts)
    index = np.empty((len(owner), extents.shape[1]), dtype=np.int64)
    for axis in reversed(range(extents.shape[1])):
        rest, index[:, axis] = np.divmod(rest, extents[owner, axis])
    return owner, index


def _faults(lows: IntArray, highs: IntArray, extents: Shape) -> Iterator[str]:
    """The faults of boxes ``[lows, highs)``: each where the first element is that isn't covered just once.

    A box that makes up for a fault, as often as needed, leaves the next to be found.
    """
    times = np.ones(len(lows), dtype=np.int64)
    while (at := _first_miscovered(lows, highs, times, extents)) is not None:
        low, high, count = _slab(lows, highs, times, at, extents)
        named = _describe(low, high)
        yield f"{count} boxes overlap at {named}" if count else f"nothing is stored for {named}"
        lows, highs = np.concatenate([lows, [low]]), np.concatenate([highs, [high]])
        times = np.append(times, 1 - count)


def _slab(
    lows: IntArray, highs: IntArray, times: IntArray, at: Shape, extents: Shape
) -> tuple[list[int], list[int], int]:
    """The slab from element ``at`` on, as far as the same boxes reach, and how often they cover it."""
    low, high = [], []
    for axis, start in enumerate(at):
        stops = np.concatenate([[extents[axis]], lows[:, axis], highs[:, axis]])
        stop = int(stops[stops > start].min())
        spanning = (lows[:, axis] <= start) & (highs[:, axis] >= stop)
        low.append(start if len(lows) else 0)
        high.append(stop if len(lows) else extents[axis])
        lows, highs, times = lows[spanning], highs[spanning], times[spanning]
    return low, high, int(times.sum())


def _first_miscovered(lows: IntArray, highs: IntArray, times: IntArray, extents: Shape) -> Shape | None:
    """The first element, in row-major order, that the boxes ``[lows, highs)``, each so many times, don't cover once.

    What a box covers is the signed sum, over its corners, of all that lies behind each; such sums are equal only where
    their corners are. So boxes tile the whole where all corners but its own cancel out, and else go wrong at the first
    that is left. Corners are taken along the axes that are cut at all: the boxes of a tensor of any rank stay few.
    """
    cut = np.flatnonzero(((lows != 0) | (highs != np.array(extents, dtype=np.int64))).any(axis=0))
    whole = np.array(extents, dtype=np.int64)[None, cut]
    corners = np.concatenate([np.zeros_like(whole), lows[:, cut]])
    opposite = np.concatenate([whole, highs[:, cut]])
    signs = np.append(-1, times)
    for axis in range(len(cut)):
        further = corners.copy()
        further[:, axis] = opposite[:, axis]
        corners, signs = np.concatenate([corners, further]), np.concatenate([signs, -signs])
        opposite = np.concatenate([opposite, opposite])
    order = ascending(corners)
    ordered = corners[order]
    firsts = np.append(0, np.flatnonzero((ordered[1:] != ordered[:-1]).any(axis=1)) + 1)
    left = np.flatnonzero(np.add.reduceat(signs[order], firsts))
    if not left.size:
        return None
    at = np.zeros(len(extents), dtype=np.int64)
    at[cut] = ordered[firsts[left[0]]]
    return tuple(at.tolist())


def _describe(low: Sequence[int] | IntArray, high: Sequence[int] | IntArray) -> str:
    return "[" + ", ".join(f"{a}:{b}" for a, b in zip(low, high, strict=True)) + "]"


def shared_runs(
    boxes: IntArray,
    source_start: IntArray,
    source_strides: IntArray,
    target_start: IntArray,
    target_strides: IntArray,
    itemsize: int,
) -> Runs:
    """The byte runs of boxes that pairs of row-major arrays share.

    ``boxes`` are shapes ``[n, ndim]`` in elements; starts ``[n]`` and strides ``[n, ndim]``, like ``itemsize``, in
    bytes. Neighbouring axes that are contiguous in both arrays become one run; an axis that is not makes it a strided
    run; further ones are unrolled.
    """
    row_bytes = np.full(len(boxes), itemsize, dtype=np.int64)
    rows, source_stride, target_stride = np.ones_like(row_bytes), np.zeros_like(row_bytes), np.zeros_like(row_bytes)
    is_strided = np.zeros(len(boxes), dtype=bool)
    further = boxes.copy()
    for axis in reversed(range(boxes.shape[1])):
        extent, in_source, in_target = boxes[:, axis], source_strides[:, axis], target_strides[:, axis]
        is_joined = ~is_strided & ((extent == 1) | ((in_source == row_bytes) & (in_target == row_bytes)))
        is_new = ~is_strided & ~is_joined
        np.copyto(row_bytes, row_bytes * extent, where=is_joined)
        np.copyto(rows, extent, where=is_new)
        np.copyto(source_stride, in_source, where=is_new)
        np.copyto(target_stride, in_target, where=is_new)
        is_strided |= is_new
        further[is_joined | is_new, axis] = 1
    np.copyto(source_stride, row_bytes, where=~is_strided)
    np.copyto(target_stride, row_bytes, where=~is_strided)
    box, index = unrolled(further)
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
    """Byte strides of row-major arrays of the shapes ``[n, ndim]`` in elements."""
    strides = np.full_like(shapes, itemsize)
    for axis in reversed(range(shapes.shape[1] - 1)):
        strides[:, axis] = strides[:, axis + 1] * shapes[:, axis + 1]
    return strides
