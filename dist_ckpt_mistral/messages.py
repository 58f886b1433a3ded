"""How messages word names, amounts, lists and commands."""

from __future__ import annotations

import itertools
import math
import os
import re
import shlex
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
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
#: Runs of ranks that are spelled out before "and N more".
_MOST_RUNS: Final = 6
_PAIR: Final = 2


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


def human_bytes(num_bytes: int) -> str:
    """``14.5 GB``: decimal units, as disks and Hugging Face count."""
    size, units = float(num_bytes), ["B", "kB", "MB", "GB", "TB", "PB"]
    while size >= 1000 and len(units) > 1:  # noqa: PLR2004  (decimal units)
        size, units = size / 1000, units[1:]
    return f"{num_bytes} B" if units[0] == "B" else f"{size:.1f} {units[0]}"


def command_line(words: Iterable[str]) -> str:
    """``words`` as one line of printable characters that bash reads as exactly these words."""
    return " ".join(shlex.quote(word) if word.isprintable() else _with_escapes(word) for word in words)


def _with_escapes(word: str) -> str:
    """A word with characters that a terminal must not get, in bash's notation ``$'...'``."""
    return "$'" + "".join(c if c.isprintable() and c not in "'\\" else _bytes_of(c) for c in word) + "'"


def _bytes_of(character: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in os.fsencode(character))


def printable(text: str) -> str:
    """``text`` in one line, with everything escaped that could steer a terminal or that has no letter.

    Names in files may hold escape sequences, halves of surrogate pairs, or letters that turn the writing round.
    """
    return escaped(text.replace("\n", " "), is_harmless=str.isprintable)


def escaped(text: str, *, is_harmless: Callable[[str], bool]) -> str:
    """``text`` with all other characters than harmless ones written as Python's ``ascii`` writes them."""
    return text if text.isprintable() else "".join(c if is_harmless(c) else ascii(c)[1:-1] for c in text)


def counted(count: int, what: str) -> str:
    """``1 file``, ``2 files``."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def spans(numbers: Iterable[int], *, most: int = _MOST_RUNS) -> str:
    """``0 to 3, 8``; of scattered numbers only the first ``most`` runs, and how many more numbers there are."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    told = [f"{run[0]} to {run[-1]}" if len(run) > _PAIR else ", ".join(map(str, run)) for run in runs[:most]]
    more = sum(map(len, runs[most:]))
    return ", ".join(told) + (f" and {more} more" if more else "")
