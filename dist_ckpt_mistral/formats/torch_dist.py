"""Reading Megatron ``torch_dist`` checkpoints of megatron-core 0.12 to 0.19, without torch and without Megatron."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from dist_ckpt_mistral import dtypes, storage, strict_json
from dist_ckpt_mistral.errors import ConfigError, FormatError, UnsupportedFormatError, for_all
from dist_ckpt_mistral.formats import common_state
from dist_ckpt_mistral.formats.common_state import Entry
from dist_ckpt_mistral.formats.metadata_pickle import read_metadata
from dist_ckpt_mistral.formats.stored_metadata import Chunks, StoredMetadata, StoredTensor
from dist_ckpt_mistral.formats.torch_archive import TensorLocator
from dist_ckpt_mistral.formats.train_state import MAX_STEP, TRAIN_STATE_FILE, read_step
from dist_ckpt_mistral.name_ranges import listed
from dist_ckpt_mistral.storage import SourceFiles

if TYPE_CHECKING:
    from dist_ckpt_mistral.gather.tensor_index import IndexedTensor, TensorIndex

METADATA_FILE: Final = ".metadata"
BACKEND_FILE: Final = "metadata.json"
TRACKER_FILE: Final = "latest_checkpointed_iteration.txt"
_RELEASE: Final = "release"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TorchDistCheckpoint:
    """An opened checkpoint: what its metadata says. Tensor data is located on demand by ``index``."""

    directory: Path
    metadata: StoredMetadata
    common_state: Mapping[str, Any] = field(repr=False)

    @property
    def file_bytes(self) -> Mapping[str, int]:
        """The data files and where the last archive in each ends."""
        return self.metadata.file_bytes

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """The tensors by key."""
        return self.metadata.tensors

    @property
    def objects(self) -> Mapping[str, Entry]:
        """Where what is not a tensor lies, by key."""
        return self.metadata.objects

    def index(self, names: Iterable[str]) -> TensorIndex:
        """Find the bytes of every chunk of ``names``. Reads some hundred bytes of each archive.

        Raises FormatError for files that are missing or truncated (all of them), and for archives that are damaged or
        hold something else than the metadata says.
        """
        from dist_ckpt_mistral.gather.tensor_index import TensorIndex  # noqa: PLC0415  (inspect must not wait for numpy)

        names = tuple(names)
        chunks = dict(zip(names, for_all(self.chunks, names), strict=True))
        files = tuple(self.file_bytes)
        used = set(chain.from_iterable(each.files.tolist() for each in chunks.values()))
        self.require_whole(files[number] for number in sorted(used))
        paths = tuple(self.directory / name for name in files)
        with SourceFiles(paths) as sources:
            columns = [(each.files, each.positions) for each in chunks.values()]
            places = chain.from_iterable(zip(at.tolist(), by.tolist(), strict=True) for at, by in columns)
            locator = TensorLocator(sources, paths, places)
            tensors = for_all(lambda name: self._locate(self.tensors[name], chunks.pop(name), locator), names)
        return TensorIndex(files=paths, tensors=dict(zip(names, tensors, strict=True)))

    def chunks(self, name: str) -> Chunks:
        """The chunks of a tensor and where their archives lie; files have the numbers that they have in ``file_bytes``.

        Raises FormatError unless the chunks that are described are those that are stored.
        """
        try:
            return self.metadata.chunks(name)
        except ValueError as error:
            raise FormatError(f"{self.directory / METADATA_FILE} is damaged: {error}") from error

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
        problems = [f"missing: {listed(absent)}"] if absent else []
        problems += [f"truncated: {listed(short)}"] if short else []
        if problems:
            raise FormatError(f"files in {self.directory} are {'; '.join(problems)}. Copy the checkpoint again, whole.")

    def _locate(self, tensor: StoredTensor, chunks: Chunks, locator: TensorLocator) -> IndexedTensor:
        import numpy as np  # noqa: PLC0415  (inspect must not wait for it)

        from dist_ckpt_mistral.gather.boxes import equal_rows  # noqa: PLC0415  (likewise)
        from dist_ckpt_mistral.gather.flat_ranges import in_own_shape  # noqa: PLC0415  (likewise)
        from dist_ckpt_mistral.gather.tensor_index import IndexedTensor  # noqa: PLC0415  (likewise)

        dtype = dtypes.require_known(tensor.dtype, repr(tensor.name))
        kinds = np.column_stack([chunks.shapes, chunks.lengths])
        positions = np.empty_like(chunks.positions)
        for rows in equal_rows(kinds):
            *shape, num_bytes = kinds[rows[0]].tolist()
            places = zip(chunks.files[rows].tolist(), chunks.positions[rows].tolist(), strict=True)
            positions[rows] = [*locator.locate(tensor.name, dtype, tuple(shape), num_bytes, places)]
        located = IndexedTensor(
            name=tensor.name,
            dtype=dtype,
            global_shape=tensor.stored_shape,
            offsets=chunks.offsets,
            shapes=chunks.shapes,
            files=chunks.files,
            positions=positions,
        )
        return located if tensor.stored_shape == tensor.global_shape else in_own_shape(located, tensor.global_shape)


def is_checkpoint(path: Path) -> bool:
    """Whether ``path`` looks like a checkpoint: an iteration of one, or a root that says which is the latest."""
    return any((path / name).exists() for name in (METADATA_FILE, BACKEND_FILE, *_TRACKERS))


def resolve_directory(path: Path) -> Path:
    """The directory with ``.metadata`` that ``path`` means: itself, or the latest iteration of a checkpoint root."""
    if (path / METADATA_FILE).exists() or (path / BACKEND_FILE).exists():
        return path
    if not path.is_dir():
        what = "it is a file" if path.exists() else "there is no such directory"
        raise FormatError(f"{path} is not a checkpoint: {what}")
    latest = {name: read(path / name) for name, read in _TRACKERS.items() if (path / name).is_file()}
    if len(set(latest.values())) > 1:
        raise FormatError(f"{path} is ambiguous: {', '.join(f'{n} names {d}' for n, d in latest.items())}. Give one.")
    for tracker, name in latest.items():
        if not (path / name).is_dir():
            raise FormatError(f"{path / tracker} names {name}, which is absent")
        return path / name
    steps = sorted(entry.name for entry in path.iterdir() if entry.name == _RELEASE or entry.name.startswith("iter_"))
    hint = f" It holds {', '.join(steps)}: give one of them." if steps else ""
    raise FormatError(f"{path} is not a Megatron checkpoint: it has neither {TRACKER_FILE} nor {METADATA_FILE}.{hint}")


def _tracked(tracker: Path) -> str:
    """The directory that Megatron-LM's tracker file names."""
    step = storage.read_bytes(tracker).decode(errors="replace").strip()
    if step != _RELEASE and not re.fullmatch(r"\d{1,18}", step):
        raise FormatError(f"{tracker} should hold an iteration or {_RELEASE!r}, got {step[:40]!r}")
    return _RELEASE if step == _RELEASE else iteration_name(int(step))


def require_iteration(iteration: int | None) -> None:
    """Raise ConfigError for a number that no directory and no tracker can have; None is a release."""
    if iteration is not None and not (type(iteration) is int and 0 <= iteration < MAX_STEP):
        raise ConfigError(f"iteration: expected a whole number from 0 to {MAX_STEP - 1}, got {iteration!r}")


def iteration_name(iteration: int | None) -> str:
    """Megatron's directory name of an iteration; None is a release (weights without training state)."""
    return _RELEASE if iteration is None else f"iter_{iteration:07d}"


#: The files in a checkpoint root that say which directory is the latest, and how to read each.
_TRACKERS: Final[Mapping[str, Callable[[Path], str]]] = {
    TRACKER_FILE: _tracked,
    TRAIN_STATE_FILE: lambda path: iteration_name(read_step(path)),
}


def iteration_of(directory_name: str) -> str | None:
    """What the tracker says for a directory of this name: ``iter_0000500`` is ``500``; None if it is no iteration.

    That is also ``iter_00000500``, which no tracker can name.
    """
    if directory_name == _RELEASE:
        return _RELEASE
    match = re.fullmatch(r"iter_(\d{7,18})", directory_name)
    return str(int(match[1])) if match and iteration_name(int(match[1])) == directory_name else None


def tracker_text(iteration: int | None) -> bytes:
    """The content of the tracker file that names ``iteration`` the latest."""
    return (_RELEASE if iteration is None else str(iteration)).encode()


def open_torch_dist(path: Path, *, with_common_state: bool = True) -> TorchDistCheckpoint:
    """Open a checkpoint root or one iteration of it.

    From megatron-core 0.17 on the common state lies in a data file; without it no data file is opened.
    Raises FormatError where it is not a torch_dist checkpoint or its metadata is damaged, UnsafePickleError where a
    pickle asks for anything outside the allowlist.
    """
    directory = resolve_directory(path)
    _require_backend(directory)
    path = directory / METADATA_FILE
    if not path.is_file():
        raise FormatError(f"{path} is missing: the checkpoint was not saved to its end, or not copied whole")
    metadata = read_metadata(lambda: storage.read_bytes(path, most_bytes=None), str(path))
    state = common_state.read(directory, metadata.objects.get(common_state.SHARDED_KEY)) if with_common_state else {}
    return TorchDistCheckpoint(directory=directory, metadata=metadata, common_state=state)


def _require_backend(directory: Path) -> None:
    path = directory / BACKEND_FILE
    if not path.is_file():
        raise FormatError(f"{directory} is not a Megatron distributed checkpoint: {BACKEND_FILE} is missing")
    backend = strict_json.loads_object(storage.read_bytes(path), str(path)).get("sharded_backend")
    if backend != "torch_dist":
        kind = UnsupportedFormatError if backend == "zarr" else FormatError  # any other word, no Megatron ever wrote
        raise kind(f"{path} says sharded_backend {backend!r}: expected 'torch_dist'")
