"""``integrity.json``: the SHA-256 of every file in a directory, as megatron-core 0.17.1 and newer write and verify it.

The content is ``{"algorithm": "sha256", "files": {name: hex}}``, without the file itself (megatron-core 0.19,
``save_integrity_manifest`` and ``verify_integrity_manifest`` in dist_checkpointing/validation.py). Megatron's
verification opens every listed name relative to the directory and ignores other keys. This package therefore lists
files in folders too. Before it wrote ``checksums.json``, it added ``crc32`` here: the CRC-32 of each tensor's data in
safetensors files. That is still read.
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
    """SHA-256 by file, in hexadecimal, and CRC-32 by tensor; file names are relative to the manifest's directory."""

    files: Mapping[str, str]
    crc32: Mapping[str, int] = field(default_factory=dict)

    def to_json(self) -> bytes:
        """The content of the file, without ``crc32``, independent of the order of ``files``."""
        content = {"algorithm": _ALGORITHM, "files": dict(sorted(self.files.items()))}
        return json.dumps(content, indent=2).encode()  # ASCII, because file names need not be UTF-8


def read_manifest(directory: Path) -> Manifest | None:
    """The manifest in ``directory``, if there is one. Raises FormatError if it is damaged or names files outside."""
    path = directory / MANIFEST_FILE
    if not path.is_file():
        return None
    content = documents.read_json(path)
    if content.get("algorithm") != _ALGORITHM:
        raise FormatError(f"algorithm in {path}: expected {_ALGORITHM!r}, got {content.get('algorithm')!r}")
    files, crc32 = content.get("files"), content.get("crc32", {})
    if not _are_checksums(files, _SHA256) or not _are_checksums(crc32, _CRC32):
        raise FormatError(f"{path} is damaged: expected names with a SHA-256 under 'files', a CRC-32 under 'crc32'")
    outside = [name for name in files if not is_inside(name)]
    if outside:
        raise FormatError(f"{path} names {', '.join(map(repr, outside))}: expected files beside it or below")
    return Manifest(files=files, crc32={name: int(digits, 16) for name, digits in crc32.items()})


def _are_checksums(value: object, pattern: re.Pattern[str]) -> TypeGuard[dict[str, str]]:
    """Whether ``value`` is a dict whose values are checksums of the form ``pattern``."""
    return isinstance(value, dict) and all(isinstance(text, str) and pattern.fullmatch(text) for text in value.values())


def is_inside(name: str) -> bool:
    """Whether a name is a normalized relative path without ``..``."""
    path = PurePosixPath(name)
    return str(path) == name and not path.is_absolute() and ".." not in path.parts and "\0" not in name


def files_in(directory: Path) -> list[str]:
    """The names of all files in ``directory`` and below, relative to it and sorted, without integrity.json."""
    paths = sorted(path.relative_to(directory) for path in directory.rglob("*") if path.is_file())
    return [path.as_posix() for path in paths if path != Path(MANIFEST_FILE)]
