"""Reading Megatron ``torch_dist`` checkpoints of megatron-core 0.12 to 0.19, without torch and without Megatron."""

from __future__ import annotations

from pathlib import Path

from dist_ckpt_mistral.errors import FormatError
from dist_ckpt_mistral.formats.checkpoint_directory import METADATA_FILE
from dist_ckpt_mistral.formats.metadata_pickle import read_metadata
from dist_ckpt_mistral.formats.stored_metadata import StoredMetadata
from dist_ckpt_mistral.storage import documents


def read_stored(directory: Path) -> StoredMetadata:
    """What an iteration's directory says is stored in it. No data file is opened.

    Raises FormatError where there is no metadata or it is damaged, UnsafePickleError where its pickle asks for anything
    outside the allowlist.
    """
    path = directory / METADATA_FILE
    if not path.is_file():
        raise FormatError(f"{path} is missing: the checkpoint was not saved to its end, or not copied whole")
    return read_metadata(lambda: documents.read_bytes(path, most_bytes=None), str(path))
