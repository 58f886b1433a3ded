"""Checksums of a file: from one reading of it, or from the checksums of its parts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from zlib_ng import zlib_ng

from dist_ckpt_mistral.errors import PlanError
from dist_ckpt_mistral.gather.bands import REMOTE_BAND_BYTES, aligned_buffer
from dist_ckpt_mistral.gather.execute import Effort
from dist_ckpt_mistral.storage.local import Readable, SourceFiles, Span
from dist_ckpt_mistral.storage.remote_reads import Wanted


@dataclass(frozen=True, slots=True, kw_only=True)
class Digest:
    """Checksums of a file: the CRC-32 of all of it and of each span, and its SHA-256 in hexadecimal if requested."""

    num_bytes: int
    sha256: str | None
    crc32: int
    spans: tuple[int, ...]


def digest(path: Path, spans: Sequence[Span] = (), *, sha256: bool, effort: Effort) -> Digest:
    """Read a file once, in blocks of a band's size, and return its checksums.

    ``spans`` must be in ascending order and must not overlap. Raises FormatError if the file cannot be read.
    """
    file_hash, at = hashlib.sha256(), 0
    with SourceFiles([path]) as files:
        buffer = aligned_buffer(REMOTE_BAND_BYTES if files.is_remote else effort.band_bytes()).data
        size = files.size_bytes(0)
        pieces = [*_with_gaps(spans, size)]
        sums = [0] * len(pieces)

        def hold(low: int) -> Readable:
            return files.hold([Wanted(0, low, min(size, low + len(buffer)))])

        ahead = hold(0)
        for start in range(0, size, len(buffer)):
            block = buffer[: min(len(buffer), size - start)]
            source, ahead = ahead, hold(start + len(block))
            source.read_into(0, start, block)
            if sha256:
                file_hash.update(block)
            while at < len(pieces) and pieces[at][0].position < start + len(block):
                low = pieces[at][0].position - start
                high = low + pieces[at][0].num_bytes
                sums[at] = zlib_ng.crc32(block[max(low, 0) : high], sums[at])
                if high > len(block):
                    break  # the piece continues in the next block
                at += 1
            effort.progress.advance(len(block))
    return Digest(
        num_bytes=size,
        sha256=file_hash.hexdigest() if sha256 else None,
        crc32=combined(SummedSpan(*piece, crc32) for (piece, _), crc32 in zip(pieces, sums, strict=True)),
        spans=tuple(crc32 for (_, is_asked), crc32 in zip(pieces, sums, strict=True) if is_asked),
    )


def _with_gaps(spans: Sequence[Span], size: int) -> Iterator[tuple[Span, bool]]:
    """Yield consecutive spans of a file of ``size`` bytes, and whether each is one of ``spans`` or a gap."""
    end = 0
    for span in spans:
        if span.position > end:
            yield Span(end, span.position - end), False
        yield span, True
        end = sum(span)
    if size > end:
        yield Span(end, size - end), False


class SummedSpan(NamedTuple):
    """Bytes of a file, and their CRC-32."""

    position: int
    num_bytes: int
    crc32: int


def combined(spans: Iterable[SummedSpan]) -> int:
    """Return the CRC-32 of consecutive spans together."""
    crc32 = 0
    for span in spans:
        crc32 = zlib_ng.crc32_combine(crc32, span.crc32, span.num_bytes)
    return crc32


def crc32_of_file(num_bytes: int, spans: Iterable[SummedSpan]) -> int:
    """Return the CRC-32 of a file from those of spans in any order. Raises PlanError unless they fill the file."""
    ordered, end = sorted(spans), 0
    for span in ordered:
        if span.position != end:
            raise PlanError(f"expected bytes to be written at {end}, got {span.position}")
        end += span.num_bytes
    if end != num_bytes:
        raise PlanError(f"expected {num_bytes} bytes to be written, got {end}")
    return combined(ordered)
