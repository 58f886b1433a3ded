"""Write Megatron ``torch_dist`` checkpoints that every megatron-core from 0.12 on loads, without torch and Megatron.

``lay_out`` places the archives in files, a byte plan copies the data into them, and ``CheckpointLayout`` writes the
bytes around the data and ``.metadata``. All versions read ``TensorProperties`` of five elements (torch 2.6 to 2.15).
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dist_ckpt_mistral.formats.checkpoint_directory import STEP_BYTES
from dist_ckpt_mistral.formats.pickles import writer
from dist_ckpt_mistral.formats.pickles.writer import Call, Global, Instance, LazyDict, LazyList
from dist_ckpt_mistral.formats.torch_dist import archive_writer
from dist_ckpt_mistral.formats.torch_dist.archive_writer import ArchiveLayout, pickled_archive, scalars_archive
from dist_ckpt_mistral.formats.torch_dist.metadata import GLOBAL_SHAPE, MCORE_DATA
from dist_ckpt_mistral.gather import dtypes
from dist_ckpt_mistral.gather.dtypes import Shape, TorchDtype
from dist_ckpt_mistral.gather.index import IndexedTensor, TensorIndex, as_range_of_blocks
from dist_ckpt_mistral.gather.parts import Around
from dist_ckpt_mistral.gather.plan import BytePlan

#: The content of metadata.json (mcore dist_checkpointing/core.py, 0.12 to 0.16; later versions ignore the last two).
BACKEND_JSON: Final = json.dumps(
    {
        "sharded_backend": "torch_dist",
        "sharded_backend_version": 1,
        "common_backend": "torch",
        "common_backend_version": 1,
    }
).encode()

#: The values of a train state beside ``step``, and their dtypes, in Bridge's order (training/checkpointing.py, 0.6.2).
#: All are zero where nothing was trained.
_OTHER_VALUES: Final[Mapping[str, str]] = {
    **dict.fromkeys(("consumed_train_samples", "skipped_train_samples", "consumed_valid_samples"), "int64"),
    "floating_point_operations_so_far": "float32",
    **dict.fromkeys(("do_train", "do_valid", "do_test"), "bool"),
}
_METADATA: Final = "torch.distributed.checkpoint.metadata"
_SIZE: Final = Global("torch", "Size")
_CHUNK: Final = Global(_METADATA, "ChunkStorageMetadata")
_INDEX: Final = Global(_METADATA, "MetadataIndex")
_INFO: Final = Global("torch.distributed.checkpoint.filesystem", "_StorageInfo")


@dataclass(frozen=True, slots=True, kw_only=True)
class NewChunk:
    """One chunk to write: a box (in elements) of the global tensor ``mcore_key``, into data file number ``file``.

    ``other_keys`` are further keys of the same bytes. ``as_block`` describes the chunk as Megatron's
    ``fully_sharded_model_space`` does (0.14; ``as_range_of_blocks`` in gather/index.py): the bytes are the same, the
    shapes in the metadata differ. All chunks of such a tensor must have one shape.
    """

    mcore_key: str
    dtype: str
    global_shape: Shape
    offset: Shape
    shape: Shape
    file: int
    other_keys: tuple[str, ...] = ()
    as_block: bool = False

    @property
    def described(self) -> tuple[Shape, Shape, Shape]:
        """Shape of the tensor, offset and shape of the chunk, all in elements, as the metadata says them."""
        if self.as_block:
            return as_range_of_blocks(self.global_shape, self.offset, self.shape)
        return self.global_shape, self.offset, self.shape


@dataclass(frozen=True, slots=True, kw_only=True)
class NewObject:
    """The archive of an object that is stored under ``keys``, in data file number ``file``.

    Its first ``copied_bytes`` bytes are copied by the byte plan, under the first key; ``rest`` follows them.
    """

    keys: tuple[str, ...]
    copied_bytes: int
    rest: bytes = b""
    file: int = 0

    @property
    def num_bytes(self) -> int:
        """Length of the archive in bytes."""
        return self.copied_bytes + len(self.rest)

    @classmethod
    def empty(cls, keys: Iterable[str]) -> NewObject:
        """Objects without content, such as absent extra states. One archive serves all keys."""
        return cls(keys=tuple(keys), copied_bytes=0, rest=_EMPTY_OBJECT)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Placed:
    """A chunk and the archive around it, which begins at byte ``position`` of its file."""

    chunk: NewChunk
    position: int
    archive: ArchiveLayout

    @property
    def data_position(self) -> int:
        """The byte of the file where the chunk's data begins."""
        return self.position + self.archive.data_offset


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointLayout:
    """The data files of a new checkpoint (names, sizes in bytes), and all chunks and (position, object) in them."""

    file_names: tuple[str, ...]
    file_bytes: tuple[int, ...]
    placed: tuple[_Placed, ...]
    objects: tuple[tuple[int, NewObject], ...]

    def index(self, directory: Path) -> TensorIndex:
        """The chunks, and the copied parts of objects, as the target of a byte plan into ``directory``."""
        by_key = self._by_key()
        tensors = {
            key: IndexedTensor.build(
                key,
                group[0].chunk.dtype,
                group[0].chunk.global_shape,
                [(p.chunk.offset, p.chunk.shape, p.chunk.file, p.data_position) for p in group],
            )
            for key, group in by_key.items()
        }
        for position, obj in self.objects:
            if obj.copied_bytes:
                key = obj.keys[0]
                tensors[key] = object_bytes(key, obj.copied_bytes, file=obj.file, position=position)
        return TensorIndex(files=tuple(directory / name for name in self.file_names), tensors=tensors)

    def file_sizes(self, directory: Path) -> dict[str, int]:
        """Path of each data file in ``directory`` -> its size in bytes."""
        return {str(directory / name): size for name, size in zip(self.file_names, self.file_bytes, strict=True)}

    def around(self, plan: BytePlan) -> Callable[[int], Iterator[Around]]:
        """A function that yields, for each file, the bytes around the data that ``plan`` copies into it."""
        number_at = {(segment.file, segment.position): number for number, segment in enumerate(plan.segments)}
        placed_in: dict[int, list[_Placed]] = defaultdict(list)
        for placed in self.placed:
            placed_in[placed.chunk.file].append(placed)

        def around_in(file: int) -> Iterator[Around]:
            for placed in placed_in[file]:
                archive, number = placed.archive, number_at[file, placed.data_position]
                yield Around.fixed(placed.position, archive.head)
                at = placed.data_position + archive.data_bytes
                yield Around(at, placed.position + archive.num_bytes - at, _tail(archive, number))
            for position, obj in self.objects:
                if obj.rest and obj.file == file:
                    yield Around.fixed(position + obj.copied_bytes, obj.rest)

        return around_in

    def metadata(self) -> bytes:
        """The content of ``.metadata``."""
        by_key = self._by_key()
        described = [
            (name, _tensor_metadata(group))
            for key, group in by_key.items()
            for name in (key, *group[0].chunk.other_keys)
        ]
        as_bytes = Instance(Global(_METADATA, "BytesStorageMetadata"), {})
        described += [(key, as_bytes) for _, obj in self.objects for key in obj.keys]
        fields: dict[str, Any] = {
            "state_dict_metadata": LazyDict(described),
            "planner_data": None,
            "storage_data": LazyDict(self._storage_data()),
            "storage_meta": None,
        }
        blocks = {key: group[0].chunk.global_shape for key, group in by_key.items() if group[0].chunk.as_block}
        if blocks:  # what Megatron 0.14 looks for then (dist_checkpointing/strategies/torch.py)
            fields[MCORE_DATA] = {key: {GLOBAL_SHAPE: _size(shape)} for key, shape in blocks.items()}
        return writer.dumps(Instance(Global(_METADATA, "Metadata"), fields))

    def _by_key(self) -> dict[str, list[_Placed]]:
        """The chunks of each tensor."""
        by_key: dict[str, list[_Placed]] = {}
        for placed in self.placed:
            by_key.setdefault(placed.chunk.mcore_key, []).append(placed)
        return by_key

    def _storage_data(self) -> Iterator[tuple[Instance, Instance]]:
        """Yield the ``MetadataIndex`` and ``_StorageInfo`` of every key of every archive."""
        for placed in self.placed:
            chunk, archive = placed.chunk, placed.archive
            for key in (chunk.mcore_key, *chunk.other_keys):
                index = {"fqn": key, "offset": _size(chunk.described[1])}
                info = _info(self.file_names[chunk.file], placed.position, archive.num_bytes)
                yield Instance(_INDEX, index), info
        for position, obj in self.objects:
            for key in obj.keys:
                yield Instance(_INDEX, {"fqn": key}), _info(self.file_names[obj.file], position, obj.num_bytes)


def _tail(archive: ArchiveLayout, number: int) -> Callable[[Mapping[int, int]], bytes]:
    """The end of an archive whose data is segment ``number``."""
    return lambda crc32_of: archive.tail(crc32_of.get(number, 0))  # of no data, it is 0


#: The payload of an absent Transformer Engine extra state. One archive serves all keys: entries may share bytes.
_EMPTY_OBJECT: Final = archive_writer.object_archive([None])


def _tensor_metadata(group: Sequence[_Placed]) -> Instance:
    """The ``TensorStorageMetadata`` of a tensor with the chunks ``group``."""
    properties = (
        Global("torch", group[0].chunk.dtype),
        Call(Global("torch.serialization", "_get_layout"), ("torch.strided",)),
        False,  # requires_grad
        Call(Global(_METADATA, "_MEM_FORMAT_ENCODING"), (0,)),
        False,  # pin_memory
    )
    described = (placed.chunk.described for placed in group)
    chunks = ({"offsets": _size(offset), "sizes": _size(shape)} for _, offset, shape in described)
    fields = {
        "properties": Instance(Global(_METADATA, "TensorProperties"), properties),
        "size": _size(group[0].chunk.described[0]),
        "chunks": LazyList(Instance(_CHUNK, chunk) for chunk in chunks),
    }
    return Instance(Global(_METADATA, "TensorStorageMetadata"), fields)


def _size(shape: Shape) -> Call:
    """``torch.Size(shape)``."""
    return Call(_SIZE, (shape,))


def _info(file: str, offset: int, num_bytes: int) -> Instance:
    """The ``_StorageInfo`` of an archive."""
    return Instance(_INFO, {"relative_path": file, "offset": offset, "length": num_bytes})


def object_bytes(key: str, num_bytes: int, *, file: int, position: int) -> IndexedTensor:
    """The archive of an object as a byte plan sees it: a uint8 tensor of ``num_bytes`` elements in one chunk."""
    return IndexedTensor.whole(key, "uint8", (num_bytes,), file=file, position=position)


def lay_out(chunks: Iterable[NewChunk], objects: Iterable[NewObject], *, num_files: int) -> CheckpointLayout:
    """Place the chunks of each file one after the other, and the objects after the chunks."""
    ends = [0] * num_files
    placed = []
    for chunk in chunks:
        archive = ArchiveLayout.for_tensor(chunk.dtype, chunk.described[2], ends[chunk.file])
        placed.append(_Placed(chunk=chunk, position=ends[chunk.file], archive=archive))
        ends[chunk.file] += archive.num_bytes
    placed_objects = []
    for obj in objects:
        placed_objects.append((ends[obj.file], obj))
        ends[obj.file] += obj.num_bytes
    return CheckpointLayout(
        file_names=tuple(f"__{rank}_0.distcp" for rank in range(num_files)),
        file_bytes=tuple(ends),
        placed=tuple(placed),
        objects=tuple(placed_objects),
    )


def common_state(state: Mapping[str, Any]) -> bytes:
    """The content of ``common.pt`` for a ``state`` of plain values; its ``args`` become an ``argparse.Namespace``.

    A ``TorchDtype`` among the args is pickled as torch's own dtype, without importing torch.
    """
    args = {
        name: Global("torch", value.name) if isinstance(value, TorchDtype) else value
        for name, value in state["args"].items()
    }
    return pickled_archive(writer.dumps({**state, "args": Instance(Global("argparse", "Namespace"), args)}))


def untrained(step: int) -> bytes:
    """The content of a train state for weights at iteration ``step`` that Bridge has not trained."""
    others = {name: (dtype, bytes(dtypes.itemsize_bytes(dtype))) for name, dtype in _OTHER_VALUES.items()}
    return scalars_archive({"step": ("int64", step.to_bytes(STEP_BYTES, "little")), **others})
