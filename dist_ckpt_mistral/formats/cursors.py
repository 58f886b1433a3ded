"""Many places of a pickle, read and moved on at once: what ``record_columns`` is made of."""

from __future__ import annotations

import pickle
from typing import Final

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
#: Readers look at most so far behind the first byte of a record: so much must stand behind the last one.
MOST_BYTES: Final = 2048
#: Megatron's tensors have no more: of experts of all layers, four, and one more where they are stored as blocks.
MOST_AXES: Final = 5

_OPCODES: Final = {pickle.BININT1: 1, pickle.BININT2: 2, pickle.BININT: 4}
#: BININT has a sign.
_MOST_SHORT: Final = (1 << 31) - 1
#: Of a LONG1 so many bytes stand in the same word as its opcode and its length.
_MOST_LONG_BYTES: Final = 6
#: By opcode: how many bytes of argument an integer has (0: it is none), and which bits of a word that makes.
_BYTES = np.zeros(256, dtype=np.int64)
_BITS = np.zeros(256, dtype=np.uint64)
for _opcode, _count in _OPCODES.items():
    _BYTES[_opcode[0]], _BITS[_opcode[0]] = _count, (1 << 8 * _count) - 1
#: What ends a tuple of so many items without a mark; 256: nothing does.
_ENDS: Final = np.array([256, 0x85, 0x86, 0x87, *[256] * MOST_AXES], dtype=np.int64)


def begins_with(content: bytes, at: IntArray, expected: bytes) -> npt.NDArray[np.bool_]:
    """Whether the first bytes at each place, up to eight, are those of ``expected``."""
    cursors = Cursors(content, at)
    cursors.constant(expected[:8])
    return cursors.good


class Cursors:
    """Places ``at``; ``good`` says of each whether all was as expected. What is not good reads something, unharmed."""

    def __init__(self, content: bytes, at: IntArray) -> None:
        """Begin at each of ``at``. ``MOST_BYTES`` bytes of ``content`` stand behind the last one."""
        self._bytes = np.frombuffer(content, dtype=np.uint8)
        self._words = np.ndarray((len(content) - 7,), dtype="<u8", buffer=content, strides=(1,))
        self.at, self.good = at.copy(), np.ones(len(at), dtype=bool)

    def constant(self, expected: bytes) -> None:
        """These bytes."""
        for start in range(0, len(expected), 8):
            piece = expected[start : start + 8]
            bits = np.uint64((1 << 8 * len(piece)) - 1)
            self.good &= (self._words[self.at + start] & bits) == np.uint64(int.from_bytes(piece, "little"))
        self.at += len(expected)

    def text(self) -> IntArray:
        """A string: the number of the memo slot that it comes from, or ~place of one that stands here."""
        words = self._words[self.at]
        opcodes = words.astype(np.uint8)
        is_long, is_here = opcodes == pickle.LONG_BINGET[0], opcodes == pickle.SHORT_BINUNICODE[0]
        lengths = ((words >> np.uint64(8)) & np.uint64(0xFF)).astype(np.int64)
        slots = np.where(is_long, ((words >> np.uint64(8)) & np.uint64(0xFFFFFFFF)).astype(np.int64), lengths)
        memoized = self._bytes[self.at + np.where(is_here, lengths + 2, 0)] == pickle.MEMOIZE[0]
        self.good &= is_long | (opcodes == pickle.BINGET[0]) | (is_here & memoized)
        found = np.where(is_here, ~self.at, slots)
        self.at += np.where(is_here, lengths + 3, np.where(is_long, 5, 2))
        return found

    def integer(self) -> IntArray:
        """A number that is not negative."""
        numbers, is_integer = self._integers()
        self.good &= is_integer
        return numbers

    def _integers(self) -> tuple[IntArray, npt.NDArray[np.bool_]]:
        """Numbers, and where there are such; elsewhere nothing is moved on and the number is 0."""
        words = self._words[self.at]
        opcodes = words.astype(np.uint8)
        lengths, numbers = _BYTES[opcodes], ((words >> np.uint64(8)) & _BITS[opcodes]).astype(np.int64)
        moved = lengths + (lengths > 0)
        numbers[numbers > _MOST_SHORT] = -1
        longs = np.flatnonzero(opcodes == pickle.LONG1[0])
        if longs.size:
            numbers[longs], moved[longs] = _longs(words[longs])
        is_integer = (moved > 0) & (numbers >= 0)
        np.copyto(moved, 0, where=~is_integer)
        np.copyto(numbers, 0, where=~is_integer)
        self.at += moved
        return numbers, is_integer

    def sizes(self) -> tuple[IntArray, IntArray]:
        """A tuple of numbers that are not negative, which has at least one: ``[places, MOST_AXES]``, and how many."""
        is_marked = self._bytes[self.at] == pickle.MARK[0]
        self.at += is_marked
        sizes, ndim = np.zeros((len(self.at), MOST_AXES), dtype=np.int64), np.zeros(len(self.at), dtype=np.int64)
        for axis in range(MOST_AXES):
            sizes[:, axis], is_integer = self._integers()
            if not is_integer.any():
                break
            ndim += is_integer
        self.good &= self._bytes[self.at] == np.where(is_marked, pickle.TUPLE[0], _ENDS[ndim])
        self.at += 1
        return sizes, ndim


def _longs(words: npt.NDArray[np.uint64]) -> tuple[IntArray, IntArray]:
    """The numbers of LONG1 opcodes of up to 6 bytes, and the lengths of these; -1 for what is longer or negative."""
    lengths = ((words >> np.uint64(8)) & np.uint64(0xFF)).astype(np.int64)
    is_short = (lengths >= 1) & (lengths <= _MOST_LONG_BYTES)
    bits = np.where(is_short, 8 * lengths, 8)
    numbers = ((words >> np.uint64(16)) & ((np.uint64(1) << bits.astype(np.uint64)) - np.uint64(1))).astype(np.int64)
    is_negative = (numbers >> (bits - 1)).astype(bool)
    return np.where(is_short & ~is_negative, numbers, -1), lengths + 2
