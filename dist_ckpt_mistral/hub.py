"""Hugging Face hub ids as local directories."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from dist_ckpt_mistral.errors import FormatError

_HUB_ID: Final = re.compile(r"[\w.-]+/[\w.-]+")
#: Other renderings of the same weights, which would only cost time.
_NOT_NEEDED: Final = ["consolidated*", "*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "onnx/*", "original/*"]


def local_directory(path_or_id: str) -> Path:
    """The directory of a model: ``path_or_id`` if there is one, else the hub's snapshot, downloaded or from the cache.

    Raises FormatError that says why neither is to be had.
    """
    path = Path(path_or_id)
    if path.exists() or not _HUB_ID.fullmatch(path_or_id):
        return path
    import huggingface_hub  # noqa: PLC0415  (only hub ids need it, and it is slow to import)
    import huggingface_hub.errors  # noqa: PLC0415

    try:
        return Path(huggingface_hub.snapshot_download(path_or_id, ignore_patterns=_NOT_NEEDED))
    except (
        huggingface_hub.errors.HfHubHTTPError,
        huggingface_hub.errors.LocalEntryNotFoundError,
        OSError,
        ValueError,
    ) as error:
        first_line = str(error).strip().partition("\n")[0]
        raise FormatError(
            f"{path_or_id} is neither a directory nor a model that the hub gives: {first_line}"
        ) from error
