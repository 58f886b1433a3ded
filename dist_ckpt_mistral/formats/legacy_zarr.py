"""Reading Megatron's legacy ``zarr`` checkpoints (megatron-core to 0.15), without zarr and without tensorstore.

A directory for every key: ``.zarray`` describes an array, and each chunk of it lies bare in a file of its own, named
after its place in the grid, ``2.0.1``. Or the directory holds objects, each as ``torch.save`` saved it, in
``shard_2_4.pt``. (mcore dist_checkpointing/strategies/zarr.py, 0.12 to 0.15; zarr storage specification, version 2.)
A chunk that has no file would read as zeros in zarr and in tensorstore: here it is an error.
"""

from __future__ import annotations

import itertools
import math
import os
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from operator import lt
from pathlib import Path
from reprlib import repr as short
from typing import Any, Final

from dist_ckpt_mistral.errors import FormatError, UnsupportedFormatError, for_all
from dist_ckpt_mistral.formats.stored_metadata import Archives, StoredMetadata, StoredTensor
from dist_ckpt_mistral.formats.torch_dist.common_state import Entry
from dist_ckpt_mistral.formats.torch_dist.tensor_pickle import MAX_AXES
from dist_ckpt_mistral.gather import dtypes
from dist_ckpt_mistral.gather.dtypes import Shape, is_countable
from dist_ckpt_mistral.messages import listed
from dist_ckpt_mistral.storage import documents, paths

_ARRAY_FILE: Final = ".zarray"
_ATTRIBUTES_FILE: Final = ".zattrs"
#: A directory of locks that several writers of one array left behind, beside that of the array.
_LOCKS_SUFFIX: Final = ".sync"
_CHUNK: Final = re.compile(r"[0-9]+(\.[0-9]+)*")
#: More faults of one array than this are not told; no name of a chunk is longer than this.
_MOST_FAULTS: Final = 1000
_MOST_LETTERS: Final = 255
#: What Megatron's arrays always say; another value would change how chunk files are to be read.
_PLAIN: Final = {"zarr_format": 2, "order": "C", "compressor": None, "filters": None, "dimension_separator": "."}
#: The specification lets this one be left out, with this meaning.
_LEFT_OUT: Final = {"dimension_separator": "."}
#: numpy's names of dtypes. zarr knows bfloat16 as two bytes of no type, which Megatron wrote over with its name.
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
#: ``shard_INDEX_SHAPE.pt``; of a shape of several axes old writers lost the last number.
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

    def places(self) -> Iterator[Shape]:
        """All places of the grid, in row-major order, one after the other: there may be more than memory holds."""
        counts = self.grid[::-1]
        for number in range(math.prod(counts)):
            place = []
            for count in counts:
                number, at = divmod(number, count)  # noqa: PLW2901  (its digits)
                place.append(at)
            yield tuple(place[::-1])

    def box(self, place: Shape) -> tuple[Shape, Shape]:
        """Offset and shape of the chunk at a place, in elements: at the end of an axis it may be cut off."""
        offset = tuple(i * step for i, step in zip(place, self.chunk_shape, strict=True))
        rest = (size - at for size, at in zip(self.shape, offset, strict=True))
        return offset, tuple(map(min, self.chunk_shape, rest))


def read_stored(directory: Path) -> StoredMetadata:
    """What an iteration's directory holds. Reads the descriptions of arrays and lists files; no data file is opened.

    Raises FormatError for descriptions that are damaged, chunks that have no file, empty directories and files that
    belong to nothing (all of them); UnsupportedFormatError for arrays of another kind than Megatron's.
    """
    folders = {entry.name: _names(entry.path) for entry in os.scandir(directory) if entry.is_dir()}
    beside = {folder + _LOCKS_SUFFIX for folder in folders}
    locks = {folder for folder in folders if folder in beside and _is_locks(directory / folder)}
    empty = sorted(folder for folder, names in folders.items() if not names and folder not in locks)
    if empty:  # what a copy that was interrupted has of a key
        raise FormatError(f"directories in {directory} are empty: {listed(empty)}. Copy the checkpoint again, whole.")
    keys = [folder for folder, names in sorted(folders.items()) if folder not in locks and _is_key(names)]
    found = for_all(lambda key: _read_key(directory, key, folders[key]), keys)
    arrays = [each for each in found if isinstance(each, _Array)]
    if not arrays:
        raise FormatError(f"{directory} holds no arrays: it was not copied whole")
    tensors, file_bytes = {}, dict[str, int]()
    for each in arrays:
        tensors[each.key] = _tensor(each, first=len(file_bytes))
        file_bytes |= {f"{each.key}/{_chunk_name(place)}": each.chunk_bytes for place in each.places()}
    files, sizes = array("q", range(len(file_bytes))), array("q", file_bytes.values())  # every chunk has its own
    objects = {name: entry for entries in found if isinstance(entries, dict) for name, entry in entries.items()}
    return StoredMetadata(
        file_bytes=file_bytes | {entry.file: entry.num_bytes for entry in objects.values()},
        tensors=tensors,
        objects=objects,
        archives=Archives(files, array("q", [0]) * len(files), sizes),
        folders=frozenset({*locks, *keys}),
    )


def _names(folder: str) -> dict[str, bool]:
    """The names in a directory, and whether each is that of a link."""
    with os.scandir(folder) as entries:
        return {entry.name: entry.is_symlink() for entry in entries}


def _is_locks(folder: Path) -> bool:
    """Whether a directory beside an array's holds the locks of its writers: empty files. A key's own never all are."""
    with os.scandir(folder) as entries:
        return all(entry.is_file() and entry.stat().st_size == 0 for entry in entries)


def _is_key(names: Iterable[str]) -> bool:
    """Whether a directory belongs to the format; others are whatever somebody put beside the checkpoint."""
    return any(name == _ARRAY_FILE or _CHUNK.fullmatch(name) or is_object(name) for name in names)


def _read_key(directory: Path, key: str, names: Mapping[str, bool]) -> _Array | dict[str, Entry]:
    """What is stored under a key: an array, or objects."""
    if not paths.is_plain_name(key):
        raise FormatError(f"{directory} has the key {short(key)}: expected a name that can be printed")
    folder = directory / key
    _require_inside(directory, [folder, *(folder / name for name, is_link in names.items() if is_link)])
    return _array(folder, {*names}) if _ARRAY_FILE in names else read_objects(folder, names)


def _require_inside(directory: Path, places: Iterable[Path]) -> None:
    """Raise FormatError for links to elsewhere: chunks are bare, so any file would be taken for one."""
    links = [str(path) for path in places if not path.exists() or paths.leads_outside(path, directory)]
    if links:
        raise FormatError(f"links lead out of {directory}, or nowhere: {listed(links)}. Copy what they mean instead.")


def _array(folder: Path, names: set[str]) -> _Array:
    """What ``.zarray`` in ``folder`` says, held against the files beside it."""
    where = f"{_ARRAY_FILE} in {folder}"
    said = _LEFT_OUT | documents.parse_json(documents.read_bytes(folder / _ARRAY_FILE), where)
    for name, value in _PLAIN.items():
        if name not in said:
            raise FormatError(f"{name} for {where}: expected {value!r}, got nothing")
        if said[name] != value:
            raise UnsupportedFormatError(f"{name} for {where}: expected {value!r}, got {short(said[name])}")
    dtype, shape, chunk_shape = said.get("dtype"), _sizes(said, "shape", where), _sizes(said, "chunks", where)
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise UnsupportedFormatError(f"dtype for {where}: expected one of {', '.join(_DTYPES)}, got {short(dtype)}")
    if len(shape) != len(chunk_shape) or 0 in chunk_shape:
        raise FormatError(f"chunks for {where}: expected one for each axis of {list(shape)}, got {list(chunk_shape)}")
    found = _Array(key=folder.name, dtype=_DTYPES[dtype], shape=shape, chunk_shape=chunk_shape)
    _require_files(found, folder, names - {_ARRAY_FILE, _ATTRIBUTES_FILE})
    _require_contiguous(found, where)
    return found


def _sizes(said: Mapping[str, Any], name: str, where: str) -> Shape:
    sizes = said.get(name)
    if not isinstance(sizes, list) or len(sizes) > MAX_AXES or not all(type(n) is int and n >= 0 for n in sizes):
        raise FormatError(f"{name} for {where}: expected a list of sizes, got {short(sizes)}")
    if not is_countable(sizes):
        raise FormatError(f"{name} for {where}: {short(sizes)} is more than any memory holds")
    return tuple(sizes)


def _require_files(found: _Array, folder: Path, names: set[str]) -> None:
    """Raise FormatError unless there is a file for every chunk, and no other. The grid may be far larger than that."""
    missing = (name for place in found.places() if (name := _chunk_name(place)) not in names)
    problems = {
        "missing": [*itertools.islice(missing, _MOST_FAULTS)],
        "unknown": sorted(name for name in names if not _is_chunk_of(found, name)),
    }
    told = "; ".join(f"{what}: {listed(faults)}" for what, faults in problems.items() if faults)
    if told:
        chunks = f"an array {list(found.shape)} in chunks {list(found.chunk_shape)}"
        raise FormatError(f"files in {folder}, which holds {chunks}, are {told}. Copy the checkpoint again, whole.")


def _chunk_name(place: Shape) -> str:
    """The file of the chunk at a place; an array without axes has one chunk."""
    return ".".join(map(str, place)) or "0"


def _is_chunk_of(found: _Array, name: str) -> bool:
    if not _CHUNK.fullmatch(name) or len(name) > _MOST_LETTERS:
        return False
    place = tuple(map(int, name.split("."))) if found.shape else ()
    return len(place) == len(found.grid) and all(map(lt, place, found.grid)) and _chunk_name(place) == name


def _require_contiguous(found: _Array, where: str) -> None:
    """Refuse chunks that are cut off so that what is left of them does not lie in one piece.

    It does where no chunk has two rows or more before the axis that is cut. Megatron cuts only vocabularies into parts
    that need not be equal, and those along their first axis.
    """
    steps = [*zip(found.shape, found.chunk_shape, strict=True)]
    cut = [axis for axis, (size, step) in enumerate(steps) if size % step]
    if cut and any(min(pair) > 1 for pair in steps[: cut[-1]]):
        raise UnsupportedFormatError(
            f"shape for {where}: expected a multiple of the chunks {list(found.chunk_shape)} along axis {cut[-1]}, "
            f"got {list(found.shape)}"
        )


def _tensor(found: _Array, *, first: int) -> StoredTensor:
    """The array as a stored tensor, whose chunks are numbered from ``first`` on."""
    boxes = [*map(found.box, found.places())]
    offsets, shapes = (array("q", itertools.chain.from_iterable(box[i] for box in boxes)) for i in range(2))
    return StoredTensor(
        name=found.key,
        dtype=found.dtype,
        global_shape=found.shape,
        stored_shape=found.shape,
        num_chunks=len(boxes),
        offsets=offsets,
        shapes=shapes,
        stored_offsets=offsets,
        archives=array("q", range(first, first + len(boxes))),
    )


def is_object(name: str) -> bool:
    """Whether a file of this name holds an object."""
    return _OBJECT.fullmatch(name) is not None


def read_objects(folder: Path, names: Iterable[str]) -> dict[str, Entry]:
    """The objects in ``folder`` by the keys that ``torch_dist`` has for them: ``KEY/shard_2_4``.

    What has the name of an object and is no file counts as empty. Raises FormatError for other names, and for names
    that contradict themselves or each other.
    """
    found = {name: _OBJECT.fullmatch(name) for name in sorted(names)}
    unknown = [name for name, match in found.items() if match is None]
    if unknown:
        raise FormatError(
            f"{folder} holds {listed(unknown)}: expected .zarray and its chunks, or objects (shard_0_1.pt). "
            "Copy the checkpoint again, whole."
        )
    places = {name: (_extents(match[1]), _extents(match[2])) for name, match in found.items() if match}
    extent = 1 + max(index[-1] for index, _ in places.values())
    entries: dict[str, Entry] = {}
    for name, (index, given) in places.items():
        shape = given if len(given) == len(index) else (*given, extent)
        if len(shape) != len(index) or not all(map(lt, index, shape)):
            raise FormatError(f"{folder / name}: the object has an index outside of its shape")
        key = f"{folder.name}/shard_{_dotted(index)}_{_dotted(shape)}"
        if key in entries:
            raise FormatError(f"{folder / name}: the object is stored twice, also in {Path(entries[key].file).name}")
        path = folder / name
        entries[key] = Entry(f"{folder.name}/{name}", 0, path.stat().st_size if path.is_file() else 0)
    return entries


def _extents(dotted: str) -> Shape:
    return tuple(map(int, dotted.split(".")))


def _dotted(sizes: Shape) -> str:
    return ".".join(map(str, sizes))
