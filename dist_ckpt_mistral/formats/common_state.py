"""The common state of a Megatron checkpoint: what is not tensors. ``args``, ``iteration``, ``content_metadata`` ...

megatron-core up to 0.16 keeps it in ``common.pt``, from 0.17 on in an object inside the shards; every version reads
``common.pt`` first where it exists (dist_checkpointing/serialization.py, ``load_common_state_dict``), so that is what
is written here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dist_ckpt_mistral.dtypes import TorchDtype
from dist_ckpt_mistral.errors import FormatError
from dist_ckpt_mistral.formats import pickle_records
from dist_ckpt_mistral.formats.pickle_records import Global, Instance, OpaqueRecord, record_class
from dist_ckpt_mistral.formats.torch_archive import ArchiveReader, torch_dtype_name
from dist_ckpt_mistral.formats.torch_archive_writer import pickled_archive
from dist_ckpt_mistral.storage import SourceFiles

COMMON_FILE: Final = "common.pt"
#: The object that holds the common state from megatron-core 0.17 on.
SHARDED_KEY: Final = "common_state/shard_0_1"

#: No number of Megatron's comes near; one of 1024 bits is beyond all floats.
_MAX_BITS: Final = 1024
#: Classes that training puts into the common state: those of megatron-core's own ``safe_globals.py`` (0.14 to 0.19).
#: All become inert records, so a whole package of classes can be let in; functions cannot.
_RECORDS: Final = {
    ("argparse", "Namespace"),
    ("types", "SimpleNamespace"),
    ("pathlib", "PosixPath"),
    ("signal", "Signals"),
    ("io", "BytesIO"),
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
}
_MEGATRON_CLASS: Final = re.compile(r"megatron(\.\w+)+:[A-Z]\w*")
_TORCH_STORAGE: Final = re.compile(r"torch:[A-Z]\w+Storage")
_BUILTINS: Final = {("collections", "OrderedDict"): dict, ("builtins", "set"): set, ("builtins", "complex"): complex}


@dataclass(frozen=True, slots=True)
class Entry:
    """Where one archive lies: the plain name of its file, and its bytes there."""

    file: str
    offset: int
    num_bytes: int


def read(directory: Path, sharded: Entry | None) -> dict[str, Any]:
    """The common state of the checkpoint in ``directory``; ``sharded`` is where its shards hold it, if they do.

    Plain values stay what they are; namespaces become dicts; everything else becomes an inert record. A checkpoint
    without common state gives an empty dict.
    """
    path = directory / COMMON_FILE
    if path.is_file():
        entry = Entry(COMMON_FILE, 0, path.stat().st_size)
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
            _allowlist()
        )
    if isinstance(value, list) and len(value) == 1:  # objects in shards are lists of one
        value = value[0]
    if not isinstance(value, dict):
        raise FormatError(f"the common state in {path} is not a dict")
    if not all(type(key) is str for key in value):
        raise FormatError(f"the common state in {path} has keys that are no strings")
    state = {key: _plain(item) for key, item in value.items()}
    _require_sane_numbers(state, path)
    return state


def write(state: Mapping[str, Any]) -> bytes:
    """The content of ``common.pt``. ``state`` holds plain values; its ``args`` become an ``argparse.Namespace``.

    A ``TorchDtype`` among the args becomes torch's own, for which neither torch nor a class needs to be imported.
    """
    args = {
        name: Global("torch", value.name) if isinstance(value, TorchDtype) else value
        for name, value in state["args"].items()
    }
    return pickled_archive(pickle_records.dumps({**state, "args": Instance(Global("argparse", "Namespace"), args)}))


def _require_sane_numbers(state: Mapping[str, Any], path: Path) -> None:
    """Whole numbers in the state, its dicts, and lists in those: Python does not even print those of 4300 digits."""
    inner = [(name, value) for each in state.values() if isinstance(each, dict) for name, value in each.items()]
    for name, value in (*state.items(), *inner):
        numbers = value if isinstance(value, list | tuple) else [value]
        if any(type(number) is int and number.bit_length() > _MAX_BITS for number in numbers):
            raise FormatError(f"{name!r} of the common state in {path} has a number of more than {_MAX_BITS} bits")


def _plain(value: Any) -> Any:  # noqa: ANN401  (from a pickle)
    """Namespaces as dicts."""
    return dict(vars(value)) if type(value).__name__ in {"Namespace", "SimpleNamespace"} else value


def _allowlist() -> Callable[[str, str], Any]:
    """Fresh inert stand-ins, one class per name."""
    made: dict[tuple[str, str], Any] = dict(_BUILTINS)

    def find(module: str, name: str) -> Any:  # noqa: ANN401  (stand-ins of any kind)
        known = made.get((module, name)) or torch_dtype_name(module, name)
        if known is not None:
            return known
        spelled = f"{module}:{name}"
        if (
            (module, name) not in _RECORDS
            and not _MEGATRON_CLASS.fullmatch(spelled)
            and not _TORCH_STORAGE.fullmatch(spelled)
        ):
            raise KeyError(spelled)
        base = (
            record_class(name) if (module, name) in {("argparse", "Namespace"), ("types", "SimpleNamespace")} else None
        )
        made[module, name] = base or record_class(name, OpaqueRecord)
        return made[module, name]

    return find
