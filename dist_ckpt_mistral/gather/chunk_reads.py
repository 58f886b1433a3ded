"""Which stored chunks a reader of boxes loads, and how much of each it needs. Pure: boxes in, numbers out.

torch DCP's ``FileSystemReader.read_data`` loads the whole stored tensor for every pair of a wanted box and a chunk that
meets it, and narrows afterwards (torch/distributed/checkpoint/filesystem.py, 2.13 and 2.14); Megatron's load strategies
use it as it is (megatron-core dist_checkpointing/strategies/torch.py, 0.16 and 0.19). So a chunk is read whole however
little of it is needed, and once for each box that it meets.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dist_ckpt_mistral.gather import dtypes
from dist_ckpt_mistral.gather.boxes import IntArray
from dist_ckpt_mistral.gather.dtypes import Shape
from dist_ckpt_mistral.gather.index import TensorIndex


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
        met = tensor.meeting(lows, highs)
        numbers.append(chunks.places[name][met.chunk])
        needed.append((met.high - met.low).prod(axis=1) * dtypes.itemsize_bytes(tensor.dtype))
    read = _joined(numbers)
    return ChunkReads(chunks=read, needed_bytes=_joined(needed), read_bytes=chunks.num_bytes[read])
