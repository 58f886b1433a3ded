"""Execute a ``BytePlan`` with threads, in bounded memory, and report progress.

Segments are copied band by band. Reads, writes and checksums release the interpreter lock, so threads are enough.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from itertools import chain, zip_longest
from typing import Final, NamedTuple, Protocol, TypeVar

from zlib_ng import zlib_ng

from dist_ckpt_mistral.errors import ConfigError
from dist_ckpt_mistral.gather.bands import BAND_BYTES, BUFFERS, PAGE_BYTES, BandReader, Stopped
from dist_ckpt_mistral.gather.casts import NOTHING, Lost, cast
from dist_ckpt_mistral.gather.plan import BytePlan, Part, Segment
from dist_ckpt_mistral.storage.local import SourceFiles

_MAX_WORKERS: Final = 4096
_MIN_BAND_BYTES: Final = 64 << 10
#: A segment without a checksum is split into parts of this size, so that all threads finish at about the same time.
_PART_BYTES: Final = 64 << 20
#: Bytes written before writeback to the disk is started.
_WRITEBACK_BYTES: Final = 16 << 20

Progress = Callable[[int], None]
T = TypeVar("T")


class Target(Protocol):
    """Receives the bytes of segments: a file (``TargetFile``), or memory."""

    def write(self, position: int, data: memoryview) -> None:
        """Write all of ``data`` at ``position``. May be called from any thread."""

    def start_writeback(self, position: int, num_bytes: int) -> None:
        """Start writing bytes back to durable storage, without waiting."""


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


def no_progress(num_bytes: int) -> None:
    """Ignore progress."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How much of the machine a conversion or comparison may use.

    Args:
        workers: Number of copying threads, at most 4096; 0 means one per core, at most 8.
        memory_bytes: Total size of copy buffers in bytes.
        progress: Called with the number of bytes just copied or compared, from any thread.

    Raises:
        ConfigError: ``workers`` is negative or larger than 4096.

    Example:
        ``dcm.to_hf("ckpt", "out", effort=Effort(workers=4, memory_bytes=64 << 20))``
    """

    workers: int = 0
    memory_bytes: int = 32 << 20
    progress: Progress = no_progress

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
        share = self.memory_bytes // (self.threads * BUFFERS * readers) // PAGE_BYTES * PAGE_BYTES
        return max(_MIN_BAND_BYTES // readers, min(BAND_BYTES, share))


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
    parts = _parts(plan, numbers, threads=effort.threads, whole=checksums)
    with SourceFiles(plan.source_files, plan.derived_files) as sources:
        reader = BandReader(sources, effort.band_bytes())

        def work(number: int) -> Copied:
            part = parts[number]
            segment = plan.segments[part.number]
            copied = record.recall(part) if record else None
            if record and record.must_prove and copied is not None:
                silent = replace(effort, progress=no_progress)
                proof = _copy(segment, part, None, reader, silent, checksum=True)
                copied = copied if proof == copied else None
            if copied is not None:
                effort.progress(segment.stored(part.low, part.high)[1])
                return copied
            copied = _copy(
                segment, part, targets[segment.file], reader, effort, checksum=checksums or record is not None
            )
            if record:
                record.note(part, copied)
            return copied

        done = run_all(work, range(len(parts)), workers=effort.threads, stop=reader.stop)
    result = dict.fromkeys(numbers, Copied(0, NOTHING))
    for part, copied in zip(parts, done, strict=True):
        result[part.number] = Copied(copied.crc32, result[part.number].lost.plus(copied.lost))
    return result


def _copy(
    segment: Segment, part: Part, target: Target | None, reader: BandReader, effort: Effort, *, checksum: bool
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
        effort.progress(len(stored))
    return Copied(crc32, lost)


def _parts(plan: BytePlan, numbers: Sequence[int], *, threads: int, whole: bool) -> list[Part]:
    """Split segments into parts, unless they must stay ``whole``, in an order that keeps threads in different files.

    The kernel lets only one thread at a time write into a file, so the parts of as many files as threads alternate.
    """
    by_file: dict[int, list[Part]] = defaultdict(list)
    for number in numbers:
        num_bytes = plan.segments[number].num_bytes
        step = max(1, num_bytes if whole else _PART_BYTES)
        spans = [Part(number, low, min(low + step, num_bytes)) for low in range(0, num_bytes, step)]
        by_file[plan.segments[number].file].extend(spans)
    queues = list(by_file.values())
    turns = (zip_longest(*queues[first : first + threads]) for first in range(0, len(queues), threads))
    return [part for turn in chain.from_iterable(turns) for part in turn if part is not None]


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
