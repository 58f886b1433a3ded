"""Stored chunks on the left, ranks on the right, and a ribbon for what each rank reads.

Heights are bytes: on the left of what is stored, on the right of what is read. A stored byte that several ranks read
stands on the right several times, so the two sides have scales of their own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Final, NamedTuple

from dist_ckpt_mistral.analysis.picture import style
from dist_ckpt_mistral.analysis.read_plan import RankReads, ReadingPlan, factor
from dist_ckpt_mistral.messages import counted, human_bytes, spans

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TOP, _BOTTOM = 0.85, 0.095
#: Where blocks stand, of the width of the picture.
_LEFT: Final = (0.165, 0.19)
_RIGHT: Final = (0.655, 0.68)
_NEED: Final = (0.686, 0.694)
#: The share of the height that gaps between blocks take, all together.
_GAPS: Final = 0.16
_MOST_GAP: Final = 0.02
#: The height of a label of two lines.
_LABEL: Final = 0.056
#: Runs of ranks that fit beside a block.
_MOST_RUNS: Final = 4
#: Blocks of less height would be all edge.
_LEAST_EDGED: Final = 0.006


class Extent(NamedTuple):
    """A stretch of the height of the picture, 0 at the top and 1 at the bottom."""

    top: float
    bottom: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Flow:
    """Neighbouring chunks of a file that one group of ranks reads, all of them whole or none.

    ``chunks`` are the first and the last; ``kinds`` are what they are and how many bytes of each are read, in order.
    """

    file: int
    group: int
    chunks: tuple[int, int]
    is_whole: bool
    kinds: tuple[tuple[str, int], ...]

    @property
    def read_bytes(self) -> int:
        """Bytes that one rank reads of these chunks."""
        return sum(num_bytes for _, num_bytes in self.kinds)


def flows(plan: ReadingPlan) -> list[Flow]:
    """All ribbons: group after group, down the files."""
    return [flow for number, group in enumerate(plan.groups) for flow in _flows_of(plan, number, group)]


def _flows_of(plan: ReadingPlan, number: int, group: RankReads) -> Iterator[Flow]:
    needed: dict[int, int] = defaultdict(int)
    read: dict[int, int] = defaultdict(int)
    for chunk, needed_bytes, read_bytes in group.reads:
        needed[chunk] += needed_bytes
        read[chunk] += read_bytes
    files, sizes = plan.chunks.files.tolist(), plan.chunks.num_bytes.tolist()

    def run(place: tuple[int, int]) -> tuple[int, int, bool]:
        order, chunk = place
        return chunk - order, files[chunk], needed[chunk] == read[chunk] == sizes[chunk]

    for (_, file, is_whole), places in groupby(enumerate(sorted(read)), key=run):
        chunks = [chunk for _, chunk in places]
        kinds = groupby(chunks, key=lambda chunk: plan.kinds[int(plan.chunks.tensors[chunk])])
        yield Flow(
            file=file,
            group=number,
            chunks=(chunks[0], chunks[-1]),
            is_whole=is_whole,
            kinds=tuple((kind, sum(read[chunk] for chunk in same)) for kind, same in kinds),
        )


def stacked(heights: Sequence[float]) -> list[Extent]:
    """Blocks of these relative heights, one below the other with gaps between them, filling the whole height."""
    gap = min(_MOST_GAP, _GAPS / max(1, len(heights) - 1))
    scale = (1 - gap * (len(heights) - 1)) / (sum(heights) or 1)
    spans_, top = [], 0.0
    for height in heights:
        spans_.append(Extent(top, top + height * scale))
        top += height * scale + gap
    return spans_


def apart(centres: Sequence[float]) -> list[float]:
    """Where to write about blocks with these middles, in order, so that no two labels overlap."""
    placed: list[float] = []
    for centre in centres:
        placed.append(max(centre, placed[-1] + _LABEL) if placed else max(centre, _LABEL / 2))
    limit = 1 - _LABEL / 2
    for number in range(len(placed) - 1, -1, -1):
        placed[number] = min(placed[number], limit)
        limit = placed[number] - _LABEL
    return placed


def _divided(within: Extent, heights: Sequence[float]) -> list[Extent]:
    """``within`` cut into stretches of these relative heights."""
    total, top, cut = sum(heights) or 1, within.top, []
    for height in heights:
        bottom = top + (within.bottom - within.top) * height / total
        cut.append(Extent(top, bottom))
        top = bottom
    return cut


def draw(figure: Figure, plan: ReadingPlan, drawn: Sequence[Flow]) -> None:
    """Draw blocks, ribbons and legends."""
    axes = figure.add_axes((0.0, _BOTTOM, 1.0, _TOP - _BOTTOM))
    axes.set(xlim=(0, 1), ylim=(1, 0))
    axes.axis("off")
    _heading(axes, sum(_LEFT) / 2, f"{human_bytes(plan.stored_bytes)} stored")
    _heading(axes, sum(_RIGHT) / 2, f"{human_bytes(plan.total.read_bytes)} read, all together")
    chunks = _draw_files(axes, plan)
    _draw_ranks(axes, plan, drawn, chunks)
    kinds = [style.patch(style.KINDS[kind], kind) for kind in style.KINDS if kind in plan.kinds]
    style.legend(figure, "Stored chunks, by what they hold", kinds)
    whole = style.patch(style.WHOLE, "chunk needed whole", alpha=0.6)
    part = style.patch(style.PART, "only part of the chunk needed", alpha=0.6)
    style.legend(figure, "Reads (bar beside a rank: share that it needs)", [whole, part], right=True)


def _draw_files(axes: Axes, plan: ReadingPlan) -> list[Extent]:
    """The stored side; gives the span of every chunk."""
    files, sizes = plan.chunks.files.tolist(), plan.chunks.num_bytes.tolist()
    of_file = [[chunk for chunk, file in enumerate(files) if file == number] for number in range(len(plan.files))]
    blocks = stacked([sum(sizes[chunk] for chunk in chunks) for chunks in of_file])
    drawn: list[Extent] = []
    labels = apart([(block.top + block.bottom) / 2 for block in blocks])
    for name, chunks, block, label in zip(plan.files, of_file, blocks, labels, strict=True):
        for chunk, place in zip(chunks, _divided(block, [sizes[chunk] for chunk in chunks]), strict=True):
            _block(axes, _LEFT, place, style.KINDS[plan.kinds[int(plan.chunks.tensors[chunk])]], f"chunk-{chunk}")
            drawn.append(place)
        size = human_bytes(sum(sizes[chunk] for chunk in chunks))
        _label(axes, _LEFT[0] - 0.008, label, name, f"{size}, {counted(len(chunks), 'chunk')}", align="right")
    return drawn


def _draw_ranks(axes: Axes, plan: ReadingPlan, drawn: Sequence[Flow], chunks: Sequence[Extent]) -> None:
    blocks = stacked([amount.read_bytes for amount in plan.amounts])
    layers = sum(amount.read_bytes for amount in plan.amounts) / (plan.stored_bytes or 1)  # of ribbons, on the left
    alpha = 0.42 / max(1.0, layers) ** 0.6
    labels = apart([(block.top + block.bottom) / 2 for block in blocks])
    for number, (group, amount, block) in enumerate(zip(plan.groups, plan.amounts, blocks, strict=True)):
        own = [flow for flow in drawn if flow.group == number]
        for flow, end in zip(own, _divided(block, [flow.read_bytes for flow in own]), strict=True):
            begin = Extent(chunks[flow.chunks[0]].top, chunks[flow.chunks[1]].bottom)
            _ribbon(axes, begin, end, style.WHOLE if flow.is_whole else style.PART, alpha=alpha)
            for (kind, _), part in zip(flow.kinds, _divided(end, [size for _, size in flow.kinds]), strict=True):
                _block(axes, _RIGHT, part, style.KINDS[kind])
        _block(axes, _NEED, block, style.PART)
        share = (block.bottom - block.top) * amount.needed_bytes / (amount.read_bytes or 1)
        _block(axes, _NEED, Extent(block.top, block.top + share), style.WHOLE, f"ranks-{group.ranks[0]}")
        _label(axes, _NEED[1] + 0.008, labels[number], _who(plan, group), _how_much(plan, number), align="left")


def _who(plan: ReadingPlan, group: RankReads) -> str:
    name = "rank" if len(group.ranks) == 1 else "ranks"
    layers = f", layers {spans(group.layers)}" if group.layers and plan.layout.pp > 1 else ""
    return f"{name} {spans(group.ranks, most=_MOST_RUNS)}{layers}"


def _how_much(plan: ReadingPlan, number: int) -> str:
    amount = plan.amounts[number]
    if not amount.needed_bytes:
        return "needs nothing"
    if amount.read_bytes == amount.needed_bytes:
        return f"reads the {human_bytes(amount.needed_bytes)} it needs"
    read, needed = human_bytes(amount.read_bytes), human_bytes(amount.needed_bytes)
    return f"reads {read}, {factor(amount.amplification)} the {needed} it needs"


def _block(axes: Axes, columns: tuple[float, float], rows: Extent, colour: str, name: str | None = None) -> None:
    from matplotlib.patches import Rectangle  # noqa: PLC0415  (only pictures need matplotlib)

    width, height = columns[1] - columns[0], rows.bottom - rows.top
    edge = 0.4 if height > _LEAST_EDGED else 0
    axes.add_patch(
        Rectangle((columns[0], rows.top), width, height, facecolor=colour, edgecolor="white", linewidth=edge, gid=name)
    )


def _ribbon(axes: Axes, begin: Extent, end: Extent, colour: str, *, alpha: float) -> None:
    from matplotlib.patches import PathPatch  # noqa: PLC0415  (only pictures need matplotlib)
    from matplotlib.path import Path  # noqa: PLC0415

    left, right = _LEFT[1], _RIGHT[0]
    middle = (left + right) / 2
    points = [(left, begin.top), (middle, begin.top), (middle, end.top), (right, end.top)]
    points += [(right, end.bottom), (middle, end.bottom), (middle, begin.bottom), (left, begin.bottom)]
    codes = [Path.MOVETO, *[Path.CURVE4] * 3, Path.LINETO, *[Path.CURVE4] * 3]
    shape = Path(points, codes)
    axes.add_patch(PathPatch(shape, facecolor=colour, alpha=alpha, linewidth=0))
    if min(begin.bottom - begin.top, end.bottom - end.top) > _LEAST_EDGED:
        axes.add_patch(PathPatch(shape, facecolor="none", edgecolor=colour, alpha=0.7, linewidth=0.5))


def _heading(axes: Axes, column: float, text: str) -> None:
    axes.text(column, -0.012, text, ha="center", va="bottom", size=10, weight="bold")


def _label(axes: Axes, column: float, middle: float, name: str, detail: str, *, align: str) -> None:
    axes.text(column, middle - 0.002, name, ha=align, va="bottom", size=10, weight="bold")
    axes.text(column, middle + 0.002, detail, ha=align, va="top", size=9, color=style.FAINT)
