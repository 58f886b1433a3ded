"""N-dimensional boxes: intersection, exact tiling, and the byte runs that two row-major arrays share.

A box is an offset and a shape in elements. Many boxes are two int64 arrays ``[n, ndim]``, one row per box.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dist_ckpt_mistral.errors import PlanError

IntArray = npt.NDArray[np.int64]
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
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
    filled = np.flatnonzero((shapes > 0).all(axis=1))
    lows, highs = offsets[filled], ends[filled]
    if not math.prod(global_shape) or _is_grid(lows, highs, global_shape):
        return
    fault = _first_fault(lows, highs, (), tuple(global_shape))
    if fault is not None:
        raise PlanError(f"{what}: {fault}")


def _is_grid(lows: IntArray, highs: IntArray, global_shape: Shape) -> bool:
    """Whether the boxes are the cells of one regular or irregular grid over all of ``global_shape``, each once."""
    cell = np.zeros(len(lows), dtype=np.int64)
    cells = 1
    for axis, extent in enumerate(global_shape):
        cuts = np.unique(lows[:, axis])
        place = np.searchsorted(cuts, lows[:, axis])
        if not cuts.size or cuts[0] != 0 or not np.array_equal(highs[:, axis], np.append(cuts[1:], extent)[place]):
            return False
        cell = cell * cuts.size + place
        cells *= cuts.size
    return cells == len(lows) == np.unique(cell).size


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
    *, box: Shape, source_at: Shape, source_shape: Shape, target_at: Shape, target_shape: Shape, itemsize: int
) -> Iterator[Run]:
    """The byte runs of a box that lies at ``source_at`` in one row-major array and at ``target_at`` in another.

    All in elements, ``itemsize`` in bytes; the two arrays may have different numbers of leading axes of extent 1 in the
    box. Neighbouring axes that are contiguous in both arrays become one run; two axes that are not become a strided
    run; further ones are unrolled.
    """
    source_strides, target_strides = _strides(source_shape, itemsize), _strides(target_shape, itemsize)
    source_start = sum(map(math.prod, zip(source_at, source_strides, strict=True)))
    target_start = sum(map(math.prod, zip(target_at, target_strides, strict=True)))
    ndim = len(box)
    axes = [  # (extent, source stride, target stride), outermost first
        axis
        for axis in zip(
            box, source_strides[len(source_strides) - ndim :], target_strides[len(target_strides) - ndim :], strict=True
        )
        if axis[0] != 1
    ]
    row_bytes = itemsize
    while axes and axes[-1][1] == axes[-1][2] == row_bytes:
        row_bytes *= axes.pop()[0]
    rows, source_stride, target_stride = axes.pop() if axes else (1, row_bytes, row_bytes)
    for index in itertools.product(*(range(extent) for extent, _, _ in axes)):
        yield Run(
            source_start=source_start + sum(i * axis[1] for i, axis in zip(index, axes, strict=True)),
            source_stride=source_stride,
            target_start=target_start + sum(i * axis[2] for i, axis in zip(index, axes, strict=True)),
            target_stride=target_stride,
            rows=rows,
            row_bytes=row_bytes,
        )


def _strides(shape: Shape, itemsize: int) -> list[int]:
    """Byte strides of a row-major array."""
    strides = [itemsize] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * shape[axis + 1]
    return strides
