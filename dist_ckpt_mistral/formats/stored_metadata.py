"""The chunks of a checkpoint as columns of numbers: what is described, and which archive or bare file holds what.

There may be millions of chunks, most of them of optimizer state: they are never objects of their own, and only the
tensors that are asked for are looked at more closely.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from dist_ckpt_mistral.formats.torch_dist.common_state import Entry
from dist_ckpt_mistral.gather import dtypes
from dist_ckpt_mistral.gather.boxes import IntArray, ascending
from dist_ckpt_mistral.gather.dtypes import Shape
from dist_ckpt_mistral.messages import listed


class Archives(NamedTuple):
    """Archives as columns: ``lengths[i]`` bytes from byte ``positions[i]`` on, in file number ``files[i]``.

    Plain arrays, because who only looks at names and shapes need not wait for numpy.
    """

    files: array[int]
    positions: array[int]
    lengths: array[int]


class Chunks(NamedTuple):
    """The chunks of one tensor as columns, in ascending order of their offsets.

    ``offsets`` and ``shapes`` are in elements, ``[chunks, ndim]``; the others say where the archive of each lies.
    """

    offsets: IntArray
    shapes: IntArray
    files: IntArray
    positions: IntArray
    lengths: IntArray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StoredTensor:
    """One tensor: torch dtype name, shape in elements, the chunks that are described, and what is stored of them.

    ``offsets`` and ``shapes`` are those of ``Chunks``, one chunk behind the other. Archive ``archives[i]`` of the
    checkpoint is said to hold the chunk at ``stored_offsets``. Chunks are those of ``stored_shape``, which is another
    than ``global_shape`` where the tensor is stored as blocks (gather/flat_ranges.py).
    """

    name: str
    dtype: str
    global_shape: Shape
    stored_shape: Shape
    num_chunks: int
    offsets: array[int]
    shapes: array[int]
    stored_offsets: array[int]
    archives: array[int]

    @property
    def num_bytes(self) -> int:
        """Size of the global tensor; 0 for a dtype that this package does not know."""
        known = self.dtype in dtypes.KNOWN_DTYPES
        return math.prod(self.global_shape) * dtypes.itemsize_bytes(self.dtype) if known else 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StoredMetadata:
    """Everything by key. ``file_bytes`` says where the last archive of each file ends; files count in that order.

    ``folders`` are the directories beside the metadata that belong to the format.
    """

    file_bytes: Mapping[str, int]
    tensors: Mapping[str, StoredTensor]
    objects: Mapping[str, Entry]
    archives: Archives = field(repr=False)
    folders: frozenset[str] = frozenset()

    def chunks(self, name: str) -> Chunks:
        """All chunks of a tensor. Raises ValueError unless those described are those stored, each once."""
        tensor = self.tensors[name]
        offsets, shapes = (_boxes(tensor, each, tensor.num_chunks) for each in (tensor.offsets, tensor.shapes))
        stored = _boxes(tensor, tensor.stored_offsets, len(tensor.archives))
        order, stored_order = ascending(offsets), ascending(stored)
        _require_all_stored(offsets[order], stored[stored_order], name)
        archives = np.asarray(tensor.archives)[stored_order]
        files, positions, lengths = (np.asarray(column)[archives] for column in self.archives)
        return Chunks(offsets[order], shapes[order], files, positions, lengths)


def _boxes(tensor: StoredTensor, column: array[int], count: int) -> IntArray:
    """A column as ``[count, ndim]``: its boxes have the axes of the tensor."""
    return np.asarray(column).reshape(count, len(tensor.stored_shape))


def _require_all_stored(described: IntArray, stored: IntArray, name: str) -> None:
    """Raise ValueError unless two ascending arrays of offsets are the same, and each stands there once."""
    if described.shape == stored.shape and (described == stored).all() and not (stored[1:] == stored[:-1]).all(1).any():
        return
    in_metadata, in_files = (Counter(map(tuple, offsets.tolist())) for offsets in (described, stored))
    faults = {
        "stored nowhere": in_metadata.keys() - in_files,
        "stored but not described": in_files.keys() - in_metadata,
        "described more than once": {offset for offset, count in in_metadata.items() if count > 1},
        "stored more than once": {offset for offset, count in in_files.items() if count > 1},
    }
    told = (
        f"{len(at)} are {what}, at {listed([*map(str, map(list, sorted(at)))])}" for what, at in faults.items() if at
    )
    raise ValueError(f"of the chunks of {name!r} {'; '.join(told)}")
