"""Execute a ``BytePlan`` with threads, in bounded memory, and report progress.

Segments are copied band by band. Reads, writes and checksums release the interpreter lock, so threads are enough.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from itertools import chain
from typing import Final, NamedTuple, Protocol, TypeVar

from zlib_ng import zlib_ng

from dist_ckpt_mistral.errors import ConfigError
from dist_ckpt_mistral.gather.bands import PAGE_BYTES, BandReader, Stopped, band_bytes_within
from dist_ckpt_mistral.gather.casts import NOTHING, Lost, cast
from dist_ckpt_mistral.gather.plan import BytePlan, Part, Segment
from dist_ckpt_mistral.gather.progress import NO_PROGRESS, Progress
from dist_ckpt_mistral.storage.local import SourceFiles

_MAX_WORKERS: Final = 4096
#: What a thread copies before it may turn to another file. Longer segments are split, so that all finish together.
_STRETCH_BYTES: Final = 64 << 20
#: Threads that write one file at a time. The kernel lets one at a time write into a file: meanwhile the other reads and
#: takes checksums, which is about half of the work. A third would only spin.
_WRITERS_OF_A_FILE: Final = 2
#: Bytes written before writeback to the disk is started.
_WRITEBACK_BYTES: Final = 16 << 20

T = TypeVar("T")


class Target(Protocol):
    """Receives the bytes of segments: a file (``TargetFile``), or memory."""

    def write(self, position: int, data: memoryview) -> None:
        """Write all of ``data`` at ``position``. May be called from any thread."""

    def start_writeback(self, position: int, num_bytes: int) -> None:
        """Start writing bytes back to durable storage, without waiting."""


@dataclass(frozen=True, slots=True)
class MemoryTarget:
    """The bytes of a contiguous array in memory, as a target."""

    view: memoryview

    def write(self, position: int, data: memoryview) -> None:
        """Write all of ``data`` at ``position``."""
        self.view[position : position + len(data)] = data

    def start_writeback(self, position: int, num_bytes: int) -> None:
        """Do nothing: the bytes stay in memory."""


class Bands(Protocol):
    """Gives the bytes of segments: out of files (``BandReader``), or out of memory."""

    def bands(self, segment: Segment, low: int, high: int, *, position: int) -> Iterator[memoryview]:
        """Yield bytes ``[low, high)`` of a segment as ``BandReader.bands`` does."""


class Copied(NamedTuple):
    """Result of copying a part: the CRC-32 of its stored bytes, and the numbers of values lost."""

    crc32: int
    lost: Lost


class CopiedParts(Protocol):
    """Record of the parts already copied, by this run or an earlier one (``journal.Journal``).

    With ``must_prove``, sources may have changed since the earlier run, so its checksums are compared with theirs.
    """

    must_prove: bool

    def recall(self, part: Part) -> Copied | None:
        """Return the record of a part whose stored bytes are intact, otherwise None."""

    def note(self, part: Part, copied: Copied) -> None:
        """Record that a part was written. May be called from any thread."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How much of the machine a conversion or comparison may use.

    Args:
        workers: Number of copying threads, at most 4096; 0 means one per core, at most 8.
        memory_bytes: Total size of copy buffers in bytes.
        progress: Receives the phases of the work and the bytes that are done; by default nothing does.

    Raises:
        ConfigError: ``workers`` is negative or larger than 4096.

    Example:
        ``dcm.to_hf("ckpt", "out", effort=Effort(workers=4, memory_bytes=64 << 20))``
    """

    workers: int = 0
    memory_bytes: int = 32 << 20
    progress: Progress = NO_PROGRESS

    def __post_init__(self) -> None:
        """Check the number of workers, before anything is started."""
        if not 0 <= self.workers <= _MAX_WORKERS:
            raise ConfigError(f"workers: expected 0 (one per core) to {_MAX_WORKERS} threads, got {self.workers}")

    @property
    def threads(self) -> int:
        """Number of threads: ``workers``, or one per core, at most 8, which is enough to saturate a local disk."""
        return self.workers or min(8, len(os.sched_getaffinity(0)))

    def band_bytes(self, readers: int = 1) -> int:
        """Size of a band in bytes if each thread uses this many ``BandReader``: whole pages."""
        return band_bytes_within(self.memory_bytes // self.threads) // readers // PAGE_BYTES * PAGE_BYTES


DEFAULT_EFFORT: Final = Effort()


def execute(
    plan: BytePlan,
    targets: Mapping[int, Target],
    *,
    effort: Effort,
    numbers: Sequence[int],
    checksums: bool,
    record: CopiedParts | None = None,
) -> dict[int, Copied]:
    """Copy the segments ``numbers`` of a plan into ``targets`` (number of the target file -> target).

    Parts that ``record`` recalls are not copied again; with ``record.must_prove``, only if the sources still give the
    same checksum. The first error stops all threads. Returns, by number of the segment, the CRC-32 of its stored bytes
    (undefined without ``checksums``) and its lost values.
    """
    turns = _Turns(plan, _stretches(plan, numbers))
    with SourceFiles(plan.source_files, plan.derived_files) as sources:
        reader = BandReader(sources, effort.band_bytes())

        def work(part: Part) -> Copied:
            segment = plan.segments[part.number]
            copied = record.recall(part) if record else None
            if record and record.must_prove and copied is not None:
                silent = replace(effort, progress=NO_PROGRESS)
                proof = copy_part(segment, part, None, reader, silent, checksum=True)
                copied = copied if proof == copied else None
            if copied is not None:
                effort.progress.advance(segment.stored(part.low, part.high)[1])
                return copied
            copied = copy_part(
                segment, part, targets[segment.file], reader, effort, checksum=checksums or record is not None
            )
            if record:
                record.note(part, copied)
            return copied

        def take_turn(_: int) -> list[tuple[Part, Copied]]:
            with turns.next() as stretch:
                return [(part, work(part)) for part in stretch]

        done = run_all(take_turn, range(turns.count), workers=turns.workers(effort.threads), stop=reader.stop)
    result = dict.fromkeys(numbers, Copied(0, NOTHING))
    for part, copied in sorted(chain.from_iterable(done)):
        before, (_, num_bytes) = result[part.number], plan.segments[part.number].stored(part.low, part.high)
        crc32 = zlib_ng.crc32_combine(before.crc32, copied.crc32, num_bytes)
        result[part.number] = Copied(crc32, before.lost.plus(copied.lost))
    return result


def copy_part(
    segment: Segment, part: Part, target: Target | None, reader: Bands, effort: Effort, *, checksum: bool
) -> Copied:
    """Copy a part, or only read it if ``target`` is None. The CRC-32 of the result is 0 without ``checksum``."""
    unflushed, _ = segment.stored(part.low, part.high)
    position, crc32, lost = unflushed, 0, NOTHING
    for band in reader.bands(segment, part.low, part.high, position=position):
        stored, lost_in_band = cast(band, segment.source_dtype, segment.dtype)
        lost = lost.plus(lost_in_band)
        if target is not None:
            target.write(position, stored)
        crc32 = zlib_ng.crc32(stored, crc32) if checksum else 0
        position += len(stored)
        if target is not None and position - unflushed >= _WRITEBACK_BYTES:
            target.start_writeback(unflushed, position - unflushed)
            unflushed = position
        effort.progress.advance(len(stored))
    return Copied(crc32, lost)


#: Consecutive parts in one file, which a thread copies one after the other.
_Stretch = list[Part]


def _stretches(plan: BytePlan, numbers: Sequence[int]) -> dict[int, deque[_Stretch]]:
    """Split the segments ``numbers`` of each file into stretches of about ``_STRETCH_BYTES``, in their order."""
    stretches: dict[int, deque[_Stretch]] = defaultdict(deque)
    room: dict[int, int] = defaultdict(int)  # in the last stretch of each file, in bytes
    for number in numbers:
        file, end, low = plan.segments[number].file, plan.segments[number].num_bytes, 0
        while low < end:
            if room[file] <= 0:
                stretches[file].append([])
                room[file] = _STRETCH_BYTES
            high = min(end, low + _STRETCH_BYTES)
            stretches[file][-1].append(Part(number, low, high))
            room[file] -= high - low
            low = high
    return stretches


class _Turns:
    """Gives each thread a stretch of the file that the fewest others write at that time."""

    def __init__(self, plan: BytePlan, waiting: dict[int, deque[_Stretch]]) -> None:
        """Begin with the stretches of all files ``waiting``."""
        self.count = sum(map(len, waiting.values()))
        self._waiting = waiting
        self._num_writers = dict.fromkeys(waiting, 0)
        self._lock = threading.Lock()
        numbers = {part.number for stretches in waiting.values() for stretch in stretches for part in stretch}
        segments = (plan.segments[number] for number in numbers)
        is_copy = not plan.derived_files and all(segment.source_dtype == segment.dtype for segment in segments)
        self._most_workers = max(1, _WRITERS_OF_A_FILE * len(waiting)) if is_copy else self.count

    def workers(self, threads: int) -> int:
        """How many of ``threads`` have something to do at the same time. Conversions of values need no lock."""
        return min(threads, self._most_workers)

    @contextlib.contextmanager
    def next(self) -> Iterator[_Stretch]:
        """Take the next stretch of the file with the fewest writers, of those the one with the most left."""
        with self._lock:
            file = min(self._waiting, key=lambda file: (self._num_writers[file], -len(self._waiting[file])))
            stretch = self._waiting[file].popleft()
            self._num_writers[file] += 1
            if not self._waiting[file]:
                del self._waiting[file]
        try:
            yield stretch
        finally:
            with self._lock:
                self._num_writers[file] -= 1


def run_all(
    work: Callable[[int], T], numbers: Sequence[int], *, workers: int, stop: Callable[[], None] = lambda: None
) -> list[T]:
    """Call ``work`` on every number in ``workers`` threads and return the results in order.

    After the first exception, pending calls are cancelled and ``stop`` is called, which may make running calls raise
    ``Stopped``. The exception is raised when all threads have ended.
    """
    if workers <= 1:
        return [work(number) for number in numbers]
    with ThreadPoolExecutor(max_workers=workers, thread_name_prefix="gather") as pool:
        futures = [pool.submit(work, number) for number in numbers]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:  # also if the wait itself is interrupted
            stop()
            pool.shutdown(wait=True, cancel_futures=True)
        failed = [error for future in futures if not future.cancelled() and (error := future.exception()) is not None]
        if failed:
            raise next((error for error in failed if not isinstance(error, Stopped)), failed[0])
        return [future.result() for future in futures]
