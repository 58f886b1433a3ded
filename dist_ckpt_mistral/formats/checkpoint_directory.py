"""The directories of Megatron checkpoints: roots, iterations, and the tracker files that name the latest iteration."""

from __future__ import annotations

import errno
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import Any, Final

from dist_ckpt_mistral.arguments import require_whole
from dist_ckpt_mistral.errors import FormatError
from dist_ckpt_mistral.formats.pickles import reader
from dist_ckpt_mistral.formats.torch_dist.archive import ArchiveReader
from dist_ckpt_mistral.storage import documents, paths
from dist_ckpt_mistral.storage.local import SourceFiles

_LOG = logging.getLogger(__name__)

#: Every ``torch_dist`` checkpoint has the first, every checkpoint of either backend the second.
METADATA_FILE: Final = ".metadata"
BACKEND_FILE: Final = "metadata.json"
#: Megatron-LM's tracker: a text file in the checkpoint root.
TRACKER_FILE: Final = "latest_checkpointed_iteration.txt"
#: Megatron-Bridge's tracker in the root, a ``torch.save`` archive, and the same file in the directory of an iteration.
TRAIN_STATE_FILE: Final = "latest_train_state.pt"
ITERATION_TRAIN_STATE_FILE: Final = "train_state.pt"
_RELEASE: Final = "release"
#: The errors of symlink(2) on a file system without links.
_NO_LINKS: Final = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP)
#: Size of the iteration in a train state.
STEP_BYTES: Final = 8
#: Iteration numbers are below this.
MAX_STEP: Final = 10**18


def latest_iteration(root: Path) -> Path:
    """The directory of the latest iteration, as the trackers in ``root`` name it; there must be at least one.

    Raises FormatError where they are damaged, disagree, or name a directory that is absent or a link out of ``root``.
    """
    latest = {name: read(root / name) for name, read in TRACKERS.items() if paths.is_named(root / name)}
    if len(set(latest.values())) > 1:
        raise FormatError(f"{root} is ambiguous: {', '.join(f'{n} names {d}' for n, d in latest.items())}. Give one.")
    tracker, name = next(iter(latest.items()))
    if not (root / name).is_dir():
        raise FormatError(f"{root / tracker} names {name}, which is absent")
    if paths.leads_outside(root / name, root):
        target = (root / name).resolve()
        raise FormatError(
            f"{root / tracker} names {name}, a link out of {root}. Give its target if you trust it: {target}"
        )
    return root / name


def _tracked(tracker: Path) -> str:
    """The name of the directory that Megatron-LM's tracker file stands for."""
    step = documents.read_bytes(tracker).decode(errors="replace").strip()
    if step != _RELEASE and not re.fullmatch(r"\d{1,18}", step):
        raise FormatError(f"{tracker} should hold an iteration or {_RELEASE!r}, got {step[:40]!r}")
    return _RELEASE if step == _RELEASE else iteration_name(int(step))


def require_iteration(iteration: int | None) -> None:
    """Raise ConfigError unless ``iteration`` is None (a release) or a number that a tracker can name."""
    if iteration is not None:
        require_whole("iteration", iteration, least=0, most=MAX_STEP - 1)


def iteration_name(iteration: int | None) -> str:
    """Megatron's name of the directory of an iteration; None is a release (weights without training state)."""
    return _RELEASE if iteration is None else f"iter_{iteration:07d}"


#: Tracker file in a checkpoint root -> function that reads the name of the latest iteration's directory from its path.
TRACKERS: Final[Mapping[str, Callable[[Path], str]]] = {
    TRACKER_FILE: _tracked,
    TRAIN_STATE_FILE: lambda path: iteration_name(read_step(path)),
}


def iteration_of(directory_name: str) -> str | None:
    """The tracker's text for a directory name: ``500`` for ``iter_0000500``; None if no tracker can name it.

    No tracker can name ``iter_00000500``.
    """
    if directory_name == _RELEASE:
        return _RELEASE
    match = re.fullmatch(r"iter_(\d{7,18})", directory_name)
    return str(int(match[1])) if match and iteration_name(int(match[1])) == directory_name else None


def is_iteration_name(directory_name: str) -> bool:
    """Whether a directory name looks like that of an iteration, also where no tracker can name it."""
    return directory_name == _RELEASE or re.fullmatch(r"iter_\d+", directory_name) is not None


def root_of(directory: Path) -> Path | None:
    """The checkpoint root around the ``directory`` of an iteration; None if its name is not that of an iteration."""
    real = directory.resolve()
    return real.parent if is_iteration_name(real.name) else None


def commit_names(directory_name: str) -> tuple[str, ...]:
    """The files that readers open first, relative to a root, in the order in which a store gets them after all others.

    Megatron takes an iteration without metadata.json for none, and follows the tracker to the latest one. A directory
    name without a tracker, such as an empty one, is that of a checkpoint without a root.
    """
    has_root = iteration_of(directory_name) is not None
    folder = f"{directory_name}/" if directory_name else ""
    names = (f"{folder}{METADATA_FILE}", f"{folder}{BACKEND_FILE}")
    return (*names, *((TRAIN_STATE_FILE, TRACKER_FILE) if has_root else ()))


def write_tracker(root: Path, directory_name: str) -> None:
    """Write Megatron-LM's tracker file in ``root``, so that it names an iteration's directory as the latest.

    For a release, ``iter_0000000`` becomes a link to it, where the file system has links: ``load_megatron_model`` of
    Megatron-Bridge's AutoBridge reads no tracker and takes the highest ``iter_*`` (models/conversion/auto_bridge.py,
    0.6). Bridge's training reads this tracker unless there is a ``latest_train_state.pt``. That one is not written,
    because Megatron-LM would not update it when it saves a later iteration.
    """
    if directory_name == _RELEASE:
        try:
            documents.write_link(root / iteration_name(0), _RELEASE)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            _LOG.warning("no links here (%s): give AutoBridge of Megatron-Bridge %s itself", error.strerror, _RELEASE)
    documents.write_bytes(root / TRACKER_FILE, (iteration_of(directory_name) or "").encode())


@dataclass(frozen=True, slots=True, eq=False)
class _Scalar:
    """A tensor in a train state: the key of its storage, the storage's class name, and its shape in elements."""

    key: str
    storage: str
    shape: tuple[int, ...]


def read_step(path: Path) -> int:
    """The iteration in the train state at ``path``.

    Raises FormatError where it is not a train state, UnsafePickleError where its pickle asks for more than tensors.
    """
    where = str(path)
    with SourceFiles([path]) as files:
        archive = ArchiveReader(files, 0, 0, files.size_bytes(0), where)
        state = reader.loads(archive.read("data.pkl"), _find, where, persistent=_persistent)
        step = state.get("step") if isinstance(state, dict) else None
        if not isinstance(step, _Scalar) or (step.storage, step.shape) != ("LongStorage", ()):
            raise FormatError(f"{where} is not a train state of Megatron-Bridge: it has no step, an int64 scalar")
        if archive.read("byteorder") != b"little":
            raise FormatError(f"{where} is big-endian, which is not supported")
        content = archive.read(f"data/{step.key}")
    value = int.from_bytes(content, "little", signed=True)
    if len(content) != STEP_BYTES or not 0 <= value < MAX_STEP:
        raise FormatError(
            f"step in {where}: expected a number of iterations in {STEP_BYTES} bytes, got {short(content)}"
        )
    return value


def _find(module: str, name: str) -> Any:  # noqa: ANN401  (stand-ins of any kind)
    """The allowlist of a train state: plain tensors, nothing else."""
    if module == "torch" and name.endswith("Storage"):
        return name
    return {
        ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
        ("collections", "OrderedDict"): reader.empty_dict,
    }[module, name]


def _persistent(pid: Any) -> tuple[str, str]:  # noqa: ANN401  (from a pickle)
    """(key, class name) of a storage, from torch.save's persistent id ("storage", type, key, device, elements)."""
    kind, storage, key, _, _ = pid
    if kind != "storage" or not isinstance(key, str) or not key.isdecimal():
        raise FormatError(f"an unexpected persistent object {short(pid)}")
    return key, storage


def _rebuild(storage: Any, offset: Any, shape: Any, *_: Any) -> _Scalar:  # noqa: ANN401  (from a pickle)
    """Stands in for ``_rebuild_tensor_v2``. A view gets a shape that no scalar has."""
    key, name = storage
    return _Scalar(key, name, shape if offset == 0 else (-1,))
