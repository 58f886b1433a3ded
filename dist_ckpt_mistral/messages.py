"""Formatting of names, lists, byte counts and commands for messages."""

from __future__ import annotations

import itertools
import math
import os
import re
import shlex
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from typing import Final, TypeAlias

#: Up to this many names are listed one by one, more as patterns.
_MAX_LISTED: Final = 50
#: Names beyond these are only counted, to bound the work: no model has so many tensors.
_MAX_GROUPED: Final = 100_000
#: A decimal number without leading zeros, so that ``str(int(text))`` gives the text back, of at most 9 digits.
_NUMBER: Final = re.compile(r"(?<!\d)(0|[1-9]\d{0,8})(?!\d)", re.ASCII)
#: A name with more numbers than this is not grouped: no tensor of a model has so many.
_MAX_NUMBERS: Final = 8
#: Runs of numbers that ``spans`` spells out before "and N more".
_MAX_RUNS: Final = 6
_PAIR: Final = 2
#: A ``repr`` shows collections of at most this many entries, and at most this many characters of a value.
_MAX_SHOWN: Final = 8
_MAX_REPR: Final = 120
_Numbers: TypeAlias = tuple[int, ...]


def listed(names: Sequence[str]) -> str:
    """Join names with commas; more than 50 names become patterns such as ``layers.{0-31}.weight``."""
    shown = names if len(names) <= _MAX_LISTED else [*grouped(names[:_MAX_GROUPED])]
    rest = [] if len(names) <= _MAX_GROUPED else [f"and {len(names) - _MAX_GROUPED} more"]
    return ", ".join([*shown, *rest])


def grouped(names: Iterable[str]) -> dict[str, list[str]]:
    """Group names that differ only in their numbers: pattern -> its names.

    ``{0-3,7}`` in a pattern stands for each of these numbers; a pattern with several such sets stands for all their
    combinations, every one of which is in ``names``. A name that fits no other is its own pattern.
    """
    by_text: dict[tuple[str, ...], dict[_Numbers, str]] = defaultdict(dict)
    for name in names:
        parts = _NUMBER.split(name)
        if len(parts) > 2 * _MAX_NUMBERS + 1:
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
    """Split ``rows`` into Cartesian products: yield each as one ascending tuple of numbers per axis."""
    axes = tuple(tuple(sorted(set(axis))) for axis in zip(*rows, strict=True))
    if math.prod(map(len, axes)) == len(rows):
        yield axes
        return
    rests_of: dict[int, set[_Numbers]] = defaultdict(set)
    for first, *rest in rows:
        rests_of[first].add(tuple(rest))
    firsts_of: dict[frozenset[_Numbers], list[int]] = defaultdict(list)
    for first in sorted(rests_of):
        firsts_of[frozenset(rests_of[first])].append(first)
    for rests, firsts in firsts_of.items():
        for product in _products(rests):
            yield (tuple(firsts), *product)


def _ranges(numbers: _Numbers) -> str:
    """Format ascending numbers as ``{0-3,7}``, and a single number without braces."""
    if len(numbers) == 1:
        return str(numbers[0])
    runs = []
    for _, run in itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        first, *rest = (number for _, number in run)
        runs.append(f"{first}-{rest[-1]}" if rest else f"{first}")
    return "{" + ",".join(runs) + "}"


def human_bytes(num_bytes: float) -> str:
    """Format a byte count in decimal units, as Hugging Face does: ``14.5 GB``."""
    size, units = float(num_bytes), ["B", "kB", "MB", "GB", "TB", "PB"]
    while size >= 1000 and len(units) > 1:  # noqa: PLR2004  (decimal units)
        size, units = size / 1000, units[1:]
    return f"{num_bytes:.0f} B" if units[0] == "B" else f"{size:.1f} {units[0]}"


def human_seconds(seconds: float) -> str:
    """Format a time: ``0.03 s``, ``14.2 s``, ``3 min 20 s``, ``2 h 5 min``."""
    if seconds < 60:  # noqa: PLR2004  (of a minute)
        return f"{seconds:.2f} s" if seconds < 1 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"  # noqa: PLR2004


def command_line(words: Iterable[str]) -> str:
    """Quote ``words`` as one line of printable characters that bash splits into exactly these words."""
    return " ".join(shlex.quote(word) if word.isprintable() else _with_escapes(word) for word in words)


def _with_escapes(word: str) -> str:
    """Quote a word in bash's notation ``$'...'``, with unprintable characters as hexadecimal bytes."""
    return "$'" + "".join(c if c.isprintable() and c not in "'\\" else _hex_escapes(c) for c in word) + "'"


def _hex_escapes(character: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in os.fsencode(character))


def printable(text: str) -> str:
    """Return ``text`` as one line with all unprintable characters escaped.

    Names in files may contain terminal escape sequences, lone surrogates, or characters that reverse the direction of
    the text.
    """
    return escaped(text.replace("\n", " "), is_harmless=str.isprintable)


def escaped(text: str, *, is_harmless: Callable[[str], bool]) -> str:
    """Escape all characters of ``text`` that are not harmless, as ``ascii`` does."""
    return text if text.isprintable() else "".join(c if is_harmless(c) else ascii(c)[1:-1] for c in text)


def counted(count: int, what: str, plural: str = "") -> str:
    """Format a count with its noun: ``1 file``, ``2 files``. ``plural`` is for one that takes more than an s."""
    return f"{count} {what if count == 1 else plural or what + 's'}"


def spans(numbers: Iterable[int], *, most: int = _MAX_RUNS) -> str:
    """Format ascending numbers as ``0 to 3, 8``: the first ``most`` runs, then ``and N more`` numbers."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    shown = [f"{run[0]} to {run[-1]}" if len(run) > _PAIR else ", ".join(map(str, run)) for run in runs[:most]]
    more = sum(map(len, runs[most:]))
    return ", ".join(shown) + (f" and {more} more" if more else "")


def concise_repr(instance: object) -> str:
    """The ``__repr__`` of public dataclasses, for notebooks: one line with the fields that are not the default.

    A long collection is its size, such as ``<201 entries>``, and an array its shape.
    """
    import dataclasses  # noqa: PLC0415  (--help needs none)

    shown = []
    for field in dataclasses.fields(instance):  # type: ignore[arg-type]  # the caller is a dataclass
        value = getattr(instance, field.name)
        is_default = type(value) is type(field.default) and value == field.default
        shown += [] if is_default else [f"{field.name}={_brief(value)}"]
    return f"{type(instance).__name__}({', '.join(shown)})"


def _brief(value: object) -> str:
    """The ``repr`` of a value, or what it is in a few words if that is long."""
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"<array {value.shape}>"
    text = "" if isinstance(value, Sized) and len(value) > _MAX_SHOWN and not isinstance(value, str) else repr(value)
    if text and len(text) <= _MAX_REPR:
        return text
    if isinstance(value, Sized) and not isinstance(value, str):
        return f"<{counted(len(value), 'entry', 'entries')}>"
    return f"{text[:_MAX_REPR]}..."
