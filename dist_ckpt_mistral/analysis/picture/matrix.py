"""The matrix picture: the bytes that each rank reads from each file, for more files and ranks than ribbons can show.

A row stands for a file or several consecutive files, a column for a group of ranks or several consecutive groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Final, Literal

from dist_ckpt_mistral.analysis.picture import style
from dist_ckpt_mistral.analysis.picture.svg import Tooltips
from dist_ckpt_mistral.mapping.read_plan import ReadingPlan
from dist_ckpt_mistral.messages import human_bytes, printable, spans

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import FigureBase

#: Rows, and columns, that the eye can distinguish.
_MOST_CELLS: Final = 64
_MOST_LABELS: Final = 32
#: In fractions of the picture: the area of the matrix with its two bar charts, the largest cell, the smallest bar
#: chart (both as width and height), the largest width of the chart at the right, and the gap before a chart.
_LEFT, _BOTTOM, _RIGHT, _TOP = 0.15, 0.19, 0.965, 0.955
_MOST_CELL: Final = (0.11, 0.09)
_LEAST_CHART: Final = (0.12, 0.13)
_MOST_RIGHT_CHART: Final = 0.25
_GAP: Final = 0.014
#: The largest side and the smallest area of a mark, in fractions of its cell.
_MOST_FILLED, _LEAST_FILLED = 0.9, 0.02
#: Digits of the numbers on an axis.
_STEPS: Final = (1, 2, 5, 10)

Bins = Sequence[range]


def bins(count: int) -> list[range]:
    """The numbers below ``count`` in at most 64 ranges of equal length; the last one may be shorter."""
    step = -(-count // _MOST_CELLS) or 1
    return [range(first, min(first + step, count)) for first in range(0, count, step)]


def draw(figure: FigureBase, plan: ReadingPlan) -> Tooltips:
    """Draw the matrix, its two bar charts and its legend, and return the tooltips of the marks."""
    rows, columns = bins(len(plan.files)), bins(len(plan.groups))
    width = min(_MOST_CELL[0] * len(columns), _RIGHT - _LEFT - _GAP - _LEAST_CHART[0])
    height = min(_MOST_CELL[1] * len(rows), _TOP - _BOTTOM - _GAP - _LEAST_CHART[1])
    chart_bottom, chart_left = _BOTTOM + height + _GAP, _LEFT + width + _GAP
    matrix = figure.add_axes((_LEFT, _BOTTOM, width, height))
    cells = _cells(plan, rows, columns)
    _draw_cells(matrix, cells)
    _label_axes(matrix, plan, rows, columns)
    ranks = _draw_ranks(figure.add_axes((_LEFT, chart_bottom, width, _TOP - chart_bottom)), plan, columns)
    chart_width = min(_RIGHT - chart_left, _MOST_RIGHT_CHART)
    files = _draw_files(figure.add_axes((chart_left, _BOTTOM, chart_width, height)), plan, rows)
    _draw_legends(figure, max((read for _, read in cells.values()), default=0))
    reads = [_cell_text(plan, rows[row], columns[column], *cells[column, row]) for column, row in cells]
    return {"reads": reads, **ranks, **files}


def _files_text(plan: ReadingPlan, files: range) -> str:
    name = printable(plan.files[files[0]])
    return name + (f" and {len(files) - 1} more" if len(files) > 1 else "")


def _group_text(plan: ReadingPlan, groups: range) -> str:
    ranks = sorted(rank for group in groups for rank in plan.groups[group].ranks)
    return f"rank{'' if len(ranks) == 1 else 's'} {spans(ranks)}"


def _cell_text(plan: ReadingPlan, files: range, groups: range, needed: int, read: int) -> str:
    """The tooltip of a mark."""
    each = " each" if len(groups) > 1 or len(plan.groups[groups[0]].ranks) > 1 else ""
    amount = f"{human_bytes(read / len(groups))} read{each}, {100 * needed / (read or 1):.0f} % of it needed"
    return f"{_files_text(plan, files)} to {_group_text(plan, groups)}: {amount}"


def _cells(plan: ReadingPlan, rows: Bins, columns: Bins) -> dict[tuple[int, int], tuple[int, int]]:
    """(column, row) -> the bytes of its files that one rank of each of its groups needs, and reads."""
    row_of = {file: row for row, files in enumerate(rows) for file in files}
    file_of = plan.chunks.files.tolist()
    cells: dict[tuple[int, int], tuple[int, int]] = {}
    for column, groups in enumerate(columns):
        for reads in (plan.groups[group].reads for group in groups):
            for chunk, needed_bytes, read_bytes in reads:
                cell = column, row_of[file_of[chunk]]
                needed, read = cells.get(cell, (0, 0))
                cells[cell] = needed + needed_bytes, read + read_bytes
    return cells


def _draw_cells(axes: Axes, cells: Mapping[tuple[int, int], tuple[int, int]]) -> None:
    from matplotlib.collections import PolyCollection

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
    """The corners of a square in the middle of a cell, with this share of the cell's area."""
    half = _MOST_FILLED * max(share, _LEAST_FILLED) ** 0.5 / 2
    left, right, top, bottom = cell[0] - half, cell[0] + half, cell[1] - half, cell[1] + half
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def _label_axes(axes: Axes, plan: ReadingPlan, rows: Bins, columns: Bins) -> None:
    axes.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(rows) - 0.5, -0.5))
    every = -(-len(rows) // _MOST_LABELS)
    names = [style.short(plan.files[files[0]]) + (f" +{len(files) - 1}" if len(files) > 1 else "") for files in rows]
    axes.set_yticks(range(0, len(rows), every), names[::every], size=8)
    every = -(-len(columns) // _MOST_LABELS)
    first = [str(plan.groups[groups[0]].ranks[0]) for groups in columns]
    axes.set_xticks(range(0, len(columns), every), first[::every], size=8)
    axes.set_xlabel(_ranks_text(plan, columns), size=9.5)
    if len(rows[0]) > 1:
        axes.set_ylabel(f"file, the first of {len(rows[0])} in a row", size=9.5)
    axes.tick_params(length=2, color=style.FAINT)
    axes.set_axisbelow(True)
    axes.grid(color=style.GRID, linewidth=0.6)
    for spine in axes.spines.values():
        spine.set_color(style.FRAME)
    for number, (before, after) in enumerate(pairwise(columns), 1):
        if plan.groups[before[-1]].stage != plan.groups[after[0]].stage:
            axes.axvline(number - 0.5, color=style.PARTING, linewidth=0.8)


def _ranks_text(plan: ReadingPlan, columns: Bins) -> str:
    """The label of the axis of ranks."""
    copies, groups = len(plan.groups[0].ranks), len(columns[0])
    text = "rank" if copies == 1 else f"rank, for {copies} ranks each that read the same"
    text += f", the first of {groups} in a column" if groups > 1 else ""
    return text + ("; lines part pipeline stages" if plan.layout.pp > 1 else "")


def _draw_ranks(axes: Axes, plan: ReadingPlan, columns: Bins) -> Tooltips:
    """Draw the chart above the matrix: the bytes that a rank needs and reads. A column shows its largest reader."""
    from matplotlib.ticker import MaxNLocator

    most = [max((plan.amounts[group] for group in groups), key=lambda amount: amount.read_bytes) for groups in columns]
    places = range(len(columns))
    needed = [amount.needed_bytes for amount in most]
    unneeded = [amount.read_bytes - amount.needed_bytes for amount in most]
    names = [f"ranks-{plan.groups[groups[0]].ranks[0]}" for groups in columns]
    for name, bar in zip(names, axes.bar(places, needed, width=0.8, color=style.WHOLE), strict=True):
        bar.set_gid(name)
    for name, bar in zip(names, axes.bar(places, unneeded, width=0.8, bottom=needed, color=style.PART), strict=True):
        bar.set_gid(f"more-{name}")
    axes.set(xlim=(-0.5, len(columns) - 0.5), xticks=[])
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=_STEPS))
    axes.yaxis.set_major_formatter(lambda num_bytes, _: human_bytes(num_bytes))
    top = max(amount.read_bytes for amount in most)
    _finish_chart(axes, f"each rank reads up to {human_bytes(top)}", axis="y")
    texts = [
        f"{_group_text(plan, groups)}: {'up to ' if len(groups) > 1 else ''}{human_bytes(amount.read_bytes)} read, "
        f"{human_bytes(amount.needed_bytes)} needed"
        for groups, amount in zip(columns, most, strict=True)
    ]
    return {key: text for name, text in zip(names, texts, strict=True) for key in (name, f"more-{name}")}


def _draw_files(axes: Axes, plan: ReadingPlan, rows: Bins) -> Tooltips:
    """Draw the chart at the right of the matrix: how often all ranks together read each byte of a file."""
    from matplotlib.ticker import MaxNLocator

    stored: dict[int, int] = dict.fromkeys(range(len(plan.files)), 0)
    for file, num_bytes in zip(plan.chunks.files.tolist(), plan.chunks.num_bytes.tolist(), strict=True):
        stored[file] += num_bytes
    read = plan.total.file_bytes
    times = [
        sum(read.get(plan.files[file], 0) for file in files) / (sum(stored[file] for file in files) or 1)
        for files in rows
    ]
    tooltips = {}
    for files, number, bar in zip(rows, times, axes.barh(range(len(rows)), times, color=style.FILES), strict=True):
        bar.set_gid(f"file-{files[0]}")
        size = human_bytes(sum(stored[file] for file in files))
        tooltips[f"file-{files[0]}"] = f"{_files_text(plan, files)}: {size}, read {number:.1f} times by all ranks"
    axes.set(ylim=(len(rows) - 0.5, -0.5), yticks=[])
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_major_locator(MaxNLocator(3, steps=_STEPS))
    _finish_chart(axes, f"each file is read\nup to {max(times):.1f} times", axis="x")
    return tooltips


def _finish_chart(axes: Axes, title: str, *, axis: Literal["x", "y"]) -> None:
    """Give a bar chart its title and the axis of its numbers, and hide the frame but at that axis."""
    axes.set_title(title, loc="left", size=9.5, pad=4)
    axes.tick_params(length=2, color=style.FAINT, labelsize=8)
    axes.set_axisbelow(True)
    axes.grid(axis=axis, color=style.GRID, linewidth=0.6)
    for side, spine in axes.spines.items():
        spine.set_visible(side == {"x": "bottom", "y": "left"}[axis])


def _draw_legends(figure: FigureBase, most_bytes: int) -> None:
    """Draw the legends: the meaning of the size and the colour of a mark, and of the bars."""
    axes = figure.add_axes((_LEFT, 0.04, 0.20, 0.02))
    axes.imshow([[step / 99 for step in range(100)]], aspect="auto", cmap=style.needed_colours(), extent=(0, 1, 0, 1))
    axes.set(yticks=[], xticks=[0, 0.5, 1], xticklabels=["0 %", "50 %", "100 %"])
    axes.tick_params(length=2, labelsize=8)
    axes.set_title("Marks: share of the read bytes that is needed", loc="left", size=9.5, weight="bold", pad=4)
    area = f"Area: bytes that a rank reads of the file,\nat most {human_bytes(most_bytes)} in a mark"
    figure.text(_LEFT + 0.3, 0.05, area, size=9.5, va="center")
    bars = [style.patch(style.WHOLE, "needed"), style.patch(style.PART, "read, but not needed")]
    style.legend(figure, "Bars of ranks", bars, right=True)
