"""Execute a ``BytePlan`` with threads, in bounded memory, and report progress.

Segments are copied band by band. Reads, writes and checksums release the interpreter lock, so threads are enough.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from itertools import chain
from typing import Final, NamedTuple, Protocol, TypeVar

from zlib_ng import zlib_ng

from dist_ckpt_mistral.arguments import require_types, require_whole
from dist_ckpt_mistral.gather.bands import MOST_SCRATCH_BYTES, PAGE_BYTES, BandReader, Stopped, band_bytes_within
from dist_ckpt_mistral.gather.casts import NOTHING, Lost, cast
from dist_ckpt_mistral.gather.plan import BytePlan, Part, Segment
from dist_ckpt_mistral.gather.progress import DEFAULT_PROGRESS, NO_PROGRESS, Progress
from dist_ckpt_mistral.gather.turns import Turns
from dist_ckpt_mistral.messages import concise_repr
from dist_ckpt_mistral.storage.local import SourceFiles
from dist_ckpt_mistral.storage.store import wait_for

_MAX_WORKERS: Final = 4096
_LOCAL_MEMORY_BYTES: Final = 32 << 20
_REMOTE_MEMORY_BYTES: Final = 256 << 20
#: Threads that read objects in a store: enough that one has something to do while others wait for an answer.
_REMOTE_THREADS: Final = 8
#: Of the memory for what a store sends, one part in so many is for what files share.
_SHARE_OF_SHARED: Final = 4
#: Rows of a local file that a thread reads for several files at once: they stay in the last level of the cache.
_SHARED_ROWS_BYTES: Final = 4 << 20
#: After an interrupt, threads that wait for a store's answer are waited for no longer: a user waits for the prompt.
INTERRUPTED_WAIT_S: Final = 1.0
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
        memory_bytes: Total size of copy buffers in bytes; 0 means 32 MiB, or 256 MiB if a store (a URL) is read or
            written, where parts of 8 MiB are on their way.
        progress: Receives the phases of the work and the bytes that are done: a ``ProgressBar`` shows them. By
            default a bar is shown in notebooks alone; ``Progress()`` shows none there either.

    Raises:
        ConfigError: ``workers`` is no whole number from 0 to 4096, or ``memory_bytes`` none of at least 0, or
            ``progress`` no ``Progress``.

    Example:
        ``dcm.to_hf("ckpt", "out", effort=Effort(workers=4, memory_bytes=64 << 20))``
    """

    workers: int = 0
    memory_bytes: int = 0
    progress: Progress = DEFAULT_PROGRESS

    __repr__ = concise_repr

    def __post_init__(self) -> None:
        """Check what was given, before anything is started."""
        require_types(Effort, progress=self.progress)
        require_whole("workers", self.workers, least=0, most=_MAX_WORKERS, meaning="threads; 0 is one per core")
        require_whole("memory_bytes", self.memory_bytes, least=0, meaning="bytes; 0 is the default")

    @property
    def threads(self) -> int:
        """Number of threads: ``workers``, or one per core, at most 8, which is enough to saturate a local disk."""
        return self.workers or min(8, len(os.sched_getaffinity(0)))

    def memory_for(self, *, is_remote: bool) -> int:
        """Total size of the buffers in bytes."""
        return self.memory_bytes or (_REMOTE_MEMORY_BYTES if is_remote else _LOCAL_MEMORY_BYTES)

    def shared_bytes(self, *, is_remote: bool) -> int:
        """What rows that files share may take: of objects in all, of local files in each thread."""
        if is_remote:
            return self.memory_for(is_remote=True) // _SHARE_OF_SHARED
        each = self.memory_for(is_remote=False) // self.threads
        return max(0, min(_SHARED_ROWS_BYTES, (each - MOST_SCRATCH_BYTES) // PAGE_BYTES * PAGE_BYTES))

    def band_bytes(self, readers: int = 1) -> int:
        """Size of a band of local files in bytes if each thread uses this many ``BandReader``: whole pages."""
        each = self.memory_for(is_remote=False) // self.threads
        return band_bytes_within(each) // readers // PAGE_BYTES * PAGE_BYTES


DEFAULT_EFFORT: Final = Effort()


def threads_for(effort: Effort, *files: SourceFiles) -> int:
    """Number of threads that read ``files``: for objects in a store at least 8, because they wait for answers."""
    is_remote = any(each.is_remote for each in files)
    return max(effort.threads, _REMOTE_THREADS) if is_remote and not effort.workers else effort.threads


def band_readers(effort: Effort, *files: SourceFiles) -> list[BandReader]:
    """A reader of each of ``files`` for every thread. Their bands are equally long and fit in the memory."""
    band_bytes = effort.band_bytes(len(files))
    if any(each.is_remote for each in files):
        each = effort.memory_for(is_remote=True) // threads_for(effort, *files) // len(files)
        band_bytes = band_bytes_within(each, is_remote=True)
    return [BandReader(each, band_bytes) for each in files]


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
    with SourceFiles(plan.source_files, plan.derived_files) as sources:
        shared_bytes = effort.shared_bytes(is_remote=sources.is_remote)
        sources.share(shared_bytes)
        turns = Turns(plan, numbers, shared_bytes, is_remote=sources.is_remote)
        (reader,) = band_readers(effort, sources)

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

        done = run_all(
            take_turn,
            range(turns.count),
            workers=turns.workers(threads_for(effort, sources)),
            stop=reader.stop,
            patience_s=INTERRUPTED_WAIT_S if sources.is_remote else None,
        )
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


def run_all(
    work: Callable[[int], T],
    numbers: Sequence[int],
    *,
    workers: int,
    stop: Callable[[], None] = lambda: None,
    patience_s: float | None = None,
) -> list[T]:
    """Call ``work`` on every number in ``workers`` threads and return the results in order.

    After the first exception, pending calls are cancelled and ``stop`` is called, which may make running calls raise
    ``Stopped``. The exception is raised when all threads have ended, that of an interrupt after ``patience_s`` seconds
    at the latest.
    """
    if workers <= 1 and patience_s is None:
        return [work(number) for number in numbers]
    pool = ThreadPoolExecutor(max_workers=max(1, workers), thread_name_prefix="gather")
    futures: list[Future[T]] = []
    try:
        futures.extend(pool.submit(work, number) for number in numbers)
        wait_for(futures, FIRST_EXCEPTION)
    except BaseException:  # an interrupt
        stop()
        pool.shutdown(wait=patience_s is None, cancel_futures=True)
        wait([future for future in futures if not future.cancelled()], timeout=patience_s)
        raise
    stop()
    pool.shutdown(wait=True, cancel_futures=True)
    failed = [error for future in futures if not future.cancelled() and (error := future.exception()) is not None]
    if failed:
        raise next((error for error in failed if not isinstance(error, Stopped)), failed[0])
    return [future.result() for future in futures]
