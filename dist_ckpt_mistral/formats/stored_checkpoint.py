"""An opened Megatron checkpoint, whatever its backend: what is stored, and where the bytes lie."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from reprlib import repr as short
from typing import Any, Final

import numpy as np

from dist_ckpt_mistral.errors import FormatError, UnsupportedFormatError, for_all
from dist_ckpt_mistral.formats import legacy_zarr
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

#: The backends. ``torch_dist`` keeps every chunk and every object in a ``torch.save`` archive, many to a file; objects
#: are lists of one. ``zarr`` has a file for each: the bare bytes of a chunk, or the archive of an object itself.
TORCH_DIST: Final = "torch_dist"
ZARR: Final = "zarr"
#: The names in metadata.json (mcore dist_checkpointing/core.py; ``zarr`` until 0.15), and what reads each.
_READERS: Final = {TORCH_DIST: metadata.read_stored, ZARR: legacy_zarr.read_stored}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StoredCheckpoint:
    """An opened checkpoint: what its metadata says. Tensor data is located on demand by ``index``."""

    directory: Path
    backend: str
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
        least = "at least " if self.backend == TORCH_DIST else ""
        told = {
            name: f"{name} (expected {least}{self.file_bytes[name]} bytes, got {size})" for name, size in sizes.items()
        }
        there = [(name, size - self.file_bytes[name]) for name, size in sizes.items() if size is not None]
        faults = {
            "missing": absent,
            "truncated": [told[name] for name, more in there if more < 0],
            "too long": [told[name] for name, more in there if more > 0 and self.backend == ZARR],
        }
        problems = [f"{what}: {listed(names)}" for what, names in faults.items() if names]
        if problems:
            raise FormatError(f"files in {self.directory} are {'; '.join(problems)}. Copy the checkpoint again, whole.")

    def _locate(self, tensor: StoredTensor, chunks: Chunks, locator: TensorLocator) -> IndexedTensor:
        dtype = dtypes.require_known(tensor.dtype, repr(tensor.name))
        positions = chunks.positions if self.backend == ZARR else _data_positions(tensor.name, dtype, chunks, locator)
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
    """Where the data of chunks begin inside their archives."""
    kinds = np.column_stack([chunks.shapes, chunks.lengths])
    positions = np.empty_like(chunks.positions)
    for rows in equal_rows(kinds):
        *shape, num_bytes = kinds[rows[0]].tolist()
        places = zip(chunks.files[rows].tolist(), chunks.positions[rows].tolist(), strict=True)
        positions[rows] = [*locator.locate(name, dtype, tuple(shape), num_bytes, places)]
    return positions


def open_stored(path: Path, *, with_common_state: bool = True) -> StoredCheckpoint:
    """Open a checkpoint root or one iteration of it.

    From megatron-core 0.17 on the common state lies in a data file; without it no data file is opened.
    Raises FormatError where it is no checkpoint or its metadata is damaged, UnsafePickleError where a pickle asks for
    anything outside the allowlist.
    """
    directory = resolve_directory(path)
    backend = _backend(directory)
    metadata = _READERS[backend](directory)
    state = common_state.read(directory, metadata.objects.get(common_state.SHARDED_KEY)) if with_common_state else {}
    return StoredCheckpoint(directory=directory, backend=backend, metadata=metadata, common_state=state)


def require_loadable(directory: Path) -> None:
    """Raise UnsupportedFormatError for an iteration's directory that Megatron's present versions do not load."""
    if _backend(directory) == ZARR:
        raise UnsupportedFormatError(
            f"{directory} is a legacy zarr checkpoint, which Megatron does not load since megatron-core 0.16. "
            "Make a torch_dist checkpoint of it first, with migrate."
        )


def _backend(directory: Path) -> str:
    """What an iteration's directory says that it was saved with."""
    path = directory / BACKEND_FILE
    backend = documents.read_json(path).get("sharded_backend")
    if not isinstance(backend, str) or backend not in _READERS:
        expected = " or ".join(map(repr, _READERS))
        raise FormatError(f"{path} says sharded_backend {short(backend)}: expected {expected}")
    return backend
