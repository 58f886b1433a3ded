"""Reading Megatron ``torch_dist`` checkpoints of megatron-core 0.12 to 0.19, without torch and without Megatron.

``.metadata`` is a pickled ``torch.distributed.checkpoint.metadata.Metadata`` that lists every chunk and the ``.distcp``
file, offset and length of the ``torch.save`` archive that holds it (torch/distributed/checkpoint/filesystem.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from dist_ckpt_mistral import dtypes, storage, strict_json
from dist_ckpt_mistral.errors import FormatError
from dist_ckpt_mistral.formats import common_state, pickle_records
from dist_ckpt_mistral.formats.common_state import Entry
from dist_ckpt_mistral.formats.pickle_records import OpaqueRecord, record_class
from dist_ckpt_mistral.formats.torch_archive import ArchiveReader, torch_dtype_name
from dist_ckpt_mistral.gather.boxes import Shape
from dist_ckpt_mistral.gather.tensor_index import IndexedTensor, TensorIndex
from dist_ckpt_mistral.storage import SourceFiles

METADATA_FILE: Final = ".metadata"
BACKEND_FILE: Final = "metadata.json"
TRACKER_FILE: Final = "latest_checkpointed_iteration.txt"
_RELEASE: Final = "release"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """One tensor as ``.metadata`` describes it. ``chunks`` are (offset, shape, entry), in elements."""

    name: str
    dtype: str
    global_shape: Shape
    chunks: tuple[tuple[Shape, Shape, Entry], ...]

    @property
    def num_bytes(self) -> int:
        """Size of the global tensor; 0 for a dtype that this package does not know."""
        return (
            math.prod(self.global_shape) * dtypes.itemsize_bytes(self.dtype) if self.dtype in dtypes.KNOWN_DTYPES else 0
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchDistCheckpoint:
    """An opened checkpoint: what its metadata says. Tensor data is located on demand by ``index``."""

    directory: Path
    tensors: Mapping[str, StoredTensor]
    objects: Mapping[str, Entry]
    common_state: Mapping[str, Any] = field(repr=False)

    def index(self, names: Iterable[str]) -> TensorIndex:
        """Find the bytes of every chunk of ``names``. Reads a few kilobytes of each archive.

        Raises FormatError for files that are missing or truncated (all of them), and for archives that are damaged or
        hold something else than the metadata says.
        """
        wanted = [self.tensors[name] for name in names]
        files = sorted({entry.file for tensor in wanted for _, _, entry in tensor.chunks})
        number = {name: i for i, name in enumerate(files)}
        paths = tuple(self.directory / name for name in files)
        with SourceFiles(paths) as sources:
            _require_files(paths, sources, (entry for tensor in wanted for _, _, entry in tensor.chunks), number)
            tensors = {tensor.name: self._locate(tensor, sources, number) for tensor in wanted}
        return TensorIndex(files=paths, tensors=tensors)

    def _locate(self, tensor: StoredTensor, sources: SourceFiles, number: Mapping[str, int]) -> IndexedTensor:
        chunks = []
        for offset, shape, entry in tensor.chunks:
            where = f"the chunk of {tensor.name!r} at byte {entry.offset} of {self.directory / entry.file}"
            file = number[entry.file]
            stored = ArchiveReader(sources, file, entry.offset, entry.num_bytes, where).tensor()
            if (stored.dtype, stored.shape) != (tensor.dtype, shape):
                raise FormatError(
                    f"{where} does not match the metadata: expected {tensor.dtype} {list(shape)}, "
                    f"got {stored.dtype} {list(stored.shape)}"
                )
            chunks.append((offset, shape, file, stored.data.position))
        return IndexedTensor.build(tensor.name, tensor.dtype, tensor.global_shape, chunks)


def resolve_directory(path: Path) -> Path:
    """The directory with ``.metadata`` that ``path`` means: itself, or the latest iteration of a checkpoint root."""
    if (path / METADATA_FILE).exists() or (path / BACKEND_FILE).exists():
        return path
    if not path.is_dir():
        raise FormatError(f"{path} is not a checkpoint: there is no such directory")
    tracker = path / TRACKER_FILE
    if tracker.is_file():
        step = storage.read_bytes(tracker).decode(errors="replace").strip()
        if step != _RELEASE and not re.fullmatch(r"\d{1,18}", step):
            raise FormatError(f"{tracker} should hold an iteration or {_RELEASE!r}, got {step[:40]!r}")
        directory = path / (_RELEASE if step == _RELEASE else iteration_name(int(step)))
        if not directory.is_dir():
            raise FormatError(f"{tracker} names {directory.name}, which is absent")
        return directory
    steps = sorted(entry.name for entry in path.iterdir() if entry.name == _RELEASE or entry.name.startswith("iter_"))
    hint = f" It holds {', '.join(steps)}: give one of them." if steps else ""
    raise FormatError(f"{path} is not a Megatron checkpoint: it has neither {TRACKER_FILE} nor {METADATA_FILE}.{hint}")


def iteration_name(iteration: int | None) -> str:
    """Megatron's directory name of an iteration; None is a release (weights without training state)."""
    return _RELEASE if iteration is None else f"iter_{iteration:07d}"


def open_torch_dist(path: Path) -> TorchDistCheckpoint:
    """Open a checkpoint root or one iteration of it.

    Raises FormatError where it is not a torch_dist checkpoint or its metadata is damaged, UnsafePickleError where a
    pickle asks for anything outside the allowlist.
    """
    directory = resolve_directory(path)
    _require_backend(directory)
    where = str(directory / METADATA_FILE)
    if not (directory / METADATA_FILE).is_file():
        raise FormatError(f"{where} is missing: the checkpoint was not saved to its end, or not copied whole")
    metadata = pickle_records.loads(storage.read_bytes(directory / METADATA_FILE), _metadata_allowlist(), where)
    try:
        tensors, objects = _parse(metadata, where)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise FormatError(f"{where} is not torch_dist metadata: {error!r}") from error
    state = common_state.read(directory, objects.get(common_state.SHARDED_KEY))
    return TorchDistCheckpoint(directory=directory, tensors=tensors, objects=objects, common_state=state)


def _require_backend(directory: Path) -> None:
    path = directory / BACKEND_FILE
    if not path.is_file():
        raise FormatError(f"{directory} is not a Megatron distributed checkpoint: {BACKEND_FILE} is missing")
    backend = strict_json.loads_object(storage.read_bytes(path), str(path)).get("sharded_backend")
    if backend != "torch_dist":
        raise FormatError(f"{path} says sharded_backend {backend!r}: expected 'torch_dist'")


def _parse(metadata: Any, where: str) -> tuple[dict[str, StoredTensor], dict[str, Entry]]:  # noqa: ANN401  (a record)
    """Tensors and objects by key. Whatever is missing raises one of the errors that ``open_torch_dist`` translates."""
    entries: dict[str, dict[Shape | None, Entry]] = {}
    for index, info in metadata.storage_data.items():
        at = getattr(index, "offset", None)  # torch leaves out what is None
        offset = None if at is None else _sizes(at)
        entries.setdefault(index.fqn, {})[offset] = _entry(info, where)
    tensors, objects = {}, {}
    for name, described in metadata.state_dict_metadata.items():
        stored = entries.get(name, {})
        if type(described).__name__ == "TensorStorageMetadata":
            tensors[str(name)] = _tensor(str(name), described, stored, where)
        elif len(stored) == 1:
            objects[str(name)] = next(iter(stored.values()))
        else:
            raise FormatError(f"{where} lists {name!r} and says nowhere where it is stored")
    return tensors, objects


def _tensor(name: str, described: Any, stored: Mapping[Shape | None, Entry], where: str) -> StoredTensor:  # noqa: ANN401
    chunks = [(_sizes(chunk.offsets), _sizes(chunk.sizes)) for chunk in described.chunks]
    lost = [offset for offset, _ in chunks if offset not in stored]
    if lost:
        raise FormatError(
            f"{where} says nowhere where {len(lost)} chunks of {name!r} are stored, the first at {lost[0]}"
        )
    shape = _sizes(described.size)
    if any(len(offset) != len(shape) or len(sizes) != len(shape) for offset, sizes in chunks):
        raise FormatError(f"{where} gives chunks of {name!r} another number of axes than its shape {list(shape)}")
    return StoredTensor(
        name=name,
        dtype=str(described.properties.state[0]),
        global_shape=shape,
        chunks=tuple((offset, sizes, stored[offset]) for offset, sizes in chunks),
    )


def _entry(info: Any, where: str) -> Entry:  # noqa: ANN401  (a record)
    file, offset, num_bytes = info.relative_path, info.offset, info.length
    if not isinstance(file, str) or Path(file).name != file or file in {"", ".", ".."}:
        raise FormatError(f"{where} names the file {file!r}: expected a plain name of a file beside it")
    if getattr(info, "transform_descriptors", None):
        raise FormatError(
            f"{where} describes transformed data ({info.transform_descriptors!r}), which is not supported"
        )
    return Entry(file, *_sizes((offset, num_bytes)))


def _sizes(value: Any) -> Shape:  # noqa: ANN401  (from a pickle)
    """A tuple of non-negative integers, as offsets and shapes must be."""
    sizes = tuple(value)
    if not all(type(size) is int and size >= 0 for size in sizes):
        raise ValueError(f"bad sizes {sizes!r}")
    return sizes


def _require_files(
    paths: tuple[Path, ...], sources: SourceFiles, entries: Iterable[Entry], number: Mapping[str, int]
) -> None:
    """Every file must be there and reach as far as its entries do."""
    absent = [path.name for path in paths if not path.is_file()]
    if absent:
        raise FormatError(
            f"files are missing in {paths[0].parent}: {', '.join(absent)}. Copy the checkpoint again, whole."
        )
    ends: dict[str, int] = {}
    for entry in entries:
        ends[entry.file] = max(ends.get(entry.file, 0), entry.offset + entry.num_bytes)
    short = [
        f"{name} (expected at least {end} bytes, got {size})"
        for name, end in sorted(ends.items())
        if (size := sources.size_bytes(number[name])) < end
    ]
    if short:
        raise FormatError(
            f"files in {paths[0].parent} are truncated: {', '.join(short)}. Copy the checkpoint again, whole."
        )


def _metadata_allowlist() -> Callable[[str, str], Any]:
    """Fresh stand-ins for the classes of ``.metadata``; torch's dtypes become their names."""
    checkpoint = "torch.distributed.checkpoint"
    records = {
        f"{checkpoint}.metadata": (
            *("Metadata", "StorageMeta", "TensorStorageMetadata", "BytesStorageMetadata"),
            *("ChunkStorageMetadata", "MetadataIndex"),
        ),
        f"{checkpoint}.filesystem": ("_StorageInfo",),
        f"{checkpoint}.planner": ("SavePlan", "WriteItem", "TensorWriteData", "BytesIOWriteData"),
        "megatron.core.dist_checkpointing.strategies.torch": ("MCoreSavePlan", "MCoreMetadata"),
    }
    allowed: dict[tuple[str, str], Any] = {
        (module, name): record_class(name) for module, names in records.items() for name in names
    }
    allowed |= {
        (f"{checkpoint}.metadata", "TensorProperties"): record_class("TensorProperties", OpaqueRecord),
        (f"{checkpoint}.metadata", "_MEM_FORMAT_ENCODING"): _arguments,
        (f"{checkpoint}.planner", "WriteItemType"): _arguments,
        ("torch.serialization", "_get_layout"): _arguments,
        ("pathlib", "PosixPath"): _arguments,
        ("torch", "Size"): tuple,
    }
    return lambda module, name: torch_dtype_name(module, name) or allowed[module, name]


def _arguments(*values: object) -> tuple[object, ...]:
    """Stands in for calls whose result does not matter."""
    return values
