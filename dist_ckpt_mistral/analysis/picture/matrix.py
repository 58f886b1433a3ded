"""A matrix of files and ranks: how much each rank reads of each file, for more of them than ribbons can show.

Consecutive files, and consecutive ranks, share a row or a column where there are too many for one each.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Final

from dist_ckpt_mistral.analysis.picture import style
from dist_ckpt_mistral.analysis.read_plan import ReadingPlan
from dist_ckpt_mistral.messages import human_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Rows, and columns, that can still be told apart.
_MOST_CELLS: Final = 64
_MOST_LABELS: Final = 32
#: In shares of the picture: where the matrix begins, how far it and its margins reach, the most that a cell takes.
_LEFT, _BOTTOM, _RIGHT, _TOP = 0.13, 0.16, 0.965, 0.855
_MOST_CELL: Final = (0.11, 0.08)
_LEAST_MARGIN: Final = (0.12, 0.11)
_MOST_BESIDE: Final = 0.25
_GAP: Final = 0.014
#: What one cell of a matrix may fill of its place, and what it must fill to be seen.
_MOST_FILLED, _LEAST_FILLED = 0.9, 0.02

Bins = Sequence[range]


def bins(count: int) -> list[range]:
    """``count`` things in at most 64 runs of (but for the last) equal length."""
    step = -(-count // _MOST_CELLS) or 1
    return [range(first, min(first + step, count)) for first in range(0, count, step)]


def draw(figure: Figure, plan: ReadingPlan) -> None:
    """Draw the matrix, its margins and legend."""
    rows, columns = bins(len(plan.files)), bins(len(plan.groups))
    width = min(_MOST_CELL[0] * len(columns), _RIGHT - _LEFT - _GAP - _LEAST_MARGIN[0])
    height = min(_MOST_CELL[1] * len(rows), _TOP - _BOTTOM - _GAP - _LEAST_MARGIN[1])
    above, beside = _BOTTOM + height + _GAP, _LEFT + width + _GAP
    matrix = figure.add_axes((_LEFT, _BOTTOM, width, height))
    _draw_cells(matrix, plan, rows, columns)
    _label_axes(matrix, plan, rows, columns)
    _draw_ranks(figure.add_axes((_LEFT, above, width, _TOP - above)), plan, columns)
    _draw_files(figure.add_axes((beside, _BOTTOM, min(_RIGHT - beside, _MOST_BESIDE), height)), plan, rows)
    _draw_scale(figure)


def _cells(plan: ReadingPlan, rows: Bins, columns: Bins) -> dict[tuple[int, int], tuple[int, int]]:
    """(column, row) -> bytes that one rank of each of its groups needs, and reads, of its files."""
    row_of = {file: row for row, files in enumerate(rows) for file in files}
    file_of = plan.chunks.files.tolist()
    found: dict[tuple[int, int], tuple[int, int]] = {}
    for column, groups in enumerate(columns):
        for reads in (plan.groups[group].reads for group in groups):
            for chunk, needed_bytes, read_bytes in reads:
                cell = column, row_of[file_of[chunk]]
                needed, read = found.get(cell, (0, 0))
                found[cell] = needed + needed_bytes, read + read_bytes
    return found


def _draw_cells(axes: Axes, plan: ReadingPlan, rows: Bins, columns: Bins) -> None:
    from matplotlib.collections import PolyCollection  # noqa: PLC0415  (only pictures need matplotlib)

    cells = _cells(plan, rows, columns)
    most = max((read for _, read in cells.values()), default=1)
    marks = PolyCollection(
        [_square(cell, read / most) for cell, (_, read) in cells.items()],
        array=[needed / read for needed, read in cells.values()],
        cmap=style.needed_colours(),
        clim=(0, 1),
        linewidths=0,
        zorder=2,
    )
    marks.set_gid("reads")
    axes.add_collection(marks, autolim=False)


def _square(cell: tuple[int, int], share: float) -> list[tuple[float, float]]:
    """Corners of a mark of this share of a cell's area, in the middle of the cell."""
    half = _MOST_FILLED * max(share, _LEAST_FILLED) ** 0.5 / 2
    left, right, top, bottom = cell[0] - half, cell[0] + half, cell[1] - half, cell[1] + half
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def _label_axes(axes: Axes, plan: ReadingPlan, rows: Bins, columns: Bins) -> None:
    axes.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(rows) - 0.5, -0.5))
    every = -(-len(rows) // _MOST_LABELS)
    names = [plan.files[files[0]] + (f" and {len(files) - 1} more" if len(files) > 1 else "") for files in rows]
    axes.set_yticks(range(0, len(rows), every), names[::every], size=8)
    every = -(-len(columns) // _MOST_LABELS)
    first = [str(plan.groups[groups[0]].ranks[0]) for groups in columns]
    axes.set_xticks(range(0, len(columns), every), first[::every], size=8)
    axes.set_xlabel(_ranks_text(plan, columns), size=9.5)
    axes.tick_params(length=2, color=style.FAINT)
    axes.set_axisbelow(True)
    axes.grid(color="#edf0f3", linewidth=0.6)
    for spine in axes.spines.values():
        spine.set_color("#c9d1d8")
    for number, (before, after) in enumerate(pairwise(columns), 1):
        if plan.groups[before[-1]].stage != plan.groups[after[0]].stage:
            axes.axvline(number - 0.5, color="#9aa6b1", linewidth=0.8)


def _ranks_text(plan: ReadingPlan, columns: Bins) -> str:
    """What a column is."""
    same, runs = len(plan.groups[0].ranks), len(columns[0])
    told = "rank" if same == 1 else f"rank, for {same} ranks each that read the same"
    told += f", the first of {runs} in a column" if runs > 1 else ""
    return told + ("; lines part pipeline stages" if plan.layout.pp > 1 else "")


def _draw_ranks(axes: Axes, plan: ReadingPlan, columns: Bins) -> None:
    """Above the matrix: what a rank needs and what it reads; of several in a column, the one that reads most."""
    most = [max((plan.amounts[group] for group in groups), key=lambda amount: amount.read_bytes) for groups in columns]
    places = range(len(columns))
    needed = [amount.needed_bytes for amount in most]
    in_vain = [amount.read_bytes - amount.needed_bytes for amount in most]
    for number, bar in enumerate(axes.bar(places, needed, width=0.8, color=style.WHOLE)):
        bar.set_gid(f"ranks-{plan.groups[columns[number][0]].ranks[0]}")
    axes.bar(places, in_vain, width=0.8, bottom=needed, color=style.PART)
    axes.set(xlim=(-0.5, len(columns) - 0.5), xticks=[])
    top = max(amount.read_bytes for amount in most)
    axes.set_yticks([0, top], ["0", human_bytes(top)], size=8)
    axes.set_title("each rank reads", loc="left", size=9.5, pad=4)
    _bare(axes, keep="left")


def _draw_files(axes: Axes, plan: ReadingPlan, rows: Bins) -> None:
    """Beside the matrix: how often a file's bytes are read, by all ranks together."""
    stored: dict[int, int] = dict.fromkeys(range(len(plan.files)), 0)
    for file, num_bytes in zip(plan.chunks.files.tolist(), plan.chunks.num_bytes.tolist(), strict=True):
        stored[file] += num_bytes
    read = plan.total.file_bytes
    times = [
        sum(read.get(plan.files[file], 0) for file in files) / (sum(stored[file] for file in files) or 1)
        for files in rows
    ]
    for number, bar in enumerate(axes.barh(range(len(rows)), times, height=0.8, color="#7d93ad")):
        bar.set_gid(f"file-{rows[number][0]}")
    axes.set(ylim=(len(rows) - 0.5, -0.5), yticks=[])
    axes.set_xticks([0, max(times)], ["0", f"{max(times):.1f} times"], size=8)
    axes.set_title("each file is read", loc="left", size=9.5, pad=4)
    _bare(axes, keep="bottom")


def _bare(axes: Axes, *, keep: str) -> None:
    """Only the axis that is read off."""
    axes.tick_params(length=2, color=style.FAINT)
    for side, spine in axes.spines.items():
        spine.set_visible(side == keep)


def _draw_scale(figure: Figure) -> None:
    """What size and colour of squares mean."""
    axes = figure.add_axes((0.13, 0.035, 0.20, 0.018))
    axes.imshow([[step / 99 for step in range(100)]], aspect="auto", cmap=style.needed_colours(), extent=(0, 1, 0, 1))
    axes.set(yticks=[], xticks=[0, 0.5, 1], xticklabels=["0 %", "50 %", "100 %"])
    axes.tick_params(length=2, labelsize=8)
    axes.set_title("share of what is read that is needed", loc="left", size=9.5, pad=4)
    figure.text(0.40, 0.044, "area of a mark: bytes that a rank reads of the file", size=9.5, va="center")
