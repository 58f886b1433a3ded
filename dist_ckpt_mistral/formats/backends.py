"""Opening a Megatron checkpoint, whichever backend of Megatron's saved it."""

from __future__ import annotations

from pathlib import Path
from reprlib import repr as short
from typing import Final

from dist_ckpt_mistral.errors import FormatError, UnsupportedFormatError
from dist_ckpt_mistral.formats import common_state, legacy_zarr, torch_dist
from dist_ckpt_mistral.formats.checkpoint_directory import BACKEND_FILE
from dist_ckpt_mistral.formats.places import resolve_directory
from dist_ckpt_mistral.formats.stored_checkpoint import TORCH_DIST, ZARR, StoredCheckpoint
from dist_ckpt_mistral.storage import documents

#: The names in metadata.json (mcore dist_checkpointing/core.py; ``zarr`` until 0.15), and what reads each.
_READERS: Final = {TORCH_DIST: torch_dist.read_stored, ZARR: legacy_zarr.read_stored}


def open_stored(path: Path, *, with_common_state: bool = True) -> StoredCheckpoint:
    """Open a checkpoint root or one iteration of it.

    From megatron-core 0.17 on the common state lies in a data file; without it no data file is opened.
    Raises FormatError where it is no checkpoint or its metadata is damaged, UnsafePickleError where a pickle asks for
    anything outside the allowlist.
    """
    directory = resolve_directory(path)
    backend = _backend(directory)
    metadata = _READERS[backend](directory)
    state = common_state.read(directory, metadata.objects.get(common_state.SHARDED_KEY)) if with_common_state else {}
    return StoredCheckpoint(directory=directory, backend=backend, metadata=metadata, common_state=state)


def require_loadable(directory: Path) -> None:
    """Raise UnsupportedFormatError for an iteration's directory that Megatron's present versions do not load."""
    if _backend(directory) == ZARR:
        raise UnsupportedFormatError(
            f"{directory} is a legacy zarr checkpoint, which Megatron does not load since megatron-core 0.16. "
            "Make a torch_dist checkpoint of it first, with migrate."
        )


def _backend(directory: Path) -> str:
    """What an iteration's directory says that it was saved with."""
    path = directory / BACKEND_FILE
    backend = documents.read_json(path).get("sharded_backend")
    if not isinstance(backend, str) or backend not in _READERS:
        expected = " or ".join(map(repr, _READERS))
        raise FormatError(f"{path} says sharded_backend {short(backend)}: expected {expected}")
    return backend
