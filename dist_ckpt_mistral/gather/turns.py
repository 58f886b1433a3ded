"""Which part of a plan each thread copies next: in turns, so that threads neither wait for a file nor read twice."""

from __future__ import annotations

import contextlib
import threading
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from typing import Final

from dist_ckpt_mistral.gather.bands import PAGE_BYTES
from dist_ckpt_mistral.gather.plan import BytePlan, Part, Segment

#: What a thread copies before it may turn to another file. Longer segments are split, so that all finish together.
_STRETCH_BYTES: Final = 64 << 20
#: Threads that write one file at a time. The kernel lets one at a time write into a file: meanwhile the other reads and
#: takes checksums, which is about half of the work. A third would only spin.
_WRITERS_OF_A_FILE: Final = 2
#: What a thread copies of objects in a store before it may turn to another file: files that share rows are in step.
_REMOTE_STRETCH_BYTES: Final = 8 << 20
_MOST_IN_STEP: Final = 16
#: Parts that a thread copies one after the other.
_Stretch = list[Part]


class Turns:
    """Gives each thread something to copy, in turns.

    The files of a group, which share rows, are written in step. Of local files a thread takes the shared rows for all
    files of a group in one turn, and turns go to the group whose files the fewest others write at that time.
    """

    def __init__(self, plan: BytePlan, numbers: Sequence[int], shared_bytes: int, *, is_remote: bool) -> None:
        """Begin with all segments ``numbers``. A thread keeps ``shared_bytes`` of rows that local files share."""
        length = _REMOTE_STRETCH_BYTES if is_remote else _STRETCH_BYTES
        stretches = _stretches(plan, numbers, length, 0 if is_remote else shared_bytes)
        self._groups = in_step(plan, sorted(stretches), _MOST_IN_STEP) if is_remote else sharing(plan, stretches)
        self._waiting = {
            number: deque(_in_turn([stretches[file] for file in group])) for number, group in enumerate(self._groups)
        }
        self.count = sum(map(len, self._waiting.values()))
        self._num_writers = dict.fromkeys(self._waiting, 0)
        self._lock = threading.Lock()
        segments = (plan.segments[number] for number in numbers)
        is_copy = not plan.derived_files and all(segment.source_dtype == segment.dtype for segment in segments)
        self._is_remote = is_remote
        self._most_workers = max(1, _WRITERS_OF_A_FILE * len(stretches)) if is_copy and not is_remote else self.count

    def workers(self, threads: int) -> int:
        """How many of ``threads`` have something to do at the same time. Conversions of values need no lock."""
        return min(threads, self._most_workers)

    @contextlib.contextmanager
    def next(self) -> Iterator[_Stretch]:
        """Take the next turn of a group."""
        with self._lock:
            group = min(self._waiting, key=self._rank)
            stretch = self._waiting[group].popleft()
            self._num_writers[group] += 1
            if not self._waiting[group]:
                del self._waiting[group]
        try:
            yield stretch
        finally:
            with self._lock:
                self._num_writers[group] -= 1

    def _rank(self, group: int) -> tuple[float, int]:
        """What the next group has the least of: in a store, its number; else writers, then turns that are done."""
        if self._is_remote:
            return group, 0
        return self._num_writers[group] / len(self._groups[group]), -len(self._waiting[group])


def sharing(plan: BytePlan, files: Iterable[int]) -> list[list[int]]:
    """Group target files: those which want pieces of the same rows are together.

    The rows of a weight that tensor parallelism cuts along its last axis have a piece for every rank.
    """
    groups: dict[int, list[int]] = {file: [file] for file in files}
    file_of: dict[str, int] = {}
    for segment in plan.segments:
        if segment.file not in groups or not segment.shares_rows.any():
            continue
        for source in segment.sources:
            first, other = groups[file_of.setdefault(source, segment.file)], groups[segment.file]
            if first is not other:
                first += other
                groups |= dict.fromkeys(other, first)
    return [*{id(group): sorted(group) for group in groups.values()}.values()]


def in_step(plan: BytePlan, files: Iterable[int], most: int) -> list[list[int]]:
    """Group target files as ``sharing`` does, with at least one and at most ``most`` in a group.

    Where the files of a group are written in step, each row that they share is fetched once.
    """
    found: list[list[int]] = []
    for group in sharing(plan, files):
        for start in range(0, len(group), most):
            some = group[start : start + most]
            if found and len(found[-1]) + len(some) <= most:
                found[-1] += some
            else:
                found.append(some)
    return found


def _stretches(
    plan: BytePlan, numbers: Iterable[int], length: int, shared_bytes: int
) -> dict[int, list[tuple[bool, _Stretch]]]:
    """Split the segments ``numbers`` of each file into stretches of about ``length`` bytes, in their order.

    Segments that share rows with other files get stretches of their own, marked True, whose rows have at most
    ``shared_bytes`` bytes in the source; none do if that is 0.
    """
    stretches: dict[int, list[tuple[bool, _Stretch]]] = defaultdict(list)
    room: dict[int, int] = defaultdict(int)  # in the last stretch of each file, in bytes
    for number in numbers:
        segment = plan.segments[number]
        file, end, low = segment.file, segment.num_bytes, 0
        most = shared_bytes and _piece_of_rows(segment, shared_bytes)
        while low < end:
            high = min(end, low + (most or length))
            if most or room[file] <= 0:
                stretches[file].append((bool(most), []))
                room[file] = 0 if most else length
            stretches[file][-1][1].append(Part(number, low, high))
            room[file] -= high - low
            low = high
    return stretches


def _piece_of_rows(segment: Segment, num_bytes: int) -> int:
    """How many bytes a segment has of rows of ``num_bytes`` bytes in all that it shares; 0 if it shares none."""
    copies = segment.copies[segment.shares_rows]
    if not len(copies):
        return 0
    piece_bytes = int((num_bytes * copies["row_bytes"] // copies["source_stride"]).min())
    return max(PAGE_BYTES, piece_bytes // PAGE_BYTES * PAGE_BYTES)


def _in_turn(files: Sequence[Sequence[tuple[bool, _Stretch]]]) -> Iterator[_Stretch]:
    """Yield the stretches of some files in step; those of the same shared rows together, for one thread."""
    for step in zip_longest(*files, fillvalue=(False, [])):
        together = [part for is_shared, stretch in step if is_shared for part in stretch]
        if together:
            yield together
        yield from (stretch for is_shared, stretch in step if stretch and not is_shared)
