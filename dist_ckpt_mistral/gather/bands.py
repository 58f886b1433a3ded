"""Read the segments of a ``BytePlan`` band by band.

A band is a piece of a segment, gathered in a buffer that fits into the processor's cache. The caller then writes,
checksums or compares it. Each thread has its own buffers.
"""

from __future__ import annotations

import functools
import mmap
import threading
from collections.abc import Iterable, Iterator
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from dist_ckpt_mistral.gather import dtypes
from dist_ckpt_mistral.gather.plan import CopyArray, Segment
from dist_ckpt_mistral.storage.local import Readable, SourceFiles
from dist_ckpt_mistral.storage.processor import l2_cache_bytes
from dist_ckpt_mistral.storage.remote_reads import Wanted
from dist_ckpt_mistral.storage.shared_rows import SharedRows

#: Limits of a band's size. Shorter ones cost more calls than copying; longer ones were no faster on any processor.
LEAST_BAND_BYTES: Final = 64 << 10
_MOST_BAND_BYTES: Final = 512 << 10
#: L2 cache of a core if the system does not tell it.
_USUAL_L2_BYTES: Final = 512 << 10
#: A band of objects in a store: long enough that its requests take longer to answer than to begin.
REMOTE_BAND_BYTES: Final = 4 << 20
#: A thread has a band, and a buffer of a quarter of its size for rows that are read with the gaps between them.
_BANDS_IN_SCRATCH: Final = 4
#: The two together take no more than this.
MOST_SCRATCH_BYTES: Final = _MOST_BAND_BYTES + _MOST_BAND_BYTES // _BANDS_IN_SCRATCH
#: Buffers are page-aligned: the kernel copies into them up to three times faster (measured, AMD). Writes begin at
#: multiples of their length, where the page cache has each in one piece: 10 % less time (Linux 6.18, ext4).
PAGE_BYTES: Final = 4096
#: A gap between two rows that takes longer to read than to skip.
_LONG_GAP_BYTES: Final = 64 << 10
#: Rows of at least this size are read into their places by one call. Shorter ones are copied there, by numpy.
_LONG_ROW_BYTES: Final = 2 << 10

ByteArray = npt.NDArray[np.uint8]


class Stopped(Exception):  # noqa: N818  (a consequence of another error)
    """A thread stops because another one failed or the run was interrupted."""


class BandReader:
    """Gathers segments band by band from open files. May be used by several threads."""

    def __init__(self, sources: SourceFiles, band_bytes: int | None = None) -> None:
        """Read from ``sources``, at most ``band_bytes`` at a time (default: ``best_band_bytes`` of the sources)."""
        self._sources = sources
        self._band_bytes = band_bytes or (REMOTE_BAND_BYTES if sources.is_remote else best_band_bytes())
        self._buffers = threading.local()
        self._stopped = False

    def stop(self) -> None:
        """Raise ``Stopped`` in all threads before their next band."""
        self._stopped = True

    def bands(
        self, segment: Segment, low: int = 0, high: int | None = None, *, position: int = 0
    ) -> Iterator[memoryview]:
        """Yield bytes ``[low, high)`` of a segment, in its ``source_dtype``.

        A band is valid until this thread asks for the next. ``position`` is where the caller will store the first band:
        its length is chosen so that the others are stored at multiples of their stored length.
        """
        high = segment.num_bytes if high is None else high
        itemsize, stored_itemsize = dtypes.itemsize_bytes(segment.source_dtype), dtypes.itemsize_bytes(segment.dtype)
        ahead_elems = -position % (self._band_bytes * stored_itemsize // itemsize) // stored_itemsize
        ahead = min(ahead_elems * itemsize, high - low)
        if ahead:
            yield from self._bands(segment, low, low + ahead)
        yield from self._bands(segment, low + ahead, high)

    def _bands(self, segment: Segment, low: int, high: int) -> Iterator[memoryview]:
        """Yield bytes ``[low, high)`` of a segment in bands of full length and a shorter last one."""
        copies = overlapping(segment.copies, low, high)
        buffer, scratch = self._thread_buffers()
        is_remote = self._sources.is_remote
        holds = is_remote or any(has_gaps(copy) for _, _, copy in copies)
        ahead = self._held(copies, low, min(high, low + len(buffer))) if is_remote else self._sources
        for start in range(low, high, len(buffer)):
            if self._stopped:
                raise Stopped
            band = buffer[: high - start]
            sources, end = ahead, start + len(band)
            if is_remote:
                ahead = self._held(copies, end, min(high, end + len(buffer)))  # it comes while this band is copied
            elif holds:
                sources = self._held(copies, start, end)
            fill(band, start, copies, scratch, sources)
            if self._stopped:  # while an answer was waited for
                raise Stopped
            yield band.data

    def _held(self, copies: list[_Copy], low: int, high: int) -> Readable:
        """What to read bytes ``[low, high)`` of a segment from."""
        return self._sources.hold(wanted(copies, low, high))

    def _thread_buffers(self) -> tuple[ByteArray, ByteArray]:
        """Return the band and the scratch buffer of this thread."""
        if not hasattr(self._buffers, "pair"):
            scratch_bytes = max(1, self._band_bytes // _BANDS_IN_SCRATCH)
            self._buffers.pair = aligned_buffer(self._band_bytes), aligned_buffer(scratch_bytes)
        pair: tuple[ByteArray, ByteArray] = self._buffers.pair
        return pair


@functools.cache
def best_band_bytes() -> int:
    """Return the size of a band that leaves half of a core's L2 cache to the pages it is copied between.

    A power of two, so that the page cache takes each write in one piece. Bands that spill from the cache take twice the
    time, most of it inside the lock of the file that is written.
    """
    half = l2_cache_bytes(unknown=_USUAL_L2_BYTES) // 2
    return min(_MOST_BAND_BYTES, max(LEAST_BAND_BYTES, 1 << (half.bit_length() - 1)))


def band_bytes_within(memory_bytes: int, *, is_remote: bool = False) -> int:
    """Return the size of a band, in whole pages, if all buffers of a thread may take ``memory_bytes``.

    A band of objects in a store is in memory three times: it, what it is gathered from, and what comes next.
    """
    if is_remote:
        return max(LEAST_BAND_BYTES, min(REMOTE_BAND_BYTES, memory_bytes // 3 // PAGE_BYTES * PAGE_BYTES))
    most = memory_bytes * _BANDS_IN_SCRATCH // (_BANDS_IN_SCRATCH + 1)
    return max(LEAST_BAND_BYTES, min(best_band_bytes(), most // PAGE_BYTES * PAGE_BYTES))


def aligned_buffer(num_bytes: int) -> ByteArray:
    """Return a page-aligned buffer. It is a private mapping, so that a forked process does not share it."""
    return np.frombuffer(mmap.mmap(-1, num_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=np.uint8)


#: A copy: its first byte in the segment, its end there, and the fields of ``COPY`` as plain numbers.
_Copy: TypeAlias = tuple[int, int, tuple[int, ...]]


def has_gaps(copy: tuple[int, ...]) -> bool:
    """Whether something lies between the rows of a copy in the source, which other files want."""
    _, _, source_stride, _, _, rows, row_bytes = copy
    return rows > 1 and source_stride > row_bytes


def overlapping(copies: CopyArray, low: int, high: int) -> list[_Copy]:
    """Return the copies that write into bytes ``[low, high)`` of a segment."""
    begins = copies["target_offset"]
    ends = begins + (copies["rows"] - 1) * copies["target_stride"] + copies["row_bytes"]
    hit = (begins < high) & (ends > low)
    return list(zip(begins[hit].tolist(), ends[hit].tolist(), copies[hit].tolist(), strict=True))


def fill(buffer: ByteArray, low: int, copies: list[_Copy], scratch: ByteArray, sources: Readable) -> None:
    """Fill ``buffer`` with the bytes of a segment from byte ``low`` on; ``copies`` are those that overlap it."""
    for begin, end, copy in copies:
        if begin < low + len(buffer) and end > low:
            _gather(copy, low, buffer, scratch, sources)


def wanted(copies: Iterable[_Copy], low: int, high: int) -> Iterator[Wanted]:
    """Yield what bytes ``[low, high)`` of a segment are read from. Gaps between rows that are read along are in it."""
    for begin, end, copy in copies:
        if begin >= high or end <= low:
            continue
        file, position, source_stride, offset, target_stride, rows, row_bytes = copy
        first = max(0, (low - offset - row_bytes) // target_stride + 1)  # the rows [first, last) have such bytes
        last = min(rows, -((offset - high) // target_stride))
        if first >= last:
            continue
        skip = max(0, low - offset - first * target_stride)
        rest = max(0, offset + (last - 1) * target_stride + row_bytes - high)
        starts = position + first * source_stride, position + (last - 1) * source_stride
        if source_stride - row_bytes <= _LONG_GAP_BYTES:
            is_shared = has_gaps(copy)
            yield Wanted(file, starts[0] + skip, starts[1] + row_bytes - rest, is_shared)
            continue
        for start in range(starts[0], starts[1] + 1, source_stride):
            low_skip, high_rest = skip if start == starts[0] else 0, rest if start == starts[1] else 0
            yield Wanted(file, start + low_skip, start + row_bytes - high_rest)


def _gather(copy: tuple[int, ...], low: int, band: ByteArray, scratch: ByteArray, sources: Readable) -> None:
    """Read the part of ``copy`` that falls into ``band``, which begins at target offset ``low``."""
    file, position, source_stride, offset, target_stride, rows, row_bytes = copy
    start = offset - low  # of row 0, relative to the band
    first = max(0, (-start - row_bytes) // target_stride + 1)  # the rows [first, last) touch the band
    last = min(rows, -((start - len(band)) // target_stride))
    if first >= last:  # the band falls between two rows
        return
    whole_first = first if start + first * target_stride >= 0 else first + 1
    whole_last = last if start + (last - 1) * target_stride + row_bytes <= len(band) else last - 1
    for row in {first, last - 1}:
        if whole_first <= row < whole_last:
            continue
        at = start + row * target_stride  # of a row that an edge of the band cuts
        skip = max(0, -at)
        piece = band[at + skip : min(at + row_bytes, len(band))]
        sources.read_into(file, position + row * source_stride + skip, piece.data)
    if whole_first < whole_last:
        source_at, target_at = position + whole_first * source_stride, start + whole_first * target_stride
        count = whole_last - whole_first
        target = np.ndarray((count, row_bytes), np.uint8, band.data, target_at, (target_stride, 1))
        _gather_rows(file, source_at, source_stride, target, scratch, sources)


def _gather_rows(
    file: int, position: int, source_stride: int, target: ByteArray, scratch: ByteArray, sources: Readable
) -> None:
    """Fill ``target`` ``[rows, row_bytes]`` from rows that begin at ``position``, ``source_stride`` bytes apart."""
    rows, row_bytes = target.shape
    if source_stride == row_bytes and target.flags.c_contiguous:
        sources.read_into(file, position, target.reshape(-1).data)
        return
    if source_stride == row_bytes and row_bytes >= _LONG_ROW_BYTES:
        sources.read_into(file, position, *[row.data for row in target])
        return
    if isinstance(sources, SharedRows):
        block = sources.view(file, position, (rows - 1) * source_stride + row_bytes)
        if block is not None:
            np.copyto(target, np.ndarray((rows, row_bytes), np.uint8, block, 0, (source_stride, 1)))
            return
    if source_stride - row_bytes > _LONG_GAP_BYTES or source_stride > len(scratch):
        for row in range(rows):
            sources.read_into(file, position + row * source_stride, target[row].data)
        return
    step = len(scratch) // source_stride
    for first in range(0, rows, step):
        count = min(step, rows - first)
        span = scratch[: (count - 1) * source_stride + row_bytes]
        sources.read_into(file, position + first * source_stride, span.data)
        source = np.ndarray((count, row_bytes), np.uint8, span.data, 0, (source_stride, 1))
        np.copyto(target[first : first + count], source)
