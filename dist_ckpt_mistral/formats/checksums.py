"""``checksums.json``: the CRC-32 of every file in a directory, and of every tensor in its safetensors files.

Every command writes it beside its output, from checksums that were taken while the bytes were copied. The content is
``{"algorithm": "crc32", "files": {name: {"bytes": size, "crc32": hex}}, "tensors": {name: hex}, "crc32_of_this_file":
hex}``. File names are relative to the directory. The file itself and ``integrity.json`` are not among them. Its own
CRC-32 is that of its text with ``00000000`` in that place, which is the end.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

from zlib_ng import zlib_ng

from dist_ckpt_mistral.errors import FormatError
from dist_ckpt_mistral.formats.integrity import is_inside
from dist_ckpt_mistral.storage import documents

CHECKSUMS_FILE: Final = "checksums.json"
_ALGORITHM: Final = "crc32"
_CRC32: Final = re.compile(r"[0-9a-f]{8}")
_OWN: Final = "crc32_of_this_file"
#: The end of the file's text: its own checksum, the line end and the closing brace.
_END: Final = re.compile(rb'([0-9a-f]{8})"\s*\}\s*')
_LONGEST_END: Final = 64


class FileSum(NamedTuple):
    """Size and CRC-32 of a file."""

    num_bytes: int
    crc32: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FileChecksums:
    """Size and CRC-32 by file, and CRC-32 by tensor; file names are relative to the directory."""

    files: Mapping[str, FileSum]
    tensors: Mapping[str, int] = field(default_factory=dict)

    def to_json(self) -> bytes:
        """The content of the file, independent of the order of ``files`` and ``tensors``."""
        files = {name: {"bytes": size, "crc32": f"{crc32:08x}"} for name, (size, crc32) in sorted(self.files.items())}
        tensors = {name: f"{crc32:08x}" for name, crc32 in sorted(self.tensors.items())}
        content = {"algorithm": _ALGORITHM, "files": files, **({"tensors": tensors} if tensors else {}), _OWN: "0" * 8}
        text = json.dumps(content, indent=2).encode()  # ASCII, because file names need not be UTF-8
        return _with_own_sum(text, f"{zlib_ng.crc32(text):08x}".encode())


def _with_own_sum(text: bytes, digits: bytes) -> bytes:
    """``text`` with other digits for its own checksum, or as it is if it ends otherwise."""
    tail = text[-_LONGEST_END:]
    ends = [*_END.finditer(tail)]
    if not ends or ends[-1].end() != len(tail):
        return text
    at = len(text) - len(tail) + ends[-1].start()
    return text[:at] + digits + text[at + len(digits) :]


def read_checksums(directory: Path) -> FileChecksums | None:
    """The checksums in ``directory``, if it has any. Raises FormatError if they are damaged or name files outside."""
    path = directory / CHECKSUMS_FILE
    if not path.is_file():
        return None
    text = documents.read_bytes(path)
    content = documents.parse_json(text, str(path))
    if content.get("algorithm") != _ALGORITHM:
        raise FormatError(f"algorithm in {path}: expected {_ALGORITHM!r}, got {content.get('algorithm')!r}")
    if content.get(_OWN) != f"{zlib_ng.crc32(_with_own_sum(text, b'0' * 8)):08x}":
        raise FormatError(f"{path} is damaged: its text does not have the CRC-32 at its end")
    files, tensors = content.get("files"), content.get("tensors", {})
    if not (isinstance(files, dict) and isinstance(tensors, dict)):
        raise FormatError(f"{path} is damaged: expected objects under 'files' and 'tensors'")
    outside = [name for name in files if not is_inside(name)]
    if outside:
        raise FormatError(f"{path} names {', '.join(map(repr, outside))}: expected files beside it or below")
    return FileChecksums(
        files={name: _file_sum(entry, path) for name, entry in files.items()},
        tensors={name: _number(value, path) for name, value in tensors.items()},
    )


def _file_sum(entry: Any, path: Path) -> FileSum:  # noqa: ANN401  (of JSON)
    size = entry.get("bytes") if isinstance(entry, dict) else None
    if not isinstance(size, int) or isinstance(size, bool) or size < 0:
        raise FormatError(f"{path} is damaged: expected 'bytes' and 'crc32' of every file")
    return FileSum(size, _number(entry.get("crc32"), path))


def _number(digits: object, path: Path) -> int:
    if not isinstance(digits, str) or not _CRC32.fullmatch(digits):
        raise FormatError(f"{path} is damaged: expected a CRC-32 of eight hexadecimal digits, got {digits!r:.100}")
    return int(digits, 16)
