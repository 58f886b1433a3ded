"""``integrity.json``: the SHA-256 of every file in a directory, as megatron-core 0.18 and newer write and verify it.

``{"algorithm": "sha256", "files": {name: hex}}``, without itself (megatron-core 0.19, ``save_integrity_manifest`` and
``verify_integrity_manifest`` in dist_checkpointing/validation.py). Its verification opens every name that it finds,
relative to the directory, and ignores other keys. So files in folders are listed here too, and ``crc32`` tells the
CRC-32 of the data of every tensor in safetensors files, to name the damaged one: Megatron's files bring their own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Final, TypeGuard

from dist_ckpt_mistral.errors import FormatError
from dist_ckpt_mistral.storage import documents

MANIFEST_FILE: Final = "integrity.json"
_ALGORITHM: Final = "sha256"
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_CRC32: Final = re.compile(r"[0-9a-f]{8}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """SHA-256 by file and CRC-32 by tensor, both in hexadecimal; names are relative to the manifest's directory."""

    files: Mapping[str, str]
    crc32: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> bytes:
        """The content of the file, the same for the same files."""
        content = {"algorithm": _ALGORITHM, "files": dict(sorted(self.files.items()))}
        content |= {"crc32": dict(sorted(self.crc32.items()))} if self.crc32 else {}
        return json.dumps(content, indent=2).encode()  # ASCII: names of files need not be UTF-8


def read_manifest(directory: Path) -> Manifest | None:
    """The manifest in ``directory``, if there is one. Raises FormatError unless it is one, whole."""
    path = directory / MANIFEST_FILE
    if not path.is_file():
        return None
    content = documents.read_json(path)
    if content.get("algorithm") != _ALGORITHM:
        raise FormatError(f"algorithm in {path}: expected {_ALGORITHM!r}, got {content.get('algorithm')!r}")
    files, crc32 = content.get("files"), content.get("crc32", {})
    if not _are_sums(files, _SHA256) or not _are_sums(crc32, _CRC32):
        raise FormatError(f"{path} is damaged: expected names with a SHA-256 under 'files', a CRC-32 under 'crc32'")
    outside = [name for name in files if not _is_inside(name)]
    if outside:
        raise FormatError(f"{path} names {', '.join(map(repr, outside))}: expected files beside it or below")
    return Manifest(files=files, crc32=crc32)


def _are_sums(value: object, pattern: re.Pattern[str]) -> TypeGuard[dict[str, str]]:
    return isinstance(value, dict) and all(isinstance(each, str) and pattern.fullmatch(each) for each in value.values())


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return str(path) == name and not path.is_absolute() and ".." not in path.parts and "\0" not in name


def files_in(directory: Path) -> list[str]:
    """The files in ``directory`` and below that a manifest of it lists, by name."""
    paths = sorted(path.relative_to(directory) for path in directory.rglob("*") if path.is_file())
    return [path.as_posix() for path in paths if path != Path(MANIFEST_FILE)]
