"""Runs a ``BytePlan``: bounded memory, threads, progress. Knows positions and bytes, and no format.

Every segment is filled band by band: a band is gathered into a small buffer that stays in the processor's cache, then
written, checksummed or compared. Reading, writing and checksums release the interpreter lock, so threads suffice.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Final, TypeVar

import numpy as np
import numpy.typing as npt

from dist_ckpt_mistral.gather.plan import BytePlan, CopyArray, Segment
from dist_ckpt_mistral.storage import SourceFiles, TargetFile

#: Bytes gathered at a time: whole elements of any dtype. Bands that spill the processor's cache are up to twice slower.
BAND_BYTES: Final = 2 << 20
#: A gap between two rows that is cheaper to jump over than to read.
_LONG_GAP_BYTES: Final = 64 << 10

ByteArray = npt.NDArray[np.uint8]
Progress = Callable[[int], None]
T = TypeVar("T")


def _no_progress(num_bytes: int) -> None:
    """Progress that nobody watches."""


def default_workers() -> int:
    """Threads that saturate a local disk: as many as there are cores, at most 8."""
    return min(8, len(os.sched_getaffinity(0)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Gathered:
    """A segment that has been written: its number in the plan and the CRC-32 of its stored bytes."""

    segment: int
    crc32: int


def execute(
    plan: BytePlan,
    targets: Sequence[TargetFile],
    *,
    workers: int,
    checksums: bool,
    progress: Progress = _no_progress,
) -> list[Gathered]:
    """Write every segment of ``plan`` into ``targets`` (one per target file), with ``workers`` threads.

    Returns the segments in order, with their checksums if asked for (else 0). The first failure ends the run.
    """

    def work(number: int) -> Gathered:
        segment = plan.segments[number]
        target, position, crc32 = targets[segment.file], segment.position, 0
        for band in bands(segment, sources):
            stored = _convert(band, segment)
            target.write(position, stored)
            if checksums:
                crc32 = zlib.crc32(stored, crc32)
            position += len(stored)
            progress(len(stored))
        return Gathered(segment=number, crc32=crc32)

    with SourceFiles(plan.source_files) as sources:
        return run_all(work, range(len(plan.segments)), workers=workers)


def run_all(work: Callable[[int], T], numbers: Sequence[int], *, workers: int) -> list[T]:
    """``work`` on every number with ``workers`` threads, results in order. The first exception cancels the rest."""
    if workers <= 1:
        return [work(number) for number in numbers]
    with ThreadPoolExecutor(max_workers=workers, thread_name_prefix="gather") as pool:
        futures = [pool.submit(work, number) for number in numbers]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:  # also when the wait itself is interrupted
            pool.shutdown(wait=True, cancel_futures=True)
        failed = [error for future in futures if not future.cancelled() and (error := future.exception()) is not None]
        if failed:
            raise failed[0]
        return [future.result() for future in futures]


def bands(segment: Segment, sources: SourceFiles, *, band_bytes: int = BAND_BYTES) -> Iterator[memoryview]:
    """Yield the bytes of a segment in ``source_dtype``, ``band_bytes`` at a time. A band is valid until the next."""
    buffer = np.empty(min(band_bytes, segment.num_bytes), dtype=np.uint8)
    scratch = np.empty(band_bytes, dtype=np.uint8)
    for low in range(0, segment.num_bytes, band_bytes):
        high = min(low + band_bytes, segment.num_bytes)
        band = buffer[: high - low]
        for copy in _overlapping(segment.copies, low, high):
            _gather(copy, low, band, scratch, sources)
        yield band.data


def _overlapping(copies: CopyArray, low: int, high: int) -> Iterator[tuple[int, ...]]:
    """The copies that write into ``[low, high)``, as plain tuples in the order of ``COPY``."""
    ends = copies["target_offset"] + (copies["rows"] - 1) * copies["target_stride"] + copies["row_bytes"]
    for copy in copies[(copies["target_offset"] < high) & (ends > low)]:
        yield copy.item()


def _gather(copy: tuple[int, ...], low: int, band: ByteArray, scratch: ByteArray, sources: SourceFiles) -> None:
    """Bring what ``copy`` has for the band that begins at target offset ``low``."""
    file, position, source_stride, offset, target_stride, rows, row_bytes = copy
    start = offset - low  # of row 0, in the band
    first = max(0, (-start - row_bytes) // target_stride + 1)  # the rows [first, last) touch the band
    last = min(rows, -((start - len(band)) // target_stride))
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
