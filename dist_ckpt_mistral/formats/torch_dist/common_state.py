"""The common state of a Megatron checkpoint: what is not tensors. ``args``, ``iteration``, ``content_metadata`` ...

megatron-core up to 0.16 keeps it in ``common.pt``, from 0.17 on in an object inside the shards; every version reads
``common.pt`` first where it exists (dist_checkpointing/serialization.py, ``load_common_state_dict``), so that is what
is written here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Final

from dist_ckpt_mistral.errors import FormatError
from dist_ckpt_mistral.formats.pickles import writer
from dist_ckpt_mistral.formats.pickles.reader import OpaqueRecord, StateRecord, empty_dict, record_class
from dist_ckpt_mistral.formats.pickles.writer import Global, Instance
from dist_ckpt_mistral.formats.torch_dist.archive import ArchiveReader
from dist_ckpt_mistral.formats.torch_dist.archive_writer import pickled_archive
from dist_ckpt_mistral.formats.torch_dist.tensor_pickle import torch_dtype_name
from dist_ckpt_mistral.gather.dtypes import TorchDtype
from dist_ckpt_mistral.storage.local import SourceFiles

COMMON_FILE: Final = "common.pt"
#: The object that holds the common state from megatron-core 0.17 on.
SHARDED_KEY: Final = "common_state/shard_0_1"

#: No number of Megatron's comes near; one of 1024 bits is beyond all floats.
_MAX_BITS: Final = 1024
#: Of what is written out, each value counts as one and each string as so many as it has letters. A pickle refers to one
#: list a thousand times for little; error messages and config.json spell it out.
_MAX_ITEMS: Final = 1 << 24
_MAX_HEIGHT: Final = 100
#: Classes that training puts into the common state: those of megatron-core's own ``safe_globals.py`` (0.14 to 0.19).
#: All become inert records, so a whole package of classes can be let in; functions cannot.
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
    """Where one archive lies: its file, relative to the checkpoint's directory, and its bytes there."""

    file: str
    offset: int
    num_bytes: int


def read(directory: Path, sharded: Entry | None) -> dict[str, Any]:
    """The common state of the checkpoint in ``directory``; ``sharded`` is where its shards hold it, if they do.

    Plain values stay what they are; namespaces become dicts; everything else becomes an inert record. A checkpoint
    without common state gives an empty dict.
    """
    path = directory / COMMON_FILE
    if path.is_symlink() or path.exists():
        with SourceFiles([path]) as files:
            entry = Entry(COMMON_FILE, 0, files.size_bytes(0))
    elif sharded is not None:
        entry = sharded
    else:
        return {}
    path = directory / entry.file
    with SourceFiles([path]) as files:
        if files.size_bytes(0) < entry.offset + entry.num_bytes:
            raise FormatError(
                f"{path} is truncated: the common state should end at byte {entry.offset + entry.num_bytes}"
            )
        value = ArchiveReader(files, 0, entry.offset, entry.num_bytes, f"the common state in {path}").object(
            allowlist()
        )
    return _state(value, f"the common state in {path}")


def _state(value: object, where: str) -> dict[str, Any]:
    """What was pickled as a common state, if it is one."""
    if isinstance(value, list) and len(value) == 1:  # objects in shards are lists of one
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


def write(state: Mapping[str, Any]) -> bytes:
    """The content of ``common.pt``. ``state`` holds plain values; its ``args`` become an ``argparse.Namespace``.

    A ``TorchDtype`` among the args becomes torch's own, for which neither torch nor a class needs to be imported.
    """
    args = {
        name: Global("torch", value.name) if isinstance(value, TorchDtype) else value
        for name, value in state["args"].items()
    }
    return pickled_archive(writer.dumps({**state, "args": Instance(Global("argparse", "Namespace"), args)}))


def _extent(value: object, known: dict[int, tuple[int, int]], depth: int = 0) -> tuple[int, int]:
    """How much ``value`` is when it is written out, and its height; ``known`` are those met before, by their ids.

    Raises ValueError where either is too much, and for a number that Python does not even print.
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
    """What a value consists of."""
    if isinstance(value, dict):
        return chain.from_iterable(value.items())
    return value if isinstance(value, list | tuple) else vars(value).values() if isinstance(value, OpaqueRecord) else ()


def _plain(value: Any) -> Any:  # noqa: ANN401  (from a pickle)
    """Namespaces as dicts."""
    if not isinstance(value, StateRecord):
        return value
    if len(value) > 1 or not all(isinstance(state, dict) for state in value):
        raise ValueError("a namespace whose attributes are no dict")
    return dict(*value)


def allowlist() -> Callable[[str, str], Any]:
    """Fresh inert stand-ins for all that Megatron stores beside tensors, one class per name."""
    made: dict[tuple[str, str], Any] = dict(_BUILTINS)

    def find(module: str, name: str) -> Any:  # noqa: ANN401  (stand-ins of any kind)
        known = made.get((module, name)) or torch_dtype_name(module, name)
        if known is not None:
            return known
        spelled = f"{module}:{name}"
        if (module, name) in _NAMESPACES:
            made[module, name] = record_class(name)
        elif (module, name) in _RECORDS or _MEGATRON_CLASS.fullmatch(spelled) or _TORCH_STORAGE.fullmatch(spelled):
            made[module, name] = record_class(name, OpaqueRecord)
        else:
            raise KeyError(spelled)
        return made[module, name]

    return find
