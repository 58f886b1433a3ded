"""The chunks and bytes that every rank of a layout reads from a checkpoint, stored or only planned.

The plan assumes Megatron's ``dist_checkpointing.load`` without ``--ckpt-fully-parallel-load``, which is off by default
(megatron-core 0.19, training/config/training_config.py): every replica reads all of its boxes itself. For every pair of
a box and a chunk that overlap, the whole chunk is read. torch DCP's ``FileSystemReader.read_data`` loads the stored
tensor and then narrows it (torch/distributed/checkpoint/filesystem.py, 2.13 and 2.14), and Megatron uses it unchanged
(megatron-core dist_checkpointing/strategies/torch.py, 0.16 and 0.19). With ``--ckpt-fully-parallel-load`` the replicas
share the boxes (fully_parallel.py beside it): bytes needed and bytes read become fewer alike.

A chunk is never larger than one layer or one expert of a tensor. Pipeline and expert parallelism hand out whole layers
and experts, so only tensor parallelism makes ranks read more than they need.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np

from dist_ckpt_mistral.gather.boxes import IntArray
from dist_ckpt_mistral.gather.chunk_reads import ChunkList, ChunkReads, WantedBox, chunk_list, chunk_reads
from dist_ckpt_mistral.gather.index import TensorIndex
from dist_ckpt_mistral.mapping.checkpoint_map import CheckpointMap
from dist_ckpt_mistral.mapping.chunking import SPEC
from dist_ckpt_mistral.messages import command_line, concise_repr
from dist_ckpt_mistral.model.layout.layout import ParallelLayout, RankCoordinates
from dist_ckpt_mistral.model.layout.local_tensors import local_tensors, require_divisible
from dist_ckpt_mistral.model.table.entries import kind_of

#: Version of the JSON that ``plan --json`` prints; fields are only ever added under one version.
JSON_VERSION: Final = 1
#: The parts of a checkpoint, by their names in the JSON.
WEIGHTS: Final = "weights"
OPTIMIZER: Final = "optimizer"
#: The smallest factor that one decimal digit distinguishes from 1.
_CLEARLY_MORE: Final = 1.05
#: From this many bytes read per byte needed on, a plan names the remedy. A tensor parallelism above that of the chunks
#: gives 2 or more. Vocabulary padding that differs gives less than 1.1, and the dense part of a Mixtral whose experts
#: are read whole less than 1.3: too little for writing a checkpoint again.
MUCH_MORE: Final = 1.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Amount:
    """The amount of data that one rank or several ranks need and read. Bytes are bytes of tensor data.

    Args:
        needed_bytes: Bytes that the ranks hold.
        read_bytes: Bytes that they read.
        num_reads: Number of reads of a chunk.
        num_chunks: Number of different chunks that are read.
        file_bytes: File -> bytes that are read from it.
    """

    needed_bytes: int
    read_bytes: int
    num_reads: int
    num_chunks: int
    file_bytes: Mapping[str, int]

    __repr__ = concise_repr

    @property
    def amplification(self) -> float | None:
        """Bytes read per byte needed; None if no byte is needed."""
        return self.read_bytes / self.needed_bytes if self.needed_bytes else None

    def to_json(self) -> dict[str, Any]:
        """An amount in ``plan --json``, in JSON types."""
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
    """A group of ranks with the same boxes, which all read the same chunks: copies by data or context parallelism.

    Args:
        ranks: The ranks, in ascending order.
        stage: Their pipeline stage.
        layers: The layers of that stage.
        reads: The reads of one of the ranks.
    """

    ranks: tuple[int, ...]
    stage: int
    layers: tuple[int, ...]
    reads: ChunkReads

    __repr__ = concise_repr


@dataclass(frozen=True, kw_only=True, eq=False)
class ReadingPlan:
    """The reads of every rank of ``layout``, as ``plan_reading`` returns them.

    Args:
        path: Directory of the iteration.
        config_from: Source of the model configuration, in words.
        layout: The layout that would load the checkpoint.
        files: Names of the files that store ``chunks``.
        chunks: All stored chunks of the planned tensors.
        kinds: Kind of each tensor in ``chunks.names``, in words, such as ``attention``.
        parts: ``WEIGHTS`` or ``OPTIMIZER`` for each tensor in ``chunks.names``.
        groups: Groups of ranks that read the same, ordered by their first rank.
        left_out: Reason why stored optimizer state is not in the plan, or None.
        reshard_options: Words of the command ``reshard`` besides the layout, without which it refuses the checkpoint or
            writes more than was planned.
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
    reshard_options: tuple[str, ...] = ()

    __repr__ = concise_repr

    @property
    def has_optimizer(self) -> bool:
        """Whether the plan includes optimizer state."""
        return OPTIMIZER in self.parts

    @cached_property
    def amounts(self) -> tuple[Amount, ...]:
        """The amount that one rank of each group reads."""
        return self.amounts_of(WEIGHTS, OPTIMIZER)

    @cached_property
    def total(self) -> Amount:
        """The sum of what all ranks read; ``num_chunks`` counts the chunks that at least one rank reads."""
        return self.total_of(WEIGHTS, OPTIMIZER)

    def amounts_of(self, *parts: str) -> tuple[Amount, ...]:
        """The amount that one rank of each group reads of these parts."""
        return tuple(self._amount([(group.reads, 1)], parts) for group in self.groups)

    def total_of(self, *parts: str) -> Amount:
        """The sum of what all ranks read of these parts."""
        return self._amount([(group.reads, len(group.ranks)) for group in self.groups], parts)

    def _amount(self, counted_reads: Sequence[tuple[ChunkReads, int]], parts: Sequence[str]) -> Amount:
        """The sum of reads, each multiplied by its count. Takes time in the number of reads, not of chunks."""
        is_part = np.array([part in parts for part in self.parts], dtype=bool)
        needed_bytes = num_reads = 0
        read_chunks: list[IntArray] = []
        read_bytes: list[IntArray] = []
        for reads, count in counted_reads:
            rows = np.flatnonzero(is_part[self.chunks.tensors[reads.chunks]])
            needed_bytes += int(reads.needed_bytes[rows].sum()) * count
            num_reads += len(rows) * count
            read_chunks.append(reads.chunks[rows])
            read_bytes.append(reads.read_bytes[rows] * count)
        chunks, chunk_of_read = np.unique(np.concatenate(read_chunks), return_inverse=True)
        files, file_of_chunk = np.unique(self.chunks.files[chunks], return_inverse=True)
        sums = np.zeros(len(files), dtype=np.int64)
        np.add.at(sums, file_of_chunk[chunk_of_read], np.concatenate(read_bytes))  # exact, unlike bincount
        file_bytes = dict(zip((self.files[number] for number in files), sums.tolist(), strict=True))
        return Amount(
            needed_bytes=needed_bytes,
            read_bytes=sum(file_bytes.values()),
            num_reads=num_reads,
            num_chunks=len(chunks),
            file_bytes=file_bytes,
        )

    @property
    def stored_bytes(self) -> int:
        """Size of the planned tensors in the checkpoint."""
        return int(self.chunks.num_bytes.sum())

    @property
    def reads_only_whole_chunks(self) -> bool:
        """Whether every rank reads only bytes that it needs."""
        return self.total.read_bytes == self.total.needed_bytes

    @property
    def reads_much_more(self) -> bool:
        """Whether the ranks together read at least 1.5 times what they need."""
        return (self.total.amplification or 0) >= MUCH_MORE

    @property
    def remedy(self) -> str | None:
        """The command that cuts the chunks for ``layout``, if the ranks read much more than they need; else None."""
        if not self.reads_much_more:
            return None
        words = ("dist-ckpt-mistral", "reshard", str(self.path), "OUT", *self.layout.options, *self.reshard_options)
        return command_line(words)

    def verdict(self) -> str:
        """The result of the plan in one sentence."""
        if self.reads_only_whole_chunks:
            return "Every rank reads only what it needs: whole chunks."
        overall = factor(self.total.amplification)
        worst = factor(max(amount.amplification or 0 for amount in self.amounts))
        exception = f" (the worst {worst})" if worst != overall else ""
        much_more = "that is much more than necessary, and " if self.reads_much_more else ""
        remedy = "`dist-ckpt-mistral reshard` would make it 1.0."
        return f"The ranks read {overall} what they need{exception}; {much_more}{remedy}"

    def to_json(self) -> dict[str, Any]:
        """The content of ``plan --json``, in JSON types: totals, then every rank."""
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
            "remedy": self.remedy,
            "left_out": self.left_out,
            "stored_bytes": self.stored_bytes,
            "total": self._amount_json(self.total, self.total_of(WEIGHTS), self.total_of(OPTIMIZER)),
            "ranks": sorted(ranks, key=lambda rank: int(rank["rank"])),
        }

    def _amount_json(self, both: Amount, weights: Amount, optimizer: Amount) -> dict[str, Any]:
        parts = {WEIGHTS: weights.to_json(), OPTIMIZER: optimizer.to_json() if self.has_optimizer else None}
        return {**both.to_json(), **parts}


def plan_reads(
    layout: ParallelLayout,
    maps: Sequence[CheckpointMap],
    index: TensorIndex,
    *,
    path: Path,
    config_from: str,
    left_out: str | None = None,
    reshard_options: tuple[str, ...] = (),
) -> ReadingPlan:
    """Plan the reads of every rank of ``layout`` from the chunks in ``index``, stored or yet to be written.

    ``maps`` map the weights and, after them, the states of the optimizer. Other tensors of ``index`` are not read. The
    other arguments are fields of the plan. The layout must have passed ``check``.
    """
    require_divisible(layout, maps[0].table)
    maps = [replace(each, table=each.table.without_carried()) for each in maps]  # Megatron's part
    kinds = {name: kind_of(rule, each.state) for each in maps for name, rule, _ in each.tensors()}
    weights = set(maps[0].names())
    chunks = chunk_list(TensorIndex(files=index.files, tensors={name: index.tensors[name] for name in kinds}))
    return ReadingPlan(
        path=path,
        config_from=config_from,
        layout=layout,
        files=tuple(path.name for path in index.files),
        chunks=chunks,
        kinds=tuple(kinds[name] for name in chunks.names),
        parts=tuple(WEIGHTS if name in weights else OPTIMIZER for name in chunks.names),
        groups=tuple(_groups(layout, maps, index, chunks)),
        left_out=left_out,
        reshard_options=reshard_options,
    )


def _groups(
    layout: ParallelLayout, maps: Sequence[CheckpointMap], index: TensorIndex, chunks: ChunkList
) -> Iterator[RankReads]:
    """The groups of ranks with the same boxes, ordered by their first rank."""
    copies: dict[RankCoordinates, list[int]] = defaultdict(list)  # without data and context parallelism -> ranks
    for rank in range(layout.world_size):
        copies[replace(layout.coordinates(rank), cp=0, dp=0, dp_cp=0, edp=0)].append(rank)
    groups: dict[tuple[int, tuple[WantedBox, ...]], list[int]] = defaultdict(list)
    for coordinates, ranks in copies.items():
        boxes = tuple(box for each in maps for box in _wanted_boxes(layout, each, coordinates))
        groups[coordinates.pp, boxes] += ranks
    for (stage, boxes), ranks in groups.items():
        model_chunks = layout.model_chunks(maps[0].table.num_layers, stage)
        yield RankReads(
            ranks=tuple(sorted(ranks)),
            stage=stage,
            layers=tuple(layer for model_chunk in model_chunks for layer in model_chunk.layers),
            reads=chunk_reads(index, chunks, boxes),
        )


def _wanted_boxes(
    layout: ParallelLayout, checkpoint_map: CheckpointMap, coordinates: RankCoordinates
) -> Iterator[WantedBox]:
    """The boxes of a rank, by the checkpoint's own keys."""
    table, style = checkpoint_map.table, checkpoint_map.style
    for model_chunk in layout.model_chunks(table.num_layers, coordinates.pp):
        for tensor in local_tensors(layout, table, model_chunk, coordinates, style=style, spec=SPEC):
            names = checkpoint_map.spelling(tensor.mcore_key, tensor.index)
            for box in tensor.boxes:
                yield WantedBox(names[box.mcore_key], box.global_offset, box.shape)


def factor(amplification: float | None) -> str:
    """``3.9 times``, with enough digits to distinguish it from 1; ``nothing of`` for None."""
    if amplification is None:
        return "nothing of"
    digits = 1 if amplification == 1 or amplification >= _CLEARLY_MORE else 4
    return f"{amplification:.{digits}f} times"
