"""``.metadata`` of a ``torch_dist`` checkpoint of megatron-core 0.12 to 0.19, read without torch and without Megatron.

It is a pickled ``torch.distributed.checkpoint.metadata.Metadata`` that lists every chunk of every tensor, and the file,
offset and length of the ``torch.save`` archive that holds it (torch/distributed/checkpoint/{metadata,filesystem}.py,
2.6 to 2.15). The records that unpickling makes of a million chunks take a gigabyte: they are turned into columns.
"""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import chain
from operator import add, itemgetter
from pathlib import Path
from reprlib import repr as short
from typing import Any, Final

from dist_ckpt_mistral.errors import FormatError, UnsafePickleError
from dist_ckpt_mistral.formats.checkpoint_directory import METADATA_FILE
from dist_ckpt_mistral.formats.pickles import opcodes, reader
from dist_ckpt_mistral.formats.pickles.reader import OpaqueRecord, as_tuple, record_class
from dist_ckpt_mistral.formats.stored_metadata import Archives, StoredMetadata, StoredTensor
from dist_ckpt_mistral.formats.torch_dist.common_state import Entry
from dist_ckpt_mistral.formats.torch_dist.tensor_pickle import MAX_AXES, torch_dtype_name
from dist_ckpt_mistral.gather.dtypes import MOST, Shape, is_countable
from dist_ckpt_mistral.storage import documents, paths

#: What Megatron (0.12 to 0.19) adds to torch's Metadata behind all else: the plans of all ranks, which repeat it.
_PLANS: Final = "all_local_plans"
#: The attributes of ``_StorageInfo``; torch leaves out the one of transforms where there are none.
_PLACE: Final = ("relative_path", "offset", "length")
_TRANSFORMS: Final = "transform_descriptors"
#: Where Megatron's ``fully_sharded_model_space`` keeps the shapes of tensors that are stored as blocks: an attribute of
#: Metadata, and the entry for each tensor in it (mcore dist_checkpointing/strategies/torch.py, 0.12 to 0.14).
MCORE_DATA: Final = "mcore_data"
OWN_SHAPE: Final = "nd_reformulated_orig_global_shape"
#: The attributes of a ``StateRecord``.
attributes: Final = itemgetter(0)


def read_stored(directory: Path) -> StoredMetadata:
    """What an iteration's directory says is stored in it. No data file is opened.

    Raises FormatError where there is no metadata or it is damaged, UnsafePickleError where its pickle asks for anything
    outside the allowlist.
    """
    path = directory / METADATA_FILE
    if not path.is_file():
        raise FormatError(f"{path} is missing: the checkpoint was not saved to its end, or not copied whole")
    return read_metadata(lambda: documents.read_bytes(path, most_bytes=None), str(path))


def read_metadata(read: Callable[[], bytes], where: str) -> StoredMetadata:
    """The content of the ``.metadata`` file ``where``, whose bytes ``read`` gives.

    Raises FormatError if it is damaged, UnsafePickleError if it asks for anything outside the allowlist.
    """
    with reader.paused_collector():
        try:
            return parse(_unpickled(read, where))  # all records are gone before the collector looks at them
        except (AttributeError, LookupError, OverflowError, TypeError, ValueError) as error:
            raise FormatError(f"{where} is not sound torch_dist metadata: {error}") from error


def _without_plans(read: Callable[[], bytes]) -> bytes | None:
    """The pickle ended before Megatron's plans, where they stand last: half of it."""
    return opcodes.ended_before(read(), _PLANS, unless_behind=MCORE_DATA)


def _unpickled(read: Callable[[], bytes], where: str) -> dict[str, Any]:
    """The attributes of the metadata."""
    short = _without_plans(read)
    if short is not None:
        try:
            found: dict[str, Any] = attributes(reader.loads(short, _allowlist(), where))
            if {"state_dict_metadata", "storage_data"} <= found.keys():
                return found
        except UnsafePickleError:
            raise
        except (AttributeError, FormatError, LookupError, TypeError):
            pass  # the plans stand elsewhere
    whole: dict[str, Any] = attributes(reader.loads(read(), _allowlist(), where))
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
    """Stands in for calls whose result does not matter."""


def parse(metadata: dict[str, Any]) -> StoredMetadata:
    """The columns of unpickled metadata.

    Raises ValueError, TypeError, LookupError, OverflowError or AttributeError where it is damaged; ``read_metadata``
    turns these into FormatError.
    """
    described, storage_data = metadata["state_dict_metadata"], metadata["storage_data"]
    indices = [*map(attributes, storage_data)]
    file_bytes, archives = archives_of([*map(attributes, storage_data.values())])
    numbers: dict[str, list[int]] = defaultdict(list)
    for number, name in enumerate(map(itemgetter("fqn"), indices)):
        numbers[name].append(number)
    require_names([*described, *numbers])
    require_bounded(described.values(), len(indices))
    names, tensors, objects = [*file_bytes], {}, {}
    own_shapes = unblocked_shapes(metadata)
    for name, record in described.items():
        stored = numbers.pop(name, [])
        if is_tensor(record):
            offsets = [indices[number]["offset"] for number in stored]
            tensors[name] = _tensor(name, attributes(record), offsets, stored, own_shapes.get(name))
        elif type(record).__name__ != "BytesStorageMetadata":
            raise ValueError(f"{name!r} is a {type(record).__name__}: expected a tensor or an object")
        elif len(stored) == 1:
            file, position, num_bytes = (column[stored[0]] for column in archives)
            objects[name] = Entry(names[file], position, num_bytes)
        else:
            raise ValueError(f"{name!r} is listed, but it is not said where it is stored")
    if numbers:
        raise ValueError(f"{', '.join(map(repr, numbers))} are stored but not listed")
    return StoredMetadata(file_bytes=file_bytes, tensors=tensors, objects=objects, archives=archives)


def is_tensor(record: object) -> bool:
    """Whether a record under a key describes a tensor."""
    return type(record).__name__ == "TensorStorageMetadata"


def require_names(names: Sequence[Any]) -> None:
    """Keys must be strings, and such that can be printed and written: 1 and "1" are not one tensor."""
    others = [name for name in names if type(name) is not str]
    if others:
        raise ValueError(f"it has the key {short(others[0])}: expected a string")
    "".join(names).encode()  # raises where there are halves of surrogate pairs


def require_bounded(described: Iterable[Any], num_archives: int) -> None:
    """A pickle may refer to one list of chunks a thousand times; what is stored is as large as the file at most."""
    num_chunks = sum(len(attributes(record)["chunks"]) for record in described if is_tensor(record))
    if num_chunks > num_archives:
        raise ValueError(f"{num_chunks} chunks are described, but only {num_archives} archives are stored")


def archives_of(places: Sequence[Mapping[str, Any]]) -> tuple[dict[str, int], Archives]:
    """Where the last archive of each file ends, and all archives."""
    if {*map(len, places)} - {len(_PLACE)}:
        _require_untransformed(places)
    names, positions, lengths = ([*map(itemgetter(key), places)] for key in _PLACE)
    if not (_are_sizes(positions) and _are_sizes(lengths)):
        place = next(place for place in zip(positions, lengths, strict=True) if not _are_sizes(place))
        raise ValueError(f"it places an archive at {short(place[0])}, {short(place[1])} bytes long")
    numbers = FileNumbers()
    files = [*map(numbers.__getitem__, names)]
    ends = [0] * len(numbers)
    for file, end in zip(files, map(add, positions, lengths), strict=True):
        if end > ends[file]:  # noqa: PLR1730  (max takes three times as long, for every chunk)
            ends[file] = end
    return dict(zip(numbers, ends, strict=True)), Archives(
        array("q", files), array("q", positions), array("q", lengths)
    )


def unblocked_shapes(metadata: Mapping[str, Any]) -> dict[str, Shape]:
    """The shapes of the tensors that are stored as blocks, by key. Megatron says None where there are none."""
    about = metadata.get(MCORE_DATA)
    return {name: sizes_of(each[OWN_SHAPE]) for name, each in (about or {}).items() if OWN_SHAPE in each}


class FileNumbers(dict[str, int]):
    """The numbers of files in the order in which they are met."""

    def __missing__(self, name: object) -> int:
        """Shards lie beside ``.metadata``; anything but a plain name could point anywhere."""
        if not isinstance(name, str) or not paths.is_plain_name(name):
            raise ValueError(f"it names the file {short(name)}: expected the plain name of a file beside it")
        return self.setdefault(name, len(self))


def _require_untransformed(places: Iterable[Mapping[str, Any]]) -> None:
    for place in places:
        if place.get(_TRANSFORMS):
            raise ValueError(f"it describes transformed data ({short(place[_TRANSFORMS])}), which is not supported")


def _tensor(
    name: str,
    record: Mapping[str, Any],
    stored_offsets: Sequence[Any],
    archives: Sequence[int],
    own_shape: Shape | None,
) -> StoredTensor:
    stored_shape, dtype = sizes_of(record["size"]), record["properties"].state[0]
    if type(dtype) is not str:  # what stands in for torch's dtypes
        raise ValueError(f"{name!r} has the dtype {short(dtype)}")
    chunks = [*map(attributes, record["chunks"])]
    boxes = ([*map(itemgetter(key), chunks)] for key in ("offsets", "sizes"))
    offsets, shapes, stored = (column_of(each, len(stored_shape), name) for each in (*boxes, stored_offsets))
    largest = tuple(max(shapes[axis :: len(stored_shape)], default=0) for axis in range(len(stored_shape)))
    if not is_countable(largest):
        raise ValueError(f"chunks of {name!r} have sizes of up to {short(largest)}, more than any memory holds")
    return StoredTensor(
        name=name,
        dtype=dtype,
        global_shape=stored_shape if own_shape is None else own_shape,
        stored_shape=stored_shape,
        num_chunks=len(chunks),
        offsets=offsets,
        shapes=shapes,
        stored_offsets=stored,
        archives=array("q", archives),
    )


def column_of(boxes: Sequence[Any], ndim: int, name: str) -> array[int]:
    """Offsets or shapes of chunks, one behind the other: tuples of ``ndim`` non-negative integers each.

    Lengths are looked at before anything is put together: a pickle may refer to one long tuple a thousand times.
    """
    if {*map(type, boxes)} - {tuple}:
        boxes = [*map(sizes_of, boxes)]  # raises
    wrong = {*map(len, boxes)} - {ndim}
    if wrong:
        raise ValueError(f"a chunk of {name!r} has {min(wrong)} axes, the tensor has {ndim}")
    numbers = [*chain.from_iterable(boxes)]
    if not _are_sizes(numbers):
        boxes = [*map(sizes_of, boxes)]  # raises
    return array("q", numbers)


def _are_sizes(numbers: Collection[Any]) -> bool:
    """Whether all are whole numbers that can be counted with. All integers of ``.metadata`` go through here."""
    return {*map(type, numbers)} <= {int} and min(numbers, default=0) >= 0 and max(numbers, default=0) <= MOST


def sizes_of(value: Any) -> Shape:  # noqa: ANN401  (from a pickle)
    """A tuple of non-negative integers, as offsets and shapes must be, of no more axes than torch's tensors have."""
    if type(value) is not tuple or not _are_sizes(value):
        raise ValueError(f"expected sizes, got {short(value)}")
    if len(value) > MAX_AXES:
        raise ValueError(f"expected sizes of at most {MAX_AXES} axes, got {len(value)} axes")
    if not is_countable(value):
        raise ValueError(f"expected sizes of a tensor, got {short(value)}, more than any memory holds")
    return value
