"""An opened Megatron checkpoint of any backend: which tensors and objects it stores, and in which bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from reprlib import repr as short
from typing import Any, Final

import numpy as np

from dist_ckpt_mistral.errors import FormatError, UnsupportedFormatError, for_all
from dist_ckpt_mistral.formats.checkpoint_directory import BACKEND_FILE, METADATA_FILE
from dist_ckpt_mistral.formats.places import resolve_directory
from dist_ckpt_mistral.formats.stored_metadata import Chunks, StoredMetadata, StoredTensor
from dist_ckpt_mistral.formats.torch_dist import common_state, metadata
from dist_ckpt_mistral.formats.torch_dist.archive import TensorLocator
from dist_ckpt_mistral.formats.torch_dist.common_state import Entry
from dist_ckpt_mistral.gather import dtypes
from dist_ckpt_mistral.gather.boxes import IntArray, equal_rows
from dist_ckpt_mistral.gather.index import IndexedTensor, TensorIndex, unblocked
from dist_ckpt_mistral.messages import listed
from dist_ckpt_mistral.storage import documents
from dist_ckpt_mistral.storage.local import SourceFiles

#: The backends. ``torch_dist`` stores every chunk and every object as a ``torch.save`` archive, many to a file; objects
#: are lists of length 1. ``zarr`` has a file for each: the bare bytes of a chunk, or the archive of the object itself.
#: ``torch`` has an archive for each rank, in which every tensor is that rank's part of one (legacy_torch.py).
#: ``torch_dcp`` stores as ``torch_dist`` does, but the parameters of modules, and objects as they are (torch_dcp.py).
TORCH_DIST: Final = "torch_dist"
ZARR: Final = "zarr"
TORCH: Final = "torch"
TORCH_DCP: Final = "torch_dcp"
#: The backends that metadata.json may name (mcore dist_checkpointing/core.py; ``zarr`` until 0.15).
_NAMED: Final = (TORCH_DIST, ZARR)
#: Legacy backend -> what it is, and what Megatron makes of it today.
_NOT_LOADED: Final = {
    ZARR: "is a legacy zarr checkpoint, which Megatron does not load since megatron-core 0.16",
    TORCH: "is in Megatron's legacy torch format, which Megatron loads at the parallelism that saved it alone",
    TORCH_DCP: "is in Megatron's format torch_dcp or fsdp_dtensor, which Megatron loads with FSDP alone",
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StoredCheckpoint:
    """An opened checkpoint: its metadata and common state. ``index`` locates the data of tensors on demand."""

    directory: Path
    backend: str
    metadata: StoredMetadata
    common_state: Mapping[str, Any] = field(repr=False)

    @property
    def is_bare(self) -> bool:
        """Whether the places in the metadata are those of the data themselves, and not of archives around them."""
        return self.backend in {ZARR, TORCH}

    @property
    def is_of_modules(self) -> bool:
        """Whether tensors have the names of modules' parameters, and not Megatron's keys: ``matched`` joins them."""
        return self.backend in {TORCH, TORCH_DCP}

    @property
    def file_bytes(self) -> Mapping[str, int]:
        """Data file -> the byte where its last archive ends."""
        return self.metadata.file_bytes

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """The tensors by key."""
        return self.metadata.tensors

    @property
    def objects(self) -> Mapping[str, Entry]:
        """The archives of everything that is not a tensor, by key."""
        return self.metadata.objects

    def index(self, names: Iterable[str]) -> TensorIndex:
        """Find the bytes of every chunk of ``names``. Reads some hundred bytes of each archive.

        Raises FormatError for missing or truncated files (it lists all), and for archives that are damaged or hold
        another tensor than the metadata says.
        """
        names = tuple(names)
        chunks = dict(zip(names, for_all(self.chunks, names), strict=True))
        files = tuple(self.file_bytes)
        used = set(chain.from_iterable(columns.files.tolist() for columns in chunks.values()))
        self.require_whole(files[number] for number in sorted(used))
        paths = tuple(self.directory / name for name in files)
        with SourceFiles(paths) as sources:
            pairs = [(columns.files, columns.positions) for columns in chunks.values()]
            places = chain.from_iterable(zip(file.tolist(), at.tolist(), strict=True) for file, at in pairs)
            locator = TensorLocator(sources, paths, places)
            tensors = for_all(lambda name: self._locate(self.tensors[name], chunks.pop(name), locator), names)
        return TensorIndex(files=paths, tensors=dict(zip(names, tensors, strict=True)))

    def chunks(self, name: str) -> Chunks:
        """The chunks of a tensor and their archives; file numbers are positions in ``file_bytes``.

        Raises FormatError unless the described chunks are the stored ones.
        """
        try:
            return self.metadata.chunks(name)
        except ValueError as error:
            raise FormatError(f"{self.directory / METADATA_FILE} is damaged: {error}") from error

    def require_whole(self, files: Iterable[str]) -> None:
        """Raise FormatError unless each of ``files`` exists and reaches to the end of its last archive."""
        paths = {name: self.directory / name for name in files}
        sizes = {name: path.stat().st_size if path.is_file() else None for name, path in paths.items()}
        absent = [name for name, size in sizes.items() if size is None]
        least = "" if self.backend == ZARR else "at least "
        present = [
            (f"{name} (expected {least}{self.file_bytes[name]} bytes, got {size})", size - self.file_bytes[name])
            for name, size in sizes.items()
            if size is not None
        ]
        faults = {
            "missing": absent,
            "truncated": [description for description, excess in present if excess < 0],
            "too long": [description for description, excess in present if excess > 0 and self.backend == ZARR],
        }
        problems = [f"{what}: {listed(names)}" for what, names in faults.items() if names]
        if problems:
            raise FormatError(f"files in {self.directory} are {'; '.join(problems)}. Copy the checkpoint again, whole.")

    def _locate(self, tensor: StoredTensor, chunks: Chunks, locator: TensorLocator) -> IndexedTensor:
        """The tensor with the position of every chunk's data."""
        dtype = dtypes.require_known(tensor.dtype, repr(tensor.name))
        positions = chunks.positions if self.is_bare else _data_positions(tensor.name, dtype, chunks, locator)
        located = IndexedTensor(
            name=tensor.name,
            dtype=dtype,
            global_shape=tensor.stored_shape,
            offsets=chunks.offsets,
            shapes=chunks.shapes,
            files=chunks.files,
            positions=positions,
        )
        return located if tensor.stored_shape == tensor.global_shape else unblocked(located, tensor.global_shape)


def _data_positions(name: str, dtype: str, chunks: Chunks, locator: TensorLocator) -> IntArray:
    """The byte of its file where the data of each chunk begins, inside its archive."""
    kinds = np.column_stack([chunks.shapes, chunks.lengths])
    positions = np.empty_like(chunks.positions)
    for rows in equal_rows(kinds):
        *shape, num_bytes = kinds[rows[0]].tolist()
        places = zip(chunks.files[rows].tolist(), chunks.positions[rows].tolist(), strict=True)
        positions[rows] = [*locator.locate(name, dtype, tuple(shape), num_bytes, places)]
    return positions


def open_stored(path: Path, *, with_common_state: bool = True) -> StoredCheckpoint:
    """Open a checkpoint root (its latest iteration) or the directory of one iteration.

    Without the common state no data file is opened: megatron-core 0.19 stores it in one.
    Raises FormatError where ``path`` is no checkpoint or its metadata is damaged, UnsafePickleError where a pickle asks
    for anything outside the allowlist.
    """
    directory = resolve_directory(path)
    backend = _backend(directory)
    stored = _reader_of(backend)(directory)
    checkpoint = StoredCheckpoint(directory=directory, backend=backend, metadata=stored, common_state={})
    return with_state(checkpoint) if with_common_state else checkpoint


def _reader_of(backend: str) -> Callable[[Path], StoredMetadata]:
    """What reads the metadata of a backend. Most checkpoints are ``torch_dist``: the others are imported where met."""
    if backend == ZARR:
        from dist_ckpt_mistral.formats import legacy_zarr  # noqa: PLC0415

        return legacy_zarr.read_stored
    if backend == TORCH:
        from dist_ckpt_mistral.formats import legacy_torch  # noqa: PLC0415

        return legacy_torch.read_stored
    if backend == TORCH_DCP:
        from dist_ckpt_mistral.formats import torch_dcp  # noqa: PLC0415

        return torch_dcp.read_stored
    return metadata.read_stored


def with_state(checkpoint: StoredCheckpoint) -> StoredCheckpoint:
    """A checkpoint with its common state. Raises as ``open_stored``."""
    if checkpoint.backend == TORCH:
        from dist_ckpt_mistral.formats import legacy_torch  # noqa: PLC0415  (as in _reader_of)

        state = legacy_torch.read_common_state(checkpoint.directory)
    elif checkpoint.backend == TORCH_DCP:
        from dist_ckpt_mistral.formats import torch_dcp  # noqa: PLC0415  (as in _reader_of)

        state = torch_dcp.read_common_state(checkpoint.directory, checkpoint.metadata)
    else:
        state = common_state.read(checkpoint.directory, checkpoint.objects.get(common_state.SHARDED_KEY))
    return replace(checkpoint, common_state=state)


def require_loadable(directory: Path) -> None:
    """Raise UnsupportedFormatError for an iteration's directory that Megatron does not load at any layout."""
    if why := _NOT_LOADED.get(_backend(directory)):
        raise UnsupportedFormatError(f"{directory} {why}. Make a torch_dist checkpoint of it first, with migrate.")


def _backend(directory: Path) -> str:
    """The backend that metadata.json in an iteration's directory names, or that files without it are of."""
    path = directory / BACKEND_FILE
    if not path.exists():
        from dist_ckpt_mistral.formats import legacy_torch  # noqa: PLC0415  (as in _reader_of)

        if legacy_torch.rank_folders(directory):
            return TORCH
        if (directory / METADATA_FILE).exists():
            return TORCH_DCP
    backend = documents.read_json(path).get("sharded_backend")
    if not isinstance(backend, str) or backend not in _NAMED:
        expected = " or ".join(map(repr, _NAMED))
        raise FormatError(f"{path} says sharded_backend {short(backend)}: expected {expected}")
    return backend
