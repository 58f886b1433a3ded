"""Write a read-only OCDBT database: keys whose values are byte ranges of files beside it, or short texts.

OCDBT is TensorStore's key-value format (tensorstore/kvstore/ocdbt/index.rst, "Storage format", 0.1.86): a file
``manifest.ocdbt`` names the root node of a B+tree. Here the tree is one leaf, in a file of its own, and the values stay
in the files that hold them already. Nothing but the writer is needed: TensorStore reads.
"""

from __future__ import annotations

import functools
import itertools
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from typing import Final, NamedTuple

from dist_ckpt_mistral.errors import UnsupportedFormatError

MANIFEST_FILE: Final = "manifest.ocdbt"
NODE_FILE: Final = "index.ocdbt"
#: Sizes and checksums of the files that the database refers to. OCDBT itself has no place for them.
SHARDS_FILE: Final = "index.ocdbt.json"
#: All files of an index. They describe the files beside them, so that no copy of a checkpoint takes them along.
INDEX_FILES: Final = (MANIFEST_FILE, NODE_FILE, SHARDS_FILE)

_MANIFEST_MAGIC: Final = 0x0CDB3A2A
_NODE_MAGIC: Final = 0x0CDB20DE
#: Limits that a database names for its writers. TensorStore refuses larger nodes and inline values when it writes.
_MAX_INLINE_BYTES: Final = 1 << 20
_MAX_NODE_BYTES: Final = 1 << 30
_VERSION_TREE_ARITY_LOG2: Final = 4
#: CRC-32C (RFC 3720), which zlib does not have; reflected polynomial.
_CRC32C: Final = 0x82F63B78


class FileRange(NamedTuple):
    """Bytes ``[position, position + num_bytes)`` of a file, by its number."""

    file: int
    position: int
    num_bytes: int


def database(entries: Mapping[str, bytes | FileRange], files: Sequence[str]) -> dict[str, bytes]:
    """The content of the node and of the manifest, by file name, in the order to write them.

    ``files`` are the names that ranges refer to, relative to the directory of the manifest. The same entries always
    give the same bytes. Raises UnsupportedFormatError if there are too many entries for one node.
    """
    ordered = sorted((key.encode(), value) for key, value in entries.items())
    ranges = [value for _, value in ordered if isinstance(value, FileRange)]
    node = _framed(_NODE_MAGIC, _leaf(ordered, files))
    if len(node) > _MAX_NODE_BYTES:
        raise UnsupportedFormatError(
            f"an index of {len(ordered)} entries: expected at most {_MAX_NODE_BYTES} bytes, got {len(node)}"
        )
    config = (
        sha256(node).digest()[:16]  # the uuid
        + _varints([0, _MAX_INLINE_BYTES, _MAX_NODE_BYTES])  # a single manifest
        + bytes([_VERSION_TREE_ARITY_LOG2])
        + _varints([0])  # no compression
    )
    version = (
        _varints([1, 1])  # one version: generation 1
        + b"\0"  # the height of its tree
        + _varints([0, 0, len(node)])  # file, position and size of the root
        + _varints([len(ordered), len(node), sum(each.num_bytes for each in ranges)])
        + struct.pack("<Q", 1)  # the commit time, which may be any
    )
    body = config + _file_table([NODE_FILE]) + version + _varints([0])  # no tree of further versions
    return {NODE_FILE: node, MANIFEST_FILE: _framed(_MANIFEST_MAGIC, body)}


def _leaf(entries: Sequence[tuple[bytes, bytes | FileRange]], files: Sequence[str]) -> bytes:
    """A leaf node: its keys, each without what it shares with the one before, and columns of its values."""
    keys = [key for key, _ in entries]
    shared = [len(os.path.commonprefix(pair)) for pair in itertools.pairwise(keys)]  # noqa: RUF071  (no paths)
    rests = [key[length:] for key, length in zip(keys, [0, *shared], strict=True)]
    ranges = [value for _, value in entries if isinstance(value, FileRange)]
    texts = [value for _, value in entries if not isinstance(value, FileRange)]
    sizes = (value.num_bytes if isinstance(value, FileRange) else len(value) for _, value in entries)
    return b"".join(
        [
            b"\0",  # the height
            _file_table(files),
            _varints([len(entries)]),
            _varints(shared),
            _varints(map(len, rests)),
            *rests,
            _varints(sizes),
            _varints(int(isinstance(value, FileRange)) for _, value in entries),
            _varints(each.file for each in ranges),
            _varints(each.position for each in ranges),
            *texts,
        ]
    )


def _file_table(names: Sequence[str]) -> bytes:
    """A data file table. Names share no beginning with the one before, and have no base path."""
    encoded = [name.encode() for name in names]
    none = [0] * len(names)
    return (
        _varints([len(names)]) + _varints(none[1:]) + _varints(map(len, encoded)) + _varints(none) + b"".join(encoded)
    )


def _framed(magic: int, body: bytes) -> bytes:
    """A manifest or node around its uncompressed ``body``: magic, length, version 0, compression 0, CRC-32C."""
    head = _varints([0, 0])
    num_bytes = 4 + 8 + len(head) + len(body) + 4
    content = struct.pack(">I", magic) + struct.pack("<Q", num_bytes) + head + body
    return content + struct.pack("<I", crc32c(content))


def _varints(numbers: Iterable[int]) -> bytes:
    """Unsigned LEB128 numbers, one behind the other."""
    out = bytearray()
    for each in numbers:
        number = each
        while number > 0x7F:  # noqa: PLR2004  (seven bits a byte)
            out.append(number & 0x7F | 0x80)
            number >>= 7
        out.append(number)
    return bytes(out)


@functools.cache
def _table() -> list[int]:
    """The CRC-32C of every byte."""
    table = []
    for byte in range(256):
        crc = byte
        for _ in range(8):
            crc = (crc >> 1) ^ (_CRC32C if crc & 1 else 0)
        table.append(crc)
    return table


def crc32c(data: bytes) -> int:
    """The CRC-32C of ``data``."""
    crc, table = 0xFFFFFFFF, _table()
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF
