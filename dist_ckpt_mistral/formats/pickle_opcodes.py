"""What the bytes of a pickle tell before anything is unpickled: whether it is plain, and where an attribute begins.

CPython's own unpickler trusts a pickle with more than its names. Some bytes make it reserve gigabytes (a memo slot of a
high number), hash for ever (a dict key that is a tuple of twice the same tuple of twice ...) or overflow its stack (a
key that is nested deeply). Plain pickles cannot, and whoever writes ``.metadata`` writes plain ones: a regular
expression tells them, in a third of the time that unpickling takes. Opcodes: CPython 3.11 to 3.14, ``Lib/pickle.py``.
"""

from __future__ import annotations

import functools
import itertools
import pickle
import re
from bisect import bisect_right
from typing import Final

#: The length of the PROTO opcode with its argument, and of a FRAME opcode's argument.
_PROTO_BYTES: Final = 2
_FRAME_LENGTH_BYTES: Final = 8
#: From this protocol on, memo slots are not numbered by the pickle but count up.
_COUNTING_PROTOCOL: Final = 4
#: Longer tuples than torch's tensors have axes are not plain.
_MAX_ITEMS: Final = 64

_INT: Final = rb"(?:K.|M..|J.{4}|\x8a(?:\x05.{5}|\x06.{6}|\x07.{7}|\x08.{8}|\x00|\x01.|\x02..|\x03...|\x04....))"
#: A tuple of integers: TUPLE2, TUPLE3, TUPLE1, MARK with TUPLE, or EMPTY_TUPLE.
_INTS: Final = rb"(?:%b(?:%b(?:\x86|%b\x87)|\x85)|\((?:%b){0,%d}+t|\))" % (_INT, _INT, _INT, _INT, _MAX_ITEMS)
#: Such a tuple, alone or as the only argument of a call.
_SIZES: Final = rb"(?:%b(?:\x94?\x85\x94?R)?|\(%btR)" % (_INTS, _INTS)
_GET: Final = rb"(?:h.|j.{4})"
_GLOBAL: Final = rb"c[^\n]*\n[^\n]*\n"
#: NONE NEWTRUE NEWFALSE NEWOBJ BUILD REDUCE EMPTY_DICT SETITEMS and SETITEM, EMPTY_LIST APPEND(S) STACK_GLOBAL
_ALONE: Final = rb"N\x88\x89\x81bR}su\]ae\x93"
_TUPLES: Final = pickle.TUPLE + pickle.TUPLE1 + pickle.TUPLE2 + pickle.TUPLE3
_CONSUMERS: Final = (pickle.REDUCE, pickle.BUILD)


def swaps_for_safety(pickled: bytes) -> list[tuple[int, int]] | None:
    """Pairs of positions whose bytes must be swapped before CPython's unpickler may have ``pickled``; None: never.

    Then it takes time and memory in proportion to the length, whatever the pickle says, if no call that it asks for
    makes tuples. In a plain pickle opcodes make tuples of integers, or tuples that the next opcode takes off the stack.
    Where the memo remembers one of the latter, as picklers have it although nobody asks for it again, the opcodes are
    swapped, so that it remembers what came of the tuple: else tuples could grow without end.
    """
    protocol = pickled[1] if pickled[:1] == pickle.PROTO and len(pickled) > 1 else 0
    opcodes, starts = _unframed(pickled)
    run = _plain_run(counting=protocol >= _COUNTING_PROTOCOL, is_large=len(pickled) >= 1 << 24)
    at = _PROTO_BYTES
    found: list[int] = []
    while True:
        at = run.match(opcodes, at).end()  # type: ignore[union-attr]  # may match nothing, but always matches
        opcode, behind = opcodes[at : at + 1], opcodes[at + 1 : at + 3]
        if opcode == pickle.STOP:
            return [(_original(at, starts), _original(at + 1, starts)) for at in found]
        if opcode == pickle.BINUNICODE:  # a long one
            at += 1 + 4 + int.from_bytes(opcodes[at + 1 : at + 5], "little")
        elif opcode and opcode in _TUPLES and behind[:1] == pickle.MEMOIZE and behind[1:] in _CONSUMERS:
            found.append(at + 1)
            at += 3
        elif opcode and opcode in _TUPLES and behind[:1] in _CONSUMERS:
            at += 2
        else:
            return None


@functools.cache
def _plain_run(*, counting: bool, is_large: bool) -> re.Pattern[bytes]:
    """A run of plain opcodes. Where memo slots are not counted, only names and strings have any, of low numbers.

    Slot numbers need memory, which a large file may take.
    """
    short = b"|".join(b"%b.{%d}" % (re.escape(bytes([length])), length) for length in range(256))
    if counting:
        text, alone = rb"\x8c(?:%b)" % short, _ALONE + rb"\x94"
    else:
        slot = rb"(?:r..%b)?" % (b".\0" if is_large else b"\0\0")
        texts = b"|".join(b"%b\\0\\0\\0.{%d}" % (re.escape(bytes([length])), length) for length in range(256))
        text, alone = rb"(?:X(?:%b)|%b)%b" % (texts, _GLOBAL, slot), _ALONE
    record = rb"\)\x81\x94?}\x94?\("  # an object of the class just named, whose attributes follow
    plain = rb"%b{1,2}+(?:%b|%b)?+[%b]*+|[%b]++|%b|\(|%b|%b|G.{8}" % (
        *(_GET, record, _SIZES, alone, alone),
        *(_SIZES, _INT, text),
    )
    return re.compile(rb"(?:%b|%b)*+" % (plain, _GLOBAL), re.DOTALL)


def _unframed(pickled: bytes) -> tuple[bytes, list[tuple[int, int]]]:
    """The opcodes without the frames around them, and for each frame where it begins: there and in ``pickled``."""
    ends = _frame_ends(pickled)
    parts, starts, at = [pickled[:_PROTO_BYTES]], [(0, 0)], _PROTO_BYTES
    for start, end in itertools.pairwise([_PROTO_BYTES, *ends]):
        begin = start + 1 + _FRAME_LENGTH_BYTES
        parts.append(pickled[begin:end])
        starts.append((at, begin))
        at += end - begin
    last = ends[-1] if ends else _PROTO_BYTES
    starts.append((at, last))
    return (b"".join([*parts, pickled[last:]]) if ends else pickled), starts


def _original(at: int, starts: list[tuple[int, int]]) -> int:
    """The position in the pickle of position ``at`` of its opcodes without frames."""
    there, here = starts[bisect_right(starts, at, key=lambda pair: pair[0]) - 1]
    return here + at - there


def _frame_ends(pickled: bytes) -> list[int]:
    """Where each of the frames ends with which ``pickled`` begins: behind the PROTO opcode, one behind the other."""
    ends, start = [], _PROTO_BYTES
    while pickled[start : start + 1] == pickle.FRAME:
        begin = start + 1 + _FRAME_LENGTH_BYTES
        start = begin + int.from_bytes(pickled[start + 1 : begin], "little")
        ends.append(start)
    return ends


def ended_before(pickled: bytes, key: str, *, unless_behind: str) -> bytes | None:
    """A pickled object of attributes, ended before its attribute ``key``; None if that cannot be told from the bytes.

    Those must be the frames that picklers make from protocol 4 on (PEP 3154), all of them, without the attribute
    ``unless_behind`` behind ``key``. Where ``key`` is something else than an attribute of the topmost object, loading
    the result fails, or gives something else than that object.
    """
    at = pickled.rfind(_short_string(key))
    ends = _frame_ends(pickled)
    is_whole = ends[-1:] == [len(pickled)] and pickled.endswith(pickle.STOP)
    if not is_whole or at < 0 or pickled.find(_short_string(unless_behind), at) >= 0:
        return None
    number = bisect_right(ends, at)
    if at < (ends[number - 1] if number else _PROTO_BYTES) + 1 + _FRAME_LENGTH_BYTES:
        return None
    ending = pickle.SETITEMS + pickle.BUILD + pickle.STOP
    return b"".join((memoryview(pickled)[:at], ending.ljust(ends[number] - at, b"\0")))  # unpicklers want whole frames


def _short_string(text: str) -> bytes:
    """The opcode of a string of less than 256 bytes."""
    return pickle.SHORT_BINUNICODE + bytes([len(text)]) + text.encode()
