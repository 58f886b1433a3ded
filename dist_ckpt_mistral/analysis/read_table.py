"""The reading plan as a table: one row for the ranks of a pipeline stage that each read the same number of bytes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dist_ckpt_mistral.analysis.sheet import sheet
from dist_ckpt_mistral.mapping.read_plan import OPTIMIZER, WEIGHTS, Amount, ReadingPlan, factor
from dist_ckpt_mistral.messages import counted, human_bytes, spans

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Ranks of one stage that each need and read the same number of bytes, if of different chunks and files.

    ``parts`` are the amounts of one rank for weights and, if planned, for optimizer state. ``amounts`` are the amounts
    for both together, of one rank of each group.
    """

    ranks: tuple[int, ...]
    layers: tuple[int, ...]
    parts: tuple[Amount, ...]
    amounts: tuple[Amount, ...]


def render(plan: ReadingPlan) -> RenderableType:
    """The plan as a rich renderable."""
    parts = _parts(plan)
    numbers = (*(name for part in parts for name in (f"{part} needed", "read", "times")), "chunks", "files")
    return sheet(
        str(plan.path),
        _facts(plan),
        [("ranks", "left"), ("layers", "left"), *((name, "right") for name in numbers)],
        [(spans(row.ranks), spans(row.layers), *_sizes(row.parts), *_counts(row.amounts)) for row in rows(plan)],
        total=("all together", "", *_sizes([plan.total_of(part) for part in parts]), *_counts([plan.total])),
        notes=(plan.verdict(), *notes(plan)),
        command=plan.remedy or "",
    )


def rows(plan: ReadingPlan) -> list[Row]:
    """The rows of the table, ordered by their first rank."""
    parts = list(zip(*(plan.amounts_of(part) for part in _parts(plan)), strict=True))
    groups_of: dict[tuple[object, ...], list[int]] = defaultdict(list)  # stage and bytes -> numbers of groups
    for number, (group, amounts) in enumerate(zip(plan.groups, parts, strict=True)):
        groups_of[group.stage, *((amount.needed_bytes, amount.read_bytes) for amount in amounts)].append(number)
    unsorted = [
        Row(
            ranks=tuple(sorted(rank for number in numbers for rank in plan.groups[number].ranks)),
            layers=plan.groups[numbers[0]].layers,
            parts=parts[numbers[0]],
            amounts=tuple(plan.amounts[number] for number in numbers),
        )
        for numbers in groups_of.values()
    ]
    return sorted(unsorted, key=lambda row: row.ranks)


def _parts(plan: ReadingPlan) -> tuple[str, ...]:
    return (WEIGHTS, OPTIMIZER) if plan.has_optimizer else (WEIGHTS,)


def _sizes(parts: Sequence[Amount]) -> list[str]:
    """For each part: the bytes needed, the bytes read, and their ratio."""
    cells = []
    for amount in parts:
        times = "" if amount.amplification is None else factor(amount.amplification).removesuffix(" times")
        cells += [human_bytes(amount.needed_bytes), human_bytes(amount.read_bytes), times]
    return cells


def _counts(amounts: Sequence[Amount]) -> list[str]:
    """The numbers of chunks and of files that a rank reads, as ranges over ``amounts``."""
    chunks, files = {amount.num_chunks for amount in amounts}, {len(amount.file_bytes) for amount in amounts}
    return [f"{min(counts)} to {max(counts)}" if len(counts) > 1 else str(*counts) for counts in (chunks, files)]


def notes(plan: ReadingPlan) -> list[str]:
    """Notes on what the plan leaves out, and on ranks that read the same."""
    copies = max(len(group.ranks) for group in plan.groups)
    said = [f"Not in the plan: {plan.left_out}"] if plan.left_out else []
    if copies > 1:
        shared = "with Megatron's --ckpt-fully-parallel-load they would share the work"
        said.append(f"Up to {copies} ranks read the same; {shared}.")
    return said


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
