"""A target file as a sequence of parts, each gathered and checked once, in order: what an upload is made of.

A part holds pieces of segments and of what stands around them, such as headers. What stands behind a segment may depend
on its checksum, which is known when the segment has passed.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
from zlib_ng import zlib_ng

from dist_ckpt_mistral.errors import PlanError
from dist_ckpt_mistral.gather import dtypes
from dist_ckpt_mistral.gather.bands import ByteArray, aligned_buffer, fill, overlapping, wanted
from dist_ckpt_mistral.gather.casts import NOTHING, Lost, cast
from dist_ckpt_mistral.gather.plan import BytePlan, Segment
from dist_ckpt_mistral.storage.local import Readable, SourceFiles

#: Stores take at most so many parts of one object (S3).
MOST_PARTS: Final = 10_000
#: A request takes longer to answer than to begin, and eight parts fit in little memory.
PART_BYTES: Final = 8 << 20
#: Stores take no shorter parts, but for the last one (S3).
LEAST_PART_BYTES: Final = 5 << 20


class Around(NamedTuple):
    """Bytes of a target file that no segment fills. ``content`` takes the CRC-32 of the segments before, by number."""

    position: int
    num_bytes: int
    content: Callable[[Mapping[int, int]], bytes]

    @classmethod
    def fixed(cls, position: int, data: bytes) -> Around:
        """Bytes that depend on no checksum."""
        return cls(position, len(data), lambda _: data)


class Piece(NamedTuple):
    """Bytes ``[low, high)`` of a segment as they are stored, or of something around, at byte ``at`` of a part.

    ``number`` is that of the segment in its plan, or -1 minus that of the ``Around``.
    """

    at: int
    number: int
    low: int
    high: int


class Summed(NamedTuple):
    """A piece of a segment, its CRC-32, and the values that its conversion lost."""

    piece: Piece
    crc32: int
    lost: Lost


def part_bytes_of(num_bytes: int, usual_bytes: int = PART_BYTES) -> int:
    """Return the length of the parts of a file of ``num_bytes``: the usual one if a store takes so many parts."""
    least = -(-num_bytes // MOST_PARTS)
    return max(usual_bytes, -(-least // (1 << 20)) << 20)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TargetParts:
    """One target file: its segments and what stands around them, in the order of ``starts``, cut into parts.

    ``items`` are (number, stored bytes), with numbers as in ``Piece``.
    """

    plan: BytePlan
    num_bytes: int
    part_bytes: int
    starts: Sequence[int]
    items: Sequence[tuple[int, int]]
    around: Sequence[Around]

    @classmethod
    def of(
        cls,
        plan: BytePlan,
        segments: Iterable[int],
        around: Iterable[Around],
        num_bytes: int,
        part_bytes: int = PART_BYTES,
    ) -> TargetParts:
        """Cut a file of ``num_bytes`` bytes into parts of ``part_bytes``, longer ones if it would have too many.

        Raises PlanError unless ``segments`` and ``around`` fill it exactly.
        """
        pieces = tuple(around)
        spans = [(plan.segments[number].position, number, plan.segments[number].stored_bytes) for number in segments]
        spans += [(each.position, -1 - number, each.num_bytes) for number, each in enumerate(pieces)]
        spans = sorted(span for span in spans if span[2])
        end = 0
        for position, _, size in spans:
            if position != end:
                raise PlanError(f"expected bytes to be written at {end}, got {position}")
            end += size
        if end != num_bytes:
            raise PlanError(f"expected {num_bytes} bytes to be written, got {end}")
        return cls(
            plan=plan,
            num_bytes=num_bytes,
            part_bytes=part_bytes_of(num_bytes, part_bytes),
            starts=[span[0] for span in spans],
            items=[span[1:] for span in spans],
            around=pieces,
        )

    def __len__(self) -> int:
        """Return the number of parts; an empty file has one, which is empty."""
        return max(1, -(-self.num_bytes // self.part_bytes))

    def size_bytes(self, number: int) -> int:
        """Size of a part: all but the last are equally long."""
        return min(self.part_bytes, self.num_bytes - number * self.part_bytes)

    def pieces(self, number: int) -> list[Piece]:
        """Return the pieces of a part, in order."""
        start = at = number * self.part_bytes
        stop = start + self.size_bytes(number)
        found, item = [], bisect_right(self.starts, start) - 1
        while at < stop:
            of, size = self.items[item]
            low, high = at - self.starts[item], min(size, stop - self.starts[item])
            found.append(Piece(at - start, of, low, high))
            at = self.starts[item] + high
            item += 1
        return found

    def gather(self, number: int, sources: SourceFiles, scratch: ByteArray) -> tuple[ByteArray, list[Summed]]:
        """Gather a part: its bytes, without what stands around segments, and the checksums of its pieces of them."""
        pieces = [piece for piece in self.pieces(number) if piece.number >= 0]
        spans = [_Span.of(self.plan.segments[piece.number], piece) for piece in pieces]
        held = sources.hold(each for span in spans for each in wanted(span.copies, span.low, span.high))
        size = self.size_bytes(number)
        part = aligned_buffer(max(1, size))[:size]  # which is given back to the system at once, unlike what malloc has
        return part, [self._gather(span, part, scratch, held) for span in spans]

    def _gather(self, span: _Span, part: ByteArray, scratch: ByteArray, sources: Readable) -> Summed:
        piece, segment = span.piece, self.plan.segments[span.piece.number]
        target, lost = part[piece.at : piece.at + piece.high - piece.low], NOTHING
        if span.is_direct:
            fill(target, span.low, span.copies, scratch, sources)
        else:
            values = np.empty(span.high - span.low, dtype=np.uint8)
            fill(values, span.low, span.copies, scratch, sources)
            stored, lost = cast(values.data, segment.source_dtype, segment.dtype)
            if span.skip:  # the first value has begun in the part before, where it is counted
                _, first = cast(values.data[: span.itemsize], segment.source_dtype, segment.dtype)
                lost = Lost(lost.overflowed - first.overflowed, lost.vanished - first.vanished)
            target[:] = np.frombuffer(stored, np.uint8)[span.skip : span.skip + len(target)]
        return Summed(piece, zlib_ng.crc32(target.data), lost)

    def put_around(self, number: int, part: ByteArray, crc32_of: Mapping[int, int]) -> None:
        """Add what stands around segments; ``crc32_of`` has those of all segments that end before."""
        for piece in self.pieces(number):
            if piece.number < 0:
                content = self.around[-1 - piece.number].content(crc32_of)
                target = part[piece.at : piece.at + piece.high - piece.low]
                target[:] = np.frombuffer(content, np.uint8)[piece.low : piece.high]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Span:
    """What a piece of a segment is gathered from: bytes ``[low, high)`` in the source's dtype, which are whole values.

    ``skip`` stored bytes of the first value belong to the part before. ``is_direct`` means that the bytes are stored
    as they are. ``copies`` are those that write into the span.
    """

    piece: Piece
    low: int
    high: int
    skip: int
    itemsize: int
    is_direct: bool
    copies: list[tuple[int, int, tuple[int, ...]]]

    @classmethod
    def of(cls, segment: Segment, piece: Piece) -> _Span:
        source, stored = dtypes.itemsize_bytes(segment.source_dtype), dtypes.itemsize_bytes(segment.dtype)
        first, end = piece.low // stored, -(-piece.high // stored)
        low, high, skip = first * source, end * source, piece.low - first * stored
        is_whole = skip == 0 and piece.high == end * stored
        return cls(
            piece=piece,
            low=low,
            high=high,
            skip=skip,
            itemsize=source,
            is_direct=is_whole and segment.source_dtype == segment.dtype,
            copies=overlapping(segment.copies, low, high),
        )
