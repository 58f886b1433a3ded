"""Thousands of tensor names as a few: names that differ in numbers only are written once, with ranges."""

from __future__ import annotations

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, TypeAlias

#: A number as Python writes it, so that it can be written again.
_NUMBER: Final = re.compile(r"(?<!\d)(0|[1-9]\d*)(?!\d)")
#: More names than this are not read one by one.
_MANY: Final = 50
_Numbers: TypeAlias = tuple[int, ...]


def listed(names: Sequence[str]) -> str:
    """Names with commas between them; many as their patterns."""
    return ", ".join(names if len(names) <= _MANY else grouped(names))


def shown(name: str) -> str:
    """A name as it can be printed on one line, whatever is in it."""
    return name if name.isprintable() else repr(name)


def grouped(names: Iterable[str]) -> dict[str, list[str]]:
    """Pattern -> the names that it stands for, which are all given and all different.

    ``{0-3,7}`` stands for each of these numbers, several of them for every combination. A name that shares nothing is
    its own pattern.
    """
    by_text: dict[tuple[str, ...], dict[_Numbers, str]] = defaultdict(dict)
    for name in names:
        parts = _NUMBER.split(name)
        by_text[tuple(parts[::2])][tuple(map(int, parts[1::2]))] = name
    return {
        "".join(itertools.chain.from_iterable(itertools.zip_longest(text, map(_ranges, axes), fillvalue=""))): [
            rows[numbers] for numbers in itertools.product(*axes)
        ]
        for text, rows in by_text.items()
        for axes in _products(frozenset(rows))
    }


def _products(rows: frozenset[_Numbers]) -> Iterator[tuple[_Numbers, ...]]:
    """Products of numbers, one set for each axis, that together are ``rows``."""
    axes = tuple(tuple(sorted(set(axis))) for axis in zip(*rows, strict=True))
    if math.prod(map(len, axes)) == len(rows):
        yield axes
        return
    behind: dict[int, set[_Numbers]] = defaultdict(set)
    for first, *rest in rows:
        behind[first].add(tuple(rest))
    firsts: dict[frozenset[_Numbers], list[int]] = defaultdict(list)
    for first in sorted(behind):
        firsts[frozenset(behind[first])].append(first)
    for remaining, values in firsts.items():
        for further in _products(remaining):
            yield (tuple(values), *further)


def _ranges(numbers: _Numbers) -> str:
    """Ascending numbers as ``{0-3,7}``; a single one as it is."""
    if len(numbers) == 1:
        return str(numbers[0])
    runs = []
    for _, run in itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        first, *rest = (number for _, number in run)
        runs.append(f"{first}-{rest[-1]}" if rest else f"{first}")
    return "{" + ",".join(runs) + "}"
