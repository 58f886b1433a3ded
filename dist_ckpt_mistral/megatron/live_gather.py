"""Gather Hugging Face tensors out of the ranks of a live model: a byte plan whose source files are the ranks.

The tensors stay on the device of the model. Bucket by bucket, every rank puts the pieces that it holds into its part of
a buffer and sends that at once; receivers copy from the buffer into Hugging Face tensors. While a bucket is used, the
next one travels.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

import torch
import torch.distributed as dist

from dist_ckpt_mistral.errors import LayoutError
from dist_ckpt_mistral.gather.buckets import Bucket, Piece, cut_buckets, lay_out, travel_dtype
from dist_ckpt_mistral.gather.dtypes import Shape
from dist_ckpt_mistral.gather.plan import BytePlan, Segment
from dist_ckpt_mistral.mapping.live_source import RankBox, live_source
from dist_ckpt_mistral.mapping.source import ModelSource
from dist_ckpt_mistral.megatron.live_model import AnyModel, LivePart, device_of, live_parts
from dist_ckpt_mistral.megatron.live_ranks import LiveRanks
from dist_ckpt_mistral.model.config.mistral_config import ChosenConfig

#: Messages between two ranks carry this number, so that they are not taken for those of training (gloo).
_TAG: Final = 0x6463
#: Who gets the tensors: all ranks, or these.
Receivers = Literal["all"] | frozenset[int]


def receivers_of(to: Literal["all"] | int | Collection[int], ranks: LiveRanks) -> Receivers:
    """``to`` as a set. Raises LayoutError if it has no ranks of the job."""
    if to == "all":
        return "all"
    given = frozenset([to] if isinstance(to, int) else to)
    if not given or not given <= frozenset(range(ranks.world_size)):
        raise LayoutError(f"to: expected 'all', or ranks from 0 to {ranks.world_size - 1}, got {to!r}")
    return given


def open_live(
    model: AnyModel, chosen: ChosenConfig, ranks: LiveRanks, arguments: Callable[[], Mapping[str, object]]
) -> tuple[ModelSource, list[LivePart]]:
    """The model of all ranks as a source, and the parts of it that this rank holds.

    Only descriptions are exchanged. ``arguments`` checks those of the call, which must be the same on all ranks. An
    error on one rank is raised on all.
    """
    parts: list[LivePart] = []

    def describe() -> tuple[list[RankBox], dict[str, object]]:
        given = {**arguments(), "config": chosen.config}
        parts.extend(live_parts(model))
        return [part.box for part in parts], given

    described = ranks.ranks.together(describe)
    for rank, (_, others) in enumerate(described):
        for name, value in others.items():
            if value != described[0][1][name]:
                raise LayoutError(f"rank {rank} was given another {name} than rank 0: all must make the same call")
    return live_source(chosen, [boxes for boxes, _ in described]), parts


@dataclass(slots=True)
class _Underway:
    """A bucket whose bytes are travelling, and what to wait for. Ranks that only send have a buffer of their bytes."""

    bucket: Bucket
    buffer: torch.Tensor
    works: list[dist.Work]


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveGather:
    """Carries out a plan of ``open_live`` on all ranks. ``shapes`` are those of the tensors of its segments, by name.

    A buffer has at most ``bucket_bytes``; at most two exist. A receiver has one tensor besides.
    """

    plan: BytePlan
    shapes: Mapping[str, Shape]
    parts: Sequence[LivePart]
    device: torch.device
    ranks: LiveRanks
    receivers: Receivers
    buckets: Sequence[range]
    starts: Sequence[int] = field(init=False)

    def __post_init__(self) -> None:
        """Note where the parts begin."""
        object.__setattr__(self, "starts", [part.box.position for part in self.parts])

    @property
    def receives(self) -> bool:
        """Whether this rank gets the tensors."""
        return self.receivers == "all" or self.ranks.rank in self.receivers

    def tensors(self) -> Generator[tuple[Segment, torch.Tensor]]:
        """Yield every segment and its tensor, in the order of the plan, on the ranks that receive them."""
        used, spare = (torch.empty(0, dtype=torch.uint8, device=self.device) for _ in range(2))
        underway: _Underway | None = self._start(self.buckets[0], used)
        for following in range(1, len(self.buckets) + 1):
            arrived = self._finish(underway)
            underway = self._start(self.buckets[following], spare) if following < len(self.buckets) else None
            used, spare = spare, used
            try:
                yield from self._unpacked(arrived)
            except GeneratorExit:
                self._finish(underway)
                if following + 1 < len(self.buckets):
                    self.ranks.leave()
                raise

    def _unpacked(self, arrived: _Underway | None) -> Iterator[tuple[Segment, torch.Tensor]]:
        """Yield the tensors of a bucket, on the ranks that receive them."""
        if arrived is None or not self.receives:
            return
        pieces = arrived.bucket.pieces_by_segment()
        for number in arrived.bucket.segments:
            segment = self.plan.segments[number]
            yield segment, self._tensor(segment, pieces[number], arrived.buffer)

    def _start(self, segments: range, memory: torch.Tensor) -> _Underway:
        """Put this rank's pieces of a bucket into a buffer and let the bytes travel. ``memory`` is that of the buffer.

        It grows where it must: new memory costs more time than a copy.
        """
        bucket, me = lay_out(self.plan, segments), self.ranks.rank
        own_low, own_high = bucket.spans.get(me, (0, 0))
        base, end = (0, bucket.num_bytes) if self.receives else (own_low, own_high)
        try:
            buffer = memory.resize_(max(end - base, len(memory)))[: end - base]
            self._pack(bucket.pieces.get(me, ()), buffer[own_low - base : own_high - base], own_low)
        except BaseException:
            self.ranks.leave()
            raise
        self.ranks.meet(f"bucket {segments.start}")
        if self.ranks.world_size == 1:
            return _Underway(bucket, buffer, [])
        parts = {rank: buffer[max(0, low - base) : max(0, high - base)] for rank, (low, high) in bucket.spans.items()}
        with self.ranks.exchanging():
            return _Underway(bucket, buffer, self._send(parts))

    def _send(self, parts: Mapping[int, torch.Tensor]) -> list[dist.Work]:
        """Start sending ``parts`` of the buffer, each by its rank."""
        if self.receivers == "all":
            works = (dist.broadcast(part, src=rank, async_op=True) for rank, part in parts.items())
            return [work for work in works if work is not None]
        me = self.ranks.rank
        messages = [
            dist.P2POp(dist.isend, part, receiver, tag=_TAG)
            if rank == me
            else dist.P2POp(dist.irecv, part, rank, tag=_TAG)
            for rank, part in parts.items()
            for receiver in sorted(self.receivers)
            if rank != receiver and me in {rank, receiver}
        ]
        return dist.batch_isend_irecv(messages) if messages else []

    def _finish(self, underway: _Underway | None) -> _Underway | None:
        """Wait until a bucket has arrived, and return it."""
        with self.ranks.exchanging():
            for work in underway.works if underway else ():
                work.wait(self.ranks.timeout)
        return underway

    def _pack(self, pieces: Sequence[Piece], span: torch.Tensor, span_start: int) -> None:
        """Copy this rank's pieces into ``span``, the part of the buffer from ``span_start`` on, in travelling dtype."""
        flat: dict[int, torch.Tensor] = {}
        for piece in pieces:
            number = bisect_right(self.starts, piece.source_byte) - 1
            if number not in flat:
                flat[number] = self.parts[number].values().contiguous().view(-1)
            values = flat[number]
            first = (piece.source_byte - self.starts[number]) // values.itemsize
            _in_buffer(span, piece, piece.position - span_start, self.plan.segments[piece.segment]).copy_(
                _rows(values, first, piece.source_stride, piece)
            )

    def _tensor(self, segment: Segment, pieces: Sequence[Piece], buffer: torch.Tensor) -> torch.Tensor:
        """The Hugging Face tensor of a segment, from the pieces of all ranks."""
        tensor = torch.empty(self.shapes[segment.tensor], dtype=getattr(torch, segment.dtype), device=self.device)
        for piece in pieces:
            _rows(tensor.view(-1), piece.target_offset, piece.target_stride, piece).copy_(
                _in_buffer(buffer, piece, piece.position, segment)
            )
        return tensor


def plan_live_gather(
    plan: BytePlan,
    source: ModelSource,
    model: AnyModel,
    parts: Sequence[LivePart],
    *,
    ranks: LiveRanks,
    receivers: Receivers,
    bucket_bytes: int | None,
) -> LiveGather:
    """Prepare to carry out ``plan``, whose source is that of ``open_live``. Raises ConfigError as ``cut_buckets``."""
    return LiveGather(
        plan=plan,
        shapes={tensor.hf_name: tensor.shape for tensor in source.tensors},
        parts=parts,
        device=device_of(model),
        ranks=ranks,
        receivers=receivers,
        buckets=cut_buckets(plan, bucket_bytes),
    )


def _rows(flat: torch.Tensor, first: int, stride: int, piece: Piece) -> torch.Tensor:
    """The rows of a piece in a flat tensor, ``[rows, row_elems]``, from element ``first`` on."""
    return flat.as_strided((piece.rows, piece.row_elems), (stride, 1), flat.storage_offset() + first)


def _in_buffer(buffer: torch.Tensor, piece: Piece, position: int, segment: Segment) -> torch.Tensor:
    """The rows of a piece in a buffer, from byte ``position`` on."""
    dtype: torch.dtype = getattr(torch, travel_dtype(segment))
    num_bytes = piece.rows * piece.row_elems * dtype.itemsize
    return buffer[position : position + num_bytes].view(dtype).view(piece.rows, piece.row_elems)
