"""``.metadata`` of a ``torch_dist`` checkpoint of megatron-core 0.12 to 0.19, read without torch and without Megatron.

It is a pickled ``torch.distributed.checkpoint.metadata.Metadata`` that lists every chunk of every tensor, and the file,
offset and length of the ``torch.save`` archive that holds it (torch/distributed/checkpoint/{metadata,filesystem}.py,
2.6 to 2.15). Unpickling makes a gigabyte of records for a million chunks; they are turned into columns at once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import chain
from operator import itemgetter
from pathlib import Path
from reprlib import repr as short
from typing import Any, Final

import numpy as np

from dist_ckpt_mistral.errors import FormatError, UnsafePickleError
from dist_ckpt_mistral.formats.checkpoint_directory import METADATA_FILE
from dist_ckpt_mistral.formats.pickles import opcodes, reader
from dist_ckpt_mistral.formats.pickles.reader import OpaqueRecord, as_tuple, record_class
from dist_ckpt_mistral.formats.pickles.tensors import MAX_AXES, torch_dtype_name
from dist_ckpt_mistral.formats.stored_metadata import Archives, StoredMetadata, StoredTensor
from dist_ckpt_mistral.formats.torch_dist.common_state import Entry
from dist_ckpt_mistral.gather.boxes import IntArray
from dist_ckpt_mistral.gather.dtypes import MOST, Shape, is_countable
from dist_ckpt_mistral.storage import documents, paths

#: The plans of all ranks, which repeat everything. Megatron (0.12 to 0.19) appends them to torch's Metadata.
_PLANS: Final = "all_local_plans"
#: The attributes of ``_StorageInfo``, and one more that torch leaves out where the data is not transformed.
_PLACE: Final = ("relative_path", "offset", "length")
_TRANSFORMS: Final = "transform_descriptors"
#: The attribute of Metadata that has the global shapes of tensors stored as blocks (``fully_sharded_model_space``), and
#: the entry of each tensor in it (mcore dist_checkpointing/strategies/torch.py, 0.12 to 0.14).
MCORE_DATA: Final = "mcore_data"
GLOBAL_SHAPE: Final = "nd_reformulated_orig_global_shape"
#: The attributes of a ``StateRecord``.
_attributes: Final = itemgetter(0)


def read_stored(directory: Path) -> StoredMetadata:
    """What the ``.metadata`` of an iteration's directory lists. No data file is opened.

    Raises FormatError where there is no metadata or it is damaged, UnsafePickleError where its pickle asks for anything
    outside the allowlist.
    """
    path = directory / METADATA_FILE
    if not path.is_file():
        raise FormatError(f"{path} is missing: the save was not finished, or files were not copied")
    return read_metadata(lambda: documents.read_bytes(path, most_bytes=None), str(path))


def read_metadata(read: Callable[[], bytes], where: str) -> StoredMetadata:
    """Parse a ``.metadata`` file. ``read`` returns its bytes and may be called twice; ``where`` names it in errors.

    Raises FormatError if it is damaged, UnsafePickleError if it asks for anything outside the allowlist.
    """
    with reader.paused_collector():
        try:
            return _parsed(_unpickled(read, where))  # the records are freed before the collector runs again
        except (AttributeError, LookupError, OverflowError, TypeError, ValueError) as error:
            raise FormatError(f"{where} is not sound torch_dist metadata: {error}") from error


def _unpickled(read: Callable[[], bytes], where: str) -> dict[str, Any]:
    """The attributes of the metadata. Where Megatron's plans come last, they are cut off: half of the pickle.

    No pickle is kept in a variable here, so that its memory is free while it is unpickled.
    """
    try:
        shortened = reader.loads(opcodes.ended_before(read(), _PLANS, unless_behind=MCORE_DATA), _allowlist(), where)
        found: dict[str, Any] = _attributes(shortened)
        if {"state_dict_metadata", "storage_data"} <= found.keys():
            return found
    except UnsafePickleError:
        raise
    except (AttributeError, FormatError, LookupError, TypeError):
        pass  # the plans are somewhere else, or the pickle is damaged
    whole: dict[str, Any] = _attributes(reader.loads(read(), _allowlist(), where))
    return whole


def _allowlist() -> Callable[[str, str], Any]:
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
        (f"{checkpoint}.metadata", "_MEM_FORMAT_ENCODING"): _nothing,
        (f"{checkpoint}.planner", "WriteItemType"): _nothing,
        ("torch.serialization", "_get_layout"): _nothing,
        ("pathlib", "PosixPath"): _nothing,
        ("torch", "Size"): as_tuple,
    }
    return lambda module, name: torch_dtype_name(module, name) or allowed[module, name]


def _nothing(*_: object) -> None:
    """Stands in for a call whose result is not used."""


def _parsed(metadata: dict[str, Any]) -> StoredMetadata:
    """The columns of unpickled metadata.

    Raises ValueError, TypeError, LookupError, OverflowError or AttributeError where it is damaged; ``read_metadata``
    turns these into FormatError.
    """
    described, storage_data = metadata["state_dict_metadata"], metadata["storage_data"]
    indices = [*map(_attributes, storage_data)]
    file_bytes, archives = _archives([*map(_attributes, storage_data.values())])
    archives_of: dict[str, list[int]] = defaultdict(list)
    for number, name in enumerate(map(itemgetter("fqn"), indices)):
        archives_of[name].append(number)
    _require_names([*described, *archives_of])
    _require_bounded(described.values(), len(indices))
    files, tensors, objects = [*file_bytes], {}, {}
    global_shapes = _global_shapes(metadata)
    for name, record in described.items():
        numbers = archives_of.pop(name, [])
        if _is_tensor(record):
            offsets = [indices[number]["offset"] for number in numbers]
            tensors[name] = _tensor(name, _attributes(record), offsets, numbers, global_shapes.get(name))
        elif type(record).__name__ != "BytesStorageMetadata":
            raise ValueError(f"{name!r} is a {type(record).__name__}: expected a tensor or an object")
        elif len(numbers) == 1:
            file, position, num_bytes = (int(column[numbers[0]]) for column in archives)
            objects[name] = Entry(files[file], position, num_bytes)
        else:
            raise ValueError(f"{name!r} is listed, and stored {len(numbers)} times: expected once")
    if archives_of:
        raise ValueError(f"{', '.join(map(repr, archives_of))} are stored but not listed")
    return StoredMetadata(file_bytes=file_bytes, tensors=tensors, objects=objects, archives=archives)


def _is_tensor(record: object) -> bool:
    """Whether the record of a key describes a tensor."""
    return type(record).__name__ == "TensorStorageMetadata"


def _require_names(names: Sequence[Any]) -> None:
    """Raise unless all keys are strings that can be printed and written: 1 and "1" are not one tensor."""
    others = [name for name in names if type(name) is not str]
    if others:
        raise ValueError(f"it has the key {short(others[0])}: expected a string")
    "".join(names).encode()  # raises where there are halves of surrogate pairs


def _require_bounded(described: Iterable[Any], num_archives: int) -> None:
    """Raise ValueError if more chunks are described than stored: a pickle can share one list of chunks many times."""
    num_chunks = sum(len(_attributes(record)["chunks"]) for record in described if _is_tensor(record))
    if num_chunks > num_archives:
        raise ValueError(f"{num_chunks} chunks are described, but only {num_archives} archives are stored")


def _archives(places: Sequence[Mapping[str, Any]]) -> tuple[dict[str, int], Archives]:
    """The end of the last archive in each file, in bytes, and all archives; ``places`` are ``_StorageInfo``."""
    if {*map(len, places)} - {len(_PLACE)}:
        _require_untransformed(places)
    names, *extents = ([*map(itemgetter(key), places)] for key in _PLACE)
    positions, lengths = map(_sizes_column, extents)
    if positions is None or lengths is None:
        place = next(place for place in zip(*extents, strict=True) if _sizes_column(place) is None)
        raise ValueError(f"it places an archive at {short(place[0])}, {short(place[1])} bytes long")
    numbers = _FileNumbers()
    files = np.fromiter(map(numbers.__getitem__, names), np.int64, len(names))
    ends = np.zeros(len(numbers), np.int64)
    np.maximum.at(ends, files, positions + lengths)
    return dict(zip(numbers, ends.tolist(), strict=True)), Archives(files, positions, lengths)


def _global_shapes(metadata: Mapping[str, Any]) -> dict[str, Shape]:
    """The global shapes of the tensors that are stored as blocks, by key. Megatron says None where there are none."""
    entries = metadata.get(MCORE_DATA) or {}
    return {name: _sizes(entry[GLOBAL_SHAPE]) for name, entry in entries.items() if GLOBAL_SHAPE in entry}


class _FileNumbers(dict[str, int]):
    """File name -> number, in the order in which the names are looked up first."""

    def __missing__(self, name: object) -> int:
        """Number a new file. It lies beside ``.metadata``: anything but a plain name could point anywhere."""
        if not isinstance(name, str) or not paths.is_plain_name(name):
            raise ValueError(f"it names the file {short(name)}: expected the plain name of a file beside it")
        return self.setdefault(name, len(self))


def _require_untransformed(places: Iterable[Mapping[str, Any]]) -> None:
    """Raise ValueError if the data of an archive is transformed, such as compressed."""
    for place in places:
        if place.get(_TRANSFORMS):
            raise ValueError(f"it describes transformed data ({short(place[_TRANSFORMS])}), which is not supported")


def _tensor(
    name: str,
    record: Mapping[str, Any],
    stored_offsets: Sequence[Any],
    archives: Sequence[int],
    global_shape: Shape | None,
) -> StoredTensor:
    """The tensor of a ``TensorStorageMetadata`` record, whose ``archives`` hold the chunks at ``stored_offsets``."""
    stored_shape, dtype = _sizes(record["size"]), record["properties"].state[0]
    if type(dtype) is not str:  # what stands in for torch's dtypes
        raise ValueError(f"{name!r} has the dtype {short(dtype)}")
    chunks = [*map(_attributes, record["chunks"])]
    described = ([*map(itemgetter(key), chunks)] for key in ("offsets", "sizes"))
    offsets, shapes, stored = (_boxes_column(boxes, len(stored_shape), name) for boxes in (*described, stored_offsets))
    largest = shapes.max(axis=0, initial=0).tolist()
    if not is_countable(largest):
        raise ValueError(f"chunks of {name!r} have sizes of up to {short(largest)}, more than any memory holds")
    return StoredTensor(
        name=name,
        dtype=dtype,
        global_shape=stored_shape if global_shape is None else global_shape,
        stored_shape=stored_shape,
        offsets=offsets,
        shapes=shapes,
        stored_offsets=stored,
        archives=np.array(archives, np.int64),
    )


def _boxes_column(boxes: Sequence[Any], ndim: int, name: str) -> IntArray:
    """Offsets or shapes of chunks as ``[chunks, ndim]``. Raises ValueError unless all are ``ndim`` sizes.

    Lengths are checked before anything is joined: a pickle may refer to one long tuple a thousand times.
    """
    if {*map(type, boxes)} - {tuple}:
        boxes = [*map(_sizes, boxes)]  # raises
    wrong = {*map(len, boxes)} - {ndim}
    if wrong:
        raise ValueError(f"a chunk of {name!r} has {min(wrong)} axes, the tensor has {ndim}")
    column = _sizes_column([*chain.from_iterable(boxes)])
    if column is None:
        wrong_box = next(box for box in boxes if _sizes_column(box) is None)
        raise ValueError(f"expected sizes, got {short(wrong_box)}")
    return column.reshape(len(boxes), ndim)


def _sizes_column(numbers: Collection[Any]) -> IntArray | None:
    """The numbers as int64; None unless all are integers from 0 to ``MOST``. All of ``.metadata`` go through here."""
    if not {*map(type, numbers)} <= {int}:
        return None
    try:
        column = np.fromiter(numbers, np.int64, len(numbers))
    except OverflowError:
        return None
    return column if column.min(initial=0) >= 0 and column.max(initial=0) <= MOST else None


def _sizes(value: Any) -> Shape:  # noqa: ANN401  (from a pickle)
    """``value`` if it is a tuple of sizes, as offsets and shapes must be, of no more axes than torch's tensors have."""
    if type(value) is not tuple or _sizes_column(value) is None:
        raise ValueError(f"expected sizes, got {short(value)}")
    if len(value) > MAX_AXES:
        raise ValueError(f"expected sizes of at most {MAX_AXES} axes, got {len(value)} axes")
    if not is_countable(value):
        raise ValueError(f"expected sizes of a tensor, got {short(value)}, more than any memory holds")
    return value
