"""Thousands of tensor names as a few: names that differ in numbers only are written once, with ranges."""

from __future__ import annotations

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, TypeAlias

#: A number as Python writes it, so that it can be written again. Longer ones are names.
_NUMBER: Final = re.compile(r"(?<!\d)(0|[1-9]\d{0,8})(?!\d)", re.ASCII)
#: A name with more numbers than this is its own pattern: no tensor of a model has so many.
_MOST_NUMBERS: Final = 8
#: More names than this are not read one by one.
_MANY: Final = 50
#: More than these are not even looked at: no model has so many tensors.
_TOO_MANY: Final = 100_000
_Numbers: TypeAlias = tuple[int, ...]


def listed(names: Sequence[str]) -> str:
    """Names with commas between them; many as their patterns."""
    told = names if len(names) <= _MANY else [*grouped(names[:_TOO_MANY])]
    rest = [] if len(names) <= _TOO_MANY else [f"and {len(names) - _TOO_MANY} more"]
    return ", ".join([*told, *rest])


def grouped(names: Iterable[str]) -> dict[str, list[str]]:
    """Pattern -> the names that it stands for, which are all given and all different.

    ``{0-3,7}`` stands for each of these numbers, several of them for every combination. A name that shares nothing is
    its own pattern.
    """
    by_text: dict[tuple[str, ...], dict[_Numbers, str]] = defaultdict(dict)
    for name in names:
        parts = _NUMBER.split(name)
        if len(parts) > 2 * _MOST_NUMBERS + 1:
            parts = [name]
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
