"""Links that follow one another, element by element against numpy."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from dist_ckpt_mistral.gather.links import Link, compose, reverse

Shape = tuple[int, ...]


def pairs(link: Link) -> set[tuple[Shape, Shape]]:
    """Every (source element, target element) that a link says is the same."""
    return {
        (shifted(link.source_offset, step), shifted(link.target_offset, step))
        for step in itertools.product(*map(range, link.shape))
    }


def shifted(offset: Shape, step: Shape) -> Shape:
    """An offset moved on its last axes."""
    lead = len(offset) - len(step)
    return (*offset[:lead], *(at + by for at, by in zip(offset[lead:], step, strict=True)))


@st.composite
def links(draw: st.DrawFn, middle: int) -> tuple[Link, Link]:
    """Two links with a tensor of ``middle`` axes in between, each with any number of axes on its outer side."""

    def offset(axes: int) -> Shape:
        return tuple(draw(st.lists(st.integers(0, 3), min_size=axes, max_size=axes)))

    def link(source: str, target: str) -> Link:
        shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=middle)))
        outer = draw(st.integers(len(shape), middle + 1))
        if len(shape) < min(outer, middle):
            outer = len(shape)
        ends = {"source": middle if source == "B" else outer, "target": middle if target == "B" else outer}
        return Link(
            source=source,
            source_offset=offset(ends["source"]),
            target=target,
            target_offset=offset(ends["target"]),
            shape=shape,
        )

    return link("A", "B"), link("B", "C")


@given(st.integers(1, 3).flatmap(links))
def test_composed_links_join_elements(both: tuple[Link, Link]) -> None:
    """A composed link says of exactly those elements that they are the same which the two links lead to."""
    first, second = both
    joined = {(a, c) for (a, b), (b2, c) in itertools.product(pairs(first), pairs(second)) if b == b2}
    found = compose(first, second)
    assert (set() if found is None else pairs(found)) == joined
    if found is not None:
        assert (found.source, found.target) == ("A", "C")
        assert compose(reverse(second), reverse(first)) == reverse(found)
