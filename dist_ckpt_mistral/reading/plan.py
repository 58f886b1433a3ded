"""What every rank of a layout reads of a stored checkpoint, in numbers.

A rank reads what ``dist_checkpointing.load`` makes it read without ``--ckpt-fully-parallel-load``: every replica all of
its boxes, and of each stored chunk that a box meets the whole (gather/chunk_reads.py says why).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from dist_ckpt_mistral.gather.chunk_reads import ChunkList, ChunkReads
from dist_ckpt_mistral.model.parallel_layout import ParallelLayout

#: Version of the JSON that ``plan --json`` prints; fields are only ever added under one version.
JSON_VERSION: Final = 1
#: From here on, one digit tells a factor from 1.
_CLEARLY_MORE: Final = 1.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Amount:
    """How much is read. ``file_bytes`` are the bytes read of every file that is touched, ``num_reads`` the chunk loads.

    All bytes are of tensors, without what the file format adds.
    """

    needed_bytes: int
    loaded_bytes: int
    num_reads: int
    num_chunks: int
    file_bytes: Mapping[str, int]

    @property
    def amplification(self) -> float | None:
        """Bytes read for each byte needed; None where nothing is needed."""
        return self.loaded_bytes / self.needed_bytes if self.needed_bytes else None

    def to_json(self) -> dict[str, Any]:
        """Plain values, stable within ``JSON_VERSION``."""
        return {
            "needed_bytes": self.needed_bytes,
            "read_bytes": self.loaded_bytes,
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
    """What every rank of ``layout`` reads. ``kinds`` say of every tensor of ``chunks`` what it is, for people."""

    path: Path
    config_from: str
    layout: ParallelLayout
    files: tuple[str, ...]
    chunks: ChunkList
    kinds: tuple[str, ...]
    groups: tuple[RankReads, ...]

    @cached_property
    def amounts(self) -> tuple[Amount, ...]:
        """What one rank of each group reads."""
        return tuple(self._amount(group.reads) for group in self.groups)

    def _amount(self, reads: ChunkReads) -> Amount:
        by_file: dict[str, int] = defaultdict(int)
        for file, num_bytes in zip(self.chunks.files[reads.chunks].tolist(), reads.loaded_bytes.tolist(), strict=True):
            by_file[self.files[file]] += num_bytes
        return Amount(
            needed_bytes=int(reads.needed_bytes.sum()),
            loaded_bytes=int(reads.loaded_bytes.sum()),
            num_reads=len(reads.chunks),
            num_chunks=len(set(reads.chunks.tolist())),
            file_bytes={name: by_file[name] for name in self.files if name in by_file},
        )

    @cached_property
    def total(self) -> Amount:
        """What all ranks read together; ``num_chunks`` are those that any rank reads."""
        by_file: dict[str, int] = defaultdict(int)
        for group, amount in zip(self.groups, self.amounts, strict=True):
            for name, num_bytes in amount.file_bytes.items():
                by_file[name] += num_bytes * len(group.ranks)
        counted = [(amount, len(group.ranks)) for group, amount in zip(self.groups, self.amounts, strict=True)]
        return Amount(
            needed_bytes=sum(amount.needed_bytes * ranks for amount, ranks in counted),
            loaded_bytes=sum(amount.loaded_bytes * ranks for amount, ranks in counted),
            num_reads=sum(amount.num_reads * ranks for amount, ranks in counted),
            num_chunks=len({chunk for group in self.groups for chunk in group.reads.chunks.tolist()}),
            file_bytes={name: by_file[name] for name in self.files if name in by_file},
        )

    @property
    def stored_bytes(self) -> int:
        """Size of the stored tensors that are read."""
        return int(self.chunks.num_bytes.sum())

    @property
    def reads_only_whole_chunks(self) -> bool:
        """Whether no rank reads a byte that it does not need."""
        return self.total.loaded_bytes == self.total.needed_bytes

    def verdict(self) -> str:
        """The plan in a sentence."""
        if self.reads_only_whole_chunks:
            return "Every rank reads only what it needs: whole chunks."
        told = f"The ranks read {factor(self.total.amplification)} what they need"
        worst = factor(max(amount.amplification or 0 for amount in self.amounts))
        told += f" (the worst {worst})" if worst != factor(self.total.amplification) else ""
        return f"{told}; `dist-ckpt-mistral reshard` to this layout would make it 1.0."

    def to_json(self) -> dict[str, Any]:
        """Plain values, stable within ``JSON_VERSION``: totals, then every rank."""
        ranks = [
            {
                "rank": rank,
                "pipeline_stage": group.stage,
                "layers": list(group.layers),
                "reads_like": group.ranks[0],
                **amount.to_json(),
            }
            for group, amount in zip(self.groups, self.amounts, strict=True)
            for rank in group.ranks
        ]
        return {
            "json_version": JSON_VERSION,
            "path": str(self.path),
            "config_from": self.config_from,
            "layout": asdict(self.layout),
            "verdict": self.verdict(),
            "stored_bytes": self.stored_bytes,
            "total": self.total.to_json(),
            "ranks": sorted(ranks, key=lambda each: int(each["rank"])),
        }


def factor(amplification: float | None) -> str:
    """``3.9 times``, with as many digits as tell it from 1."""
    if amplification is None:
        return "nothing of"
    digits = 1 if amplification == 1 or amplification >= _CLEARLY_MORE else 4
    return f"{amplification:.{digits}f} times"
