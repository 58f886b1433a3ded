"""The gather against numpy: any boxes from any chunks into any chunks, in bands of any size."""

from __future__ import annotations

import itertools
import math
import operator
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from drawn_chunks import (
    DTYPES,
    Disk,
    elements,
    expected_chunks,
    gathered,
    planned_tensors,
    shapes,
    sizes,
    stored_tensors,
    tilings,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_ckpt_mistral.errors import PlanError, TensorMismatchError
from dist_ckpt_mistral.gather.execute import Effort, execute
from dist_ckpt_mistral.gather.index import IndexedTensor, TensorIndex
from dist_ckpt_mistral.gather.links import Link, reverse
from dist_ckpt_mistral.gather.plan import only_dtype, plan_gather
from dist_ckpt_mistral.model.config.mistral_config import MistralConfig
from dist_ckpt_mistral.model.table.rules import RowBlocks
from dist_ckpt_mistral.model.table.table import tensor_table
from dist_ckpt_mistral.storage.local import TargetFile

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
