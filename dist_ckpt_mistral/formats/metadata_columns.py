"""The same as ``metadata_records``, where most records were never made: a million chunks in a fraction of the time.

What is amiss is left to ``metadata_records`` to find and to tell.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, Final, NamedTuple

import numpy as np

from dist_ckpt_mistral.errors import FormatError
from dist_ckpt_mistral.formats import metadata_records as records_of
from dist_ckpt_mistral.formats import pickle_reading
from dist_ckpt_mistral.formats.common_state import Entry
from dist_ckpt_mistral.formats.cursors import MOST_AXES, IntArray
from dist_ckpt_mistral.formats.record_batch import Batch
from dist_ckpt_mistral.formats.record_columns import Items, Kind, cut
from dist_ckpt_mistral.formats.stored_metadata import Archives, StoredMetadata, StoredTensor
from dist_ckpt_mistral.shapes import Shape

_CHECKPOINT: Final = "torch.distributed.checkpoint"
_NONE: Final = np.empty(0, dtype=np.int64)


def read(proto: bytes, opcodes: bytes, find: Callable[[str, str], Any], where: str) -> StoredMetadata | None:
    """What the opcodes of ``.metadata`` say, behind PROTO; None where that must be found out record by record."""
    try:
        remains = cut(proto, opcodes, _items(find), find)
        if remains is None:
            return None
        metadata = records_of.attributes(pickle_reading.loads(remains.pickled, remains.find, where))
        return _Parser(metadata, remains.batches).parse()
    except (AttributeError, FormatError, LookupError, OverflowError, TypeError, ValueError):
        return None


def _items(find: Callable[[str, str], Any]) -> tuple[Items, Items]:
    """How chunks are written, and where they and objects are stored."""
    chunk, index = (find(f"{_CHECKPOINT}.metadata", name) for name in ("ChunkStorageMetadata", "MetadataIndex"))
    info, size = find(f"{_CHECKPOINT}.filesystem", "_StorageInfo"), find("torch", "Size")
    place = (info, "relative_path", "offset", "length")
    kinds = (
        (("gog", "gg", "cugog", "g", "g", "u"), "tstii", (index, "fqn", "offset", size, *place)),
        (("gog", "gNgg", "cugog", "g", "g", "u"), "tstii", (index, "fqn", "index", "offset", size, *place)),
        (("gog", "gNugog", "g", "g", "u"), "ttii", (index, "fqn", "index", *place)),
    )
    places = (Kind(constants=constants, slots=slots, referred=referred) for constants, slots, referred in kinds)
    boxes = Kind(constants=("gogg", "cgg", "cu"), slots="ss", referred=(chunk, "offsets", size, "sizes", size))
    return Items.of_lists("ChunkStorageMetadata", boxes), Items.of_dicts("MetadataIndex", *places)


class _Stored(NamedTuple):
    """Archives and what is in them as columns: which of ``names``, of ``files``, and where the chunk is, if it is one.

    ``offsets[i, :ndim[i]]`` are in elements; an object has -1 axes.
    """

    names: Sequence[str]
    name: IntArray
    files: Sequence[str]
    file: IntArray
    positions: IntArray
    lengths: IntArray
    offsets: IntArray
    ndim: IntArray


class _Parser:
    """Puts together what the unpickler gave, and the batches, each of which must be met once. Raises what is amiss."""

    def __init__(self, metadata: Mapping[str, Any], batches: Sequence[Batch]) -> None:
        self._metadata = metadata
        self._unmet = set(batches)

    def parse(self) -> StoredMetadata:
        """All of it."""
        described, stored = self._metadata["state_dict_metadata"], self._stored(self._metadata["storage_data"])
        records_of.require_names([*described, *stored.names])
        records_of.require_bounded(described.values(), len(stored.name))
        numbers = dict(zip(stored.names, _grouped(stored.name, len(stored.names)), strict=True))
        own_shapes = records_of.own_shapes_of(self._metadata)
        tensors, objects = {}, {}
        for name, record in described.items():
            archives = numbers.pop(name, _NONE)
            if records_of.is_tensor(record):
                columns = stored.offsets[archives], stored.ndim[archives], archives
                tensors[name] = self._tensor(name, records_of.attributes(record), columns, own_shapes.get(name))
            else:
                objects[name] = _object(record, stored, archives)
        num_chunks = sum(tensor.num_chunks for tensor in tensors.values())
        if numbers or self._unmet or num_chunks > len(stored.name):
            raise ValueError("what is described is not what is stored")
        places = Archives(*map(_plain, (stored.file, stored.positions, stored.lengths)))
        return StoredMetadata(file_bytes=_ends(stored), tensors=tensors, objects=objects, archives=places)

    def _met(self, batch: Batch) -> Batch:
        self._unmet.remove(batch)  # raises where it is met twice
        return batch

    def _stored(self, storage_data: dict[Any, Any]) -> _Stored:
        if type(storage_data) is not dict:
            raise TypeError("not a dict")
        pieces = _pieces(storage_data.items(), lambda pair: pair[0])
        return _joined([_of_batch(self._met(e)) if isinstance(e, Batch) else _of_records(e) for e in pieces])

    def _tensor(
        self, name: str, record: Mapping[str, Any], stored: tuple[IntArray, IntArray, IntArray], own_shape: Shape | None
    ) -> StoredTensor:
        shape, dtype, chunks = records_of.sizes_of(record["size"]), record["properties"].state[0], record["chunks"]
        if type(dtype) is not str or type(chunks) is not list:
            raise TypeError("not a dtype, or not a list")
        boxes = [self._boxes(name, len(shape), piece) for piece in _pieces(chunks, lambda each: each)]
        offsets, shapes = np.concatenate([np.empty((2, 0, len(shape)), dtype=np.int64), *boxes], axis=1)
        stored_offsets, ndim, archives = stored
        return StoredTensor(
            name=name,
            dtype=dtype,
            global_shape=shape if own_shape is None else own_shape,
            stored_shape=shape,
            num_chunks=len(offsets),
            offsets=_plain(offsets),
            shapes=_plain(shapes),
            stored_offsets=_plain(_of_axes(stored_offsets, ndim, len(shape))),
            archives=_plain(archives),
        )

    def _boxes(self, name: str, ndim: int, piece: Batch | list[Any]) -> IntArray:
        """Offsets and shapes of some chunks, ``[2, chunks, ndim]``."""
        if isinstance(piece, Batch):
            records = self._met(piece).records
            return _of_axes(records.sizes, records.ndim, ndim).transpose(1, 0, 2)
        chunks = [*map(records_of.attributes, piece)]
        columns = [records_of.column_of([each[key] for each in chunks], ndim, name) for key in ("offsets", "sizes")]
        return np.array(columns, dtype=np.int64).reshape(2, len(chunks), ndim)


def _pieces(items: Iterable[Any], key: Callable[[Any], Any]) -> Iterator[Batch | list[Any]]:
    """Each batch among the items, and what stands between batches together."""
    for is_batch, group in groupby(items, lambda item: isinstance(key(item), Batch)):
        if is_batch:
            yield from map(key, group)
        else:
            yield [*group]


def _of_axes(sizes: IntArray, ndim: IntArray, expected: int) -> IntArray:
    """Sizes that must all have the same number of axes, without the columns that they have not."""
    if (ndim != expected).any():
        raise ValueError("another number of axes")
    return sizes[..., :expected]


def _object(record: object, stored: _Stored, archives: IntArray) -> Entry:
    (archive,) = archives.tolist()
    if type(record).__name__ != "BytesStorageMetadata":
        raise TypeError("neither a tensor nor an object")
    return Entry(stored.files[stored.file[archive]], int(stored.positions[archive]), int(stored.lengths[archive]))


def _of_batch(batch: Batch) -> _Stored:
    names, files = batch.text_numbers(0), batch.text_numbers(1)
    positions, lengths = batch.records.integers.T
    offsets, ndim = batch.records.sizes[:, 0], batch.records.ndim[:, 0]
    return _Stored(batch.strings, names, batch.strings, files, positions, lengths, offsets, ndim)


def _of_records(pairs: list[tuple[Any, Any]]) -> _Stored:
    indices = [records_of.attributes(index) for index, _ in pairs]
    ends, archives = records_of.archives_of([records_of.attributes(place) for _, place in pairs])
    boxes = [None if (at := each.get("offset")) is None else records_of.sizes_of(at) for each in indices]
    ndim = np.array([-1 if at is None else len(at) for at in boxes])
    offsets = np.zeros((len(pairs), MOST_AXES), dtype=np.int64)
    for row, at in enumerate(boxes):
        offsets[row, : len(at or ())] = at or ()  # raises where it has more axes
    files, positions, lengths = (np.asarray(each, dtype=np.int64) for each in archives)
    names = [each["fqn"] for each in indices]
    return _Stored(names, np.arange(len(names)), [*ends], files, positions, lengths, offsets, ndim)


def _joined(parts: list[_Stored]) -> _Stored:
    names, files = _Numbers(), records_of.FileNumbers()
    name = np.concatenate([_renumbered(part.name, part.names, names) for part in parts])
    file = np.concatenate([_renumbered(part.file, part.files, files) for part in parts])
    columns = zip(*((part.positions, part.lengths, part.offsets, part.ndim) for part in parts), strict=True)
    return _Stored([*names], name, [*files], file, *map(np.concatenate, columns))


class _Numbers(dict[Any, int]):
    """The numbers of names in the order in which they are met."""

    def __missing__(self, name: Any) -> int:  # noqa: ANN401  (from a pickle)
        return self.setdefault(name, len(self))


def _renumbered(numbers: IntArray, names: Sequence[Any], known: dict[Any, int]) -> IntArray:
    """Numbers of ``names`` as those that ``known`` gives to the same names, in the order in which they are met."""
    used, first, which = np.unique(numbers, return_index=True, return_inverse=True)
    theirs = np.empty(len(used), dtype=np.int64)
    for each in np.argsort(first).tolist():
        theirs[each] = known[names[used[each]]]
    return theirs[which]


def _grouped(numbers: IntArray, count: int) -> list[IntArray]:
    """Where each of the numbers up to ``count`` stands."""
    order = np.argsort(numbers, kind="stable")
    return np.split(order, np.bincount(numbers, minlength=count).cumsum()[:-1])


def _ends(stored: _Stored) -> dict[str, int]:
    """Where the last archive of each file ends."""
    if int(stored.positions.max()) + int(stored.lengths.max()) > np.iinfo(np.int64).max:
        raise OverflowError("beyond what is counted in 64 bits")
    ends = np.zeros(len(stored.files), dtype=np.int64)
    np.maximum.at(ends, stored.file, stored.positions + stored.lengths)
    return dict(zip(stored.files, ends.tolist(), strict=True))


def _plain(numbers: IntArray) -> array[int]:
    return array("q", numbers.astype(np.int64).tobytes())
