"""What every rank of a layout reads of a stored checkpoint, in numbers.

A rank reads what ``dist_checkpointing.load`` makes it read without ``--ckpt-fully-parallel-load``: every replica all of
its boxes, and of each stored chunk that a box meets the whole (gather/chunk_reads.py says why).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from dist_ckpt_mistral.gather import dtypes
from dist_ckpt_mistral.gather.boxes import IntArray
from dist_ckpt_mistral.gather.dtypes import Shape
from dist_ckpt_mistral.gather.index import TensorIndex
from dist_ckpt_mistral.model.layout.layout import ParallelLayout

#: Version of the JSON that ``plan --json`` prints; fields are only ever added under one version.
JSON_VERSION: Final = 1
#: The parts of a checkpoint that are planned, as JSON calls them.
WEIGHTS: Final = "weights"
OPTIMIZER: Final = "optimizer"
#: From here on, one digit tells a factor from 1.
_CLEARLY_MORE: Final = 1.05


class WantedBox(NamedTuple):
    """A box of a stored tensor, in elements. It may reach outside the tensor: there it needs nothing."""

    tensor: str
    offset: Shape
    shape: Shape


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ChunkList:
    """All chunks of an index as columns, in the order of files and positions.

    ``tensors[i]`` is the number of chunk ``i``'s tensor in ``names``, ``files[i]`` that of its file in the index, and
    ``num_bytes[i]`` its size without what the file format adds. ``places`` gives the number of a tensor's chunk.
    """

    names: tuple[str, ...]
    tensors: IntArray
    files: IntArray
    num_bytes: IntArray
    places: dict[str, IntArray]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ChunkReads:
    """One row for every chunk that is read for a box: its number in a ``ChunkList``, bytes needed of it, its size."""

    chunks: IntArray
    needed_bytes: IntArray
    read_bytes: IntArray

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        """Yield ``(chunk, needed_bytes, read_bytes)`` of every read."""
        return zip(self.chunks.tolist(), self.needed_bytes.tolist(), self.read_bytes.tolist(), strict=True)


def chunk_list(index: TensorIndex) -> ChunkList:
    """The chunks of all tensors of ``index``."""
    tensors = list(index.tensors.values())
    counts = [tensor.num_chunks for tensor in tensors]
    files = _joined([tensor.files for tensor in tensors])
    order = np.lexsort((_joined([tensor.positions for tensor in tensors]), files))
    sizes = [tensor.shapes.prod(axis=1, dtype=np.int64) * dtypes.itemsize_bytes(tensor.dtype) for tensor in tensors]
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order))
    starts = np.cumsum([0, *counts])
    return ChunkList(
        names=tuple(tensor.name for tensor in tensors),
        tensors=np.repeat(np.arange(len(tensors)), counts)[order],
        files=files[order],
        num_bytes=_joined(sizes)[order],
        places={
            tensor.name: place[start : start + count]
            for tensor, start, count in zip(tensors, starts, counts, strict=False)
        },
    )


def _joined(columns: list[IntArray]) -> IntArray:
    return np.concatenate([np.empty(0, dtype=np.int64), *columns])


def chunk_reads(index: TensorIndex, chunks: ChunkList, boxes: Iterable[WantedBox]) -> ChunkReads:
    """What is read for ``boxes`` of tensors of ``index``."""
    by_tensor: dict[str, list[WantedBox]] = defaultdict(list)
    for box in boxes:
        by_tensor[box.tensor].append(box)
    numbers, needed = [], []
    for name, wanted in by_tensor.items():
        tensor = index.tensors[name]
        lows = np.array([box.offset for box in wanted], dtype=np.int64)
        highs = np.minimum(lows + np.array([box.shape for box in wanted]), tensor.global_shape)
        met = tensor.overlaps(lows, highs)
        numbers.append(chunks.places[name][met.chunk])
        needed.append((met.high - met.low).prod(axis=1) * dtypes.itemsize_bytes(tensor.dtype))
    read = _joined(numbers)
    return ChunkReads(chunks=read, needed_bytes=_joined(needed), read_bytes=chunks.num_bytes[read])


@dataclass(frozen=True, slots=True, kw_only=True)
class Amount:
    """How much is read. ``file_bytes`` are the bytes read of every file that is touched, ``num_reads`` the chunk loads.

    All bytes are of tensors, without what the file format adds.
    """

    needed_bytes: int
    read_bytes: int
    num_reads: int
    num_chunks: int
    file_bytes: Mapping[str, int]

    @property
    def amplification(self) -> float | None:
        """Bytes read for each byte needed; None where nothing is needed."""
        return self.read_bytes / self.needed_bytes if self.needed_bytes else None

    def to_json(self) -> dict[str, Any]:
        """Plain values, stable within ``JSON_VERSION``."""
        return {
            "needed_bytes": self.needed_bytes,
            "read_bytes": self.read_bytes,
            "amplification": self.amplification,
            "num_reads": self.num_reads,
            "num_chunks": self.num_chunks,
            "files": dict(self.file_bytes),
        }


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RankReads:
    """Ranks that hold the same boxes and so read the same: their pipeline stage, its layers, and the chunks they read.

    More than one rank does so where a layout has data or context parallelism.
    """

    ranks: tuple[int, ...]
    stage: int
    layers: tuple[int, ...]
    reads: ChunkReads


@dataclass(frozen=True, kw_only=True, eq=False)
class ReadingPlan:
    """What every rank of ``layout`` reads.

    ``kinds`` say of every tensor of ``chunks`` what it is, for people; ``parts`` whether it is of WEIGHTS or OPTIMIZER.
    ``left_out`` is why optimizer state that the checkpoint has is not in the plan, if that is so.
    """

    path: Path
    config_from: str
    layout: ParallelLayout
    files: tuple[str, ...]
    chunks: ChunkList
    kinds: tuple[str, ...]
    parts: tuple[str, ...]
    groups: tuple[RankReads, ...]
    left_out: str | None = None

    @property
    def has_optimizer(self) -> bool:
        """Whether optimizer state is in the plan."""
        return OPTIMIZER in self.parts

    @cached_property
    def amounts(self) -> tuple[Amount, ...]:
        """What one rank of each group reads."""
        return self.amounts_of(WEIGHTS, OPTIMIZER)

    @cached_property
    def total(self) -> Amount:
        """What all ranks read together; ``num_chunks`` are those that any rank reads."""
        return self.total_of(WEIGHTS, OPTIMIZER)

    def amounts_of(self, *parts: str) -> tuple[Amount, ...]:
        """What one rank of each group reads of these parts."""
        return tuple(self._amount([(group.reads, 1)], parts) for group in self.groups)

    def total_of(self, *parts: str) -> Amount:
        """What all ranks read together of these parts."""
        return self._amount([(group.reads, len(group.ranks)) for group in self.groups], parts)

    def _amount(self, times: Sequence[tuple[ChunkReads, int]], parts: Sequence[str]) -> Amount:
        """The sum of reads, each so many times. Takes as many steps as there are reads, not as there are chunks."""
        is_part = np.array([part in parts for part in self.parts], dtype=bool)
        needed_bytes = num_reads = 0
        seen: list[IntArray] = []
        read: list[IntArray] = []
        for reads, count in times:
            rows = np.flatnonzero(is_part[self.chunks.tensors[reads.chunks]])
            needed_bytes += int(reads.needed_bytes[rows].sum()) * count
            num_reads += len(rows) * count
            seen.append(reads.chunks[rows])
            read.append(reads.read_bytes[rows] * count)
        chunks, place = np.unique(np.concatenate(seen), return_inverse=True)
        files, file = np.unique(self.chunks.files[chunks], return_inverse=True)
        of_files = np.zeros(len(files), dtype=np.int64)
        np.add.at(of_files, file[place], np.concatenate(read))  # exact, where bincount's weights are floats
        file_bytes = dict(zip((self.files[number] for number in files), of_files.tolist(), strict=True))
        return Amount(
            needed_bytes=needed_bytes,
            read_bytes=sum(file_bytes.values()),
            num_reads=num_reads,
            num_chunks=len(chunks),
            file_bytes=file_bytes,
        )

    @property
    def stored_bytes(self) -> int:
        """Size of the stored tensors that are read."""
        return int(self.chunks.num_bytes.sum())

    @property
    def reads_only_whole_chunks(self) -> bool:
        """Whether no rank reads a byte that it does not need."""
        return self.total.read_bytes == self.total.needed_bytes

    def verdict(self) -> str:
        """The plan in a sentence."""
        if self.reads_only_whole_chunks:
            return "Every rank reads only what it needs: whole chunks."
        told, worst = (factor(each) for each in (self.total.amplification, self._worst))
        worst_told = f" (the worst {worst})" if worst != told else ""
        return f"The ranks read {told} what they need{worst_told}; `dist-ckpt-mistral reshard` would make it 1.0."

    @property
    def _worst(self) -> float:
        return max(amount.amplification or 0 for amount in self.amounts)

    def to_json(self) -> dict[str, Any]:
        """Plain values, stable within ``JSON_VERSION``: totals, then every rank."""
        amounts = zip(self.amounts, self.amounts_of(WEIGHTS), self.amounts_of(OPTIMIZER), strict=True)
        ranks = [
            {
                "rank": rank,
                "pipeline_stage": group.stage,
                "layers": list(group.layers),
                "reads_like": group.ranks[0],
                **self._amount_json(*amount),
            }
            for group, amount in zip(self.groups, amounts, strict=True)
            for rank in group.ranks
        ]
        return {
            "json_version": JSON_VERSION,
            "path": str(self.path),
            "config_from": self.config_from,
            "layout": asdict(self.layout),
            "verdict": self.verdict(),
            "left_out": self.left_out,
            "stored_bytes": self.stored_bytes,
            "total": self._amount_json(self.total, self.total_of(WEIGHTS), self.total_of(OPTIMIZER)),
            "ranks": sorted(ranks, key=lambda each: int(each["rank"])),
        }

    def _amount_json(self, both: Amount, weights: Amount, optimizer: Amount) -> dict[str, Any]:
        parts = {WEIGHTS: weights.to_json(), OPTIMIZER: optimizer.to_json() if self.has_optimizer else None}
        return {**both.to_json(), **parts}


def factor(amplification: float | None) -> str:
    """``3.9 times``, with as many digits as tell it from 1."""
    if amplification is None:
        return "nothing of"
    digits = 1 if amplification == 1 or amplification >= _CLEARLY_MORE else 4
    return f"{amplification:.{digits}f} times"
