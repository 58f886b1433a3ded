"""Writing Megatron ``torch_dist`` checkpoints that every megatron-core from 0.12 on loads, without torch and Megatron.

First the layout (which archive where), then the data through a byte plan, then what stands around it.
Five-element ``TensorProperties`` and a ``common.pt`` are what all versions read (torch 2.6 to 2.15).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dist_ckpt_mistral.formats import pickle_records, torch_archive_writer
from dist_ckpt_mistral.formats.pickle_records import Call, Global, Instance, Items, Pairs
from dist_ckpt_mistral.formats.torch_archive_writer import ArchiveLayout
from dist_ckpt_mistral.gather.tensor_index import IndexedTensor, TensorIndex
from dist_ckpt_mistral.shapes import Shape
from dist_ckpt_mistral.storage import TargetFile

#: The content of metadata.json (mcore dist_checkpointing/core.py, 0.12 to 0.16; later versions ignore the last two).
BACKEND_JSON: Final = json.dumps(
    {
        "sharded_backend": "torch_dist",
        "sharded_backend_version": 1,
        "common_backend": "torch",
        "common_backend_version": 1,
    }
).encode()

_METADATA: Final = "torch.distributed.checkpoint.metadata"
_SIZE: Final = Global("torch", "Size")
_CHUNK: Final = Global(_METADATA, "ChunkStorageMetadata")
_INDEX: Final = Global(_METADATA, "MetadataIndex")
_INFO: Final = Global("torch.distributed.checkpoint.filesystem", "_StorageInfo")


@dataclass(frozen=True, slots=True, kw_only=True)
class NewChunk:
    """One chunk to write: a box of the global tensor ``mcore_key``, in elements, into data file number ``file``."""

    mcore_key: str
    dtype: str
    global_shape: Shape
    offset: Shape
    shape: Shape
    file: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Placed:
    """A chunk and the archive around it, which starts at byte ``position`` of its file."""

    chunk: NewChunk
    position: int
    archive: ArchiveLayout

    @property
    def data_position(self) -> int:
        return self.position + self.archive.data_offset


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointLayout:
    """Where everything of a new checkpoint lies: chunks in their order of files, then one archive for all objects."""

    file_names: tuple[str, ...]
    file_bytes: tuple[int, ...]
    placed: tuple[_Placed, ...]
    object_keys: tuple[str, ...]
    object_position: int

    def index(self, directory: Path) -> TensorIndex:
        """The chunks as a target of a byte plan."""
        by_key: dict[str, list[_Placed]] = {}
        for placed in self.placed:
            by_key.setdefault(placed.chunk.mcore_key, []).append(placed)
        tensors = {
            key: IndexedTensor.build(
                key,
                group[0].chunk.dtype,
                group[0].chunk.global_shape,
                [(p.chunk.offset, p.chunk.shape, p.chunk.file, p.data_position) for p in group],
            )
            for key, group in by_key.items()
        }
        return TensorIndex(files=tuple(directory / name for name in self.file_names), tensors=tensors)

    def write_around(self, targets: Mapping[int, TargetFile], crc32_at: Mapping[tuple[int, int], int]) -> None:
        """Write what stands around the data; ``targets`` are by file, ``crc32_at`` by file and position of the data."""
        for placed in self.placed:
            target, crc32 = targets[placed.chunk.file], crc32_at[placed.chunk.file, placed.data_position]
            target.write(placed.position, placed.archive.head)
            target.write(placed.data_position + placed.archive.data_bytes, placed.archive.tail(crc32))
        targets[0].write(self.object_position, _EMPTY_OBJECT)

    def metadata(self) -> bytes:
        """The content of ``.metadata``."""
        by_key: dict[str, list[_Placed]] = {}
        for placed in self.placed:
            by_key.setdefault(placed.chunk.mcore_key, []).append(placed)
        described = [(key, _tensor_metadata(group)) for key, group in by_key.items()]
        described += [(key, Instance(Global(_METADATA, "BytesStorageMetadata"), {})) for key in self.object_keys]
        fields = {
            "state_dict_metadata": Pairs(described),
            "planner_data": None,
            "storage_data": Pairs(self._storage_data()),
            "storage_meta": None,
        }
        return pickle_records.dumps(Instance(Global(_METADATA, "Metadata"), fields))

    def _storage_data(self) -> Iterator[tuple[Instance, Instance]]:
        for placed in self.placed:
            index = {"fqn": placed.chunk.mcore_key, "offset": _size(placed.chunk.offset)}
            info = _info(self.file_names[placed.chunk.file], placed.position, placed.archive.num_bytes)
            yield Instance(_INDEX, index), info
        for key in self.object_keys:
            yield Instance(_INDEX, {"fqn": key}), _info(self.file_names[0], self.object_position, len(_EMPTY_OBJECT))


#: The payload of an absent Transformer Engine extra state. One archive serves all keys: entries may share bytes.
_EMPTY_OBJECT: Final = torch_archive_writer.object_archive([None])


def _tensor_metadata(group: Sequence[_Placed]) -> Instance:
    properties = (
        Global("torch", group[0].chunk.dtype),
        Call(Global("torch.serialization", "_get_layout"), ("torch.strided",)),
        False,  # requires_grad
        Call(Global(_METADATA, "_MEM_FORMAT_ENCODING"), (0,)),
        False,  # pin_memory
    )
    chunks = ({"offsets": _size(placed.chunk.offset), "sizes": _size(placed.chunk.shape)} for placed in group)
    fields = {
        "properties": Instance(Global(_METADATA, "TensorProperties"), properties),
        "size": _size(group[0].chunk.global_shape),
        "chunks": Items(Instance(_CHUNK, chunk) for chunk in chunks),
    }
    return Instance(Global(_METADATA, "TensorStorageMetadata"), fields)


def _size(shape: Shape) -> Call:
    return Call(_SIZE, (shape,))


def _info(file: str, offset: int, num_bytes: int) -> Instance:
    return Instance(_INFO, {"relative_path": file, "offset": offset, "length": num_bytes})


def object_key(key: str, index: int, count: int) -> str:
    """The name under which element ``index`` of ``count`` of a sharded object is stored (mcore mapping.py, 0.12+)."""
    return f"{key}/shard_{index}_{count}"


def lay_out(chunks: Iterable[NewChunk], object_keys: Iterable[str], *, num_files: int) -> CheckpointLayout:
    """Place every chunk behind the one before it in its file, and the shared object archive behind the first file's."""
    ends = [0] * num_files
    placed = []
    for chunk in chunks:
        archive = ArchiveLayout.for_tensor(chunk.dtype, chunk.shape, ends[chunk.file])
        placed.append(_Placed(chunk=chunk, position=ends[chunk.file], archive=archive))
        ends[chunk.file] += archive.num_bytes
    object_position = ends[0]
    ends[0] += len(_EMPTY_OBJECT)
    return CheckpointLayout(
        file_names=tuple(f"__{rank}_0.distcp" for rank in range(num_files)),
        file_bytes=tuple(ends),
        placed=tuple(placed),
        object_keys=tuple(object_keys),
        object_position=object_position,
    )
