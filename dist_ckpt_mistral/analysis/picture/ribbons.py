"""The ribbon picture: stored chunks on the left, ranks on the right, and a ribbon from chunks to each of their readers.

Heights are bytes: stored bytes on the left, read bytes on the right. The two sides have different scales, because a
stored byte that several ranks read is on the right several times.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Final, NamedTuple

from dist_ckpt_mistral.analysis.picture import style
from dist_ckpt_mistral.analysis.picture.svg import Tooltips
from dist_ckpt_mistral.mapping.read_plan import RankReads, ReadingPlan, factor
from dist_ckpt_mistral.messages import counted, human_bytes, printable, spans

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import FigureBase

_TOP, _BOTTOM = 0.955, 0.11
#: Left and right edges of the blocks, in fractions of the width of the picture.
_LEFT: Final = (0.165, 0.19)
_RIGHT: Final = (0.655, 0.68)
_NEED: Final = (0.686, 0.694)
#: In fractions of the height: all gaps between blocks together, one gap at most, and a label of two lines.
_GAPS: Final = 0.16
_MOST_GAP: Final = 0.02
_LABEL: Final = 0.056
#: Runs of consecutive ranks that fit in a label.
_MOST_RUNS: Final = 4
#: Blocks and ribbons of less height have no edge, which would hide them.
_LEAST_EDGED: Final = 0.006


class Extent(NamedTuple):
    """A vertical extent in the picture, in fractions of its height from the top."""

    top: float
    bottom: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Flow:
    """One ribbon: consecutive chunks of a file that a group of ranks reads, and needs either all whole or none whole.

    ``chunks`` has the numbers of the first and the last chunk, ``kinds`` the kinds of tensors with the bytes that are
    read of each, in order.
    """

    file: int
    group: int
    chunks: tuple[int, int]
    is_whole: bool
    kinds: tuple[tuple[str, int], ...]

    @property
    def read_bytes(self) -> int:
        """Bytes that one rank reads from these chunks."""
        return sum(num_bytes for _, num_bytes in self.kinds)


def flows(plan: ReadingPlan) -> list[Flow]:
    """All ribbons, ordered by group, then by chunk."""
    return [flow for number, group in enumerate(plan.groups) for flow in _flows_of(plan, number, group)]


def _flows_of(plan: ReadingPlan, number: int, group: RankReads) -> Iterator[Flow]:
    needed: dict[int, int] = defaultdict(int)
    read: dict[int, int] = defaultdict(int)
    for chunk, needed_bytes, read_bytes in group.reads:
        needed[chunk] += needed_bytes
        read[chunk] += read_bytes
    files, sizes = plan.chunks.files.tolist(), plan.chunks.num_bytes.tolist()

    def run(numbered: tuple[int, int]) -> tuple[int, int, bool]:
        number, chunk = numbered
        return chunk - number, files[chunk], needed[chunk] == read[chunk] == sizes[chunk]

    for (_, file, is_whole), run_of_chunks in groupby(enumerate(sorted(read)), key=run):
        chunks = [chunk for _, chunk in run_of_chunks]
        kinds = groupby(chunks, key=lambda chunk: plan.kinds[int(plan.chunks.tensors[chunk])])
        yield Flow(
            file=file,
            group=number,
            chunks=(chunks[0], chunks[-1]),
            is_whole=is_whole,
            kinds=tuple((kind, sum(read[chunk] for chunk in of_kind)) for kind, of_kind in kinds),
        )


def stacked(heights: Sequence[float]) -> list[Extent]:
    """The extents of blocks of these relative heights, one below the other with gaps, that fill the whole height."""
    gap = min(_MOST_GAP, _GAPS / max(1, len(heights) - 1))
    scale = (1 - gap * (len(heights) - 1)) / (sum(heights) or 1)
    extents, top = [], 0.0
    for height in heights:
        extents.append(Extent(top, top + height * scale))
        top += height * scale + gap
    return extents


def apart(centres: Sequence[float]) -> list[float]:
    """The positions of the labels of blocks with these centres, in order, so that no two labels overlap."""
    placed: list[float] = []
    for centre in centres:
        placed.append(max(centre, placed[-1] + _LABEL) if placed else max(centre, _LABEL / 2))
    limit = 1 - _LABEL / 2
    for number in range(len(placed) - 1, -1, -1):
        placed[number] = min(placed[number], limit)
        limit = placed[number] - _LABEL
    return placed


def _divided(within: Extent, heights: Sequence[float]) -> list[Extent]:
    """``within`` divided into extents of these relative heights."""
    total, top, extents = sum(heights) or 1, within.top, []
    for height in heights:
        bottom = top + (within.bottom - within.top) * height / total
        extents.append(Extent(top, bottom))
        top = bottom
    return extents


def draw(figure: FigureBase, plan: ReadingPlan, ribbons: Sequence[Flow]) -> Tooltips:
    """Draw blocks, ribbons and legends, and return the tooltips of the marks."""
    axes = figure.add_axes((0.0, _BOTTOM, 1.0, _TOP - _BOTTOM))
    axes.set(xlim=(0, 1), ylim=(1, 0))
    axes.axis("off")
    _heading(axes, sum(_LEFT) / 2, f"{human_bytes(plan.stored_bytes)} stored")
    _heading(axes, sum(_RIGHT) / 2, f"{human_bytes(plan.total.read_bytes)} read, all together")
    chunks = _draw_files(axes, plan)
    _draw_ranks(axes, plan, ribbons, chunks)
    kinds = [style.patch(style.KINDS[kind], kind) for kind in style.KINDS if kind in plan.kinds]
    style.legend(figure, "Stored chunks, by what they hold", kinds)
    whole = style.patch(style.WHOLE, "chunk needed whole", alpha=0.6)
    part = style.patch(style.PART, "only part of the chunk needed", alpha=0.6)
    style.legend(figure, "Reads (bar beside a rank: share that it needs)", [whole, part], right=True)
    return _tooltips(plan, ribbons)


def _tooltips(plan: ReadingPlan, ribbons: Sequence[Flow]) -> Tooltips:
    """The tooltips of chunks, ribbons and ranks."""
    files, sizes, tensors = plan.chunks.files.tolist(), plan.chunks.num_bytes.tolist(), plan.chunks.tensors.tolist()
    chunks = {
        f"chunk-{number}": f"{plan.chunks.names[tensor]}: a chunk of {human_bytes(size)} in {plan.files[file]}"
        for number, (file, size, tensor) in enumerate(zip(files, sizes, tensors, strict=True))
    }
    reads = {f"ribbon-{number}": _read_text(plan, flow) for number, flow in enumerate(ribbons)}
    ranks = {
        f"ranks-{group.ranks[0]}": f"{_ranks_text(plan, group)}: {_amount_text(plan, number)}"
        for number, group in enumerate(plan.groups)
    }
    return {name: printable(text) for name, text in {**chunks, **reads, **ranks}.items()}


def _read_text(plan: ReadingPlan, flow: Flow) -> str:
    """The tooltip of a ribbon."""
    first, last = flow.chunks
    what = ", ".join(f"{human_bytes(size)} {kind}" for kind, size in flow.kinds)
    whose = _ranks_text(plan, plan.groups[flow.group])
    needed = "needed whole" if flow.is_whole else "only part of each needed"
    return f"{plan.files[flow.file]} to {whose}: {counted(last - first + 1, 'chunk')}, {needed}: {what}"


def _draw_files(axes: Axes, plan: ReadingPlan) -> list[Extent]:
    """Draw the stored side, and return the extent of every chunk."""
    files, sizes = plan.chunks.files.tolist(), plan.chunks.num_bytes.tolist()
    by_file = [[chunk for chunk, file in enumerate(files) if file == number] for number in range(len(plan.files))]
    blocks = stacked([sum(sizes[chunk] for chunk in chunks) for chunks in by_file])
    extents: list[Extent] = []
    labels = apart([(block.top + block.bottom) / 2 for block in blocks])
    for name, chunks, block, label in zip(plan.files, by_file, blocks, labels, strict=True):
        for chunk, extent in zip(chunks, _divided(block, [sizes[chunk] for chunk in chunks]), strict=True):
            _block(axes, _LEFT, extent, style.KINDS[plan.kinds[int(plan.chunks.tensors[chunk])]], f"chunk-{chunk}")
            extents.append(extent)
        size = human_bytes(sum(sizes[chunk] for chunk in chunks))
        _label(
            axes, _LEFT[0] - 0.008, label, style.short(name), f"{size}, {counted(len(chunks), 'chunk')}", align="right"
        )
    return extents


def _draw_ranks(axes: Axes, plan: ReadingPlan, ribbons: Sequence[Flow], chunks: Sequence[Extent]) -> None:
    """Draw the side of the ranks, and the ribbons from ``chunks``."""
    blocks = stacked([amount.read_bytes for amount in plan.amounts])
    ribbons_per_chunk = sum(amount.read_bytes for amount in plan.amounts) / (plan.stored_bytes or 1)
    alpha = 0.42 / max(1.0, ribbons_per_chunk) ** 0.6
    labels = apart([(block.top + block.bottom) / 2 for block in blocks])
    for number, (group, amount, block) in enumerate(zip(plan.groups, plan.amounts, blocks, strict=True)):
        group_flows = [(place, flow) for place, flow in enumerate(ribbons) if flow.group == number]
        ends = _divided(block, [flow.read_bytes for _, flow in group_flows])
        for (place, flow), end in zip(group_flows, ends, strict=True):
            begin = Extent(chunks[flow.chunks[0]].top, chunks[flow.chunks[1]].bottom)
            _ribbon(axes, begin, end, style.WHOLE if flow.is_whole else style.PART, f"ribbon-{place}", alpha=alpha)
            for (kind, _), part in zip(flow.kinds, _divided(end, [size for _, size in flow.kinds]), strict=True):
                _block(axes, _RIGHT, part, style.KINDS[kind])
        _block(axes, _NEED, block, style.PART)
        share = (block.bottom - block.top) * amount.needed_bytes / (amount.read_bytes or 1)
        _block(axes, _NEED, Extent(block.top, block.top + share), style.WHOLE, f"ranks-{group.ranks[0]}")
        _label(
            axes, _NEED[1] + 0.008, labels[number], _ranks_text(plan, group), _amount_text(plan, number), align="left"
        )


def _ranks_text(plan: ReadingPlan, group: RankReads) -> str:
    name = "rank" if len(group.ranks) == 1 else "ranks"
    layers = f", layers {spans(group.layers)}" if group.layers and plan.layout.pp > 1 else ""
    return f"{name} {spans(group.ranks, most=_MOST_RUNS)}{layers}"


def _amount_text(plan: ReadingPlan, number: int) -> str:
    amount = plan.amounts[number]
    if not amount.needed_bytes:
        return "needs nothing"
    if amount.read_bytes == amount.needed_bytes:
        return f"reads the {human_bytes(amount.needed_bytes)} it needs"
    read, needed = human_bytes(amount.read_bytes), human_bytes(amount.needed_bytes)
    return f"reads {read}, {factor(amount.amplification)} the {needed} it needs"


def _block(axes: Axes, columns: tuple[float, float], rows: Extent, colour: str, name: str | None = None) -> None:
    from matplotlib.patches import Rectangle

    width, height = columns[1] - columns[0], rows.bottom - rows.top
    edge = 0.4 if height > _LEAST_EDGED else 0
    axes.add_patch(
        Rectangle(
            (columns[0], rows.top), width, height, facecolor=colour, edgecolor=style.PAPER, linewidth=edge, gid=name
        )
    )


def _ribbon(axes: Axes, begin: Extent, end: Extent, colour: str, name: str, *, alpha: float) -> None:
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    left, right = _LEFT[1], _RIGHT[0]
    middle = (left + right) / 2
    points = [(left, begin.top), (middle, begin.top), (middle, end.top), (right, end.top)]
    points += [(right, end.bottom), (middle, end.bottom), (middle, begin.bottom), (left, begin.bottom)]
    codes = [Path.MOVETO, *[Path.CURVE4] * 3, Path.LINETO, *[Path.CURVE4] * 3]
    shape = Path(points, codes)
    axes.add_patch(PathPatch(shape, facecolor=colour, alpha=alpha, linewidth=0, gid=name))
    if min(begin.bottom - begin.top, end.bottom - end.top) > _LEAST_EDGED:
        axes.add_patch(PathPatch(shape, facecolor="none", edgecolor=colour, alpha=0.7, linewidth=0.5))


def _heading(axes: Axes, column: float, text: str) -> None:
    axes.text(column, -0.012, text, ha="center", va="bottom", size=10, weight="bold")


def _label(axes: Axes, column: float, middle: float, name: str, detail: str, *, align: str) -> None:
    axes.text(column, middle - 0.002, name, ha=align, va="bottom", size=10, weight="bold")
    axes.text(column, middle + 0.002, detail, ha=align, va="top", size=9, color=style.FAINT)
