"""The reading plan as an SVG picture of which stored chunk goes to which rank.

Few files and ranks are connected by ribbons, chunk by chunk. Many files or ranks become a matrix. The SVG depends only
on the plan, not on the user's matplotlib configuration.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

from dist_ckpt_mistral import libraries
from dist_ckpt_mistral.analysis.picture import matrix, ribbons, style
from dist_ckpt_mistral.analysis.read_table import layout_text
from dist_ckpt_mistral.mapping.read_plan import ReadingPlan
from dist_ckpt_mistral.messages import counted, printable
from dist_ckpt_mistral.storage import documents

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: The largest picture with ribbons: files or ranks and ribbons that the eye can follow, chunks that a viewer can draw.
_MOST_ENDS: Final = 16
_MOST_RIBBONS: Final = 600
_MOST_CHUNKS: Final = 20_000
#: Letters of a command that fits on a line with what is said of it.
_MOST_LETTERS: Final = 80


def require_matplotlib() -> None:
    """Raise MissingLibraryError if matplotlib is not installed."""
    with libraries.needed("a picture", "matplotlib", extra="plot"):
        import matplotlib as mpl  # noqa: F401


def save_svg(plan: ReadingPlan, path: Path) -> None:
    """Draw ``plan`` into an SVG file, or replace an old one. Raises MissingLibraryError and OutputError."""
    require_matplotlib()
    with _quiet_matplotlib():
        documents.write_whole(path, _svg(plan))


def _svg(plan: ReadingPlan) -> bytes:
    import matplotlib.style

    with matplotlib.style.context(["default", dict(style.SETTINGS)]):
        content = io.BytesIO()
        draw(plan).savefig(content, format="svg", metadata={"Date": None, "Creator": "dist-ckpt-mistral"})
    return content.getvalue()


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


def draw(plan: ReadingPlan) -> Figure:
    """The picture of ``plan``, as a matplotlib figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 8.6), facecolor="white")
    _write_title(figure, plan)
    few = max(len(plan.files), len(plan.groups)) <= _MOST_ENDS and len(plan.chunks.files) <= _MOST_CHUNKS
    flows = ribbons.flows(plan) if few else []
    if few and len(flows) <= _MOST_RIBBONS:
        ribbons.draw(figure, plan, flows)
    else:
        matrix.draw(figure, plan)
    return figure


def _write_title(figure: Figure, plan: ReadingPlan) -> None:
    verdict, _, remedy = plan.verdict().replace("`", "").partition("; ")
    if plan.remedy and len(plan.remedy) <= _MOST_LETTERS:
        remedy = remedy.replace("dist-ckpt-mistral reshard", plan.remedy)
    stored = f"{counted(len(plan.files), 'file')}, {counted(len(plan.chunks.files), 'chunk')}"
    facts = f"{printable('/'.join(plan.path.parts[-2:]))}, {stored}   →   {layout_text(plan)}"
    figure.text(0.02, 0.975, verdict, size=15, weight="bold", va="top")
    figure.text(0.02, 0.935, facts, size=11, color=style.FAINT, va="top")
    figure.text(0.02, 0.909, remedy, size=11, color=style.FAINT, va="top")
