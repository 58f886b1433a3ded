"""The reading plan as a table: a row for the ranks of a pipeline stage that read equally much, each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dist_ckpt_mistral.analysis.read_plan import OPTIMIZER, WEIGHTS, Amount, ReadingPlan, factor
from dist_ckpt_mistral.analysis.sheet import sheet
from dist_ckpt_mistral.messages import human_bytes

if TYPE_CHECKING:
    from rich.console import RenderableType
from dist_ckpt_mistral.messages import counted, spans


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Ranks of one stage that need and read equally many bytes, each, if of other chunks and files.

    ``parts`` are what each reads of weights and, if it is planned, of optimizer state; ``amounts`` what of both.
    """

    ranks: tuple[int, ...]
    layers: tuple[int, ...]
    parts: tuple[Amount, ...]
    amounts: tuple[Amount, ...]


def rows(plan: ReadingPlan) -> list[Row]:
    """The rows of the table, in the order of the first rank of each."""
    parts = list(zip(*(plan.amounts_of(part) for part in _parts(plan)), strict=True))
    alike: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for number, (group, amounts) in enumerate(zip(plan.groups, parts, strict=True)):
        alike[group.stage, *((amount.needed_bytes, amount.read_bytes) for amount in amounts)].append(number)
    found = [
        Row(
            ranks=tuple(sorted(rank for number in numbers for rank in plan.groups[number].ranks)),
            layers=plan.groups[numbers[0]].layers,
            parts=parts[numbers[0]],
            amounts=tuple(plan.amounts[number] for number in numbers),
        )
        for numbers in alike.values()
    ]
    return sorted(found, key=lambda row: row.ranks)


def _parts(plan: ReadingPlan) -> tuple[str, ...]:
    return (WEIGHTS, OPTIMIZER) if plan.has_optimizer else (WEIGHTS,)


def render(plan: ReadingPlan) -> RenderableType:
    """The plan as a rich renderable."""
    needs = [f"{part} needed" for part in _parts(plan)]
    numbers = (*(name for need in needs for name in (need, "read", "times")), "chunks", "files")
    return sheet(
        str(plan.path),
        _facts(plan),
        [("ranks", "left"), ("layers", "left"), *((name, "right") for name in numbers)],
        [(spans(row.ranks), spans(row.layers), *_sizes(row.parts), *_counts(row.amounts)) for row in rows(plan)],
        total=("all together", "", *_sizes([plan.total_of(part) for part in _parts(plan)]), *_counts([plan.total])),
        notes=(plan.verdict(), *_notes(plan)),
    )


def _sizes(parts: Sequence[Amount]) -> list[str]:
    """Needed and read, and how much more that is."""
    cells = []
    for amount in parts:
        times = "" if amount.amplification is None else factor(amount.amplification).removesuffix(" times")
        cells += [human_bytes(amount.needed_bytes), human_bytes(amount.read_bytes), times]
    return cells


def _counts(amounts: Sequence[Amount]) -> list[str]:
    """Chunks and files, from the fewest to the most."""
    counts = [sorted({each.num_chunks for each in amounts}), sorted({len(each.file_bytes) for each in amounts})]
    return [f"{count[0]} to {count[-1]}" if len(count) > 1 else str(count[0]) for count in counts]


def _notes(plan: ReadingPlan) -> list[str]:
    """What else to know."""
    copies = max(len(group.ranks) for group in plan.groups)
    notes = [f"Not in the plan: {plan.left_out}"] if plan.left_out else []
    if copies > 1:
        shared = "with Megatron's --ckpt-fully-parallel-load they would share the work"
        notes.append(f"Up to {copies} ranks read the same; {shared}.")
    return notes


def _facts(plan: ReadingPlan) -> list[tuple[str, str]]:
    parts = f"{counted(len(plan.chunks.files), 'chunk')}, {counted(len(plan.files), 'file')}"
    return [
        ("configuration", plan.config_from),
        ("stored", f"{human_bytes(plan.stored_bytes)} in {parts}"),
        ("layout", layout_text(plan)),
    ]


def layout_text(plan: ReadingPlan) -> str:
    """``8 ranks: tp=4, pp=2``."""
    text = plan.layout.text
    return counted(plan.layout.world_size, "rank") + (f": {text}" if text else "")
