"""The order in which ranks exchange the bytes of a plan: buckets of segments, each with the layout of one buffer.

The plan's source files are the ranks. In the buffer of a bucket, the pieces that one rank holds lie one behind the
other, so that the rank sends them at once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np

from dist_ckpt_mistral.errors import ConfigError
from dist_ckpt_mistral.gather.dtypes import itemsize_bytes
from dist_ckpt_mistral.gather.plan import BytePlan, Segment

#: Size of a buffer unless a tensor is larger. Messages of some megabytes saturate a network.
DEFAULT_BUCKET_BYTES: Final = 256 << 20
#: Pieces begin at multiples of the largest element.
_ALIGNMENT_BYTES: Final = 8


class Piece(NamedTuple):
    """A strided copy (see ``plan.COPY``) of ``rows`` rows, which lie one behind the other from ``position`` on.

    ``segment`` is the number of its segment in the plan, ``position`` is in bytes of the buffer. All other numbers are
    in elements.
    """

    segment: int
    position: int
    source_byte: int
    source_stride: int
    target_offset: int
    target_stride: int
    rows: int
    row_elems: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """Consecutive segments of a plan, and the buffer through which they travel.

    ``spans`` has the bytes ``[low, high)`` of the buffer that each rank fills, ``pieces`` what it puts there.
    """

    segments: range
    spans: Mapping[int, tuple[int, int]]
    pieces: Mapping[int, Sequence[Piece]]
    num_bytes: int

    def pieces_by_segment(self) -> Mapping[int, Sequence[Piece]]:
        """The pieces of each segment."""
        found = defaultdict[int, list[Piece]](list)
        for pieces in self.pieces.values():
            for piece in pieces:
                found[piece.segment].append(piece)
        return found


def travel_dtype(segment: Segment) -> str:
    """The dtype in which the values of a segment travel: the shorter one of its two."""
    return min(segment.source_dtype, segment.dtype, key=itemsize_bytes)


def cut_buckets(plan: BytePlan, bucket_bytes: int | None) -> list[range]:
    """Cut the segments of a plan into runs whose values fit into a buffer of ``bucket_bytes``.

    By default a buffer is as large as the largest segment, and at least ``DEFAULT_BUCKET_BYTES``. Raises ConfigError if
    a segment does not fit.
    """
    sizes = [segment.num_bytes // itemsize_bytes(segment.source_dtype) for segment in plan.segments]
    sizes = [count * itemsize_bytes(travel_dtype(each)) for count, each in zip(sizes, plan.segments, strict=True)]
    largest = max(sizes, default=0)
    limit = max(DEFAULT_BUCKET_BYTES, largest) if bucket_bytes is None else bucket_bytes
    if largest > limit:
        name = plan.segments[sizes.index(largest)].tensor
        raise ConfigError(f"bucket_bytes: expected at least {largest}, the bytes of {name!r}, got {bucket_bytes}")
    cuts, filled = [0], 0
    for number, size in enumerate(sizes):
        if filled + size > limit:
            cuts.append(number)
            filled = 0
        filled += size
    return [range(low, high) for low, high in zip(cuts, [*cuts[1:], len(sizes)], strict=True) if low < high]


def lay_out(plan: BytePlan, segments: range) -> Bucket:
    """The buffer of a bucket: the pieces of each rank, in the order of segments, and of copies in a segment."""
    pieces = defaultdict[int, list[Piece]](list)
    spans, end = {}, 0
    copies = [plan.segments[number].copies for number in segments]
    for rank in np.unique(np.concatenate([array["source_file"] for array in copies])).tolist():
        low = end
        for number, array in zip(segments, copies, strict=True):
            for piece, num_bytes in _pieces(
                plan.segments[number], number, array[array["source_file"] == rank].tolist()
            ):
                pieces[rank].append(piece._replace(position=end))
                end += -(-num_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        spans[rank] = low, end
    return Bucket(segments=segments, spans=spans, pieces=pieces, num_bytes=end)


def _pieces(segment: Segment, number: int, copies: Sequence[tuple[int, ...]]) -> Iterator[tuple[Piece, int]]:
    """Yield the pieces of ``copies`` (the fields of ``COPY``), at position 0, and their sizes in the buffer."""
    itemsize, travelling = itemsize_bytes(segment.source_dtype), itemsize_bytes(travel_dtype(segment))
    for _, position, source_stride, offset, target_stride, rows, row_bytes in copies:
        yield (
            Piece(
                segment=number,
                position=0,
                source_byte=position,
                source_stride=source_stride // itemsize,
                target_offset=offset // itemsize,
                target_stride=target_stride // itemsize,
                rows=rows,
                row_elems=row_bytes // itemsize,
            ),
            rows * row_bytes // itemsize * travelling,
        )
