"""Hugging Face hub ids as local directories."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from fnmatch import filter as matching
from pathlib import Path
from typing import Final

from dist_ckpt_mistral.errors import FormatError

#: ``org/name``, ``org/name@revision`` or the hub's URL of one; paths have lost a slash of ``https://``. A name that
#: ends as one of a file or of an iteration is taken for a path that is mistyped.
_NAME: Final = re.compile(
    r"(?:https?:/{1,2}(?:www\.)?(?:huggingface|hf)\.co/|hf:/{1,2})?"
    r"(?P<id>\w[\w.-]*/(?!iter_\d+$|release$)\w[\w.-]*(?<!\.json)(?<!\.safetensors)(?<!\.gguf))"
    r"(?:(?:@|/tree/)(?P<revision>[\w./-]+?))?/?"
)
#: Weights that are never read, which would only cost time.
_NOT_READ: Final = ("*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "onnx/*", "original/*")
#: The weights that transformers reads or their index, and Mistral AI's own, which count where there are no others.
_WEIGHTS: Final = "model*.safetensors*"
_OWN_WEIGHTS: Final = "consolidated*"


def local_directory(path_or_id: str, *, weights: bool = True, check: Callable[[Sequence[str]], object] = len) -> Path:
    """The directory of a model: ``path_or_id`` if there is one, else the hub's snapshot, downloaded or from the cache.

    Without ``weights`` the other files are enough. ``check`` gets the names of the model's files before any weights
    are downloaded, and may raise. Raises FormatError that says why there is neither directory nor model.
    """
    path, name = Path(path_or_id), _NAME.fullmatch(path_or_id)
    if path.exists() or name is None:
        return path
    small = _snapshot(name, [*_NOT_READ, "*.safetensors"])
    if not weights:
        return small
    files = _files(name, small)
    check(files)
    return _snapshot(name, [*_NOT_READ, *([_OWN_WEIGHTS] if matching(files, _WEIGHTS) else [])])


def _snapshot(name: re.Match[str], ignored: list[str]) -> Path:
    import huggingface_hub  # noqa: PLC0415  (only hub ids need it, and it is slow to import)

    try:
        return Path(huggingface_hub.snapshot_download(name["id"], revision=name["revision"], ignore_patterns=ignored))
    except Exception as error:  # the hub's errors and those of the transport have no class in common
        why = " ".join(str(error).split())  # the first line is a status; the others say what it means, and what to do
        raise FormatError(f"{name[0]} is neither a directory nor a model that the hub gives: {why}") from error


def _files(name: re.Match[str], small: Path) -> list[str]:
    """The names of the model's files; those in the snapshot ``small`` if that is enough, or the hub cannot be asked."""
    import huggingface_hub  # noqa: PLC0415  (as above)

    here = sorted(path.name for path in small.iterdir())
    if matching(here, _WEIGHTS):
        return here
    try:
        return huggingface_hub.list_repo_files(name["id"], revision=name["revision"])
    except Exception:  # noqa: BLE001  (as above; what is missing, the download says)
        return here
