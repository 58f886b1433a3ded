"""Colours, matplotlib settings and legends of the pictures of reading plans."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from matplotlib.colors import Colormap
    from matplotlib.figure import FigureBase
    from matplotlib.patches import Patch

WHOLE: Final = "#2a9d8f"
PART: Final = "#ee8a33"
INK: Final = "#22303c"
FAINT: Final = "#6b7885"
PAPER: Final = "#ffffff"
#: Of a chart: lines at its ticks, its frame, the lines that part pipeline stages, and bars of files.
GRID: Final = "#edf0f3"
FRAME: Final = "#c9d1d8"
PARTING: Final = "#9aa6b1"
FILES: Final = "#7d93ad"
#: Colours of the kinds of tensors, all different from those of whole and partial reads.
KINDS: Final[Mapping[str, str]] = {
    "embedding": "#27408b",
    "attention": "#5b8bd0",
    "MLP": "#b3cdec",
    "experts": "#9a86c8",
    "norms": "#8d99a6",
    "output layer": "#5e3c84",
    "optimizer state": "#d7b5c9",
}
#: Colours that become others on a dark background. Those that are not here do on both.
DARK: Final[Mapping[str, str]] = {
    INK: "#e6e9ee",
    FAINT: "#9aa5b4",
    PAPER: "#14171c",
    GRID: "#242a32",
    FRAME: "#3c454f",
    PARTING: "#75818d",
    KINDS["embedding"]: "#4263d0",
    KINDS["output layer"]: "#8a5fc0",
}
#: Letters of a file's name that fit beside a picture.
_MOST_LETTERS: Final = 23
#: matplotlib's settings, in place of the user's: text stays text in the SVG, ``$`` does not begin a formula, and
#: identifiers are not random.
SETTINGS: Final[Mapping[str, Any]] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],
    "font.monospace": ["DejaVu Sans Mono", "Menlo", "Consolas"],
    "font.size": 10,
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "hatch.linewidth": 1.0,
    "svg.fonttype": "none",
    "svg.hashsalt": "dist-ckpt-mistral",
}


def short(name: str) -> str:
    """A name that fits beside the picture: the end of a long one."""
    return name if len(name) <= _MOST_LETTERS else f"…{name[-_MOST_LETTERS:]}"


def needed_colours() -> Colormap:
    """Colours of the share of the read bytes that is needed, from 0 to 1."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("needed", [(0, "#c8402f"), (0.5, PART), (0.85, "#d3c26a"), (1, WHOLE)])


def patch(colour: str, label: str, *, alpha: float = 1.0) -> Patch:
    """A coloured entry of a legend."""
    from matplotlib.patches import Patch

    return Patch(facecolor=colour, alpha=alpha, label=label)


def legend(figure: FigureBase, title: str, patches: Iterable[Patch], *, right: bool = False) -> None:
    """Draw a legend in the lower left corner of the picture, or in the lower right one."""
    shown = list(patches)
    figure.legend(
        handles=shown,
        title=title,
        loc="lower right" if right else "lower left",
        bbox_to_anchor=(0.98, 0.012) if right else (0.02, 0.012),
        ncols=len(shown),
        frameon=False,
        alignment="left",
        title_fontproperties={"weight": "bold", "size": 9.5},
        fontsize=9.5,
        handlelength=1.3,
        handleheight=1.1,
        columnspacing=1.4,
        borderaxespad=0,
    )
