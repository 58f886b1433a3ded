"""Boxes that do not cover a tensor exactly once are refused, and every gap and overlap is named."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from drawn_chunks import (
    Box,
    region,
    shapes,
    tilings,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_ckpt_mistral.errors import PlanError
from dist_ckpt_mistral.gather.boxes import require_tiling
from dist_ckpt_mistral.gather.index import IndexedTensor, TensorIndex
from dist_ckpt_mistral.gather.links import Link
from dist_ckpt_mistral.gather.plan import plan_gather


def painted(boxes: Sequence[Box], shape: tuple[int, ...]) -> npt.NDArray[np.int64]:
    """How often each element is covered."""
    canvas = np.zeros(shape, np.int64)
    for box in boxes:
        canvas[region(box)] += 1
    return canvas


@st.composite
def scattered_boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Box]]:
    """A shape, and boxes inside it that are a tiling, nearly one, or anything."""
    shape = draw(shapes(least_axes=1, most_axes=3))
    boxes = draw(tilings(shape))
    change = draw(st.sampled_from(["nothing", "drop", "repeat", "add"]))
    if change == "drop" and boxes:
        boxes.pop()
    if change == "repeat" and boxes:
        boxes.append(boxes[0])
    if change == "add":
        low = [draw(st.integers(0, extent)) for extent in shape]
        boxes.append((tuple(low), tuple(draw(st.integers(0, e - a)) for a, e in zip(low, shape, strict=True))))
    return shape, boxes


@settings(max_examples=300)
@given(scattered_boxes())
def test_a_tiling_is_what_covers_everything_once(case: tuple[tuple[int, ...], list[Box]]) -> None:
    """Boxes pass if painting them covers each element once; else the message names every slab where it does not."""
    shape, boxes = case
    offsets = np.array([low for low, _ in boxes], np.int64).reshape(len(boxes), len(shape))
    extents = np.array([size for _, size in boxes], np.int64).reshape(len(boxes), len(shape))
    canvas = painted(boxes, shape)
    if (canvas == 1).all():
        require_tiling(offsets, extents, shape, "it")
        return
    with pytest.raises(PlanError, match=r"^it: ") as caught:
        require_tiling(offsets, extents, shape, "it")
    named = re.findall(r"(?:(\d+) boxes overlap at|nothing is stored for) \[([\d:, ]+)\]", str(caught.value))
    for count, spans in named:
        slab = canvas[tuple(slice(*map(int, span.split(":"))) for span in spans.split(", "))]
        assert slab.size
        assert (slab == int(count or 0)).all()
        slab[...] = 1
    assert "and more" in str(caught.value) or (canvas == 1).all()


def test_more_faults_than_one_reads_are_cut_short() -> None:
    """Of 30 gaps 20 are named, and that there are more."""
    offsets = np.arange(0, 60, 2).reshape(-1, 1)
    with pytest.raises(PlanError, match=r"nothing is stored for \[39:40\], and more$") as caught:
        require_tiling(offsets, np.ones_like(offsets), (60,), "it")
    assert str(caught.value).count("nothing is stored for") == 20


def test_many_boxes_that_are_no_grid_take_no_time() -> None:
    """40 000 bricks, each row cut elsewhere than the last, tile a tensor; one that is missing is named at once."""
    row, cut = np.arange(20_000), np.where(np.arange(20_000) % 2, 3, 5)
    offsets = np.concatenate([np.stack([row, row * 0], axis=1), np.stack([row, cut], axis=1)])
    extents = np.concatenate([np.stack([row * 0 + 1, cut], axis=1), np.stack([row * 0 + 1, 8 - cut], axis=1)])
    began = time.process_time()
    require_tiling(offsets, extents, (20_000, 8), "it")
    with pytest.raises(PlanError, match=re.escape("it: nothing is stored for [19999:20000, 3:8]")):
        require_tiling(offsets[:-1], extents[:-1], (20_000, 8), "it")
    assert time.process_time() - began < 2  # as many steps as boxes: 0.1 s; as their square: 7 s


@pytest.mark.parametrize(
    ("offset", "size", "named"),
    [
        ((0, 0), (5, 3), "[0:5, 0:3]"),
        ((-1, 0), (4, 3), "[-1:3, 0:3]"),
        ((0, 1), (4, 3), "[0:4, 1:4]"),
        ((4, 3), (0, -3), "[4:4, 3:0]"),
    ],
)
def test_boxes_outside_are_named(offset: tuple[int, ...], size: tuple[int, ...], named: str) -> None:
    """A box that reaches over an edge, begins before the first element or has a negative size is named."""
    boxes = np.array([[0, 0], offset], np.int64), np.array([[4, 3], size], np.int64)
    with pytest.raises(PlanError, match=re.escape(f"it: {named} lies outside the tensor of shape [4, 3]")):
        require_tiling(*boxes, (4, 3), "it")


def two_tensors(
    source_boxes: Sequence[Box], target_boxes: Sequence[Box], links: Sequence[tuple[int, int, int]]
) -> None:
    """Plan a gather between two tensors of four rows; a link is (source row, target row, rows)."""
    stored, planned = (
        IndexedTensor.build(name, "float32", (4,), [(*box, 0, 0) for box in boxes])
        for name, boxes in (("s", source_boxes), ("t", target_boxes))
    )
    plan_gather(
        TensorIndex(files=(Path("a"),), tensors={"s": stored}),
        TensorIndex(files=(Path("b"),), tensors={"t": planned}),
        [Link(source="s", source_offset=(a,), target="t", target_offset=(b,), shape=(rows,)) for a, b, rows in links],
    )


WHOLE: list[Box] = [((0,), (4,))]


@pytest.mark.parametrize(
    ("source", "target", "links", "message"),
    [
        ([((0,), (3,))], WHOLE, [(0, 0, 4)], "the stored chunks of 's' are not whole: nothing is stored for [3:4]"),
        (
            [*WHOLE, ((1,), (1,))],
            WHOLE,
            [(0, 0, 4)],
            "the stored chunks of 's' are not whole: 2 boxes overlap at [1:2]",
        ),
        (WHOLE, [((1,), (3,))], [(0, 0, 4)], "the chunks of 't' are not whole: nothing is stored for [0:1]"),
        (WHOLE, WHOLE, [(0, 0, 3)], "the source does not fill 't' exactly: nothing is stored for [3:4]"),
        (WHOLE, WHOLE, [(0, 0, 3), (0, 2, 2)], "the source does not fill 't' exactly: 2 boxes overlap at [2:3]"),
        (WHOLE, WHOLE, [(0, 1, 4)], "the source does not fill 't' exactly: [1:5] lies outside"),
        (WHOLE, WHOLE, [], "the source does not fill 't' exactly: nothing is stored for [0:4]"),
        (WHOLE, WHOLE, [(1, 0, 4)], "a link ends at [5], outside 's' of [4]"),
    ],
)
def test_plans_that_are_not_total_are_refused(
    source: list[Box], target: list[Box], links: list[tuple[int, int, int]], message: str
) -> None:
    """A gap or an overlap in what is stored, in what is written, or in what links the two: all are refused."""
    two_tensors(WHOLE, WHOLE, [(0, 0, 4)])
    with pytest.raises(PlanError, match=re.escape(message)):
        two_tensors(source, target, links)
