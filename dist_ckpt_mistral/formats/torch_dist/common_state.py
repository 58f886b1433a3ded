"""The common state of a Megatron checkpoint: everything but tensors and objects, such as ``args`` and ``iteration``.

megatron-core up to 0.18 saves it as ``common.pt``, 0.19 as an object inside a data file. Every version reads
``common.pt`` first where it exists (dist_checkpointing/serialization.py, ``load_common_state_dict``), so that is what
``writer`` writes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Final

from dist_ckpt_mistral.errors import FormatError
from dist_ckpt_mistral.formats.pickles.reader import OpaqueRecord, StateRecord, empty_dict, record_class
from dist_ckpt_mistral.formats.pickles.tensors import torch_dtype_name
from dist_ckpt_mistral.formats.torch_dist.archive import ArchiveReader
from dist_ckpt_mistral.storage import paths
from dist_ckpt_mistral.storage.local import SourceFiles

COMMON_FILE: Final = "common.pt"
#: The object that holds the common state from megatron-core 0.17 on.
SHARDED_KEY: Final = "common_state/shard_0_1"

#: Integers of more bits are refused: they exceed all floats, and Megatron has none.
_MAX_BITS: Final = 1024
#: The most that the state may be when it is written out, as errors and config.json do. A value counts as one item, a
#: string as many as it has characters. A pickle can refer to one list a thousand times at little cost.
_MAX_ITEMS: Final = 1 << 24
_MAX_HEIGHT: Final = 100
#: Classes that training puts into the common state: those of megatron-core's own ``safe_globals.py`` (0.14 to 0.19).
#: All become inert records, so that all of Megatron's classes can be allowed; functions cannot.
_RECORDS: Final = {
    ("pathlib", "PosixPath"),
    ("signal", "Signals"),
    ("io", "BytesIO"),
    ("_io", "BytesIO"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy.dtypes", "UInt32DType"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "scalar"),
    ("_codecs", "encode"),
    ("torch", "Size"),
    ("torch", "device"),
    ("torch.storage", "UntypedStorage"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_tensor_v3"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch._C", "Generator"),
    ("torch.serialization", "_get_layout"),
    ("builtins", "set"),
    ("builtins", "complex"),
}
_NAMESPACES: Final = {("argparse", "Namespace"), ("types", "SimpleNamespace")}
_MEGATRON_CLASS: Final = re.compile(r"megatron(\.\w+)+:[A-Z]\w*")
_TORCH_STORAGE: Final = re.compile(r"torch:[A-Z]\w+Storage")
_BUILTINS: Final = {("collections", "OrderedDict"): empty_dict}


@dataclass(frozen=True, slots=True)
class Entry:
    """One archive: its file, relative to the checkpoint's directory, and its byte range there."""

    file: str
    offset: int
    num_bytes: int


def read(directory: Path, sharded: Entry | None) -> dict[str, Any]:
    """The common state of the checkpoint in ``directory``; empty if it has none.

    ``sharded`` is the archive of the object ``SHARDED_KEY``, if there is one; ``common.pt`` comes first.
    Plain values are kept, namespaces at the top become dicts, and everything else becomes an inert record.
    Raises FormatError where it is damaged, UnsafePickleError where its pickle asks for more than the allowlist.
    """
    if paths.is_named(directory / COMMON_FILE):
        sharded = None
    elif sharded is None:
        return {}
    path = directory / (COMMON_FILE if sharded is None else sharded.file)
    where = f"the common state in {path}"
    with SourceFiles([path]) as files:
        file_bytes = files.size_bytes(0)
        begin, num_bytes = (0, file_bytes) if sharded is None else (sharded.offset, sharded.num_bytes)
        if file_bytes < begin + num_bytes:
            raise FormatError(f"{path} is truncated: the common state should end at byte {begin + num_bytes}")
        return checked(ArchiveReader(files, 0, begin, num_bytes, where).object(allowlist()), where)


def checked(value: object, where: str) -> dict[str, Any]:
    """The unpickled ``value`` as a common state. Raises FormatError unless it is a dict of bounded size."""
    if isinstance(value, list) and len(value) == 1:  # an object in a data file is a list of length 1
        value = value[0]
    if not isinstance(value, dict):
        raise FormatError(f"{where} is not a dict")
    if not all(type(key) is str for key in value):
        raise FormatError(f"{where} has keys that are no strings")
    try:
        _extent(value, {})
        return {key: _plain(item) for key, item in value.items()}
    except ValueError as error:
        raise FormatError(f"{where} has {error}") from error


def _extent(value: object, known: dict[int, tuple[int, int]], depth: int = 0) -> tuple[int, int]:
    """(items, height) of ``value`` when it is written out; ``known`` has those of values seen before, by ``id``.

    Raises ValueError where either exceeds its limit, and for an integer that Python would not print.
    """
    if type(value) is int and value.bit_length() > _MAX_BITS:
        raise ValueError(f"a number of more than {_MAX_BITS} bits")
    if type(value) is str or type(value) is bytes:
        return len(value), 0
    if id(value) not in known:
        inner = [_extent(part, known, depth + 1) for part in _parts(value)] if depth < _MAX_HEIGHT else [(0, depth)]
        items, height = 1 + sum(items for items, _ in inner), 1 + max((height for _, height in inner), default=0)
        if height > _MAX_HEIGHT or items > _MAX_ITEMS:
            raise ValueError(f"values inside values: {items} or more, {height} or more deep")
        known[id(value)] = items, height
    return known[id(value)]


def _parts(value: Any) -> Iterable[object]:  # noqa: ANN401  (from a pickle)
    """The keys, items or attributes of ``value``; nothing for a plain value."""
    if isinstance(value, dict):
        return chain.from_iterable(value.items())
    return value if isinstance(value, list | tuple) else vars(value).values() if isinstance(value, OpaqueRecord) else ()


def _plain(value: Any) -> Any:  # noqa: ANN401  (from a pickle)
    """``value``, but the attributes of a namespace as a dict."""
    if not isinstance(value, StateRecord):
        return value
    if len(value) > 1 or not all(isinstance(state, dict) for state in value):
        raise ValueError("a namespace whose attributes are no dict")
    return dict(*value)


def allowlist() -> Callable[[str, str], Any]:
    """A lookup of fresh inert stand-ins for the classes that Megatron pickles beside tensors, one for each name."""
    made: dict[tuple[str, str], Any] = dict(_BUILTINS)

    def find(module: str, name: str) -> Any:  # noqa: ANN401  (stand-ins of any kind)
        stand_in = made.get((module, name)) or torch_dtype_name(module, name)
        if stand_in is not None:
            return stand_in
        full_name = f"{module}:{name}"
        if (module, name) in _NAMESPACES:
            made[module, name] = record_class(name)
        elif (module, name) in _RECORDS or _MEGATRON_CLASS.fullmatch(full_name) or _TORCH_STORAGE.fullmatch(full_name):
            made[module, name] = record_class(name, OpaqueRecord)
        else:
            raise KeyError(full_name)
        return made[module, name]

    return find
