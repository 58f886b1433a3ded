"""Long lists of names as a few patterns: nothing is lost, nothing is made up."""

from __future__ import annotations

import itertools
import re

from hypothesis import given
from hypothesis import strategies as st

from dist_ckpt_mistral.messages import grouped, listed


def expanded(pattern: str) -> list[str]:
    """The names that a pattern stands for, read as its documentation says."""
    parts = re.split(r"\{([\d,-]+)\}", pattern)
    choices: list[list[str]] = []
    for position, part in enumerate(parts):
        numbers: list[str] = []
        for run in part.split(",") if position % 2 else ():
            first, _, last = run.partition("-")
            numbers += map(str, range(int(first), int(last or first) + 1))
        choices.append(numbers if position % 2 else [part])
    return ["".join(choice) for choice in itertools.product(*choices)]


def test_layers_and_experts_are_one_name() -> None:
    """The experts of all layers are one pattern, a layer without some of them another; numbers in words stay."""
    names = [
        f"layers.{layer}.experts.{expert}.linear_fc1.w"
        for layer in range(72)
        for expert in range(128)
        if (layer, expert) != (5, 7)
    ]
    assert [*grouped([*names, "norm.weight"])] == [
        "layers.{0-4,6-71}.experts.{0-127}.linear_fc1.w",
        "layers.5.experts.{0-6,8-127}.linear_fc1.w",
        "norm.weight",
    ]


def test_few_names_are_listed_one_by_one() -> None:
    """Up to fifty names stand in a list as they are; more are given as patterns."""
    names = [f"layers.{layer}.norm" for layer in range(51)]
    assert listed(names[:50]) == ", ".join(names[:50])
    assert listed([*names, "head"]) == "layers.{0-50}.norm, head"


NAMES = st.lists(
    st.from_regex(r"(a|b\.)?([0-3]|10|007)?(\.x)?([0-2])?c?([01])?", fullmatch=True), max_size=40, unique=True
)


@given(NAMES)
def test_patterns_stand_for_exactly_the_names(names: list[str]) -> None:
    """Every name is in one pattern, and patterns stand for given names only, in the order in which they are listed."""
    found = grouped(names)
    assert sorted(name for group in found.values() for name in group) == sorted(names)
    for pattern, group in found.items():
        assert expanded(pattern) == group
