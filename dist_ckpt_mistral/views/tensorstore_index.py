"""An index beside the shards of a checkpoint, with which TensorStore and fsspec read every weight where it is.

The weights become Zarr v3 arrays whose chunks are byte ranges of the shards: in an OCDBT database for TensorStore
(``formats/ocdbt.py``), and as references of kerchunk for fsspec (kerchunk 0.2, "Reference specification", version 1).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from zlib_ng import zlib_ng

from dist_ckpt_mistral.arguments import require_types
from dist_ckpt_mistral.errors import DistCkptMistralError, FormatError, UnsupportedFormatError
from dist_ckpt_mistral.formats.kinds import Kind
from dist_ckpt_mistral.formats.ocdbt import MANIFEST_FILE, SHARDS_FILE, FileRange, database
from dist_ckpt_mistral.formats.places import locate
from dist_ckpt_mistral.formats.stored_checkpoint import ZARR, StoredCheckpoint, open_stored
from dist_ckpt_mistral.formats.torch_dist.archive import ArchiveReader
from dist_ckpt_mistral.gather.digest import digest
from dist_ckpt_mistral.gather.dtypes import Shape
from dist_ckpt_mistral.gather.execute import DEFAULT_EFFORT
from dist_ckpt_mistral.gather.grids import CellGrid, cell_grid
from dist_ckpt_mistral.gather.links import Link, whole
from dist_ckpt_mistral.mapping.source import ModelSource, open_megatron, with_padding_rows
from dist_ckpt_mistral.mapping.twins import require_equal_twins
from dist_ckpt_mistral.messages import concise_repr
from dist_ckpt_mistral.model.config.mistral_config import GivenConfig, chosen_config
from dist_ckpt_mistral.storage import documents
from dist_ckpt_mistral.storage.local import SourceFiles
from dist_ckpt_mistral.storage.remote_path import as_path

#: The first bytes of ``_references``.
_REFERENCES: Final = b'{"version": 1, "refs": '
#: The version of index.ocdbt.json.
_VERSION: Final = 1
#: The two name spaces of an index.
_HF, _MEGATRON = "hf", "megatron"


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightIndex:
    """An index of a checkpoint's weights.

    Args:
        directory: The absolute path of the iteration's directory, which has the shards and the index.
        names: The arrays in it: ``hf/NAME`` and ``megatron/KEY``.
        num_bytes: Total size of the index in bytes.
        left_out: Weights that no index can have, by Hugging Face name, and why: they are in other directories, or would
            be cut into too many pieces.
        was_stale: Why an older index in this directory was out of date; empty if there was none, or it was not.
    """

    directory: Path
    names: tuple[str, ...]
    num_bytes: int
    left_out: Mapping[str, str]
    was_stale: tuple[str, ...]

    __repr__ = concise_repr

    def to_json(self) -> dict[str, Any]:
        """The content of ``index --json`` that does not change from run to run, in JSON types."""
        content = {name: getattr(self, name) for name in ("num_bytes", "left_out", "was_stale", "names")}
        return {"output": str(self.directory), **content}


def write_index(
    checkpoint: str | Path, *, config: GivenConfig | None = None, kerchunk: str | Path | None = None
) -> WeightIndex:
    """Write an index beside the shards of a checkpoint, so that TensorStore opens every weight lazily.

    Nothing is converted or copied: the index has some kilobytes and refers to byte ranges of the shards. It holds for
    as long as they stay as they are, which ``index_problems`` and ``verify`` tell by sizes and checksums. An older
    index is replaced. Of the shards only the directories of their archives are read (all bytes, if they are a zarr
    checkpoint).

    Args:
        checkpoint: Megatron checkpoint: its root, or one ``iter_*`` or ``release`` directory in it.
        config: For a checkpoint that lost its configuration: a ``MistralConfig``, a config.json, or a directory or hub
            id with one.
        kerchunk: File for the same as references of kerchunk, which fsspec's ``reference`` file system reads. File
            names in it are relative to the directory of the iteration.

    Returns:
        What the index has.

    Raises:
        FormatError: The checkpoint is damaged.
        ConfigError: There is no configuration, or configurations contradict each other.
        OutputError: The index cannot be written.

    Example:
        done = dcm.write_index("ckpt")
        tensorstore.open(f"file://{done.directory}/|ocdbt:hf/model.norm.weight/|zarr3:").result()
    """
    require_types(write_index, **locals())
    if kerchunk is not None:
        documents.require_own_kind(as_path(kerchunk), _REFERENCES, "references of kerchunk")
    source = open_megatron(locate(checkpoint, Kind.CHECKPOINT).path, config=chosen_config(config))
    require_equal_twins(source, only_hidden=True)
    directory = source.path
    was_stale = index_problems(directory)
    shards = _shards(open_stored(directory, with_common_state=False))
    grids, left_out = _grids(source)
    files = [path.relative_to(directory).as_posix() for path in source.index.files]
    entries = {key: value for name, grid in grids.items() for key, value in _entries(name, grid)}
    about = json.dumps({"version": _VERSION, "shards": shards}, indent=2).encode()
    written = {SHARDS_FILE: about, **database(entries, files)}
    documents.remove(directory / MANIFEST_FILE)  # which is written last: until then there is no index
    for name, content in written.items():
        documents.write_whole(directory / name, content)
    if kerchunk is not None:
        documents.write_whole(as_path(kerchunk), _references(entries, files))
    return WeightIndex(
        directory=directory.absolute(),  # as URLs have it
        names=tuple(grids),
        num_bytes=sum(map(len, written.values())),
        left_out=left_out,
        was_stale=was_stale,
    )


def index_problems(checkpoint: str | Path) -> tuple[str, ...]:
    """Say why the index beside the shards of a checkpoint is out of date.

    Args:
        checkpoint: Megatron checkpoint: its root, or one ``iter_*`` or ``release`` directory in it.

    Returns:
        Every shard that is missing or has another size or other checksums than the index says; empty if the index is
        sound, or there is none.

    Raises:
        FormatError: The checkpoint or the index is damaged.

    Example:
        ``assert not dcm.index_problems("ckpt")``
    """
    require_types(index_problems, **locals())
    stored = open_stored(locate(checkpoint, Kind.CHECKPOINT).path, with_common_state=False)
    if not (stored.directory / MANIFEST_FILE).is_file():
        return ()
    path = stored.directory / SHARDS_FILE
    if not path.is_file():
        return (f"{MANIFEST_FILE} is there and {SHARDS_FILE} is not: an index of another program, or half of one",)
    content = documents.read_json(path)
    indexed = content.get("shards")
    if content.get("version") != _VERSION or not isinstance(indexed, dict):
        raise FormatError(f"version in {path}: expected {_VERSION}, with 'shards', got {content.get('version')!r}")
    try:
        now = _shards(stored)
    except DistCkptMistralError as error:
        return (str(error),)
    return tuple(
        f"{name}: the index was made for {indexed.get(name, 'no such file')}, and there is {now.get(name, 'none')}"
        for name in sorted({*indexed, *now})
        if indexed.get(name) != now.get(name)
    )


def _shards(stored: StoredCheckpoint) -> dict[str, dict[str, Any]]:
    """The size of every data file, and the CRC-32 of the checksums in it: those of its archives, or its own.

    torch stores the CRC-32 of all data in its archives, so that these need not be read.
    """
    stored.require_whole(stored.file_bytes)
    names = list(stored.file_bytes)
    if stored.backend == ZARR:
        sums = [digest(stored.directory / name, (), sha256=False, effort=DEFAULT_EFFORT) for name in names]
        return {name: {"bytes": each.num_bytes, "crc32": each.crc32} for name, each in zip(names, sums, strict=True)}
    archives: dict[int, set[tuple[int, int]]] = {number: set() for number in range(len(names))}
    for name in stored.tensors:
        chunks = stored.chunks(name)
        columns = (chunks.files.tolist(), chunks.positions.tolist(), chunks.lengths.tolist())
        for file, position, num_bytes in zip(*columns, strict=True):
            archives[file].add((position, num_bytes))
    numbers = {name: number for number, name in enumerate(names)}
    for entry in stored.objects.values():
        archives[numbers[entry.file]].add((entry.offset, entry.num_bytes))
    with SourceFiles([stored.directory / name for name in names]) as files:
        return {
            name: {
                "bytes": files.size_bytes(number),
                "crc32_of_checksums": _sum_of_sums(files, number, archives[number]),
            }
            for name, number in numbers.items()
        }


def _sum_of_sums(files: SourceFiles, file: int, archives: set[tuple[int, int]]) -> int:
    """The CRC-32 of the list of all records in a file: where they are, and their own CRC-32."""
    crc32 = 0
    for position, num_bytes in sorted(archives):
        for record in ArchiveReader(files, file, position, num_bytes, f"the archive at byte {position}").listed:
            text = f"{position} {record.name} {record.offset} {record.num_bytes} {record.crc32}\n"
            crc32 = zlib_ng.crc32(text.encode(), crc32)
    return crc32


def _grids(source: ModelSource) -> tuple[dict[str, CellGrid], dict[str, str]]:
    """The grid of every array by its name in the index, and the weights that are left out, with the reason."""
    padded, tensors = with_padding_rows(source), source.table.hf_tensors()
    wanted: dict[str, tuple[Shape, Sequence[Link]]] = {}
    for name, links in padded.links.items():
        if links:  # none: the tensor is not in this checkpoint
            wanted[f"{_HF}/{name}"] = tensors[name].shape, links
    for key, tensor in source.index.tensors.items():
        wanted[f"{_MEGATRON}/{key}"] = tensor.global_shape, [whole(key, tensor.global_shape)]
    grids, left_out = dict[str, CellGrid](), dict[str, str]()
    for name, (shape, sources) in wanted.items():
        try:
            grids[name] = cell_grid(source.index, name, shape, sources)
        except UnsupportedFormatError as error:
            left_out[name] = str(error)
    return grids, left_out


def _entries(name: str, grid: CellGrid) -> Iterator[tuple[str, bytes | FileRange]]:
    """Yield the keys and values of one array: its metadata, and the place of every chunk."""
    yield f"{name}/zarr.json", json.dumps(array_metadata(grid.shape, grid.cell_shape, grid.dtype)).encode()
    columns = (grid.cells.tolist(), grid.files.tolist(), grid.positions.tolist())
    for cell, file, position in zip(*columns, strict=True):
        yield f"{name}/{chunk_key(cell)}", FileRange(file, position, grid.num_bytes)


def array_metadata(shape: Shape, chunk_shape: Shape, dtype: str) -> dict[str, Any]:
    """The ``zarr.json`` of an array of uncompressed little-endian chunks (Zarr core specification, version 3)."""
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk_shape)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
        "fill_value": 0.0,
        "attributes": {},
    }


def chunk_key(cell: Sequence[int]) -> str:
    """The key of a chunk, relative to its array."""
    return "/".join(["c", *map(str, cell)])


def _references(entries: Mapping[str, bytes | FileRange], files: Sequence[str]) -> bytes:
    """The entries as kerchunk's references."""
    refs = {
        key: [files[value.file], value.position, value.num_bytes] if isinstance(value, FileRange) else value.decode()
        for key, value in entries.items()
    }
    return json.dumps({"version": 1, "refs": refs}).encode()
