"""Reading a few bytes at many places that are known before: the disk is asked for many at once, not one by one."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Final

from dist_ckpt_mistral.storage import SourceFiles

#: So many places are asked for at once: more made no difference.
_PLACES: Final = 256
#: After one place that is in memory, so many are taken to be there too: looking takes longer than reading.
_TRUSTED: Final = 16


class ReadAhead:
    """Reads at places in about the order given; another order, or other places, cost time and nothing else."""

    def __init__(self, files: SourceFiles, places: Iterable[tuple[int, int]]) -> None:
        """``places`` are (file, position) of the reads to come."""
        self._files, self._places = files, iter(places)
        self._reads = self._looking_at = self._taken = 0

    def read(self, file: int, position: int, num_bytes: int) -> bytes:
        """``num_bytes`` bytes from ``position`` on."""
        number, self._reads = self._reads, self._reads + 1
        if number >= self._looking_at:
            found = self._files.read_cached(file, position, num_bytes)
            if found is not None:
                self._looking_at = number + _TRUSTED
                return found
            self._ask(number, num_bytes)
        return self._files.read(file, position, num_bytes)

    def _ask(self, number: int, num_bytes: int) -> None:
        """Have what is read from read ``number`` on brought into memory."""
        self._looking_at = number + _PLACES
        for file, position in islice(self._places, number - self._taken, self._looking_at - self._taken):
            self._files.ask_for(file, position, num_bytes)
        self._taken = self._looking_at
