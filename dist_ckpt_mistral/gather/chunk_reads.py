"""The stored chunks that overlap with wanted boxes, where each of them is read whole."""

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
from dist_ckpt_mistral.messages import concise_repr


class WantedBox(NamedTuple):
    """A box of a stored tensor that a rank needs, in elements. Elements outside of the tensor are not read."""

    tensor: str
    offset: Shape
    shape: Shape


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ChunkList:
    """All chunks of an index as columns, ordered by file and position.

    Args:
        names: Names of the stored tensors.
        tensors: For each chunk, the number of its tensor in ``names``.
        files: For each chunk, the number of its file in the index.
        num_bytes: For each chunk, the size of its data.
        places: Name of a tensor -> for each of its chunks, the number of the chunk in the columns.
    """

    names: tuple[str, ...]
    tensors: IntArray
    files: IntArray
    num_bytes: IntArray
    places: dict[str, IntArray]

    __repr__ = concise_repr


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ChunkReads:
    """The reads of one rank as columns: one row for every overlapping box and chunk.

    Args:
        chunks: Number of the chunk in a ``ChunkList``.
        needed_bytes: Bytes of the chunk that the box needs.
        read_bytes: Size of the chunk's data in bytes, which is read whole.
    """

    chunks: IntArray
    needed_bytes: IntArray
    read_bytes: IntArray

    __repr__ = concise_repr

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        """Yield ``(chunk, needed_bytes, read_bytes)`` for every read."""
        return zip(self.chunks.tolist(), self.needed_bytes.tolist(), self.read_bytes.tolist(), strict=True)


def chunk_list(index: TensorIndex) -> ChunkList:
    """The chunks of all tensors in ``index``."""
    tensors = list(index.tensors.values())
    counts = [tensor.num_chunks for tensor in tensors]
    files = _joined([tensor.files for tensor in tensors])
    order = np.lexsort((_joined([tensor.positions for tensor in tensors]), files))
    sizes = [tensor.shapes.prod(axis=1, dtype=np.int64) * dtypes.itemsize_bytes(tensor.dtype) for tensor in tensors]
    places = np.empty(len(order), dtype=np.int64)
    places[order] = np.arange(len(order))
    starts = np.cumsum([0, *counts])
    return ChunkList(
        names=tuple(tensor.name for tensor in tensors),
        tensors=np.repeat(np.arange(len(tensors)), counts)[order],
        files=files[order],
        num_bytes=_joined(sizes)[order],
        places={
            tensor.name: places[start : start + count]
            for tensor, start, count in zip(tensors, starts, counts, strict=False)
        },
    )


def _joined(columns: list[IntArray]) -> IntArray:
    return np.concatenate([np.empty(0, dtype=np.int64), *columns])


def chunk_reads(index: TensorIndex, chunks: ChunkList, boxes: Iterable[WantedBox]) -> ChunkReads:
    """The reads for ``boxes`` of tensors in ``index``, whose chunks are ``chunks``."""
    by_tensor: dict[str, list[WantedBox]] = defaultdict(list)
    for box in boxes:
        by_tensor[box.tensor].append(box)
    numbers, needed = [], []
    for name, boxes_of_tensor in by_tensor.items():
        tensor = index.tensors[name]
        lows = np.array([box.offset for box in boxes_of_tensor], dtype=np.int64)
        highs = np.minimum(lows + np.array([box.shape for box in boxes_of_tensor]), tensor.global_shape)
        overlaps = tensor.overlaps(lows, highs)
        numbers.append(chunks.places[name][overlaps.chunk])
        needed.append((overlaps.high - overlaps.low).prod(axis=1) * dtypes.itemsize_bytes(tensor.dtype))
    read = _joined(numbers)
    return ChunkReads(chunks=read, needed_bytes=_joined(needed), read_bytes=chunks.num_bytes[read])
