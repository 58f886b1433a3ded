"""The reading plan as a picture: which stored chunk goes to which rank.

Few files and ranks are joined by ribbons, chunk by chunk; many become a matrix of files and ranks. The SVG is the same
for the same plan, whatever matplotlib is configured to.
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
from dist_ckpt_mistral.analysis.read_plan import ReadingPlan
from dist_ckpt_mistral.analysis.read_table import layout_text
from dist_ckpt_mistral.messages import counted, printable
from dist_ckpt_mistral.storage import documents

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: With more files or ranks, or more ribbons, the eye cannot follow them; with more chunks, no viewer can.
_MOST_ENDS: Final = 16
_MOST_RIBBONS: Final = 600
_MOST_CHUNKS: Final = 20_000


def require_matplotlib() -> None:
    """Raise MissingLibraryError if there is nothing to draw with."""
    with libraries.needed("a picture", "matplotlib", extra="plot"):
        import matplotlib as mpl  # noqa: F401, PLC0415  (only pictures need matplotlib)


def save_svg(plan: ReadingPlan, path: Path) -> None:
    """Draw ``plan`` into an SVG file; an old one is replaced. Raises MissingLibraryError and OutputError."""
    require_matplotlib()
    with _quiet_matplotlib():
        documents.write_whole(path, _svg(plan))


def _svg(plan: ReadingPlan) -> bytes:
    import matplotlib.style  # noqa: PLC0415  (only pictures need matplotlib)

    with matplotlib.style.context(["default", dict(style.SETTINGS)]):
        content = io.BytesIO()
        draw(plan).savefig(content, format="svg", metadata={"Date": None, "Creator": "dist-ckpt-mistral"})
    return content.getvalue()


@contextlib.contextmanager
def _quiet_matplotlib() -> Iterator[None]:
    """Without what matplotlib tells of its fonts, which viewers choose; its logger is the caller's again afterwards."""
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
    """The picture as a matplotlib figure."""
    from matplotlib.figure import Figure  # noqa: PLC0415  (only pictures need matplotlib)

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
    stored = f"{counted(len(plan.files), 'file')}, {counted(len(plan.chunks.files), 'chunk')}"
    facts = f"{printable('/'.join(plan.path.parts[-2:]))}, {stored}   →   {layout_text(plan)}"
    figure.text(0.02, 0.975, verdict, size=15, weight="bold", va="top")
    figure.text(0.02, 0.935, facts, size=11, color=style.FAINT, va="top")
    figure.text(0.02, 0.909, remedy, size=11, color=style.FAINT, va="top")
