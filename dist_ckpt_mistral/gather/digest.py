"""Checksums of a file in one pass: the SHA-256 of all of it and the CRC-32 of spans."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from zlib_ng import zlib_ng

from dist_ckpt_mistral.gather.bands import aligned_buffer
from dist_ckpt_mistral.gather.execute import Effort
from dist_ckpt_mistral.storage.local import SourceFiles


class Span(NamedTuple):
    """Bytes ``[position, position + num_bytes)`` of a file."""

    position: int
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Digest:
    """Checksums of a file: its SHA-256 in hexadecimal, None if not requested, and the CRC-32 of each span."""

    num_bytes: int
    sha256: str | None
    crc32: tuple[int, ...]


def digest(path: Path, spans: Sequence[Span], *, sha256: bool, effort: Effort) -> Digest:
    """Read a file once, in blocks of a band's size, and return its checksums.

    ``spans`` must be in ascending order and must not overlap. Raises FormatError if the file cannot be read.
    """
    file_hash, sums, open_span = hashlib.sha256(), [0] * len(spans), 0
    buffer = aligned_buffer(effort.band_bytes()).data
    with SourceFiles([path]) as files:
        size = files.size_bytes(0)
        for start in range(0, size, len(buffer)):
            block = buffer[: min(len(buffer), size - start)]
            files.read_into(0, start, block)
            if sha256:
                file_hash.update(block)
            while open_span < len(spans) and spans[open_span].position < start + len(block):
                low = spans[open_span].position - start
                high = low + spans[open_span].num_bytes
                sums[open_span] = zlib_ng.crc32(block[max(low, 0) : high], sums[open_span])
                if high > len(block):
                    break  # the span continues in the next block
                open_span += 1
            effort.progress(len(block))
    return Digest(num_bytes=size, sha256=file_hash.hexdigest() if sha256 else None, crc32=tuple(sums))
