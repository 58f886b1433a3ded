"""What is the same in two tensor indexes: boxes that hold the same elements."""

from __future__ import annotations

from dataclasses import dataclass

from dist_ckpt_mistral.shapes import Shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A box of a source tensor and a box of a target tensor hold the same elements in the same order.

    ``shape`` has the fewer axes of the two; the further leading axes of the other have extent 1. In elements.
    """

    source: str
    source_offset: Shape
    target: str
    target_offset: Shape
    shape: Shape


def reverse(link: Link) -> Link:
    """The same boxes, read the other way."""
    return Link(
        source=link.target,
        source_offset=link.target_offset,
        target=link.source,
        target_offset=link.source_offset,
        shape=link.shape,
    )
