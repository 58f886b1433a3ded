"""A million equal records of a pickle as columns of numbers, without an object for each.

A pickler writes the items of a long list or dict in batches of a thousand, and what it writes for records of one class
is the same bytes, but for numbers, references to strings and the lengths of tuples. So one record tells the form of
all: what is constant, and which slots stand between. All that may be such records are found by a constant; then one
cursor each moves over all of them at once, step by step.

Whether a batch is what it seems to be, the unpickler tells. A batch of which every byte was understood, from MARK to
APPENDS or SETITEMS, is cut out. What takes its place calls a ``Batch`` with all to which its records refer, and appends
the result; and it fills as many slots of the memo, with the strings that stand in the batch and else with something
that fits nowhere. If a batch lay inside an argument of an opcode, or if anything behind it refers to its records, then
what is left cannot be unpickled, or a batch is missing where it should be, or that something is where it should not.

Opcodes: CPython 3.11 to 3.14, ``Lib/pickle.py``, protocols 4 and 5.
"""

from __future__ import annotations

import pickle
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from dist_ckpt_mistral.formats.cursors import MOST_AXES, MOST_BYTES, Cursors, IntArray, begins_with
from dist_ckpt_mistral.formats.record_batch import Batch, Nothing, Records

#: From this protocol on, pickles are as they are taken to be here.
_COUNTING: Final = pickle.PROTO + b"\4"
#: Fewer records than this are unpickled faster: a batch of 8 takes a fifth longer, one of 16 a little less.
_LEAST: Final = 16
#: So many bytes are looked through for a record of each form.
_NEAR: Final = 1 << 18
#: Records of so many bytes at once: their columns stay in the cache.
_BLOCK_BYTES: Final = 1 << 20

_GET: Final = rb"(?:h.|j.{4})"
_INT: Final = rb"(?:K.|M..|J.{4}|\x8a\x05.{5}|\x8a\x06.{6})"
_SLOTS: Final = {
    "t": rb"(?:%b|(?>\x8c.{2,256}?\x94))" % _GET,
    "i": _INT,
    "s": rb"(?:%b{1,3}+[\x85-\x87]|\(%b{4,8}+t)" % (_INT, _INT),
}
#: A reference; an object whose attributes follow; the call that makes a Size of a tuple; None; an object's end.
_PARTS: Final = {"g": _GET, "o": rb"\)\x81\x94}\x94\(", "c": rb"\x94\x85\x94R\x94", "N": b"N", "u": b"ub"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """Records, or pairs of such, that are written alike: ``constants``, and a slot behind each but the last.

    Slots: ``t`` for text, ``i`` for an integer, ``s`` for sizes. ``referred`` is what the constants must refer to.
    """

    constants: tuple[str, ...]
    slots: str
    referred: tuple[Any, ...]

    def form(self, opcodes: bytes, start: int) -> tuple[bytes, ...]:
        """The constants of a record that stands soon behind ``start``; none if there is none."""
        constants = [b"(%b)" % b"".join(map(_PARTS.__getitem__, each)) for each in self.constants]
        pattern = b"".join(map(bytes.__add__, constants, [*map(_SLOTS.__getitem__, self.slots), b""]))
        found = re.compile(pattern, re.DOTALL).search(opcodes, start, start + _NEAR)
        return found.groups() if found else ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Items:
    """What the items of some lists, or the pairs of a dict, are: behind the name of their class, one of these kinds.

    A batch of them is ended by the opcode ``end``, and what takes its place goes where it should by ``instead``.
    """

    announced: str
    kinds: tuple[Kind, ...]
    end: bytes
    instead: bytes

    @classmethod
    def of_lists(cls, announced: str, *kinds: Kind) -> Items:
        """Items of lists."""
        return cls(announced=announced, kinds=kinds, end=pickle.APPENDS, instead=pickle.APPEND)

    @classmethod
    def of_dicts(cls, announced: str, *kinds: Kind) -> Items:
        """Pairs of dicts; what takes the place of a batch becomes a key."""
        return cls(announced=announced, kinds=kinds, end=pickle.SETITEMS, instead=pickle.NONE + pickle.SETITEM)


class Cut(NamedTuple):
    """A pickle without most of its records, what the names in it mean, and the batches that were cut out."""

    pickled: bytes
    find: Callable[[str, str], Any]
    batches: tuple[Batch, ...]


class _Place(NamedTuple):
    """Where a batch stands, without MARK and the last opcode, and with what it is replaced."""

    begin: int
    end: int
    batch: Batch
    constants: bytes
    instead: bytes


def cut(proto: bytes, opcodes: bytes, items: Iterable[Items], find: Callable[[str, str], Any]) -> Cut | None:
    """Cut items out of the opcodes of a pickle, which stand behind PROTO. None where nothing can be cut out.

    ``find`` says what the names in the pickle mean.
    """
    if proto < _COUNTING:
        return None
    padded = opcodes + bytes(MOST_BYTES)
    places = sorted((place for each in items for place in _found(padded, each)), key=lambda place: place.begin)
    if not places or any(one.end >= other.begin - 1 for one, other in pairwise(places)):
        return None
    module = f"cut {secrets.token_hex(16)}"  # a name that nobody who made the pickle could guess
    parts, at = [proto], 0
    for number, (begin, end, batch, constants, instead) in enumerate(places):
        push = b"c%b\n%%b\n" % module.encode()
        parts += [opcodes[at : begin - 1], *batch.opcodes(opcodes, push, number, constants), instead]
        at = end + 1
    batches = tuple(place.batch for place in places)
    stand_ins = {Nothing.NAME.decode(): Nothing(), **{str(number): batch for number, batch in enumerate(batches)}}
    return Cut(
        pickled=b"".join([*parts, opcodes[at:]]),
        find=lambda asked, name: stand_ins[name] if asked == module else find(asked, name),
        batches=batches,
    )


def _found(content: bytes, items: Items) -> Iterator[_Place]:
    """The batches of items."""
    start = content.find(items.announced.encode())
    forms = [(kind, form) for kind in items.kinds if (form := kind.form(content, start))] if start >= 0 else []
    if forms:
        references = [each for _, form in forms for part in form for each in re.findall(_GET, part, re.DOTALL)]
        expected = tuple(each for kind, _ in forms for each in kind.referred)
        records = _read(content, start, forms)
        for begin, stop in _runs(content, records, items.end[0]):
            batch = Batch(_taken(records, slice(begin, stop)), expected)
            first, last = int(records.begin[begin]), int(records.end[stop - 1])
            yield _Place(first, last, batch, b"".join(references), items.instead)


def _read(content: bytes, start: int, forms: Sequence[tuple[Kind, tuple[bytes, ...]]]) -> Records:
    """The records of these forms behind ``start``."""
    every, parts = np.frombuffer(content, dtype=np.uint8), []
    for at in range(start, len(every), _BLOCK_BYTES):
        news = np.flatnonzero(every[at : at + _BLOCK_BYTES] == pickle.NEWOBJ[0]) + at
        parts += [_block(content, news, kind, form) for kind, form in forms]
    return _joined(parts)


def _block(content: bytes, news: IntArray, kind: Kind, form: tuple[bytes, ...]) -> Records:
    """The records of one form whose first NEWOBJ opcodes are among ``news``."""
    begin = news - len(pickle.EMPTY_TUPLE) - (5 if form[0].startswith(pickle.LONG_BINGET) else 2)
    begin = begin[begin > 0]
    begin = begin[begins_with(content, begin, form[0])]  # most are of another form
    cursors = Cursors(content, begin)
    texts, ranks, integers, sizes = [], [], [], []
    memos = np.zeros(len(begin), dtype=np.int64)
    for constant, slot in zip(form, [*kind.slots, None], strict=True):
        cursors.constant(constant)
        memos += re.sub(_GET, b"", constant, flags=re.DOTALL).count(pickle.MEMOIZE)
        if slot == "t":
            ranks.append(memos.copy())
            texts.append(cursors.text())
            memos += texts[-1] < 0
        elif slot == "i":
            integers.append(cursors.integer())
        elif slot == "s":
            sizes.append(cursors.sizes())
    if not sizes:
        sizes.append((np.zeros((len(begin), MOST_AXES), dtype=np.int64), np.full(len(begin), -1)))
    columns = (_beside(each, len(begin)) for each in (texts, ranks, integers, *zip(*sizes, strict=True)))
    records = Records(begin, cursors.at, memos, *columns)
    return records if cursors.good.all() else _taken(records, cursors.good)


def _beside(columns: Sequence[IntArray], rows: int) -> IntArray:
    """Columns as ``[rows, columns, ...]``, also where there are none."""
    return np.stack(columns, axis=1) if columns else np.empty((rows, 0), dtype=np.int64)


def _taken(records: Records, which: slice | npt.NDArray[Any]) -> Records:
    """Some of the records."""
    return Records(*(each[which] for each in records))


def _joined(parts: Sequence[Records]) -> Records:
    """All the records, in the order in which they stand."""
    records = Records(*map(np.concatenate, zip(*parts, strict=True)))
    is_ordered = (records.begin[1:] > records.begin[:-1]).all()
    return records if is_ordered else _taken(records, np.argsort(records.begin))


def _runs(content: bytes, records: Records, end: int) -> Iterator[tuple[int, int]]:
    """From which record to which they stand one behind the other, between MARK and the opcode ``end``."""
    gaps = np.flatnonzero(records.end[:-1] != records.begin[1:]) + 1
    for first, stop in pairwise([0, *gaps.tolist(), len(records.begin)]):
        if stop - first >= _LEAST:
            before, behind = int(records.begin[first]) - 1, int(records.end[stop - 1])
            if content[before] == pickle.MARK[0] and content[behind] == end:
                yield first, stop
