"""Colours, matplotlib settings and legends of the pictures of reading plans."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

WHOLE: Final = "#2a9d8f"
PART: Final = "#ee8a33"
INK: Final = "#22303c"
FAINT: Final = "#6b7885"
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
#: matplotlib's settings, in place of the user's: text stays text in the SVG, ``$`` does not begin a formula, and
#: identifiers are not random.
SETTINGS: Final[Mapping[str, Any]] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],
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


def needed_colours() -> Colormap:
    """Colours of the share of the read bytes that is needed, from 0 to 1."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("needed", [(0, "#c8402f"), (0.5, PART), (0.85, "#d3c26a"), (1, WHOLE)])


def patch(colour: str, label: str, *, alpha: float = 1.0) -> Patch:
    """A coloured entry of a legend."""
    from matplotlib.patches import Patch

    return Patch(facecolor=colour, alpha=alpha, label=label)


def legend(figure: Figure, title: str, patches: Iterable[Patch], *, right: bool = False) -> None:
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
