"""Draw the picture of ``resume_demo.py``: losses, and below their differences from the training that never stopped."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import matplotlib as mpl
from matplotlib.figure import Figure
from resume_runs import (
    BEGUN_AT,
    LAYOUTS,
    OPTIMIZERS,
    OTHERS,
    PARTS,
    SAVED_AFTER,
    TOLERANCE,
    Story,
    never_stopped,
    resumed_at,
    resumed_without,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Okabe and Ito's colours, which colour-blind people can distinguish.
_COLOURS: Final = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
_MARKERS: Final = "osD^vP"
_DASHES: Final = ((0, (5, 2)), (0, (3, 1, 1, 1)), (0, (1, 1.5)))
_FAINT: Final = "#888888"
_SMALL: Final[dict[str, Any]] = {
    "fontsize": 8,
    "color": _FAINT,
    "xytext": (3, 2),
    "textcoords": "offset points",
    "va": "top",
}
#: Smaller differences are drawn at this value of the logarithmic axis, whose label says so.
_NOTHING: Final = 1e-5


def draw(stories: Sequence[Story], file: Path) -> None:
    """Draw the stories side by side. The file's name decides the format."""
    figure = Figure(figsize=(5.6 * len(stories) + 3, 7), layout="constrained")
    axes = figure.subplots(2, len(stories), sharex=True, sharey="row", squeeze=False, height_ratios=(4, 3))
    for story, (above, below) in zip(stories, axes.T, strict=True):
        _draw_losses(story, above)
        _draw_differences(story, below)
    axes[0, 0].set_ylabel("loss (nats)")
    axes[1, 0].set_ylabel("difference from the training\nthat never stopped (nats)")
    axes[1, 0].set_yticks([_NOTHING, *(10.0**power for power in range(-4, 0))])
    axes[1, 0].set_yticklabels(["up to $10^{-5}$", *(f"$10^{{{power}}}$" for power in range(-4, 0))])
    labels = [plot.get_legend_handles_labels() for plot in axes[:, 0]]
    figure.legend(*map(sum, zip(*labels, strict=True), ([], [])), loc="outside right center", frameon=False, fontsize=9)
    figure.suptitle(f"Training stopped at {BEGUN_AT} and resumed at other layouts")
    with mpl.rc_context({"svg.fonttype": "none"}):  # text stays text
        figure.savefig(file, dpi=130)


def _draw_losses(story: Story, axes: Axes) -> None:
    """Draw the losses of all steps of the runs."""
    axes.set_title(OPTIMIZERS[story.optimizer], fontsize=10)
    whole = story.losses[never_stopped(BEGUN_AT)]
    axes.plot(list(whole), list(whole.values()), color="black", linewidth=5, alpha=0.25, label=never_stopped(BEGUN_AT))
    for number, layout in enumerate(LAYOUTS):
        losses = story.losses[resumed_at(layout)]
        # Markers get smaller from layout to layout, so that all are visible although they coincide.
        axes.plot(list(losses), list(losses.values()), **_style(number, 9 - 1.2 * number), label=resumed_at(layout))
    for part, dashes in zip(PARTS, _DASHES, strict=True):
        losses = story.losses[resumed_without(part)]
        axes.plot(list(losses), list(losses.values()), color=_FAINT, linestyle=dashes, label=resumed_without(part))
    axes.annotate("checkpoint", (SAVED_AFTER + 0.5, 0.97), xycoords=("data", "axes fraction"), rotation=90, **_SMALL)
    _mark_checkpoint(axes)


def _draw_differences(story: Story, axes: Axes) -> None:
    """Draw the differences of all losses from those of the training that never stopped."""
    axes.set_yscale("log")
    for number, layout in enumerate(LAYOUTS):
        _draw_difference(story, resumed_at(layout), axes, **_style(number, 9 - 1.2 * number))
    for layout in OTHERS:
        name = never_stopped(layout)
        _draw_difference(story, name, axes, color="black", linewidth=5, alpha=0.12, label=name)
    for part, dashes in zip(PARTS, _DASHES, strict=True):
        _draw_difference(story, resumed_without(part), axes, color=_FAINT, linestyle=dashes)
    axes.axhline(TOLERANCE, color="#D55E00", linewidth=1)
    axes.annotate(f"tolerance {TOLERANCE}", (1, TOLERANCE), **_SMALL | {"va": "bottom", "color": "#D55E00"})
    axes.set_xlabel("step")
    _mark_checkpoint(axes)


def _draw_difference(story: Story, run: str, axes: Axes, **style: Any) -> None:  # noqa: ANN401  (plot's own)
    """Draw the differences of one run."""
    differences = story.differences(run)
    axes.plot(list(differences), [max(each, _NOTHING) for each in differences.values()], **style)


def _style(number: int, size: float) -> dict[str, Any]:
    """The style of the line of layout ``number``, with markers of ``size`` points."""
    return {
        "color": _COLOURS[number],
        "marker": _MARKERS[number],
        "markersize": size,
        "markerfacecolor": "none",
        "linewidth": 0.8,
    }


def _mark_checkpoint(axes: Axes) -> None:
    """Draw a vertical line between the steps before and after the checkpoint."""
    axes.axvline(SAVED_AFTER + 0.5, color=_FAINT, linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
