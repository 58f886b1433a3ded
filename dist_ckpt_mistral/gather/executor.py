"""Runs a ``BytePlan``: bounded memory, threads, progress. Knows positions and bytes, and no format.

Every segment is filled band by band: a band is gathered into a small buffer that stays in the processor's cache, then
written, checksummed or compared. Reading, writing and checksums release the interpreter lock, so threads suffice.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Final, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from zlib_ng import zlib_ng

from dist_ckpt_mistral import dtypes
from dist_ckpt_mistral.gather.plan import BytePlan, CopyArray, Part, Segment
from dist_ckpt_mistral.storage import SourceFiles

#: Bytes gathered at a time: whole elements of any dtype. Bands that spill the processor's cache are up to twice slower.
BAND_BYTES: Final = 512 << 10
_LEAST_BAND_BYTES: Final = 64 << 10
#: Each thread has two buffers of a band's size: the band itself, and rows on their way into it.
_BUFFERS: Final = 2
#: Kernels copy into page-aligned memory up to three times faster (measured, AMD): buffers begin at pages. Writes begin
#: at multiples of their length, where the page cache holds each in one piece: another tenth less (Linux 6.18, ext4).
_PAGE_BYTES: Final = 4096
#: What one thread takes at a time of a segment that needs no checksum, so that threads end together.
_PART_BYTES: Final = 64 << 20
#: How much is written before the disk is told to begin with it, if the output is to be durable.
_WRITEBACK_BYTES: Final = 16 << 20
#: A gap between two rows that is cheaper to jump over than to read.
_LONG_GAP_BYTES: Final = 64 << 10

ByteArray = npt.NDArray[np.uint8]
Progress = Callable[[int], None]
T = TypeVar("T")


class Target(Protocol):
    """Where segments are written: a file (``storage.TargetFile``), or memory."""

    def write(self, position: int, data: memoryview) -> None:
        """Write all of ``data`` at ``position``, from any thread."""

    def start_writeback(self, position: int, num_bytes: int) -> None:
        """Have bytes that were written begin their way to where they last, without waiting."""


class Record(Protocol):
    """Which parts were copied, by an earlier run too (``journal.Journal``)."""

    def recall(self, part: Part) -> int | None:
        """The CRC-32 of the part's stored bytes if they are there; else None."""

    def note(self, part: Part, crc32: int) -> None:
        """Note, from any thread, that the part was written."""


class Stopped(Exception):  # noqa: N818  (no error: another one is why)
    """A thread ends because another one failed, or because the run was interrupted."""


def no_progress(num_bytes: int) -> None:
    """Progress that nobody watches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How much of a machine to use. ``memory_bytes`` bounds the buffers of all threads together.

    With ``durable`` an output appears only when its bytes are on the disk; without, when the operating system has them.
    """

    workers: int = 0
    memory_bytes: int = 32 << 20
    durable: bool = True
    progress: Progress = no_progress

    @property
    def threads(self) -> int:
        """Threads that saturate a local disk: as many as there are cores, at most 8, unless ``workers`` says."""
        return self.workers or min(8, len(os.sched_getaffinity(0)))

    def band_bytes(self, readers: int = 1) -> int:
        """Bytes that each thread gathers at a time with each of ``readers``: whole pages."""
        share = self.memory_bytes // (self.threads * _BUFFERS * readers) // _PAGE_BYTES * _PAGE_BYTES
        return max(_LEAST_BAND_BYTES // readers, min(BAND_BYTES, share))


def execute(
    plan: BytePlan,
    targets: Mapping[int, Target],
    *,
    effort: Effort,
    numbers: Sequence[int],
    checksums: bool,
    record: Record | None = None,
) -> dict[int, int]:
    """Write the segments ``numbers`` of ``plan`` into ``targets``, which are by number of the plan's target file.

    What ``record`` recalls is not copied again. Returns the CRC-32 of every segment's stored bytes, by number, if
    ``checksums``. The first failure ends the run.
    """
    parts = _parts(plan, numbers, threads=effort.threads, whole=checksums)
    with SourceFiles(plan.source_files, plan.derived_files) as sources:
        reader = BandReader(sources, effort.band_bytes())

        def work(number: int) -> int:
            part = parts[number]
            segment = plan.segments[part.number]
            crc32 = record.recall(part) if record else None
            if crc32 is not None:
                effort.progress(segment.stored(part.low, part.high)[1])
                return crc32
            crc32 = _copy(
                segment, part, targets[segment.file], reader, effort, checksum=checksums or record is not None
            )
            if record:
                record.note(part, crc32)
            return crc32

        done = run_all(work, range(len(parts)), workers=effort.threads, stop=reader.stop)
    found = {part.number: crc32 for part, crc32 in zip(parts, done, strict=True)}
    return {number: found.get(number, 0) for number in numbers} if checksums else {}


def _copy(segment: Segment, part: Part, target: Target, reader: BandReader, effort: Effort, *, checksum: bool) -> int:
    """Copy a part; the CRC-32 of its stored bytes, if wanted."""
    begun, _ = segment.stored(part.low, part.high)
    position, crc32 = begun, 0
    for band in reader.bands(segment, part.low, part.high, position=position):
        stored = _convert(band, segment)
        target.write(position, stored)
        crc32 = zlib_ng.crc32(stored, crc32) if checksum else 0
        position += len(stored)
        if effort.durable and position - begun >= _WRITEBACK_BYTES:
            target.start_writeback(begun, position - begun)
            begun = position
        effort.progress(len(stored))
    return crc32


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


class BandReader:
    """Gathers segments band by band from open files, with buffers of its own for every thread."""

    def __init__(self, sources: SourceFiles, band_bytes: int = BAND_BYTES) -> None:
        """Read from ``sources``, at most ``band_bytes`` at a time."""
        self._sources = sources
        self._band_bytes = band_bytes
        self._buffers = threading.local()
        self._stopped = False

    def stop(self) -> None:
        """Have all threads end with their bands: ``Stopped`` is raised in them."""
        self._stopped = True

    def bands(
        self, segment: Segment, low: int = 0, high: int | None = None, *, position: int = 0
    ) -> Iterator[memoryview]:
        """Yield bytes ``[low, high)`` of a segment, in ``source_dtype``; a band is valid until the thread's next.

        The first will be stored at ``position``: it ends where all others begin at multiples of their stored length.
        """
        high = segment.num_bytes if high is None else high
        itemsize, stored_itemsize = dtypes.itemsize_bytes(segment.source_dtype), dtypes.itemsize_bytes(segment.dtype)
        ahead_elems = -position % (self._band_bytes * stored_itemsize // itemsize) // stored_itemsize
        ahead = min(ahead_elems * itemsize, high - low)
        if ahead:
            yield from self._bands(segment, low, low + ahead)
        yield from self._bands(segment, low + ahead, high)

    def _bands(self, segment: Segment, low: int, high: int) -> Iterator[memoryview]:
        copies = _overlapping(segment.copies, low, high)
        for start in range(low, high, self._band_bytes):
            if self._stopped:
                raise Stopped
            band, scratch = self._own_buffers()
            band = band[: min(self._band_bytes, high - start)]
            for first, last, copy in copies:
                if first < start + len(band) and last > start:
                    _gather(copy, start, band, scratch, self._sources)
            yield band.data

    def _own_buffers(self) -> tuple[ByteArray, ByteArray]:
        if not hasattr(self._buffers, "pair"):
            self._buffers.pair = tuple(aligned_buffer(self._band_bytes) for _ in range(_BUFFERS))
        pair: tuple[ByteArray, ByteArray] = self._buffers.pair
        return pair


def aligned_buffer(num_bytes: int) -> ByteArray:
    """A buffer that begins at a page."""
    return np.frombuffer(mmap.mmap(-1, num_bytes), dtype=np.uint8)


def _overlapping(copies: CopyArray, low: int, high: int) -> list[tuple[int, int, tuple[int, ...]]]:
    """The copies that write into ``[low, high)``: (first byte, end, plain numbers in the order of ``COPY``)."""
    firsts = copies["target_offset"]
    lasts = firsts + (copies["rows"] - 1) * copies["target_stride"] + copies["row_bytes"]
    hit = (firsts < high) & (lasts > low)
    return list(zip(firsts[hit].tolist(), lasts[hit].tolist(), copies[hit].tolist(), strict=True))


def _gather(copy: tuple[int, ...], low: int, band: ByteArray, scratch: ByteArray, sources: SourceFiles) -> None:
    """Bring what ``copy`` has for the band that begins at target offset ``low``."""
    file, position, source_stride, offset, target_stride, rows, row_bytes = copy
    start = offset - low  # of row 0, in the band
    first = max(0, (-start - row_bytes) // target_stride + 1)  # the rows [first, last) touch the band
    last = min(rows, -((start - len(band)) // target_stride))
    if first >= last:  # the band lies between two rows
        return
    whole_first = first if start + first * target_stride >= 0 else first + 1
    whole_last = last if start + (last - 1) * target_stride + row_bytes <= len(band) else last - 1
    for row in {first, last - 1} - set(range(whole_first, whole_last)):  # cut by an edge of the band
        at = start + row * target_stride
        skip = max(0, -at)
        piece = band[at + skip : min(at + row_bytes, len(band))]
        sources.read_into(file, position + row * source_stride + skip, [piece.data])
    if whole_first < whole_last:
        source_at, target_at = position + whole_first * source_stride, start + whole_first * target_stride
        count = whole_last - whole_first
        target = np.lib.stride_tricks.as_strided(band[target_at:], (count, row_bytes), (target_stride, 1))
        _gather_rows(file, source_at, source_stride, target, scratch, sources)


def _gather_rows(
    file: int, position: int, source_stride: int, target: ByteArray, scratch: ByteArray, sources: SourceFiles
) -> None:
    """Fill ``target`` ``[rows, row_bytes]`` from rows that lie ``source_stride`` bytes apart."""
    rows, row_bytes = target.shape
    if source_stride == row_bytes and target.flags.c_contiguous:
        sources.read_into(file, position, [target.reshape(-1).data])
        return
    if source_stride - row_bytes > _LONG_GAP_BYTES or source_stride > len(scratch):
        for row in range(rows):
            sources.read_into(file, position + row * source_stride, [target[row].data])
        return
    step = len(scratch) // source_stride
    for first in range(0, rows, step):
        count = min(step, rows - first)
        span = scratch[: (count - 1) * source_stride + row_bytes]
        sources.read_into(file, position + first * source_stride, [span.data])
        source = np.lib.stride_tricks.as_strided(span, (count, row_bytes), (source_stride, 1))
        np.copyto(target[first : first + count], source)


def _convert(band: memoryview, segment: Segment) -> memoryview:
    """The band as it is stored: unchanged, or converted (rounding to nearest even, as torch does)."""
    if segment.source_dtype == segment.dtype:
        return band
    import ml_dtypes  # noqa: F401, PLC0415  (registers bfloat16; only conversions need it)

    values = np.frombuffer(band, dtype=np.dtype(segment.source_dtype))
    with np.errstate(over="ignore", invalid="ignore"):  # as in torch, too large becomes infinite and NaN stays NaN
        return values.astype(np.dtype(segment.dtype)).view(np.uint8).data
