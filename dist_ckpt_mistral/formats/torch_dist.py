"""Reading Megatron ``torch_dist`` checkpoints of megatron-core 0.12 to 0.19, without torch and without Megatron.

``.metadata`` is a pickled ``torch.distributed.checkpoint.metadata.Metadata`` that lists every chunk and the ``.distcp``
file, offset and length of the ``torch.save`` archive that holds it (torch/distributed/checkpoint/filesystem.py).
"""

from __future__ import annotations

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from dist_ckpt_mistral import dtypes, storage, strict_json
from dist_ckpt_mistral.errors import FormatError
from dist_ckpt_mistral.formats import common_state, pickle_records
from dist_ckpt_mistral.formats.common_state import Entry
from dist_ckpt_mistral.formats.pickle_records import OpaqueRecord, record_class
from dist_ckpt_mistral.formats.torch_archive import TensorLocator, torch_dtype_name
from dist_ckpt_mistral.shapes import Shape
from dist_ckpt_mistral.storage import SourceFiles

if TYPE_CHECKING:
    from dist_ckpt_mistral.gather.tensor_index import IndexedTensor, TensorIndex

METADATA_FILE: Final = ".metadata"
BACKEND_FILE: Final = "metadata.json"
TRACKER_FILE: Final = "latest_checkpointed_iteration.txt"
#: Where Megatron's ``fully_sharded_model_space`` keeps the shapes of tensors that are stored as blocks: an attribute of
#: Metadata, and the entry for each tensor in it (mcore dist_checkpointing/strategies/torch.py, 0.12 to 0.14).
MCORE_DATA: Final = "mcore_data"
OWN_SHAPE: Final = "nd_reformulated_orig_global_shape"
_RELEASE: Final = "release"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StoredTensor:
    """One tensor as ``.metadata`` describes it: torch dtype name, shape in elements, and its chunks still as records.

    ``stored_shape`` is another than ``global_shape`` where the tensor is stored as blocks (gather/flat_ranges.py); the
    chunks are those of ``stored_shape``.

    There may be millions of chunks, most of them of optimizer state: they become numbers only when asked for.
    """

    name: str
    dtype: str
    global_shape: Shape
    stored_shape: Shape
    described: Sequence[Any]
    stored: Sequence[tuple[Any, Any]]

    @property
    def num_chunks(self) -> int:
        """Number of stored chunks."""
        return len(self.described)

    @property
    def num_bytes(self) -> int:
        """Size of the global tensor; 0 for a dtype that this package does not know."""
        known = self.dtype in dtypes.KNOWN_DTYPES
        return math.prod(self.global_shape) * dtypes.itemsize_bytes(self.dtype) if known else 0

    def chunks(self) -> list[tuple[Shape, Shape, Entry]]:
        """(offset, shape, where) of every chunk, in elements. Raises ValueError that says what does not fit."""
        places = {index.offset: info for index, info in self.stored}
        if len(places) != len(self.stored):
            raise ValueError(f"chunks of {self.name!r} are stored more than once")
        boxes = [(chunk.offsets, chunk.sizes) for chunk in self.described]
        lost = [offset for offset, _ in boxes if offset not in places]
        if lost:
            raise ValueError(f"{len(lost)} chunks of {self.name!r} are stored nowhere, the first at {list(lost[0])}")
        if len(boxes) != len(places):
            raise ValueError(f"{len(boxes)} chunks of {self.name!r} are described, {len(places)} are stored")
        _require_sizes(boxes, len(self.stored_shape), self.name)
        return [(offset, shape, _entry(places[offset])) for offset, shape in boxes]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TorchDistCheckpoint:
    """An opened checkpoint: what its metadata says. Tensor data is located on demand by ``index``.

    ``file_bytes`` are the data files and where the last entry of each ends.
    """

    directory: Path
    file_bytes: Mapping[str, int]
    tensors: Mapping[str, StoredTensor]
    objects: Mapping[str, Entry]
    common_state: Mapping[str, Any] = field(repr=False)

    def index(self, names: Iterable[str]) -> TensorIndex:
        """Find the bytes of every chunk of ``names``. Reads some hundred bytes of each archive.

        Raises FormatError for files that are missing or truncated (all of them), and for archives that are damaged or
        hold something else than the metadata says.
        """
        from dist_ckpt_mistral.gather.tensor_index import TensorIndex  # noqa: PLC0415  (inspect must not wait for numpy)

        try:
            chunks = {name: self.tensors[name].chunks() for name in names}
        except (AttributeError, TypeError, ValueError) as error:
            raise FormatError(f"{self.directory / METADATA_FILE} is damaged: {error}") from error
        files = sorted({entry.file for _, _, entry in itertools.chain.from_iterable(chunks.values())})
        self.require_whole(files)
        paths = tuple(self.directory / name for name in files)
        number = {name: i for i, name in enumerate(files)}
        with SourceFiles(paths) as sources:
            tensors = {name: self._locate(self.tensors[name], chunks[name], sources, number) for name in chunks}
        return TensorIndex(files=paths, tensors=tensors)

    def require_whole(self, files: Iterable[str]) -> None:
        """Raise FormatError unless each of ``files`` is there and reaches to its end, ignored entries included."""
        paths = {name: self.directory / name for name in files}
        sizes = {name: path.stat().st_size if path.is_file() else None for name, path in paths.items()}
        absent = [name for name, size in sizes.items() if size is None]
        short = [
            f"{name} (expected at least {self.file_bytes[name]} bytes, got {size})"
            for name, size in sizes.items()
            if size is not None and size < self.file_bytes[name]
        ]
        problems = [f"missing: {', '.join(absent)}"] if absent else []
        problems += [f"truncated: {', '.join(short)}"] if short else []
        if problems:
            raise FormatError(f"files in {self.directory} are {'; '.join(problems)}. Copy the checkpoint again, whole.")

    def _locate(
        self,
        tensor: StoredTensor,
        chunks: list[tuple[Shape, Shape, Entry]],
        sources: SourceFiles,
        number: Mapping[str, int],
    ) -> IndexedTensor:
        from dist_ckpt_mistral.gather.tensor_index import IndexedTensor  # noqa: PLC0415  (likewise)

        dtype = dtypes.require_known(tensor.dtype, repr(tensor.name))
        locator = TensorLocator(sources)
        located = []
        for offset, shape, entry in chunks:
            file = number[entry.file]
            try:
                position = locator.locate(file, entry.offset, entry.num_bytes, dtype, shape)
            except FormatError as error:
                where = f"the chunk of {tensor.name!r} at byte {entry.offset} of {self.directory / entry.file}"
                raise FormatError(f"{where}: {error}") from error
            located.append((offset, shape, file, position))
        indexed = IndexedTensor.build(tensor.name, dtype, tensor.stored_shape, located)
        if tensor.stored_shape == tensor.global_shape:
            return indexed
        from dist_ckpt_mistral.gather.flat_ranges import in_own_shape  # noqa: PLC0415  (likewise)

        return in_own_shape(indexed, tensor.global_shape)


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


def iteration_of(directory_name: str) -> str | None:
    """What the tracker says for a directory of this name: ``iter_0000500`` is ``500``; None if it is no iteration."""
    match = re.fullmatch(r"iter_(\d{7,18})", directory_name)
    if match:
        return str(int(match[1]))
    return _RELEASE if directory_name == _RELEASE else None


def tracker_text(iteration: int | None) -> bytes:
    """The content of the tracker file that names ``iteration`` the latest."""
    return (_RELEASE if iteration is None else str(iteration)).encode()


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
    with pickle_records.paused_collector():
        metadata = pickle_records.loads(storage.read_bytes(directory / METADATA_FILE), _metadata_allowlist(), where)
        try:
            files, tensors, objects = _parse(metadata)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise FormatError(f"{where} is not sound torch_dist metadata: {error}") from error
    state = common_state.read(directory, objects.get(common_state.SHARDED_KEY))
    return TorchDistCheckpoint(
        directory=directory, file_bytes=files, tensors=tensors, objects=objects, common_state=state
    )


def _require_backend(directory: Path) -> None:
    path = directory / BACKEND_FILE
    if not path.is_file():
        raise FormatError(f"{directory} is not a Megatron distributed checkpoint: {BACKEND_FILE} is missing")
    backend = strict_json.loads_object(storage.read_bytes(path), str(path)).get("sharded_backend")
    if backend != "torch_dist":
        raise FormatError(f"{path} says sharded_backend {backend!r}: expected 'torch_dist'")


def _parse(metadata: Any) -> tuple[dict[str, int], dict[str, StoredTensor], dict[str, Entry]]:  # noqa: ANN401  (a record)
    """Ends of files, tensors and objects by key. Whatever is amiss raises what ``open_torch_dist`` translates."""
    stored: dict[str, list[tuple[Any, Any]]] = defaultdict(list)
    ends: dict[Any, int] = defaultdict(int)
    for index, info in metadata.storage_data.items():
        stored[index.fqn].append((index, info))
        ends[info.relative_path] = max(ends[info.relative_path], info.offset + info.length)
    tensors, objects = {}, {}
    own_shapes = _own_shapes(metadata)
    for name, described in metadata.state_dict_metadata.items():
        if type(described).__name__ == "TensorStorageMetadata":
            stored_shape = _sizes(described.size)
            tensors[str(name)] = StoredTensor(
                name=str(name),
                dtype=str(described.properties.state[0]),
                global_shape=own_shapes.get(name, stored_shape),
                stored_shape=stored_shape,
                described=described.chunks,
                stored=stored.get(name, ()),
            )
        elif len(stored.get(name, ())) == 1:
            objects[str(name)] = _entry(stored[name][0][1])
        else:
            raise ValueError(f"{name!r} is listed, but it is not said where it is stored")
    unlisted = [name for name in stored if name not in metadata.state_dict_metadata]
    if unlisted:
        raise ValueError(f"{', '.join(map(repr, unlisted))} are stored but not listed")
    return {_require_file_name(file): ends[file] for file in sorted(ends, key=str)}, tensors, objects


def _own_shapes(metadata: Any) -> dict[str, Shape]:  # noqa: ANN401  (a record)
    """The shapes of the tensors that are stored as blocks, by key (mcore strategies/torch.py, to 0.14)."""
    about = getattr(metadata, MCORE_DATA, None) or {}
    return {str(name): _sizes(each[OWN_SHAPE]) for name, each in about.items() if OWN_SHAPE in each}


def _require_file_name(file: object) -> str:
    """Shards lie beside ``.metadata``; anything but a plain name could point anywhere."""
    if not isinstance(file, str) or Path(file).name != file or file in {"", ".", ".."}:
        raise ValueError(f"it names the file {file!r}: expected the plain name of a file beside it")
    return file


def _entry(info: Any) -> Entry:  # noqa: ANN401  (a record)
    if getattr(info, "transform_descriptors", None):
        raise ValueError(f"it describes transformed data ({info.transform_descriptors!r}), which is not supported")
    if not (type(info.offset) is type(info.length) is int and info.offset >= 0 and info.length >= 0):
        raise ValueError(f"it places an archive at {info.offset!r}, {info.length!r} bytes long")
    return Entry(info.relative_path, info.offset, info.length)


def _sizes(value: Any) -> Shape:  # noqa: ANN401  (from a pickle)
    """A tuple of non-negative integers, as offsets and shapes must be."""
    if type(value) is not tuple or not all(type(size) is int and size >= 0 for size in value):
        raise ValueError(f"expected sizes, got {value!r}")
    return value


def _require_sizes(boxes: Sequence[tuple[Any, Any]], ndim: int, name: str) -> None:
    """Offsets and shapes of chunks must be tuples of ``ndim`` non-negative integers."""
    for box in boxes:
        for sizes in box:
            if len(_sizes(sizes)) != ndim:
                raise ValueError(f"a chunk of {name!r} has {len(sizes)} axes, the tensor has {ndim}")


def _metadata_allowlist() -> Callable[[str, str], Any]:
    """Fresh stand-ins for the classes of ``.metadata``; torch's dtypes become their names."""
    checkpoint = "torch.distributed.checkpoint"
    records = {
        f"{checkpoint}.metadata": (
            *("Metadata", "StorageMeta", "TensorStorageMetadata", "BytesStorageMetadata"),
            *("ChunkStorageMetadata", "MetadataIndex"),
        ),
        f"{checkpoint}.filesystem": ("_StorageInfo", "_StoragePrefix"),
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
