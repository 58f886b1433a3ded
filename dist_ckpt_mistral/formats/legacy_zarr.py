"""Read Megatron's legacy ``zarr`` checkpoints (megatron-core up to 0.15), without zarr and without TensorStore.

Every key is a directory. For a tensor, ``.zarray`` describes the array, and each chunk is a bare file named after its
position in the grid, such as ``2.0.1``. For objects, each is a ``torch.save`` file such as ``shard_2_4.pt``.
(mcore dist_checkpointing/strategies/zarr.py, 0.12 to 0.15; zarr storage specification, version 2.)
zarr and TensorStore read a missing chunk file as zeros; here it is an error.
"""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from operator import lt
from pathlib import Path
from reprlib import repr as short
from typing import Any, Final

import numpy as np

from dist_ckpt_mistral.errors import FormatError, UnsupportedFormatError, for_all
from dist_ckpt_mistral.formats.pickles.tensors import MAX_AXES
from dist_ckpt_mistral.formats.stored_metadata import Archives, StoredMetadata, StoredTensor, object_key
from dist_ckpt_mistral.formats.torch_dist.common_state import Entry
from dist_ckpt_mistral.gather import dtypes
from dist_ckpt_mistral.gather.boxes import unrolled
from dist_ckpt_mistral.gather.dtypes import Shape, is_countable
from dist_ckpt_mistral.messages import listed
from dist_ckpt_mistral.storage import documents, paths
from dist_ckpt_mistral.storage.remote_path import RemotePath

_ARRAY_FILE: Final = ".zarray"
_ATTRIBUTES_FILE: Final = ".zattrs"
#: Several writers of one array leave a directory of locks beside it, named after the array with this suffix.
_LOCKS_SUFFIX: Final = ".sync"
_CHUNK: Final = re.compile(r"[0-9]+(\.[0-9]+)*")
#: The most missing chunks of one array that an error counts.
_MOST_FAULTS: Final = 1000
#: The longest name of a chunk file, in characters.
_MAX_NAME_LENGTH: Final = 255
#: What every array of Megatron's says; another value would change how chunk files are read.
_PLAIN: Final = {"zarr_format": 2, "order": "C", "compressor": None, "filters": None, "dimension_separator": "."}
#: The specification gives this field a default.
_DEFAULTS: Final = {"dimension_separator": "."}
#: numpy's dtype names -> torch's. zarr writes bfloat16 as two untyped bytes, and Megatron patches its name over that.
_DTYPES: Final = {
    "<f8": "float64",
    "<f4": "float32",
    "<f2": "float16",
    "bfloat16": "bfloat16",
    "<V2": "bfloat16",
    "|V2": "bfloat16",
    "<i8": "int64",
    "<i4": "int32",
    "<i2": "int16",
    "|i1": "int8",
    "|u1": "uint8",
    "|b1": "bool",
}
_NUMBER: Final = r"(?:0|[1-9][0-9]*)"
_NUMBERS: Final = rf"({_NUMBER}(?:\.{_NUMBER})*)"
#: ``shard_INDEX_SHAPE.pt``. Old writers lost the last number of a shape with several axes.
_OBJECT: Final = re.compile(rf"shard_{_NUMBERS}_{_NUMBERS}\.pt")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Array:
    """One ``.zarray``: torch dtype name; shapes in elements. Every chunk file holds a whole ``chunk_shape``."""

    key: str
    dtype: str
    shape: Shape
    chunk_shape: Shape

    @property
    def chunk_bytes(self) -> int:
        """Size of every chunk file."""
        return math.prod(self.chunk_shape) * dtypes.itemsize_bytes(self.dtype)

    @property
    def grid(self) -> Shape:
        """Number of chunks along every axis."""
        return tuple(-(-size // step) for size, step in zip(self.shape, self.chunk_shape, strict=True))

    def file_names(self) -> Iterator[str]:
        """Yield the names of all chunk files in row-major order. A damaged array may have more than fit in memory."""
        counts = self.grid[::-1]
        for number in range(math.prod(counts)):
            place = []
            for count in counts:
                number, digit = divmod(number, count)  # noqa: PLW2901  (its digits)
                place.append(digit)
            yield _chunk_name(place[::-1])

    def stored(self, first: int) -> StoredTensor:
        """The array as a stored tensor, whose archives are numbered from ``first`` on in the order of their names."""
        _, places = unrolled(np.array([self.grid], np.int64))
        offsets = places * np.array(self.chunk_shape, np.int64)
        rests = np.array(self.shape, np.int64) - offsets  # the last chunk of an axis may be cut off
        return StoredTensor(
            name=self.key,
            dtype=self.dtype,
            global_shape=self.shape,
            stored_shape=self.shape,
            offsets=offsets,
            shapes=np.minimum(rests, np.array(self.chunk_shape, np.int64)),
            stored_offsets=offsets,
            archives=np.arange(first, first + len(offsets)),
        )


def read_stored(directory: Path) -> StoredMetadata:
    """What an iteration's directory stores. Reads the descriptions of arrays and lists files; opens no data file.

    Raises FormatError, which names all problems, for damaged descriptions, chunks without a file, empty directories and
    files that belong to nothing; UnsupportedFormatError for arrays that Megatron does not write.
    """
    tops = [name.removesuffix("/") for name in paths.names_in(directory) if name.endswith("/")]
    folders = {name: _names(directory / name) for name in tops}
    lock_names = {folder + _LOCKS_SUFFIX for folder in folders}
    locks = {folder for folder in folders if folder in lock_names and _is_locks(directory / folder)}
    empty = sorted(folder for folder, names in folders.items() if not names and folder not in locks)
    if empty:  # an interrupted copy leaves them
        raise FormatError(f"directories in {directory} are empty: {listed(empty)}. Copy the checkpoint again, whole.")
    keys = [folder for folder, names in sorted(folders.items()) if folder not in locks and _is_key(names)]
    contents = for_all(lambda key: _read_key(directory, key, folders[key]), keys)
    arrays = [content for content in contents if isinstance(content, _Array)]
    if not arrays:
        raise FormatError(f"{directory} holds no arrays: it was not copied whole")
    tensors, file_bytes = {}, dict[str, int]()
    for array in arrays:
        tensors[array.key] = array.stored(first=len(file_bytes))
        file_bytes |= {f"{array.key}/{name}": array.chunk_bytes for name in array.file_names()}
    sizes = np.array([*file_bytes.values()], np.int64)  # every chunk has a file of its own
    objects = {key: entry for entries in contents if isinstance(entries, dict) for key, entry in entries.items()}
    return StoredMetadata(
        file_bytes=file_bytes | {entry.file: entry.num_bytes for entry in objects.values()},
        tensors=tensors,
        objects=objects,
        archives=Archives(np.arange(len(sizes)), np.zeros_like(sizes), sizes),
        folders=frozenset({*locks, *keys}),
    )


def _names(folder: Path) -> dict[str, bool]:
    """The names in a directory, and whether each is a link."""
    if isinstance(folder, RemotePath):
        return dict.fromkeys((path.name for path in folder.iterdir()), False)
    with os.scandir(folder) as entries:
        return {entry.name: entry.is_symlink() for entry in entries}


def _is_locks(folder: Path) -> bool:
    """Whether a directory holds only empty files: the locks of an array's writers. The files of a key never all are."""
    return all(path.is_file() and path.stat().st_size == 0 for path in folder.iterdir())


def _is_key(names: Iterable[str]) -> bool:
    """Whether a directory with these names belongs to the format. Users may put others beside the checkpoint's."""
    return any(name == _ARRAY_FILE or _CHUNK.fullmatch(name) or _OBJECT.fullmatch(name) for name in names)


def _read_key(directory: Path, key: str, names: Mapping[str, bool]) -> _Array | dict[str, Entry]:
    """The array or the objects that are stored under a key; ``names`` are as ``_names`` returns them."""
    if not paths.is_plain_name(key):
        raise FormatError(f"{directory} has the key {short(key)}: expected a name that can be printed")
    folder = directory / key
    _require_inside(directory, [folder, *(folder / name for name, is_link in names.items() if is_link)])
    return _array(folder, {*names}) if _ARRAY_FILE in names else _objects(folder, names)


def _require_inside(directory: Path, entries: Iterable[Path]) -> None:
    """Raise FormatError for links that leave the checkpoint: chunks are bare, so any file would pass as one."""
    links = [str(path) for path in entries if not path.exists() or paths.leads_outside(path, directory)]
    if links:
        raise FormatError(f"links lead out of {directory}, or nowhere: {listed(links)}. Copy their targets instead.")


def _array(folder: Path, names: set[str]) -> _Array:
    """The array that ``.zarray`` in ``folder`` describes. Raises unless the files beside it are exactly its chunks."""
    where = f"{_ARRAY_FILE} in {folder}"
    fields = _DEFAULTS | documents.parse_json(documents.read_bytes(folder / _ARRAY_FILE), where)
    for name, value in _PLAIN.items():
        if name not in fields:
            raise FormatError(f"{name} for {where}: expected {value!r}, got nothing")
        if fields[name] != value:
            raise UnsupportedFormatError(f"{name} for {where}: expected {value!r}, got {short(fields[name])}")
    dtype, shape, chunk_shape = fields.get("dtype"), _sizes(fields, "shape", where), _sizes(fields, "chunks", where)
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise UnsupportedFormatError(f"dtype for {where}: expected one of {', '.join(_DTYPES)}, got {short(dtype)}")
    if len(shape) != len(chunk_shape) or 0 in chunk_shape:
        raise FormatError(f"chunks for {where}: expected one for each axis of {list(shape)}, got {list(chunk_shape)}")
    array = _Array(key=folder.name, dtype=_DTYPES[dtype], shape=shape, chunk_shape=chunk_shape)
    _require_files(array, folder, names - {_ARRAY_FILE, _ATTRIBUTES_FILE})
    _require_contiguous(array, where)
    return array


def _sizes(fields: Mapping[str, Any], name: str, where: str) -> Shape:
    """The field ``name`` of a ``.zarray``, a list of sizes in elements."""
    sizes = fields.get(name)
    if not isinstance(sizes, list) or len(sizes) > MAX_AXES or not all(type(n) is int and n >= 0 for n in sizes):
        raise FormatError(f"{name} for {where}: expected a list of sizes, got {short(sizes)}")
    if not is_countable(sizes):
        raise FormatError(f"{name} for {where}: {short(sizes)} is more than any memory holds")
    return tuple(sizes)


def _require_files(array: _Array, folder: Path, names: set[str]) -> None:
    """Raise FormatError unless ``names`` are the chunk files of the array. Its grid may be far larger than that."""
    missing = (name for name in array.file_names() if name not in names)
    problems = {
        "missing": [*itertools.islice(missing, _MOST_FAULTS)],
        "unknown": sorted(name for name in names if not _is_chunk_of(array, name)),
    }
    problem = "; ".join(f"{what}: {listed(faults)}" for what, faults in problems.items() if faults)
    if problem:
        chunks = f"an array {list(array.shape)} in chunks {list(array.chunk_shape)}"
        raise FormatError(f"files in {folder}, which holds {chunks}, are {problem}. Copy the checkpoint again, whole.")


def _chunk_name(place: Iterable[int]) -> str:
    """The file name of the chunk at a grid position; an array without axes has one chunk, ``0``."""
    return ".".join(map(str, place)) or "0"


def _is_chunk_of(array: _Array, name: str) -> bool:
    """Whether ``name`` is that of a chunk file of the array, spelled without leading zeros."""
    if not _CHUNK.fullmatch(name) or len(name) > _MAX_NAME_LENGTH:
        return False
    place = tuple(map(int, name.split("."))) if array.shape else ()
    return len(place) == len(array.grid) and all(map(lt, place, array.grid)) and _chunk_name(place) == name


def _require_contiguous(array: _Array, where: str) -> None:
    """Refuse cut-off chunks whose valid part is not one contiguous range of the file.

    It is contiguous where no chunk has two rows or more before the cut axis. Megatron cuts only vocabularies into parts
    that need not be equal, and those along their first axis.
    """
    steps = [*zip(array.shape, array.chunk_shape, strict=True)]
    cut_axes = [axis for axis, (size, step) in enumerate(steps) if size % step]
    if cut_axes and any(min(pair) > 1 for pair in steps[: cut_axes[-1]]):
        raise UnsupportedFormatError(
            f"shape for {where}: expected a multiple of the chunks {list(array.chunk_shape)} along axis "
            f"{cut_axes[-1]}, got {list(array.shape)}"
        )


def _objects(folder: Path, names: Iterable[str]) -> dict[str, Entry]:
    """The objects in ``folder`` under the keys that ``torch_dist`` would give them, ``KEY/shard_2_4``.

    An entry that is no file counts as empty. Raises FormatError for names of another form, and for names that
    contradict themselves or each other.
    """
    matches = {name: _OBJECT.fullmatch(name) for name in sorted(names)}
    unknown = [name for name, match in matches.items() if match is None]
    if unknown:
        raise FormatError(
            f"{folder} holds {listed(unknown)}: expected .zarray and its chunks, or objects (shard_0_1.pt). "
            "Copy the checkpoint again, whole."
        )
    places = {name: (_numbers(match[1]), _numbers(match[2])) for name, match in matches.items() if match}
    last_extent = 1 + max(index[-1] for index, _ in places.values())
    entries: dict[str, Entry] = {}
    for name, (index, named_shape) in places.items():
        shape = named_shape if len(named_shape) == len(index) else (*named_shape, last_extent)
        if len(shape) != len(index) or not all(map(lt, index, shape)):
            raise FormatError(f"{folder / name}: the object has an index outside of its shape")
        key = object_key(folder.name, index, shape)
        if key in entries:
            raise FormatError(f"{folder / name}: the object is stored twice, also in {Path(entries[key].file).name}")
        path = folder / name
        entries[key] = Entry(f"{folder.name}/{name}", 0, path.stat().st_size if path.is_file() else 0)
    return entries


def _numbers(dotted: str) -> Shape:
    """``(2, 4)`` for ``2.4``."""
    return tuple(map(int, dotted.split(".")))
