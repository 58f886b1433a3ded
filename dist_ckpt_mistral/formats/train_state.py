"""``train_state.pt`` of Megatron-Bridge: how far training has come.

A ``torch.save``'d dict of scalar tensors, among them ``step`` (megatron/bridge/training/state.py, ``TrainState``, 0.1
to 0.7). It lies in the directory of every iteration. ``latest_train_state.pt`` in the checkpoint root is a copy of it,
with which Bridge names the latest iteration: it looks there before ``latest_checkpointed_iteration.txt``, and never
calls an iteration a release.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import Any, Final

from dist_ckpt_mistral.errors import FormatError
from dist_ckpt_mistral.formats import pickle_reading
from dist_ckpt_mistral.formats.torch_archive import ArchiveReader
from dist_ckpt_mistral.formats.torch_archive_writer import scalars_archive
from dist_ckpt_mistral.gather import dtypes
from dist_ckpt_mistral.storage.local import SourceFiles

TRAIN_STATE_FILE: Final = "latest_train_state.pt"
#: The same in the directory of an iteration.
ITERATION_TRAIN_STATE_FILE: Final = "train_state.pt"
_STEP_BYTES: Final = 8
#: The other values and their dtypes as Bridge saves them, in its order (training/checkpointing.py, 0.6.2). All are zero
#: where nothing was trained.
_OTHERS: Final[Mapping[str, str]] = {
    **dict.fromkeys(("consumed_train_samples", "skipped_train_samples", "consumed_valid_samples"), "int64"),
    "floating_point_operations_so_far": "float32",
    **dict.fromkeys(("do_train", "do_valid", "do_test"), "bool"),
}
#: Iterations are below this; so is what Megatron-LM's tracker file may say.
MAX_STEP: Final = 10**18


@dataclass(frozen=True, slots=True, eq=False)
class _Scalar:
    """A tensor as far as it matters: the key of its storage, the torch name of that, and its shape."""

    key: str
    storage: str
    shape: tuple[int, ...]


def untrained(step: int) -> bytes:
    """The train state of weights that are called iteration ``step``, and that Bridge has not trained."""
    others = {name: (dtype, bytes(dtypes.itemsize_bytes(dtype))) for name, dtype in _OTHERS.items()}
    return scalars_archive({"step": ("int64", step.to_bytes(_STEP_BYTES, "little")), **others})


def read_step(path: Path) -> int:
    """The iteration that the train state at ``path`` names.

    Raises FormatError where it is not a train state, UnsafePickleError where its pickle asks for more than tensors.
    """
    where = str(path)
    with SourceFiles([path]) as files:
        archive = ArchiveReader(files, 0, 0, files.size_bytes(0), where)
        state = pickle_reading.loads(archive.read("data.pkl"), _find, where, persistent=_persistent)
        step = state.get("step") if isinstance(state, dict) else None
        if not isinstance(step, _Scalar) or (step.storage, step.shape) != ("LongStorage", ()):
            raise FormatError(f"{where} is not a train state of Megatron-Bridge: it has no step, an int64 scalar")
        if archive.read("byteorder") != b"little":
            raise FormatError(f"{where} is big-endian, which is not supported")
        content = archive.read(f"data/{step.key}")
    value = int.from_bytes(content, "little", signed=True)
    if len(content) != _STEP_BYTES or not 0 <= value < MAX_STEP:
        raise FormatError(
            f"step in {where}: expected a number of iterations in {_STEP_BYTES} bytes, got {short(content)}"
        )
    return value


def _find(module: str, name: str) -> Any:  # noqa: ANN401  (stand-ins of any kind)
    """The allowlist: plain tensors, nothing else."""
    if module == "torch" and name.endswith("Storage"):
        return name
    return {
        ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
        ("collections", "OrderedDict"): pickle_reading.empty_dict,
    }[module, name]


def _persistent(pid: Any) -> tuple[str, str]:  # noqa: ANN401  (from a pickle)
    """torch.save's persistent id: ("storage", type, key, device, elements)."""
    kind, storage, key, _, _ = pid
    if kind != "storage" or not isinstance(key, str) or not key.isdecimal():
        raise FormatError(f"an unexpected persistent object {short(pid)}")
    return key, storage


def _rebuild(storage: Any, offset: Any, shape: Any, *_: Any) -> _Scalar:  # noqa: ANN401  (from a pickle)
    key, name = storage
    return _Scalar(key, name, shape if offset == 0 else (-1,))
