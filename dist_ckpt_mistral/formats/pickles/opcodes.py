"""Inspect the opcodes of a pickle before it is unpickled: is it harmless, and where does an attribute begin?

An allowlist of names does not make CPython's C unpickler safe. A few bytes can make it reserve gigabytes (a memo slot
with a high number), hash for ever (a dict key that is a tuple of twice the same tuple of twice ...), or overflow its
stack (a deeply nested key). Pickles of a plain subset of opcodes cannot do that. Genuine ``.metadata`` is in this
subset, which a regular expression recognises in a third of the time that unpickling takes. Opcodes: CPython 3.11 to
3.14, ``Lib/pickle.py``.
"""

from __future__ import annotations

import functools
import itertools
import pickle
import re
from typing import Final

#: Length of the PROTO opcode with its argument, and of the argument of a FRAME opcode.
_PROTO_BYTES: Final = 2
_FRAME_LENGTH_BYTES: Final = 8
#: From this protocol on, picklers let memo slots count up (MEMOIZE) instead of numbering them.
_COUNTING_PROTOCOL: Final = 4
#: The longest plain tuple of integers: tensors of torch have no more axes.
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
#: Opcode of a string -> the number of bytes that give its length.
_LENGTH_BYTES: Final = {pickle.SHORT_BINUNICODE: 1, pickle.BINUNICODE: 4}
#: From this size of a pickle on, an expression pays that takes 7 ms to compile.
_LONG_BYTES: Final = 1 << 20
#: A memo slot below 2**16.
_SLOT: Final = re.compile(rb"(?:r..\0\0)?", re.DOTALL)


def made_safe(pickled: bytes) -> bytearray | None:
    """Rewrite ``pickled`` so that CPython's C unpickler uses memory and time linear in its length.

    That holds whatever the pickle contains, as long as no function that it calls makes tuples. Returns None if the
    pickle is not in the plain subset; use the Python unpickler then.

    In a plain pickle, a tuple has only integers, or the next opcode consumes it. Picklers memoize a tuple before it is
    consumed, although they never use that slot again. A hostile pickle could use it, to build tuples that grow without
    end; so the two opcodes are swapped, and the slot gets what was made of the tuple. All opcodes are put into one
    frame: otherwise an unpickler could read the head of a frame, in the middle of an argument, as part of it.
    """
    if pickled[:1] != pickle.PROTO or len(pickled) < _PROTO_BYTES:
        return None
    opcodes = unframed(pickled)
    counting = pickled[1] >= _COUNTING_PROTOCOL
    run = _plain_run(counting=counting, is_long=len(pickled) >= _LONG_BYTES, is_large=len(pickled) >= 1 << 24)
    at = 0
    swapped: list[int] = []
    while True:
        at = run.match(opcodes, at).end()  # type: ignore[union-attr]  # may match nothing, but always matches
        opcode, behind = opcodes[at : at + 1], opcodes[at + 1 : at + 3]
        if opcode == pickle.STOP:
            return _in_one_frame(pickled[:_PROTO_BYTES], opcodes, swapped)
        if opcode in _LENGTH_BYTES:  # a string of 256 bytes or more, or any in a small pickle
            at += 1 + _LENGTH_BYTES[opcode]
            at += int.from_bytes(opcodes[at - _LENGTH_BYTES[opcode] : at], "little")
            at = at if counting else _SLOT.match(opcodes, at).end()  # type: ignore[union-attr]  # always matches
        elif opcode and opcode in _TUPLES and behind[:1] == pickle.MEMOIZE and behind[1:] in _CONSUMERS:
            swapped.append(at + 1)
            at += 3
        elif opcode and opcode in _TUPLES and behind[:1] in _CONSUMERS:
            at += 2
        else:
            return None


def _in_one_frame(proto: bytes, opcodes: bytes, swapped: list[int]) -> bytearray:
    """A pickle of ``opcodes`` in one frame; each opcode at an index in ``swapped`` changes places with the next."""
    head = proto + pickle.FRAME + len(opcodes).to_bytes(_FRAME_LENGTH_BYTES, "little")
    whole = bytearray().join((head, opcodes))
    for index in swapped:
        at = len(head) + index
        whole[at], whole[at + 1] = whole[at + 1], whole[at]
    return whole


@functools.cache
def _plain_run(*, counting: bool, is_long: bool, is_large: bool) -> re.Pattern[bytes]:
    """A regular expression for a run of plain opcodes; for a long pickle with strings of up to 255 bytes in it.

    With ``counting``, memo slots count up. Otherwise only names and strings have slots, and their numbers are below
    2**16, or 2**24 in a large file: the unpickler's memo is as large as the highest number.
    """
    if counting:
        string, zeros, slot, alone = rb"\x8c", b"", b"", _ALONE + rb"\x94"
    else:
        string, zeros, slot, alone = b"X", rb"\0\0\0", rb"(?:r..%b)?" % (b".\0" if is_large else b"\0\0"), _ALONE
    named, behind_get = _GLOBAL, rb"\)\x81\x94?}\x94?\("  # an object of the class just named, whose attributes follow
    if is_long:
        texts = b"|".join(b"%b%b.{%d}" % (re.escape(bytes([length])), zeros, length) for length in range(256))
        named, behind_get = rb"(?:%b|%b(?:%b))" % (_GLOBAL, string, texts), rb"(?:%b|%b)" % (behind_get, _SIZES)
    plain = rb"%b{1,2}+(?:%b)?+[%b]*+|[%b]++|%b|\(|%b|%b%b|G.{8}" % (
        *(_GET, behind_get, alone, alone),
        *(_SIZES, _INT, named, slot),
    )
    return re.compile(rb"(?:%b)*+" % plain, re.DOTALL)


def unframed(pickled: bytes) -> bytes:
    """The opcodes after PROTO without the heads of frames; unchanged if the last frame is incomplete."""
    ends = _frame_ends(pickled)
    if not ends or ends[-1] > len(pickled):
        return pickled[_PROTO_BYTES:]
    content = memoryview(pickled)
    frames = itertools.pairwise([_PROTO_BYTES, *ends])
    parts = (content[start + 1 + _FRAME_LENGTH_BYTES : end] for start, end in frames)
    return b"".join((*parts, content[ends[-1] :]))


def _frame_ends(pickled: bytes) -> list[int]:
    """The end of each frame in the unbroken sequence of frames that follows the PROTO opcode."""
    ends, start = [], _PROTO_BYTES
    while pickled[start : start + 1] == pickle.FRAME:
        begin = start + 1 + _FRAME_LENGTH_BYTES
        start = begin + int.from_bytes(pickled[start + 1 : begin], "little")
        ends.append(start)
    return ends


def ended_before(pickled: bytes, key: str, *, unless_behind: str) -> bytes:
    """Cut a pickled object off before its attribute ``key``; ``pickled`` itself if it does not show where that is.

    Such a pickle consists of complete frames, as picklers write them from protocol 4 on (PEP 3154), and does not have
    the string ``unless_behind`` after ``key``. If ``key`` is not an attribute of the topmost object after all, loading
    the result fails, or gives another object.
    """
    if _frame_ends(pickled)[-1:] != [len(pickled)] or not pickled.endswith(pickle.STOP):
        return pickled
    opcodes = unframed(pickled)
    at = opcodes.rfind(_short_string(key))
    if at < 0 or opcodes.find(_short_string(unless_behind), at) >= 0:
        return pickled
    return b"".join((pickled[:_PROTO_BYTES], memoryview(opcodes)[:at], pickle.SETITEMS + pickle.BUILD + pickle.STOP))


def _short_string(text: str) -> bytes:
    """The opcode of a string of fewer than 256 bytes."""
    return pickle.SHORT_BINUNICODE + bytes([len(text)]) + text.encode()
