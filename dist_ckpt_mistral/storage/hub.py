"""Hugging Face hub ids: the local directory of a model's snapshot."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from fnmatch import filter as matching
from pathlib import Path
from typing import Final

from dist_ckpt_mistral.errors import FormatError
from dist_ckpt_mistral.storage.remote_path import RemotePath, as_path

#: ``org/name``, ``org/name@revision``, or the hub's URL of one, in which ``Path`` turns ``https://`` into ``https:/``.
#: A name that ends like a file or an iteration is a mistyped path, not a hub id.
_NAME: Final = re.compile(
    r"(?:https?:/{1,2}(?:www\.)?(?:huggingface|hf)\.co/|hf:/{1,2})?"
    r"(?P<id>\w[\w.-]*/(?!iter_\d+$|release$)\w[\w.-]*(?<!\.json)(?<!\.safetensors)(?<!\.gguf))"
    r"(?:(?:@|/tree/)(?P<revision>[\w./-]+?))?/?"
)
#: Weights in formats that this package never reads, so they are not downloaded.
_NOT_READ: Final = ("*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "onnx/*", "original/*")
#: Weights in transformers' format, and their index.
_WEIGHTS: Final = "model*.safetensors*"
#: Weights in Mistral AI's format, which are read only if the others are missing.
_CONSOLIDATED_WEIGHTS: Final = "consolidated*"


def local_directory(path_or_id: str, *, weights: bool = True, check: Callable[[Sequence[str]], object] = len) -> Path:
    """Return ``path_or_id`` if that path exists or is not a hub id, else the hub's snapshot of the model.

    The snapshot is downloaded, or comes from the hub's cache; without ``weights``, only the other files. ``check`` is
    called with the names of the model's files before any weights are downloaded, and may raise. Raises FormatError if
    there is no such path and the hub does not provide the model.
    """
    path, name = as_path(path_or_id), _NAME.fullmatch(path_or_id)
    if isinstance(path, RemotePath) or path.exists() or name is None:
        return path
    small = _snapshot(name, [*_NOT_READ, "*.safetensors"])
    if not weights:
        return small
    files = _files(name, small)
    check(files)
    return _snapshot(name, [*_NOT_READ, *([_CONSOLIDATED_WEIGHTS] if matching(files, _WEIGHTS) else [])])


def _snapshot(name: re.Match[str], ignored: list[str]) -> Path:
    """Return the snapshot's directory, after downloading what the cache lacks, without files that match ``ignored``."""
    import huggingface_hub  # noqa: PLC0415  (slow; only hub ids need it)

    try:
        return Path(huggingface_hub.snapshot_download(name["id"], revision=name["revision"], ignore_patterns=ignored))
    except Exception as error:  # the errors of the hub and of its transport have no common base class
        why = " ".join(str(error).split())  # the first line is a status, the next ones are its meaning and advice
        raise FormatError(f"{name[0]} is neither a directory nor a model that the hub provides: {why}") from error


def _files(name: re.Match[str], small: Path) -> list[str]:
    """Return the names of the model's files.

    These are the files of the snapshot ``small`` if it contains an index of the weights, or if the hub does not answer.
    """
    import huggingface_hub  # noqa: PLC0415  (slow; only hub ids need it)

    local_names = sorted(path.name for path in small.iterdir())
    if matching(local_names, _WEIGHTS):
        return local_names
    try:
        return huggingface_hub.list_repo_files(name["id"], revision=name["revision"])
    except Exception:  # noqa: BLE001  (no common base class; if a file is missing, the download raises)
        return local_names
