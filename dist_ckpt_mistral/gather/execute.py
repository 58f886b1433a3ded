"""Runs a ``BytePlan``: bounded memory, threads, progress. Knows positions and bytes, and no format.

Every segment is filled band by band. Reading, writing and checksums release the interpreter lock, so threads suffice.
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

_MOST_WORKERS: Final = 4096
_LEAST_BAND_BYTES: Final = 64 << 10
#: What one thread takes at a time of a segment that needs no checksum, so that threads end together.
_PART_BYTES: Final = 64 << 20
#: How much is written before a target may begin to bring it onto the disk.
_WRITEBACK_BYTES: Final = 16 << 20

Progress = Callable[[int], None]
T = TypeVar("T")


class Target(Protocol):
    """Where segments are written: a file (``TargetFile``), or memory."""

    def write(self, position: int, data: memoryview) -> None:
        """Write all of ``data`` at ``position``, from any thread."""

    def start_writeback(self, position: int, num_bytes: int) -> None:
        """Have bytes that were written begin their way to where they last, without waiting."""


class Copied(NamedTuple):
    """What is to be known of a part that was copied: the CRC-32 of its stored bytes, and the values that were lost."""

    crc32: int
    lost: Lost


class CopiedParts(Protocol):
    """Which parts were copied, by an earlier run too (``journal.Journal``).

    ``must_prove`` says that sources may have changed since: what is recalled must still be what they hold.
    """

    must_prove: bool

    def recall(self, part: Part) -> Copied | None:
        """What was noted of the part if its stored bytes are there; else None."""

    def note(self, part: Part, copied: Copied) -> None:
        """Note, from any thread, that the part was written."""


class _Nowhere:
    """A target for what is read only for its checksum."""

    def write(self, position: int, data: memoryview) -> None:
        """Drop it."""

    def start_writeback(self, position: int, num_bytes: int) -> None:
        """Nothing lasts."""


def no_progress(num_bytes: int) -> None:
    """Progress that nobody watches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How much of a machine to use.

    Args:
        workers: Threads that copy; 0 means one a core, at most 8.
        memory_bytes: Size of the buffers of all threads together.
        progress: Called with the number of bytes that were just copied or compared, from any thread.

    Raises:
        ConfigError: There are more ``workers`` than any machine has cores.
    """

    workers: int = 0
    memory_bytes: int = 32 << 20
    progress: Progress = no_progress

    def __post_init__(self) -> None:
        """Refuse what the operating system would, when all is begun."""
        if not 0 <= self.workers <= _MOST_WORKERS:
            raise ConfigError(f"workers: expected 0 (one a core) to {_MOST_WORKERS} threads, got {self.workers}")

    @property
    def threads(self) -> int:
        """Threads that saturate a local disk: as many as there are cores, at most 8, unless ``workers`` says."""
        return self.workers or min(8, len(os.sched_getaffinity(0)))

    def band_bytes(self, readers: int = 1) -> int:
        """Bytes that each thread gathers at a time with each of ``readers``: whole pages."""
        share = self.memory_bytes // (self.threads * BUFFERS * readers) // PAGE_BYTES * PAGE_BYTES
        return max(_LEAST_BAND_BYTES // readers, min(BAND_BYTES, share))


#: What functions use that are given no effort.
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
    """Write the segments ``numbers`` of ``plan`` into ``targets``, which are by number of the plan's target file.

    What ``record`` recalls is not copied again; where that must be proven, the sources must still give the same
    checksum. Returns, by the numbers of segments, the CRC-32 of each one's stored bytes if ``checksums`` (else it means
    nothing), and the values that it lost. The first failure ends the run.
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
                found = _copy(segment, part, _Nowhere(), reader, silent, checksum=True)
                copied = copied if found == copied else None
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
    segment: Segment, part: Part, target: Target, reader: BandReader, effort: Effort, *, checksum: bool
) -> Copied:
    """Copy a part. The CRC-32 is 0 unless wanted."""
    begun, _ = segment.stored(part.low, part.high)
    position, crc32, lost = begun, 0, NOTHING
    for band in reader.bands(segment, part.low, part.high, position=position):
        stored, lost_here = cast(band, segment.source_dtype, segment.dtype)
        lost = lost.plus(lost_here)
        target.write(position, stored)
        crc32 = zlib_ng.crc32(stored, crc32) if checksum else 0
        position += len(stored)
        if position - begun >= _WRITEBACK_BYTES:
            target.start_writeback(begun, position - begun)
            begun = position
        effort.progress(len(stored))
    return Copied(crc32, lost)


def _parts(plan: BytePlan, numbers: Sequence[int], *, threads: int, whole: bool) -> list[Part]:
    """What one thread takes at a time, in an order in which threads do not collide.

    Kernels let one thread at a time write into a file: as many files as there are threads take turns.
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
    """``work`` on every number with ``workers`` threads, results in order. The first exception cancels the rest.

    ``stop`` is called when nothing is to begin any more: it may end what goes on, with ``Stopped``.
    """
    if workers <= 1:
        return [work(number) for number in numbers]
    with ThreadPoolExecutor(max_workers=workers, thread_name_prefix="gather") as pool:
        futures = [pool.submit(work, number) for number in numbers]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:  # also when the wait itself is interrupted
            stop()
            pool.shutdown(wait=True, cancel_futures=True)
        failed = [error for future in futures if not future.cancelled() and (error := future.exception()) is not None]
        if failed:
            raise next((error for error in failed if not isinstance(error, Stopped)), failed[0])
        return [future.result() for future in futures]
