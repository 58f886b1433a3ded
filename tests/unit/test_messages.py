"""Amounts in words: counts, bytes and times."""

from __future__ import annotations

import pytest

from dist_ckpt_mistral.messages import counted, human_bytes, human_seconds


@pytest.mark.parametrize(
    ("words", "expected"),
    [((1, "file"), "1 file"), ((0, "file"), "0 files"), ((1, "entry", "entries"), "1 entry"),
     ((2, "entry", "entries"), "2 entries")],
)  # fmt: skip
def test_one_is_singular(words: tuple[int, str], expected: str) -> None:
    """One thing is not several."""
    assert counted(*words) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0.034, "0.03 s"), (1.25, "1.2 s"), (59, "59.0 s"), (200.4, "3 min 20 s"), (3600, "1 h 0 min"),
     (7530, "2 h 5 min")],
)  # fmt: skip
def test_times(seconds: float, expected: str) -> None:
    """A time has the digits that people want to know."""
    assert human_seconds(seconds) == expected


def test_rates_are_whole_bytes() -> None:
    """A rate has at most one digit behind the point, and as bytes none."""
    assert [human_bytes(1234.5), human_bytes(12.3), human_bytes(999)] == ["1.2 kB", "12 B", "999 B"]
