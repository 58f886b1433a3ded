"""Rows that several target files have pieces of, read once: a block of a source in memory, with the gaps between rows.

Tensor parallelism cuts the rows of some weights. Each of N files wants an Nth of each row, and reading the rest along
would read these weights N times.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable
from typing import Self

from dist_ckpt_mistral.storage.remote_reads import Wanted


class SharedRows:
    """Reads local files, and keeps the last block of shared rows. Each thread has its own."""

    def __init__(self, read_into: Callable[..., None], most_bytes: int) -> None:
        """Read by ``read_into``, that of the files. A block has at most ``most_bytes`` bytes."""
        self.read_into = read_into
        self._buffer = memoryview(mmap.mmap(-1, most_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        self._file, self._start, self._stop = -1, 0, 0

    def hold(self, wanted: Iterable[Wanted]) -> Self:
        """Have the shared rows among what is wanted in memory, if they are one range that fits."""
        shared = [each for each in wanted if each.is_shared]
        if len(shared) != 1 or shared[0].stop - shared[0].start > len(self._buffer):
            return self
        file, start, stop, _ = shared[0]
        is_next = file == self._file and self._start <= start <= self._stop
        if not is_next or stop - self._start > len(self._buffer):
            self._file, self._start, self._stop = file, start, start
        if stop > self._stop:
            missing = self._buffer[self._stop - self._start : stop - self._start]
            self._stop = self._start  # the block holds nothing if the read fails
            self.read_into(file, stop - len(missing), missing)
            self._stop = stop
        return self

    def view(self, file: int, position: int, num_bytes: int) -> memoryview | None:
        """Return the bytes from ``position`` on, which are there until the next ``hold``; None if they are not."""
        if file != self._file or position < self._start or position + num_bytes > self._stop:
            return None
        return self._buffer[position - self._start :][:num_bytes]
