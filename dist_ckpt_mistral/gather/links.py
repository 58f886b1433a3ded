"""Links between two tensor indexes: boxes with the same elements."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from operator import add, sub

from dist_ckpt_mistral.gather.dtypes import Shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A box of a source tensor and a box of a target tensor that contain the same elements in the same order.

    Offsets and ``shape`` are in elements. If one tensor has more axes, ``shape`` leaves out the leading ones, along
    which its box has extent 1.
    """

    source: str
    source_offset: Shape
    target: str
    target_offset: Shape
    shape: Shape


def whole(name: str, shape: Shape) -> Link:
    """Return the link of a whole tensor to the tensor of the same name and shape."""
    origin = (0,) * len(shape)
    return Link(source=name, source_offset=origin, target=name, target_offset=origin, shape=shape)


def reverse(link: Link) -> Link:
    """Exchange source and target."""
    return Link(
        source=link.target,
        source_offset=link.target_offset,
        target=link.source,
        target_offset=link.source_offset,
        shape=link.shape,
    )


def compose(first: Link, second: Link) -> Link | None:
    """Return the link from the source of ``first`` to the target of ``second``; None if it would be empty.

    The target of ``first`` must be the source of ``second``; the link covers the overlap of their boxes in it.
    """
    ndim = len(first.target_offset)
    first_shape, second_shape = (((1,) * (ndim - len(link.shape)) + link.shape) for link in (first, second))
    low = tuple(map(max, first.target_offset, second.source_offset))
    first_end, second_end = map(add, first.target_offset, first_shape), map(add, second.source_offset, second_shape)
    shape = tuple(map(sub, map(min, first_end, second_end), low))
    if min(shape, default=1) <= 0:
        return None
    return Link(
        source=first.source,
        source_offset=_moved(first.source_offset, map(sub, low, first.target_offset), len(first.shape), ndim),
        target=second.target,
        target_offset=_moved(second.target_offset, map(sub, low, second.source_offset), len(second.shape), ndim),
        shape=shape[ndim - min(len(first.shape), len(second.shape)) :],
    )


def _moved(offset: Shape, by: Iterable[int], shared: int, ndim: int) -> Shape:
    """Add the last ``shared`` of the ``ndim`` steps ``by`` to the last axes of ``offset``; the other steps are 0."""
    steps = tuple(by)[ndim - shared :]
    return (*offset[: len(offset) - shared], *map(add, offset[len(offset) - shared :], steps))
