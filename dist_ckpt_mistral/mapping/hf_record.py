"""The record of a model in a checkpoint: its Hugging Face configuration, the tensor map, and the original files.

It lies in Megatron's ``content_metadata``, in Megatron-LM's ``args``, or in a folder of Hugging Face files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dist_ckpt_mistral.errors import FormatError
from dist_ckpt_mistral.formats import small_files
from dist_ckpt_mistral.formats.hf_directory import FileSet
from dist_ckpt_mistral.formats.stored_checkpoint import StoredCheckpoint
from dist_ckpt_mistral.model.config.mistral_config import MistralConfig
from dist_ckpt_mistral.model.table.table import TensorTable
from dist_ckpt_mistral.storage import documents, paths

#: The key in ``content_metadata``.
KEY: Final = "dist_ckpt_mistral"
#: Increased when older versions of this package could misread the record.
_VERSION: Final = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class HfRecord:
    """The record of a model: its configuration, and the headers of the original files or None.

    ``source`` is the place of the record, in words.
    """

    source: str
    config: MistralConfig
    hf_files: FileSet | None


def to_record(config: MistralConfig, table: TensorTable, files: FileSet | None) -> dict[str, Any]:
    """The record to store under ``KEY``. ``tensor_map`` is for readers without this package."""
    tensor_map = [
        {
            "hf_name": part.hf_name,
            "mcore_key": rule.mcore_key,
            "row_blocks": [part.rows.count, part.rows.stride, part.rows.offset, part.rows.length],
        }
        for rule in table.rules
        for part in rule.parts
    ]
    return {
        "version": _VERSION,
        "hf_config": config.to_hf(),
        "tensor_map": tensor_map,
        "hf_files": None if files is None else files.to_record(),
    }


def _record(value: object, where: str, source: str) -> HfRecord:
    """The record in ``value``, which is stored at ``where``. Raises FormatError if it is damaged."""
    if not isinstance(value, Mapping) or value.get("version") != _VERSION:
        found = value.get("version") if isinstance(value, Mapping) else value
        raise FormatError(f"{where} has version {found!r:.200}: this release reads version {_VERSION}. Update it.")
    if not isinstance(value.get("hf_config"), Mapping):
        raise FormatError(f"{where} has no hf_config")
    files = value.get("hf_files")
    return HfRecord(
        source=source,
        config=MistralConfig.from_hf(value["hf_config"], where=f"hf_config in {where}"),
        hf_files=None if files is None else FileSet.from_record(files, where),
    )


def original_files(checkpoint: StoredCheckpoint) -> FileSet | None:
    """The layout of the Hugging Face files that the model came from, as the first record has it; None without one."""
    in_folders = filter(None, map(record_in_folder, small_files.hf_folders(checkpoint.directory)))
    return next((record.hf_files for record in (*embedded_records(checkpoint), *in_folders) if record.hf_files), None)


def embedded_records(checkpoint: StoredCheckpoint) -> Iterator[HfRecord]:
    """Yield the records inside a checkpoint: that of ``content_metadata``, and that of Megatron-LM's args."""
    for name, source in (("content_metadata", "checkpoint"), ("args", "args in the checkpoint")):
        content = checkpoint.common_state.get(name)
        record = content.get(KEY) if isinstance(content, Mapping) else None
        if record is not None:
            where = f"{name}[{KEY!r}] of {checkpoint.directory}"
            yield _record(record, where, f"the Hugging Face configuration inside the {source}")


def record_in_folder(folder: Path) -> HfRecord | None:
    """The record in a folder of Hugging Face files; None if it is absent, or a link out of the folder."""
    path = folder / small_files.RECORD_FILE
    if not path.is_file() or paths.leads_outside(path, folder):
        return None
    return _record(documents.read_json(path), str(path), str(path))
