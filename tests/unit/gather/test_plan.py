"""The gather against numpy: any boxes from any chunks into any chunks, in bands of any size, by any threads."""

from __future__ import annotations

import itertools
import math
import operator
import os
import re
import sys
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded_progress import Recorded

from dist_ckpt_mistral.errors import FormatError, PlanError, SourceError, TensorMismatchError
from dist_ckpt_mistral.gather.bands import BandReader, best_band_bytes
from dist_ckpt_mistral.gather.boxes import require_tiling
from dist_ckpt_mistral.gather.execute import Effort, execute
from dist_ckpt_mistral.gather.index import IndexedTensor, TensorIndex
from dist_ckpt_mistral.gather.links import Link, reverse
from dist_ckpt_mistral.gather.plan import BytePlan, only_dtype, plan_gather
from dist_ckpt_mistral.model.config.mistral_config import MistralConfig
from dist_ckpt_mistral.model.table.rules import RowBlocks
from dist_ckpt_mistral.model.table.table import tensor_table
from dist_ckpt_mistral.storage.local import SourceFiles, TargetFile

Array = npt.NDArray[Any]
#: Offset and shape in elements.
Box = tuple[tuple[int, ...], tuple[int, ...]]
DTYPES = {"uint8": 1, "bfloat16": 2, "float32": 4, "int64": 8}


def sizes(most: int) -> st.SearchStrategy[int]:
    """Extents, odd ones and 1 among them."""
    return st.integers(1, most)


def shapes(*, least_axes: int = 0, most_axes: int = 4) -> st.SearchStrategy[tuple[int, ...]]:
    """Shapes from scalars to four axes, some of them empty."""
    extents = sizes(7) | st.sampled_from([0, 1, 13])
    return st.lists(extents, min_size=least_axes, max_size=most_axes).map(tuple)


@st.composite
def tilings(draw: st.DrawFn, shape: tuple[int, ...]) -> list[Box]:
    """Boxes that cover ``shape`` once, in any order: a grid, or what comes of cutting boxes in two again and again."""
    if draw(st.booleans()):
        cuts = [sorted({0, *draw(st.lists(st.integers(0, extent), max_size=3)), extent}) for extent in shape]
        axes = [list(itertools.pairwise(axis)) or [(0, 0)] for axis in cuts]
        boxes = [(tuple(a for a, _ in cell), tuple(b - a for a, b in cell)) for cell in itertools.product(*axes)]
    else:
        boxes = [((0,) * len(shape), shape)]
        for _ in range(draw(st.integers(0, 6)) if shape else 0):
            offset, extent = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
            axis = draw(st.integers(0, len(shape) - 1))
            at = draw(st.integers(0, extent[axis]))
            for start, stop in ((0, at), (at, extent[axis])):
                low, size = list(offset), list(extent)
                low[axis] += start
                size[axis] = stop - start
                if stop > start or not math.prod(shape):
                    boxes.append((tuple(low), tuple(size)))
        boxes = list(dict.fromkeys(boxes))
    return draw(st.permutations(boxes))


def region(box: Box) -> tuple[slice, ...]:
    """The box for numpy."""
    return tuple(slice(low, low + size) for low, size in zip(*box, strict=True))


@dataclass
class Disk:
    """Files in memory. Reading stops the test where nothing was stored, and remembers every read."""

    is_remote: bool = False
    files: list[bytearray] = field(default_factory=lambda: [bytearray(), bytearray(), bytearray()])
    stored: list[list[tuple[int, int]]] = field(default_factory=lambda: [[], [], []])
    reads: list[tuple[int, int, int]] = field(default_factory=list)

    def hold(self, wanted: object) -> Disk:  # noqa: ARG002  (nothing is kept for others)
        """What is wanted is read from the files themselves."""
        return self

    def store(self, file: int, gap: int, data: bytes) -> int:
        """Append bytes behind a gap of rubbish; gives their position."""
        self.files[file] += b"\xa5" * gap + data
        position = len(self.files[file]) - len(data)
        self.stored[file].append((position, position + len(data)))
        return position

    def read_into(self, file: int, position: int, *buffers: memoryview) -> None:
        """Read as SourceFiles does, but only inside one chunk at a time."""
        num_bytes = sum(map(len, buffers))
        assert all(map(len, buffers))
        self.reads.append((file, position, num_bytes))
        assert any(low <= position and position + num_bytes <= high for low, high in self.stored[file])
        for buffer in buffers:
            buffer[:] = self.files[file][position : position + len(buffer)]
            position += len(buffer)


def elements(shape: tuple[int, ...], itemsize: int, seed: int) -> Array:
    """An array of elements that are all different, as far as their size allows, as bytes ``[*shape, itemsize]``."""
    count = math.prod(shape)
    values = np.random.default_rng(seed).permutation(count).astype(np.uint64)
    return values.view(np.uint8).reshape(count, 8)[:, :itemsize].reshape(*shape, itemsize)


@st.composite
def stored_tensors(draw: st.DrawFn, disk: Disk, name: str, dtype: str, array: Array) -> IndexedTensor:
    """``array`` on the disk, in chunks of any tiling that lie anywhere in any file."""
    shape = array.shape[:-1]
    chunks = []
    for offset, size in draw(tilings(shape)):
        file = draw(st.integers(0, 2))
        position = disk.store(file, draw(st.integers(0, 9)), array[region((offset, size))].tobytes())
        chunks.append((offset, size, file, position))
    return IndexedTensor.build(name, dtype, shape, chunks)


@st.composite
def planned_tensors(draw: st.DrawFn, ends: list[int], name: str, dtype: str, shape: tuple[int, ...]) -> IndexedTensor:
    """A tensor that is to be written, in chunks of any tiling, one behind the other in any file."""
    chunks = []
    for offset, size in draw(tilings(shape)):
        file = draw(st.integers(0, len(ends) - 1))
        ends[file] += draw(st.integers(0, 9))
        chunks.append((offset, size, file, ends[file]))
        ends[file] += math.prod(size) * DTYPES[dtype]
    return IndexedTensor.build(name, dtype, shape, chunks)


def gathered(plan: BytePlan, disk: Disk, band_bytes: int) -> dict[tuple[int, int], bytes]:
    """What the plan brings to each (file, position), band by band, none longer than ``band_bytes``."""
    reader = BandReader(cast("SourceFiles", disk), band_bytes)
    result = {}
    for segment in plan.segments:
        bands = [bytes(band) for band in reader.bands(segment)]
        assert all(0 < len(band) <= band_bytes for band in bands)
        assert len(bands) == -(-segment.num_bytes // band_bytes)
        result[segment.file, segment.position] = b"".join(bands)
    return result


def expected_chunks(tensor: IndexedTensor, array: Array) -> dict[tuple[int, int], bytes]:
    """What numpy puts into each chunk of a tensor."""
    boxes = zip(map(tuple, tensor.offsets.tolist()), map(tuple, tensor.shapes.tolist()), strict=True)
    places = zip(tensor.files.tolist(), tensor.positions.tolist(), strict=True)
    return {place: array[region(box)].tobytes() for place, box in zip(places, boxes, strict=True)}


BANDS = st.sampled_from([1, 2, 3, 8, 17, 64, 1000, 1 << 20])


@settings(max_examples=200)
@given(data=st.data(), shape=shapes(), dtype=st.sampled_from([*DTYPES]), band_bytes=BANDS, seed=st.integers(0, 99))
def test_rechunking_changes_nothing(
    data: st.DataObject, shape: tuple[int, ...], dtype: str, band_bytes: int, seed: int
) -> None:
    """Any array in any chunks comes out as numpy cuts it into any other chunks, whatever the bands are."""
    disk, ends = Disk(), [0, 0]
    array = elements(shape, DTYPES[dtype], seed)
    source = data.draw(stored_tensors(disk, "s", dtype, array))
    target = data.draw(planned_tensors(ends, "t", dtype, shape))
    origin = (0,) * len(shape)
    link = Link(source="s", source_offset=origin, target="t", target_offset=origin, shape=shape)
    files = (Path("a"), Path("b"), Path("c"))
    plan = plan_gather(
        TensorIndex(files=files, tensors={"s": source}), TensorIndex(files=files[:2], tensors={"t": target}), [link]
    )
    expected = expected_chunks(target, array)
    found = gathered(plan, disk, band_bytes)
    assert found == expected
    assert plan.num_bytes == array.size
    assert [(s.file, s.position) for s in plan.segments] == sorted((s.file, s.position) for s in plan.segments)


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows of one stored tensor, shared out among parts: (part, row in the part, row in the whole, number of rows)."""

    lead: tuple[int, ...]
    whole_rows: int
    part_rows: list[int]
    pieces: list[tuple[int, int, int, int]]


@st.composite
def row_tables(draw: st.DrawFn) -> Rows:
    """Any way of dealing the rows of a tensor, which may have leading axes of its own, to some parts."""
    lengths = draw(st.lists(sizes(4), min_size=1, max_size=6))
    owners = [draw(st.integers(0, 2)) for _ in lengths]
    starts = [0, *itertools.accumulate(lengths)]
    part_rows, pieces = [0, 0, 0], []
    for piece in draw(st.permutations(range(len(lengths)))):
        part, length = owners[piece], lengths[piece]
        pieces.append((part, part_rows[part], starts[piece], length))
        part_rows[part] += length
    lead = draw(st.lists(sizes(3), max_size=2).map(tuple))
    return Rows(lead=lead, whole_rows=starts[-1], part_rows=part_rows, pieces=pieces)


@settings(max_examples=200)
@given(data=st.data(), table=row_tables(), columns=shapes(most_axes=1), dtype=st.sampled_from([*DTYPES]), bands=BANDS)
def test_rows_go_where_the_table_says(
    data: st.DataObject, table: Rows, columns: tuple[int, ...], dtype: str, bands: int
) -> None:
    """Rows of a stacked tensor are dealt out to parts for every layer, and gathered from parts again, as numpy does."""
    whole = elements((*table.lead, table.whole_rows, *columns), DTYPES[dtype], 1)
    layers = list(itertools.product(*map(range, table.lead)))
    parts, links = {}, []
    for layer in layers:
        for part, rows in enumerate(table.part_rows):
            if rows:
                parts[f"{layer}{part}"] = np.zeros((rows, *columns, DTYPES[dtype]), np.uint8)
        for part, part_row, whole_row, rows in table.pieces:
            parts[f"{layer}{part}"][part_row : part_row + rows] = whole[layer][whole_row : whole_row + rows]
            links.append(
                Link(
                    source="whole",
                    source_offset=(*layer, whole_row, *(0,) * len(columns)),
                    target=f"{layer}{part}",
                    target_offset=(part_row, *(0,) * len(columns)),
                    shape=(rows, *columns),
                )
            )
    forth = data.draw(st.booleans())
    sources, targets = ({"whole": whole}, parts) if forth else (parts, {"whole": whole})
    disk, ends = Disk(), [0, 0]
    files = (Path("a"), Path("b"), Path("c"))
    stored = {name: data.draw(stored_tensors(disk, name, dtype, array)) for name, array in sources.items()}
    planned = {name: data.draw(planned_tensors(ends, name, dtype, array.shape[:-1])) for name, array in targets.items()}
    plan = plan_gather(
        TensorIndex(files=files, tensors=stored),
        TensorIndex(files=files[:2], tensors=planned),
        links if forth else [reverse(link) for link in links],
    )
    found = gathered(plan, disk, bands)
    expected: dict[tuple[int, int], bytes] = {}
    for name, tensor in planned.items():
        expected |= expected_chunks(tensor, targets[name])
    assert found == expected


def experts(count: int) -> tuple[TensorIndex, TensorIndex, list[Link]]:
    """Stacked weights of ``count`` experts, in two chunks each; one tensor for each expert; the links between them."""
    boxes = [((expert, half, 0), (1, 4, 6)) for expert in range(count) for half in (0, 4)]
    chunks = [(*box, 0, number * 48) for number, box in enumerate(boxes)]
    stacked = IndexedTensor.build("stacked", "bfloat16", (count, 8, 6), chunks)
    names = [f"expert {number}" for number in range(count)]
    single = {
        name: IndexedTensor.whole(name, "bfloat16", (8, 6), file=0, position=n * 96) for n, name in enumerate(names)
    }
    links = [
        Link(source="stacked", source_offset=(n, 0, 0), target=name, target_offset=(0, 0), shape=(8, 6))
        for n, name in enumerate(names)
    ]
    files = (Path("a"),)
    return TensorIndex(files=files, tensors={"stacked": stacked}), TensorIndex(files=files, tensors=single), links


@pytest.mark.parametrize("is_export", [True, False], ids=["export", "import"])
def test_many_tensors_are_planned_together(is_export: bool) -> None:
    """One more tensor costs fewer than 200 calls, counting numpy's. Planned by itself, each would cost 400 to 600."""

    def num_calls(count: int) -> int:
        stacked, single, links = experts(count)
        ends = (stacked, single, links) if is_export else (single, stacked, [reverse(link) for link in links])
        events: list[str] = []
        sys.setprofile(lambda _, event, __: events.append(event))
        try:
            plan_gather(*ends)
        finally:
            sys.setprofile(None)
        return events.count("call") + events.count("c_call")

    assert num_calls(300) - num_calls(100) < 200 * 200


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


def test_a_target_of_another_element_type() -> None:
    """All bytes of a segment are converted, and it says from what to what."""
    tensors = {
        name: IndexedTensor.whole(name, dtype, (2,), file=0, position=0)
        for name, dtype in (("a", "float32"), ("b", "float16"), ("t", "bfloat16"))
    }
    index = TensorIndex(files=(Path("x"),), tensors=tensors)
    target = TensorIndex(files=(Path("y"),), tensors={"t": tensors["t"]})
    links = [Link(source="a", source_offset=(0,), target="t", target_offset=(0,), shape=(2,))]
    [segment] = plan_gather(index, target, links).segments
    assert (segment.source_dtype, segment.dtype, segment.num_bytes, segment.stored_bytes) == (
        "float32",
        "bfloat16",
        8,
        4,
    )


@pytest.mark.parametrize("target", ["float32", "bfloat16", "float16"])
def test_element_types_are_mixed_only_where_one_is_chosen(target: str, tmp_path: Path) -> None:
    """Sources of several dtypes have none in common, but fill a target of any: each value as torch converts it."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    halves = {"a": torch.randn(3, 4), "b": torch.randn(3, 4).half(), "c": torch.randn(3, 4).bfloat16()}
    path, tensors, position = tmp_path / "source", {}, 5
    with path.open("wb") as file:
        file.write(bytes(position))
        for name, values in halves.items():
            dtype = str(values.dtype).removeprefix("torch.")
            tensors[name] = IndexedTensor.whole(name, dtype, (3, 4), file=0, position=position)
            position += file.write(values.view(torch.uint8).numpy().tobytes())
    links = [
        Link(source=name, source_offset=(row, 0), target="t", target_offset=(3 * row + part, 0), shape=(1, 4))
        for part, name in enumerate(halves)
        for row in range(3)
    ]
    index = TensorIndex(files=(path,), tensors=tensors)
    message = (
        "'t' would mix element types: expected one for all its parts, got bfloat16: c; float16: b; float32: a. Give"
    )
    with pytest.raises(TensorMismatchError, match=re.escape(message)):
        only_dtype(index, links)
    wanted = {"t": IndexedTensor.whole("t", target, (9, 4), file=0, position=0)}
    plan = plan_gather(index, TensorIndex(files=(Path("t"),), tensors=wanted), links)
    assert plan.segments[0].sources == ("a", "b", "c")
    written = TargetFile(tmp_path / "t", plan.num_bytes)
    execute(plan, {0: written}, effort=Effort(workers=1), numbers=[0], checksums=False)
    written.close()
    dtype = getattr(torch, target)
    expected = torch.stack([values.to(dtype) for values in halves.values()], 1)
    assert (tmp_path / "t").read_bytes() == expected.view(torch.uint8).numpy().tobytes()


@settings(max_examples=100)
@given(data=st.data(), shape=shapes(most_axes=3))
def test_meeting_chunks_are_those_that_overlap(data: st.DataObject, shape: tuple[int, ...]) -> None:
    """The chunks that meet each of some boxes, and where: as Python's own loops find them, for any arrangement."""
    chunks = sorted(data.draw(tilings(shape)))
    tensor = IndexedTensor.build("t", "uint8", shape, [(*chunk, 0, 0) for chunk in chunks])
    boxes = []
    for _ in range(data.draw(st.integers(0, 4))):
        low = tuple(data.draw(st.integers(0, extent)) for extent in shape)
        boxes.append((low, tuple(data.draw(st.integers(a, extent)) for a, extent in zip(low, shape, strict=True))))
    expected = []
    for (box, (low, high)), (number, (offset, size)) in itertools.product(enumerate(boxes), enumerate(chunks)):
        inner_low = tuple(map(max, offset, low))
        inner_high = tuple(min(a + b, c) for a, b, c in zip(offset, size, high, strict=True))
        if all(map(operator.lt, inner_low, inner_high)):
            expected.append((box, number, inner_low, inner_high))
    lows, highs = (np.array([box[end] for box in boxes], np.int64).reshape(len(boxes), len(shape)) for end in (0, 1))
    meets = zip(*(column.tolist() for column in tensor.overlaps(lows, highs)), strict=True)
    assert sorted((box, number, tuple(low), tuple(high)) for box, number, low, high in meets) == expected


# Running a plan


def column_plan(disk: Disk, rows: int, source_columns: int, columns: slice) -> tuple[BytePlan, bytes]:
    """A plan that takes some columns of a uint8 matrix, and what it should bring."""
    array = elements((rows, source_columns), 1, 5)
    position = disk.store(0, 7, array.tobytes())
    width = columns.stop - columns.start
    source = IndexedTensor.whole("s", "uint8", (rows, source_columns), file=0, position=position)
    target = IndexedTensor.whole("t", "uint8", (rows, width), file=0, position=0)
    link = Link(source="s", source_offset=(0, columns.start), target="t", target_offset=(0, 0), shape=(rows, width))
    plan = plan_gather(
        TensorIndex(files=(Path("a"),), tensors={"s": source}),
        TensorIndex(files=(Path("b"),), tensors={"t": target}),
        [link],
    )
    return plan, array[:, columns].tobytes()


@pytest.mark.parametrize(
    ("rows", "source_columns", "columns", "band_bytes", "reads"),
    [
        (64, 100, slice(0, 100), 1 << 20, [(7, 6400)]),
        (64, 100, slice(0, 100), 3000, [(7, 3000), (3007, 3000), (6007, 400)]),
        (4, 100, slice(10, 20), 1 << 20, [(17, 310)]),
        (3, 70_000, slice(10, 20), 1 << 20, [(17, 10), (70_017, 10), (140_017, 10)]),
        (4, 100, slice(10, 20), 15, [(17, 10), (117, 5), (122, 5), (217, 10), (317, 10)]),
    ],
)
def test_reads_are_few_and_none_is_wasted(
    rows: int, source_columns: int, columns: slice, band_bytes: int, reads: list[tuple[int, int]]
) -> None:
    """Contiguous bytes are read at once, rows with short gaps in one span, rows with long gaps one by one."""
    disk = Disk()
    plan, expected = column_plan(disk, rows, source_columns, columns)
    assert b"".join(gathered(plan, disk, band_bytes).values()) == expected
    assert sorted((position, num_bytes) for _, position, num_bytes in disk.reads) == reads


def test_long_rows_go_to_their_places_without_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that lie together in the source and apart in the target are read by one call, into as many buffers."""
    disk, array = Disk(), elements((6, 8000), 1, 3)
    halves = [((0, 0), (6, 3000)), ((0, 3000), (6, 5000))]
    chunks = [(*half, 0, disk.store(0, 7, array[region(half)].tobytes())) for half in halves]
    source = IndexedTensor.build("s", "uint8", (6, 8000), chunks)
    target = IndexedTensor.whole("t", "uint8", (6, 8000), file=0, position=0)
    link = Link(source="s", source_offset=(0, 0), target="t", target_offset=(0, 0), shape=(6, 8000))
    plan = plan_gather(
        TensorIndex(files=(Path("a"),), tensors={"s": source}),
        TensorIndex(files=(Path("b"),), tensors={"t": target}),
        [link],
    )
    monkeypatch.setattr(np, "copyto", None)
    assert gathered(plan, disk, 1 << 20) == {(0, 0): array.tobytes()}
    assert [num_bytes for _, _, num_bytes in disk.reads] == [18_000, 30_000]


@settings(max_examples=40)
@given(
    data=st.data(),
    shape=shapes(least_axes=1, most_axes=3),
    workers=st.integers(1, 4),
    checksums=st.booleans(),
    dtype=st.sampled_from([*DTYPES]),
)
def test_files_are_written_as_planned(
    data: st.DataObject,
    shape: tuple[int, ...],
    workers: int,
    checksums: bool,
    dtype: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Real files, any number of threads: planned bytes are as numpy has them, all others untouched, checksums right."""
    folder = tmp_path_factory.mktemp("run")
    disk, ends = Disk(), [0, 0]
    array = elements(shape, DTYPES[dtype], 3)
    source = data.draw(stored_tensors(disk, "s", dtype, array))
    target = data.draw(planned_tensors(ends, "t", dtype, shape))
    sources = tuple(folder / f"source{number}" for number in range(3))
    for path, content in zip(sources, disk.files, strict=True):
        path.write_bytes(content)
    origin = (0,) * len(shape)
    plan = plan_gather(
        TensorIndex(files=sources, tensors={"s": source}),
        TensorIndex(files=(folder / "0", folder / "1"), tensors={"t": target}),
        [Link(source="s", source_offset=origin, target="t", target_offset=origin, shape=shape)],
    )
    targets = {number: TargetFile(folder / str(number), end + 5) for number, end in enumerate(ends)}
    progress = Recorded()
    copied = execute(
        plan,
        targets,
        effort=Effort(workers=workers, progress=progress),
        numbers=range(len(plan.segments)),
        checksums=checksums,
    )
    for each in targets.values():
        each.close()
    expected = expected_chunks(target, array)
    whole = [bytearray(end + 5) for end in ends]
    for (file, position), raw in expected.items():
        whole[file][position : position + len(raw)] = raw
    assert [(folder / str(number)).read_bytes() for number in (0, 1)] == whole
    assert sum(num_bytes for _, num_bytes in progress.done) == array.size
    true = {n: zlib.crc32(expected[s.file, s.position]) for n, s in enumerate(plan.segments)}
    assert {number: each.lost for number, each in copied.items()} == dict.fromkeys(true, (0, 0))
    assert not checksums or {number: each.crc32 for number, each in copied.items()} == true


def test_long_segments_are_shared_among_threads(tmp_path: Path) -> None:
    """Segments longer than what a thread takes at a time come out whole, with checksums and without."""
    rng = np.random.default_rng(0)
    content = rng.integers(0, 256, 150 << 20, dtype=np.uint8)
    content.tofile(tmp_path / "source")
    shape = (len(content) // 4,)
    index = {
        name: TensorIndex(
            files=(tmp_path / name,),
            tensors={name: IndexedTensor.whole(name, "float32", shape, file=0, position=0)},
        )
        for name in ("source", "target")
    }
    link = Link(source="source", source_offset=(0,), target="target", target_offset=(0,), shape=shape)
    plan = plan_gather(index["source"], index["target"], [link])
    for checksums in (False, True):
        target = TargetFile(tmp_path / "target", len(content))
        found = execute(plan, {0: target}, effort=Effort(workers=3), numbers=[0], checksums=checksums)
        target.close()
        assert (np.fromfile(tmp_path / "target", np.uint8) == content).all()
        assert not checksums or found[0].crc32 == zlib.crc32(content.data)
        (tmp_path / "target").unlink()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_writes_begin_where_the_page_cache_takes_them_whole(tmp_path: Path, dtype: str) -> None:
    """All writes but a segment's first begin at multiples of their length, also if values are converted on the way."""
    (tmp_path / "source").write_bytes(bytes(3 << 20))
    shape, writes = (3 << 18,), []
    source = IndexedTensor.whole("s", "float32", shape, file=0, position=0)
    target = IndexedTensor.whole("t", dtype, shape, file=0, position=1000)
    plan = plan_gather(
        TensorIndex(files=(tmp_path / "source",), tensors={"s": source}),
        TensorIndex(files=(tmp_path / "target",), tensors={"t": target}),
        [Link(source="s", source_offset=(0,), target="t", target_offset=(0,), shape=shape)],
    )
    written = SimpleNamespace(
        write=lambda position, data: writes.append((position, len(data))), start_writeback=lambda *_: None
    )
    effort = Effort(workers=1)
    execute(plan, {0: cast("TargetFile", written)}, effort=effort, numbers=[0], checksums=False)
    stored, band = shape[0] * DTYPES[dtype], best_band_bytes() // 4 * DTYPES[dtype]
    begins = [1000, *range(band, 1000 + stored, band)]
    assert writes == [(begin, end - begin) for begin, end in itertools.pairwise([*begins, 1000 + stored])]


class FailingTarget:
    """A file whose disk is full after some writes."""

    def __init__(self, good: int, seconds: float = 0) -> None:
        """Let ``good`` writes pass, each after some time."""
        self.good, self.seconds, self.writes = good, seconds, 0

    def start_writeback(self, position: int, num_bytes: int) -> None:
        """Nothing is on its way."""

    def write(self, position: int, data: memoryview) -> None:
        """Write, or fail."""
        self.writes += 1
        time.sleep(self.seconds)
        if self.writes > self.good:
            time.sleep(0.01)  # a slow disk: what is still in the queue can be cancelled
            raise OSError(28, f"no space for {len(data)} bytes at {position}")


@pytest.mark.parametrize("workers", [1, 3])
def test_the_first_failure_ends_the_run(workers: int, tmp_path: Path) -> None:
    """When a write fails that error comes out, and of a thousand segments hardly any is tried after it."""
    (tmp_path / "source").write_bytes(bytes(1000))
    source = IndexedTensor.whole("s", "uint8", (1000,), file=0, position=0)
    target = IndexedTensor.build("t", "uint8", (1000,), [((row,), (1,), 0, row) for row in range(1000)])
    plan = plan_gather(
        TensorIndex(files=(tmp_path / "source",), tensors={"s": source}),
        TensorIndex(files=(tmp_path / "target",), tensors={"t": target}),
        [Link(source="s", source_offset=(0,), target="t", target_offset=(0,), shape=(1000,))],
    )
    failing = FailingTarget(5)
    effort = Effort(workers=workers)
    with pytest.raises(OSError, match="no space for 1 bytes"):
        execute(plan, {0: cast("TargetFile", failing)}, effort=effort, numbers=range(1000), checksums=True)
    assert 6 <= failing.writes < 500


def test_threads_end_when_another_fails(tmp_path: Path) -> None:
    """A thread in the middle of a long segment ends with its band when another one fails, whose error comes out."""
    (tmp_path / "source").write_bytes(bytes(32 << 20))
    source = IndexedTensor.whole("s", "uint8", (32 << 20,), file=0, position=0)
    half = 16 << 20
    target = IndexedTensor.build("t", "uint8", (32 << 20,), [((0,), (half,), 0, 0), ((half,), (half,), 1, 0)])
    plan = plan_gather(
        TensorIndex(files=(tmp_path / "source",), tensors={"s": source}),
        TensorIndex(files=(tmp_path / "0", tmp_path / "1"), tensors={"t": target}),
        [Link(source="s", source_offset=(0,), target="t", target_offset=(0,), shape=(32 << 20,))],
    )
    long, failing = FailingTarget(10**6, seconds=0.02), FailingTarget(0)
    effort = Effort(workers=2, memory_bytes=1 << 20)
    targets = {0: cast("TargetFile", long), 1: cast("TargetFile", failing)}
    with pytest.raises(OSError, match="no space"):
        execute(plan, targets, effort=effort, numbers=[0, 1], checksums=True)
    assert long.writes < half // effort.band_bytes()


class CountingTarget:
    """A file that counts how many threads are in ``write`` at the same time, and remembers which were there."""

    def __init__(self) -> None:
        """Begin without writers."""
        self.now, self.most, self.threads = 0, 0, list[int]()
        self.lock = threading.Lock()

    def start_writeback(self, position: int, num_bytes: int) -> None:
        """Nothing is on its way."""

    def write(self, position: int, data: memoryview) -> None:  # noqa: ARG002  (only who writes, and when, matters)
        """Stay for a while."""
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
            self.threads.append(threading.get_ident())
        time.sleep(0.001)
        with self.lock:
            self.now -= 1


@pytest.mark.parametrize(("num_files", "workers"), [(1, 4), (2, 4), (2, 2)])
def test_few_threads_write_one_file(num_files: int, workers: int, tmp_path: Path) -> None:
    """At most two threads write a file at a time, and with as many files as threads each begins in its own."""
    size = 256 << 20
    (tmp_path / "source").touch()
    os.truncate(tmp_path / "source", size)
    source = IndexedTensor.whole("s", "uint8", (size,), file=0, position=0)
    step = size // num_files
    target = IndexedTensor.build("t", "uint8", (size,), [((n * step,), (step,), n, 0) for n in range(num_files)])
    plan = plan_gather(
        TensorIndex(files=(tmp_path / "source",), tensors={"s": source}),
        TensorIndex(files=(Path("t"),) * num_files, tensors={"t": target}),
        [Link(source="s", source_offset=(0,), target="t", target_offset=(0,), shape=(size,))],
    )
    files = {number: CountingTarget() for number in range(num_files)}
    targets = {number: cast("TargetFile", file) for number, file in files.items()}
    execute(plan, targets, effort=Effort(workers=workers), numbers=range(num_files), checksums=False)
    assert all(file.most <= 2 for file in files.values())
    assert max(file.most for file in files.values()) == 2 or workers == num_files
    assert workers > num_files or len({file.threads[0] for file in files.values()}) == num_files


def test_a_source_that_shrinks_is_named(tmp_path: Path) -> None:
    """A file that has become shorter, or is gone, since the plan was made is an error that names it."""
    disk = Disk()
    plan, _ = column_plan(disk, 4, 100, slice(10, 20))
    path = tmp_path / "a"
    path.write_bytes(disk.files[0][:-81])
    with (
        SourceFiles([path]) as sources,
        pytest.raises(FormatError, match=rf"{path} is truncated: expected at least 327"),
    ):
        list(BandReader(sources).bands(plan.segments[0]))
    path.unlink()
    with SourceFiles([path]) as sources, pytest.raises(SourceError, match=f"cannot open {path}: No such file"):
        list(BandReader(sources).bands(plan.segments[0]))


def test_short_reads_and_writes_are_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the operating system gives or takes a few bytes at a time, all of them arrive, into several buffers too."""
    preadv, pwrite = os.preadv, os.pwrite

    def short_read(descriptor: int, buffers: list[memoryview], position: int) -> int:
        return preadv(descriptor, [buffers[0][:7]], position)

    monkeypatch.setattr(os, "preadv", short_read)
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, position: pwrite(descriptor, data[:5], position))
    content = bytes(range(200))
    target = TargetFile(tmp_path / "file", 300)
    target.write(50, memoryview(content))
    target.close()
    assert (tmp_path / "file").read_bytes() == bytes(50) + content + bytes(50)
    buffer = bytearray(200)
    with SourceFiles([tmp_path / "file"]) as sources:
        sources.read_into(0, 50, memoryview(buffer))
        assert buffer == content
        with pytest.raises(FormatError, match="expected at least 301 bytes, got 300"):
            sources.read(0, 101, 200)


def test_effort_bounds_memory() -> None:
    """Buffers of all threads together stay within what is allowed, and bands hold whole elements."""
    for workers in (1, 2, 3, 8):
        for memory_bytes in (1 << 20, 32 << 20, 1 << 30):
            effort = Effort(workers=workers, memory_bytes=memory_bytes)
            assert effort.threads == workers
            for readers in (1, 2):
                band_bytes = effort.band_bytes(readers)
                assert 64 << 10 <= band_bytes * readers <= 2 << 20
                assert band_bytes % 64 == 0
                assert band_bytes * readers * workers * 5 / 4 <= memory_bytes  # with the buffer for gaps


# Row blocks


@given(count=st.integers(0, 6), stride=st.integers(0, 8), offset=st.integers(-1, 8), length=st.integers(-1, 6))
def test_row_blocks_are_one_to_one(count: int, stride: int, offset: int, length: int) -> None:
    """Whatever is accepted maps different rows to different rows; what would not is refused."""
    rows = [block * stride + offset + row for block in range(count) for row in range(length)]
    sound = min(count, offset, length) >= 0 and len(set(rows)) == len(rows)
    if not sound:
        with pytest.raises(PlanError, match="row blocks overlap or are negative"):
            RowBlocks(count=count, stride=stride, offset=offset, length=length)
        return
    blocks = RowBlocks(count=count, stride=stride, offset=offset, length=length)
    assert blocks.hf_rows == len(rows)
    spread = [(hf + row, mcore + row) for hf, mcore, size in blocks for row in range(size)]
    assert spread == list(enumerate(rows))


@settings(max_examples=60)
@given(
    groups=st.integers(1, 4),
    queries=st.integers(1, 4),
    head_dim=st.integers(1, 4),
    hidden=st.integers(1, 5),
    ffn=st.integers(1, 5),
    layers=st.integers(1, 3),
    tied=st.booleans(),
)
def test_the_table_deals_every_row_once(
    groups: int, queries: int, head_dim: int, hidden: int, ffn: int, layers: int, tied: bool
) -> None:
    """The parts of each stored tensor cover its rows exactly once, whatever the sizes of the model."""
    config = MistralConfig(
        vocab_size=7,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=groups * queries,
        num_key_value_heads=groups,
        head_dim=head_dim,
        tie_word_embeddings=tied,
    )
    table = tensor_table(config)
    for rule in table.rules:
        rows = sorted(row for part in rule.parts for _, start, size in part.rows for row in range(start, start + size))
        assert rows == list(range(rule.shape[0]))
    elements_of: Callable[[tuple[int, ...]], int] = math.prod
    stored = sum(elements_of((*rule.lead, *rule.shape)) for rule in table.rules)
    assert stored == sum(elements_of(tensor.shape) for tensor in table.hf_tensors().values() if not tensor.is_alias)
