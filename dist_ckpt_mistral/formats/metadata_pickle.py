"""Reading ``.metadata`` of a ``torch_dist`` checkpoint, without torch.

It is a pickled ``torch.distributed.checkpoint.metadata.Metadata`` that lists every chunk of every tensor, and the file,
offset and length of the ``torch.save`` archive that holds it (torch/distributed/checkpoint/filesystem.py, 2.6 to 2.15).
The records that unpickling makes of a million chunks take a gigabyte: they give way to columns at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from dist_ckpt_mistral.errors import FormatError, UnsafePickleError
from dist_ckpt_mistral.formats import pickle_opcodes, pickle_reading
from dist_ckpt_mistral.formats.metadata_records import MCORE_DATA, attributes, parse
from dist_ckpt_mistral.formats.pickle_reading import OpaqueRecord, as_tuple, record_class
from dist_ckpt_mistral.formats.stored_metadata import StoredMetadata
from dist_ckpt_mistral.formats.tensor_pickle import torch_dtype_name

#: What Megatron (0.12 to 0.19) adds to torch's Metadata behind all else: the plans of all ranks, which repeat it.
_PLANS: Final = "all_local_plans"


def read_metadata(read: Callable[[], bytes], where: str) -> StoredMetadata:
    """The content of the ``.metadata`` file ``where``, whose bytes ``read`` gives.

    Raises FormatError if it is damaged, UnsafePickleError if it asks for anything outside the allowlist.
    """
    with pickle_reading.paused_collector():
        try:
            return parse(_unpickled(read, where))  # all records are gone before the collector looks at them
        except (AttributeError, LookupError, OverflowError, TypeError, ValueError) as error:
            raise FormatError(f"{where} is not sound torch_dist metadata: {error}") from error


def _without_plans(read: Callable[[], bytes]) -> bytes | None:
    """The pickle ended before Megatron's plans, where they stand last: half of it."""
    return pickle_opcodes.ended_before(read(), _PLANS, unless_behind=MCORE_DATA)


def _unpickled(read: Callable[[], bytes], where: str) -> dict[str, Any]:
    """The attributes of the metadata."""
    short = _without_plans(read)
    if short is not None:
        try:
            found: dict[str, Any] = attributes(pickle_reading.loads(short, _allowlist(), where))
            if {"state_dict_metadata", "storage_data"} <= found.keys():
                return found
        except UnsafePickleError:
            raise
        except (AttributeError, FormatError, LookupError, TypeError):
            pass  # the plans stand elsewhere
    whole: dict[str, Any] = attributes(pickle_reading.loads(read(), _allowlist(), where))
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
