"""Hugging Face hub ids: the place of a model, in the hub's cache or on the hub."""

from __future__ import annotations

import logging
import re
from fnmatch import filter as matching
from pathlib import Path
from typing import Final

from dist_ckpt_mistral.errors import FormatError, SourceError
from dist_ckpt_mistral.storage.remote_path import HUB_SCHEME, RemotePath, as_path

_LOG = logging.getLogger(__name__)
#: ``org/name``, ``org/name@revision``, or the hub's URL of one, in which ``Path`` turns ``https://`` into ``https:/``.
#: A name that ends like a file or an iteration is a mistyped path, not a hub id.
_NAME: Final = re.compile(
    rf"(?:https?:/{{1,2}}(?:www\.)?(?:huggingface|hf)\.co/|{HUB_SCHEME}:/{{1,2}})?"
    r"(?P<id>\w[\w.-]*/(?!iter_\d+$|release$)\w[\w.-]*(?<!\.json)(?<!\.safetensors)(?<!\.gguf))"
    r"(?:(?:@|/tree/)(?P<revision>[\w./-]+?))?/?"
)
#: Weights in formats that this package never reads.
_NOT_READ: Final = ("*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "onnx/*", "original/*")


def model_directory(path_or_id: str) -> Path:
    """Return ``path_or_id`` if that path exists or is not a hub id, else the place of the model on the hub.

    Small files are downloaded into the hub's cache. If the weights are there too, or there is no hub to ask, the place
    is the snapshot in the cache. Else it is a ``RemotePath`` of the same commit, whose weights are read by ranges (see
    ``hub_store``). Raises FormatError if there is no such path and the hub does not provide the model.
    """
    path, name = as_path(path_or_id), _NAME.fullmatch(path_or_id)
    if isinstance(path, RemotePath) or path.exists() or name is None:
        return path
    small = _small_files(name)
    owner, model = name["id"].split("/")
    remote = RemotePath(f"{HUB_SCHEME}:", owner, f"{model}@{small.name}")  # a snapshot is named by its commit
    if _is_offline():
        return small
    try:
        files = [*remote.snapshot.listing(remote.key).files]
    except SourceError as error:
        _LOG.warning("%s is read from the cache alone: %s", name[0], error)
        return small
    weights = matching(files, "*.safetensors")
    return small if weights and all((small / file).exists() for file in weights) else remote


def name_for_libraries(directory: Path) -> str:
    """The name by which transformers and Megatron open a directory: of a model on the hub its id, without commit."""
    if isinstance(directory, RemotePath) and directory.base.startswith(f"{HUB_SCHEME}://"):
        return f"{directory.parts[1]}/{directory.parts[2].partition('@')[0]}"
    return str(directory)


def _is_offline() -> bool:
    import huggingface_hub  # noqa: PLC0415  (slow; only hub ids need it)

    return bool(huggingface_hub.constants.HF_HUB_OFFLINE)


def _small_files(name: re.Match[str]) -> Path:
    """Return the snapshot's directory, after downloading what the cache lacks but weights."""
    import huggingface_hub  # noqa: PLC0415  (slow; only hub ids need it)

    ignored = [*_NOT_READ, "*.safetensors"]
    try:
        return Path(huggingface_hub.snapshot_download(name["id"], revision=name["revision"], ignore_patterns=ignored))
    except Exception as error:  # the errors of the hub and of its transport have no common base class
        why = " ".join(str(error).split())  # the first line is a status, the next ones are its meaning and advice
        raise FormatError(f"{name[0]} is neither a directory nor a model that the hub provides: {why}") from error
