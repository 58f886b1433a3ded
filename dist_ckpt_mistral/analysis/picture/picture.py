"""The reading plan as a picture of which stored chunk goes to which rank: SVG, or PNG if the file is named so.

Few files and ranks are connected by ribbons, chunk by chunk. Many files or ranks become a matrix. The picture depends
only on the plan, not on the user's matplotlib configuration.
"""

from __future__ import annotations

import contextlib
import io
import logging
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from dist_ckpt_mistral import libraries
from dist_ckpt_mistral.analysis.picture import matrix, ribbons, style, svg
from dist_ckpt_mistral.analysis.read_table import layout_text, notes
from dist_ckpt_mistral.errors import OutputError
from dist_ckpt_mistral.mapping.read_plan import ReadingPlan
from dist_ckpt_mistral.messages import counted, printable
from dist_ckpt_mistral.storage import documents

if TYPE_CHECKING:
    from matplotlib.figure import Figure, FigureBase

#: The largest picture with ribbons: files or ranks and ribbons that the eye can follow, chunks that a viewer can draw.
_MOST_ENDS: Final = 16
_MOST_RIBBONS: Final = 600
_MOST_CHUNKS: Final = 20_000
#: In inches: the width of the picture, the height of all below its header, the margin at the left, and in the header
#: the top of the first line and the pitch of the lines.
_WIDTH, _BODY_HEIGHT, _MARGIN = 13.0, 7.5, 0.26
_FIRST_LINE, _TITLE_PITCH, _PITCH = 0.22, 0.36, 0.24
#: Letters that fit on a line of the header.
_MOST_LETTERS: Final = 138
_PNG: Final = ".png"
_PNG_DOTS_PER_INCH: Final = 150
#: Endings of a file's name that decide the format. A name without one, such as /dev/stdout, gives an SVG.
FORMATS: Final = ("", ".svg", _PNG)


def require_matplotlib() -> None:
    """Raise MissingLibraryError if matplotlib is not installed."""
    with libraries.needed("a picture", "matplotlib", extra="plot"):
        import matplotlib as mpl  # noqa: F401


def save_picture(plan: ReadingPlan, path: Path) -> None:
    """Draw ``plan`` into a file, or replace an old one.

    Args:
        plan: The reads of every rank.
        path: The file. Its name decides the format: PNG if it ends in ``.png``; SVG if in ``.svg`` or in nothing.

    Raises:
        OutputError: The file cannot be written, or its name ends otherwise.
        MissingLibraryError: matplotlib is not installed.
    """
    ending = path.suffix.lower()
    if ending not in FORMATS:
        raise OutputError(f"cannot draw {path}: expected a name that ends in .svg or .png, got {ending}")
    require_matplotlib()
    with _quiet_matplotlib():
        documents.write_whole(path, _drawn(plan, as_png=ending == _PNG))


def _drawn(plan: ReadingPlan, *, as_png: bool) -> bytes:
    import matplotlib.style

    with matplotlib.style.context(["default", dict(style.SETTINGS)]):
        content = io.BytesIO()
        figure, tooltips = draw(plan)
        if as_png:
            figure.savefig(content, format="png", dpi=_PNG_DOTS_PER_INCH, metadata={"Software": "dist-ckpt-mistral"})
            return content.getvalue()
        figure.savefig(content, format="svg", metadata={"Date": None, "Creator": "dist-ckpt-mistral"})
    description = " ".join(filter(None, (_facts(plan) + ".", *_advice(plan), plan.remedy)))
    return svg.completed(content.getvalue(), plan.verdict().replace("`", ""), printable(description), tooltips)


@contextlib.contextmanager
def _quiet_matplotlib() -> Iterator[None]:
    """Silence matplotlib's warnings about fonts, which the viewer of an SVG chooses, and restore its logger."""
    logger = logging.getLogger("matplotlib")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def draw(plan: ReadingPlan) -> tuple[Figure, svg.Tooltips]:
    """The picture of ``plan``, as a matplotlib figure, and the tooltips of its marks."""
    from matplotlib.figure import Figure

    advice = [line for text in _advice(plan) for line in textwrap.wrap(text, _MOST_LETTERS)]
    command = _folded(plan.remedy) if plan.remedy else []
    header_height = _FIRST_LINE + _TITLE_PITCH + _PITCH * (1 + len(advice) + len(command)) + 0.1
    height = header_height + _BODY_HEIGHT
    figure = Figure(figsize=(_WIDTH, height), facecolor=style.PAPER)
    parts = figure.subfigures(2, 1, squeeze=False, height_ratios=(header_height, _BODY_HEIGHT), hspace=0)
    header, body = parts[:, 0]
    _write_header(header, header_height, plan.verdict().partition("; ")[0], [_facts(plan), *advice], command)
    few = max(len(plan.files), len(plan.groups)) <= _MOST_ENDS and len(plan.chunks.files) <= _MOST_CHUNKS
    flows = ribbons.flows(plan) if few else []
    if few and len(flows) <= _MOST_RIBBONS:
        return figure, ribbons.draw(body, plan, flows)
    return figure, matrix.draw(body, plan)


def _facts(plan: ReadingPlan) -> str:
    """The checkpoint and the layout."""
    stored = f"{counted(len(plan.files), 'file')}, {counted(len(plan.chunks.files), 'chunk')}"
    return f"{printable('/'.join(plan.path.parts[-2:]))}, {stored}   →   {layout_text(plan)}"


def _advice(plan: ReadingPlan) -> list[str]:
    """What the table says below its rows: the rest of the verdict, and the notes."""
    rest = plan.verdict().replace("`", "").partition("; ")[2]
    return [text for text in (rest[:1].upper() + rest[1:], *map(printable, notes(plan))) if text]


def _folded(command: str) -> list[str]:
    """A command as lines that a shell takes for one. It is folded only before its options, after the directories."""
    directories, _, layout = command.rpartition(" OUT ")
    lines = [f"{directories} OUT"]
    for option in layout.replace(" --", "\n--").split("\n"):
        if len(lines[-1]) + len(option) < _MOST_LETTERS:
            lines[-1] += f" {option}"
        else:
            lines[-1] += " \\"
            lines.append(f"    {option}")
    return lines


def _write_header(figure: FigureBase, height: float, title: str, lines: Sequence[str], command: Sequence[str]) -> None:
    """Write the verdict, and below it these lines. ``height`` is that of ``figure`` in inches."""
    left, top = _MARGIN / _WIDTH, _FIRST_LINE
    figure.text(left, 1 - top / height, title, size=15, weight="bold", va="top")
    top += _TITLE_PITCH
    for line in lines:
        figure.text(left, 1 - top / height, line, size=11, color=style.FAINT, va="top")
        top += _PITCH
    for line in command:
        size = min(10.0, 10.0 * _MOST_LETTERS / len(line))
        figure.text(left, 1 - top / height, line, size=size, family="monospace", va="top")
        top += _PITCH
