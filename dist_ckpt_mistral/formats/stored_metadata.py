"""Chunk boxes as a checkpoint's metadata describes them, and the byte range that stores each.

A large checkpoint has a million chunks, most of them of optimizer state. They are kept as columns of numbers, never as
objects, and a tensor's columns are checked against each other only when somebody asks for its chunks.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from dist_ckpt_mistral.formats.torch_dist.common_state import Entry
from dist_ckpt_mistral.gather import dtypes
from dist_ckpt_mistral.gather.boxes import IntArray, ascending
from dist_ckpt_mistral.gather.dtypes import Shape
from dist_ckpt_mistral.messages import listed


def object_key(key: str, index: Shape, shape: Shape) -> str:
    """The key of the object at ``index`` in an array of objects of this shape (mcore mapping.py, 0.12 and newer)."""
    return f"{key}/shard_{'.'.join(map(str, index))}_{'.'.join(map(str, shape))}"


class Archives(NamedTuple):
    """The byte ranges that a checkpoint stores, as int64 columns ``[archives]``.

    Archive ``i`` is the ``lengths[i]`` bytes from byte ``positions[i]`` on of file number ``files[i]``: in
    ``torch_dist`` a ``torch.save`` archive, in ``zarr`` a bare chunk.
    """

    files: IntArray
    positions: IntArray
    lengths: IntArray


class Chunks(NamedTuple):
    """The chunks of one tensor as int64 columns, in ascending order of their offsets.

    ``offsets`` and ``shapes`` (``[chunks, ndim]``) are in elements; the other columns place each chunk's archive.
    """

    offsets: IntArray
    shapes: IntArray
    files: IntArray
    positions: IntArray
    lengths: IntArray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StoredTensor:
    """One tensor as the metadata describes it: torch dtype name, shapes in elements, and its chunks.

    ``offsets`` and ``shapes`` (``[chunks, ndim]``) are the boxes that are described. Archive ``archives[i]`` of the
    checkpoint is said to hold the chunk that begins at ``stored_offsets[i]``. Boxes lie in ``stored_shape``. That
    differs from ``global_shape`` where Megatron stored the tensor as blocks (``in_own_shape`` in gather/index.py).
    """

    name: str
    dtype: str
    global_shape: Shape
    stored_shape: Shape
    offsets: IntArray
    shapes: IntArray
    stored_offsets: IntArray
    archives: IntArray

    @property
    def num_chunks(self) -> int:
        """Number of described chunks."""
        return len(self.offsets)

    @property
    def num_bytes(self) -> int:
        """Size of the global tensor; 0 for a dtype that this package does not know."""
        known = self.dtype in dtypes.KNOWN_DTYPES
        return math.prod(self.global_shape) * dtypes.itemsize_bytes(self.dtype) if known else 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StoredMetadata:
    """All tensors and objects of a checkpoint by key, and its data files.

    ``file_bytes`` gives the end of the last archive in each file, in bytes; file numbers are positions in that order.
    ``folders`` are the directories beside the metadata that belong to the format.
    """

    file_bytes: Mapping[str, int]
    tensors: Mapping[str, StoredTensor]
    objects: Mapping[str, Entry]
    archives: Archives = field(repr=False)
    folders: frozenset[str] = frozenset()

    def chunks(self, name: str) -> Chunks:
        """All chunks of a tensor. Raises ValueError unless each described chunk is stored once, and no other is."""
        tensor = self.tensors[name]
        order, stored_order = ascending(tensor.offsets), ascending(tensor.stored_offsets)
        offsets = tensor.offsets[order]
        _require_all_stored(offsets, tensor.stored_offsets[stored_order], name)
        archives = tensor.archives[stored_order]
        return Chunks(offsets, tensor.shapes[order], *(column[archives] for column in self.archives))


def _require_all_stored(described: IntArray, stored: IntArray, name: str) -> None:
    """Raise ValueError unless two ascending arrays of offsets are equal and have no row twice."""
    if described.shape == stored.shape and (described == stored).all() and not (stored[1:] == stored[:-1]).all(1).any():
        return
    in_metadata, in_files = (Counter(map(tuple, offsets.tolist())) for offsets in (described, stored))
    faults = {
        "stored nowhere": in_metadata.keys() - in_files,
        "stored but not described": in_files.keys() - in_metadata,
        "described more than once": {offset for offset, count in in_metadata.items() if count > 1},
        "stored more than once": {offset for offset, count in in_files.items() if count > 1},
    }
    problems = (
        f"{len(offsets)} {fault}, at {listed([str([*offset]) for offset in sorted(offsets)])}"
        for fault, offsets in faults.items()
        if offsets
    )
    raise ValueError(f"chunks of {name!r}: {'; '.join(problems)}")
