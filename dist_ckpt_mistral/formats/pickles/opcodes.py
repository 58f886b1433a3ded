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


def made_safe(pickled: bytes) -> bytes | None:
    """The same pickle in a form that CPython's unpickler may have: in one frame, some opcodes swapped; None: in none.

    Then it takes time and memory in proportion to the length, whatever the pickle says, if no call that it asks for
    makes tuples. In a plain pickle opcodes make tuples of integers, or tuples that the next opcode takes off the stack.
    Where the memo remembers one of the latter, as picklers have it although nobody asks for it again, the opcodes are
    swapped, so that it remembers what came of the tuple: else tuples could grow without end. In one frame it is what
    was looked at: an unpickler takes the head of a frame in the middle of an argument for a part of that.
    """
    if pickled[:1] != pickle.PROTO or len(pickled) < _PROTO_BYTES:
        return None
    opcodes = unframed(pickled)
    run = _plain_run(counting=pickled[1] >= _COUNTING_PROTOCOL, is_large=len(pickled) >= 1 << 24)
    at = 0
    found: list[int] = []
    while True:
        at = run.match(opcodes, at).end()  # type: ignore[union-attr]  # may match nothing, but always matches
        opcode, behind = opcodes[at : at + 1], opcodes[at + 1 : at + 3]
        if opcode == pickle.STOP:
            return _in_one_frame(pickled[:_PROTO_BYTES], opcodes, found)
        if opcode == pickle.BINUNICODE:  # a long one
            at += 1 + 4 + int.from_bytes(opcodes[at + 1 : at + 5], "little")
        elif opcode and opcode in _TUPLES and behind[:1] == pickle.MEMOIZE and behind[1:] in _CONSUMERS:
            found.append(at + 1)
            at += 3
        elif opcode and opcode in _TUPLES and behind[:1] in _CONSUMERS:
            at += 2
        else:
            return None


def _in_one_frame(proto: bytes, opcodes: bytes, swapped: list[int]) -> bytes:
    """A pickle of these opcodes, where each of those at ``swapped`` has changed places with the one behind it."""
    head = proto + pickle.FRAME + len(opcodes).to_bytes(_FRAME_LENGTH_BYTES, "little")
    whole = bytearray().join((head, opcodes))
    for at in swapped:
        one = len(head) + at
        whole[one], whole[one + 1] = whole[one + 1], whole[one]
    return bytes(whole)


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


def unframed(pickled: bytes) -> bytes:
    """The opcodes behind PROTO without the frames around them; where a frame is not there to its end, as they are."""
    ends = _frame_ends(pickled)
    if not ends or ends[-1] > len(pickled):
        return pickled[_PROTO_BYTES:]
    content = memoryview(pickled)
    frames = itertools.pairwise([_PROTO_BYTES, *ends])
    parts = (content[start + 1 + _FRAME_LENGTH_BYTES : end] for start, end in frames)
    return b"".join((*parts, content[ends[-1] :]))


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
