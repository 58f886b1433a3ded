"""A batch of equal records that is cut out of a pickle: its columns, and what the unpickler gets in its place."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import numpy as np

from dist_ckpt_mistral.formats.cursors import IntArray


class Nothing:
    """Fills the slots of the memo that the records would. It fits nowhere: it is no key, and takes no state."""

    NAME: Final = b"nothing"
    __slots__ = ()
    __hash__ = None  # type: ignore[assignment]  # some of the records have none either


class Records(NamedTuple):
    """Records in the order in which they stand, as columns: where each begins and ends, and its slots of every sort.

    ``texts`` are as ``Cursors.text`` gives them; record ``i`` fills ``memos[i]`` slots of the memo, and texts that
    stand in it fill those of ``ranks[i]``, counted from its first one. ``sizes[i, s, :ndim[i, s]]`` are the sizes of
    slot ``s``, of -1 axes where there are none.
    """

    begin: IntArray
    end: IntArray
    memos: IntArray
    texts: IntArray
    ranks: IntArray
    integers: IntArray
    sizes: IntArray
    ndim: IntArray


class Batch:
    """A batch of records that was cut out. The unpickler calls it with what the records refer to."""

    def __init__(self, records: Records, expected: tuple[Any, ...]) -> None:
        """``expected`` is what the constants must refer to."""
        self.records, self._expected = records, expected
        used, first, which = np.unique(records.texts.ravel(), return_index=True, return_inverse=True)
        order = np.argsort(first)  # each string where the first record refers to it: the memo may not have it before
        self._used, self._first = used[order], first[order]
        self._which = np.argsort(order)[which]
        self.strings: tuple[Any, ...] = ()

    def __call__(self, *referred: object) -> Batch:
        """Take what was pushed: what the constants refer to, and the strings."""
        found = tuple(each for each in referred if type(each) is not Nothing)
        constants, self.strings = found[: len(self._expected)], found[len(self._expected) :]
        if constants != self._expected or len(self.strings) != len(self._used):
            raise TypeError("records of another class, or of other attributes")
        return self

    def __len__(self) -> int:
        """Number of records."""
        return len(self.records.begin)

    def text_numbers(self, column: int) -> IntArray:
        """Which of ``strings`` each record has in a text slot."""
        return self._which.reshape(self.records.texts.shape)[:, column]

    def opcodes(self, opcodes: bytes, push: bytes, number: int, constants: bytes) -> Iterator[bytes]:
        """What is unpickled in place of the batch, which is global ``number`` of those that ``push % name`` pushes.

        ``constants`` are the opcodes that push what is expected.
        """
        yield push % str(number).encode() + pickle.MARK + constants
        memos = self.records.memos
        ranks = ((memos.cumsum() - memos)[:, None] + self.records.ranks).ravel()[self._first].tolist()
        filled, nothing = 0, push % Nothing.NAME
        for text, rank in zip(self._used.tolist(), ranks, strict=True):
            if text >= 0:
                yield pickle.LONG_BINGET + text.to_bytes(4, "little")
            else:
                yield nothing + pickle.MEMOIZE * (rank - filled)
                yield opcodes[~text : ~text + 2 + opcodes[~text + 1]] + pickle.MEMOIZE
                filled = rank + 1
        yield nothing + pickle.MEMOIZE * (int(memos.sum()) - filled) + pickle.TUPLE + pickle.REDUCE
