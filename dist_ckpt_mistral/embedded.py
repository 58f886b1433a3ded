"""What an imported checkpoint remembers of Hugging Face: plain JSON values inside its ``content_metadata``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from dist_ckpt_mistral.errors import FormatError
from dist_ckpt_mistral.formats.hf_directory import FileSet
from dist_ckpt_mistral.model.config.mistral_config import MistralConfig
from dist_ckpt_mistral.model.table.table import TensorTable

#: The key in ``content_metadata``.
KEY: Final = "dist_ckpt_mistral"
#: Raised when an older reader could no longer make sense of the record.
_VERSION: Final = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedded:
    """The Hugging Face configuration, and the headers of the files that the weights came from (None: not kept)."""

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


def from_common_state(common_state: Mapping[str, Any], where: str) -> Embedded | None:
    """The record in a checkpoint's common state, or None if there is none. Raises FormatError if it is damaged."""
    content = common_state.get("content_metadata")
    record = content.get(KEY) if isinstance(content, Mapping) else None
    if record is None:
        return None
    where = f"content_metadata[{KEY!r}] of {where}"
    if not isinstance(record, Mapping) or record.get("version") != _VERSION:
        found = record.get("version") if isinstance(record, Mapping) else record
        raise FormatError(f"{where} has version {found!r}: this release reads version {_VERSION}. Update it.")
    if not isinstance(record.get("hf_config"), Mapping):
        raise FormatError(f"{where} has no hf_config")
    files = record.get("hf_files")
    return Embedded(
        config=MistralConfig.from_hf(record["hf_config"], where=f"hf_config in {where}"),
        hf_files=None if files is None else FileSet.from_record(files, where),
    )
