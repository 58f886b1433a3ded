"""Write the zip archives of ``torch.save`` without torch, also around tensor data that is copied later."""

from __future__ import annotations

import functools
import math
import pickle
import pickletools
import struct
import zlib
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from dist_ckpt_mistral.errors import FormatError
from dist_ckpt_mistral.formats.pickles import writer
from dist_ckpt_mistral.formats.pickles.tensors import STORAGES, row_major_strides
from dist_ckpt_mistral.formats.pickles.writer import Call, Global, PersistentId
from dist_ckpt_mistral.formats.torch_dist.archive import (
    CENTRAL,
    END,
    END64,
    LITTLE_ENDIAN,
    LOCAL,
    LOCATOR64,
    MAX32,
    ZIP64_FIELD,
    ArchiveReader,
    Listed,
)
from dist_ckpt_mistral.gather import dtypes
from dist_ckpt_mistral.gather.dtypes import Shape

_ROOT: Final = "archive"
PICKLE: Final = "data.pkl"
#: torch takes an archive with this record for a TorchScript program (torch/serialization.py, ``_is_torchscript_zip``,
#: 2.13 and 2.14).
_SCRIPT: Final = "constants.pkl"
#: The first bytes of pickles without frames. Frames would need new lengths where opcodes are added.
_UNFRAMED: Final = (pickle.PROTO + b"\2", pickle.PROTO + b"\3")
_FLAGS: Final = 0x808  # names are UTF-8; sizes and checksums follow the data
_PADDING_FIELD: Final = 0x4246  # "FB": what torch pads local headers with
#: torch aligns storages to 64 bytes. Larger ones are aligned to pages, which makes copies cheaper.
_ALIGNMENT: Final = 64
_PAGE_BYTES: Final = 4096
_LARGE_BYTES: Final = 64 << 10
#: Sizes and offsets from here on are written as ZIP64: two pages below the limit, so that padding never crosses it.
_ZIP64_BYTES: Final = MAX32 - 2 * _PAGE_BYTES
_VERSION: Final = b"3\n"
_STORAGE_OF: Final = {dtype: storage for storage, dtype in STORAGES.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchiveLayout:
    """An archive around ``data_bytes`` bytes that are copied later: the bytes before them, and its length in bytes.

    As in torch's own archives, sizes and checksums follow the data, so that ``head`` does not depend on it. Chunks of
    equal dtype and shape have equal heads if they begin at equal offsets in a page.
    """

    head: bytes
    listed: tuple[Listed, ...]
    data_bytes: int
    num_bytes: int

    @property
    def data_offset(self) -> int:
        """The byte of the archive where the data begins."""
        return len(self.head)

    @classmethod
    def for_tensor(cls, dtype: str, shape: Shape, position: int) -> ArchiveLayout:
        """The layout for a tensor (torch dtype name, shape in elements) whose archive begins at byte ``position``.

        The data and the end of the archive, where the next one begins, are aligned in the file: to pages from 64 KiB of
        data on, else to 64 bytes.
        """
        return _tensor_layout(dtype, shape, position % _PAGE_BYTES)

    def tail(self, crc32: int) -> bytes:
        """The bytes after the data, whose CRC-32 is ``crc32``, padded to the planned length."""
        return self._tail(crc32, self.num_bytes - len(self.head) - self.data_bytes - self.tail_bytes)

    @property
    def tail_bytes(self) -> int:
        """Length of the tail without padding."""
        return len(self._tail(0, 0))

    def _tail(self, crc32: int, padding: int) -> bytes:
        """The data's descriptor, the ``version`` record with ``padding`` bytes, and the central directory."""
        descriptor = _descriptor(self.data_bytes, crc32)
        version_at = len(self.head) + self.data_bytes + len(descriptor)
        version = _record("version", _VERSION, padding)
        listed = [record._replace(crc32=crc32) if record.name == "data/0" else record for record in self.listed]
        listed.append(_list("version", _VERSION, version_at))
        return descriptor + version + _central_directory(listed, version_at + len(version))


@functools.lru_cache(maxsize=1024)
def _tensor_layout(dtype: str, shape: Shape, position: int) -> ArchiveLayout:
    """The layout of an archive that begins at byte ``position`` of a page: the same for most chunks of a tensor."""
    data_bytes = math.prod(shape) * dtypes.itemsize_bytes(dtype)
    alignment = _PAGE_BYTES if data_bytes >= _LARGE_BYTES else _ALIGNMENT
    head, listed = _leading_records(writer.dumps(_tensor_record(dtype, shape)))
    data = Listed(root=_ROOT, name="data/0", offset=len(head), num_bytes=data_bytes, crc32=0)
    unaligned = position + len(head) + len(_local_header("data/0", 0))
    head += _local_header("data/0", -unaligned % alignment)
    bare = ArchiveLayout(head=head, listed=(*listed, data), data_bytes=data_bytes, num_bytes=0)
    end = len(head) + data_bytes + bare.tail_bytes
    return replace(bare, num_bytes=end + -(position + end) % alignment)


def object_archive(value: Any) -> bytes:  # noqa: ANN401  (plain values)
    """A complete ``torch.save`` archive of a plain value, without tensors."""
    return pickled_archive(writer.dumps(value))


def pickled_archive(pickled: bytes) -> bytes:
    """A complete ``torch.save`` archive of a pickle without tensors; its length is a multiple of 64 bytes."""
    return _whole(*_leading_records(pickled))


def scalars_archive(scalars: Mapping[str, tuple[str, bytes]]) -> bytes:
    """A complete ``torch.save`` archive of a dict of scalar tensors.

    ``scalars`` gives for each key of the dict a torch dtype name and the value's little-endian bytes.
    """
    keys = {name: str(number) for number, name in enumerate(scalars)}
    tensors = {name: _tensor_record(dtype, (), keys[name]) for name, (dtype, _) in scalars.items()}
    head, listed = _leading_records(writer.dumps(tensors))
    for name, (_, content) in scalars.items():
        record = f"data/{keys[name]}"
        unaligned = len(head) + len(_local_header(record, 0))
        listed.append(_list(record, content, len(head)))
        head += _record(record, content, -unaligned % _ALIGNMENT)
    return _whole(head, listed)


def _whole(head: bytes, listed: list[Listed]) -> bytes:
    """The archive of the records in ``head``, which ``listed`` lists; its length is a multiple of 64 bytes."""
    listed = [*listed, _list("version", _VERSION, len(head))]
    bare = len(head) + len(_record("version", _VERSION, 0))
    padding = -(bare + len(_central_directory(listed, bare))) % _ALIGNMENT
    return head + _record("version", _VERSION, padding) + _central_directory(listed, bare + padding)


def in_list(archive: ArchiveReader, where: str) -> tuple[int, bytes]:
    """Turn the archive of an object into that of a list of length 1: (bytes to keep, bytes that follow them).

    All records stay where they are. After them come a second ``data.pkl`` and a directory that lists it in place of the
    first, so that storages are neither read nor moved. Raises FormatError for a TorchScript program, and unless the
    pickle is as ``torch.save`` writes it and all records precede the directory.
    """
    if _SCRIPT in archive.names:
        raise FormatError(f"{where} holds a program, TorchScript, which torch.load would run: expected a plain object")
    wrapped, begin = pickle_in_list(archive.read(PICKLE), where), archive.directory_offset
    root = archive.listed[0].root
    record = _record(PICKLE, wrapped, 0, root)
    kept = [listed for listed in archive.listed if listed.name != PICKLE]
    for listed in kept:
        archive.member(listed.name)  # raises where it is not among the bytes to keep
    return begin, record + _central_directory([_list(PICKLE, wrapped, begin, root), *kept], begin + len(record))


def pickle_in_list(pickled: bytes, where: str) -> bytes:
    """The pickle of a list of length 1 with the object that is ``pickled``. Raises FormatError as ``in_list`` does."""
    if pickled[:2] not in _UNFRAMED or _stop(pickled, where) != len(pickled) - 1:
        raise FormatError(f"{where} is not as torch.save writes it: expected a pickle of protocol 2 or 3, and no more")
    return pickled[:2] + pickle.EMPTY_LIST + pickled[2:-1] + pickle.APPEND + pickle.STOP


def _stop(pickled: bytes, where: str) -> int:
    """The byte of the opcode that ends a pickle."""
    try:
        (last,) = deque(pickletools.genops(pickled), maxlen=1)  # keeps one opcode: there may be as many as bytes
    except Exception as error:  # whatever a damaged pickle makes of it
        raise FormatError(f"{where} is not a readable pickle: {error!r:.200}") from error
    return int(last[2] or 0)


def _tensor_record(dtype: str, shape: Shape, key: str = "0") -> Call:
    """What ``torch.save`` pickles for a contiguous tensor that is the whole of its storage, the record ``data/KEY``."""
    if dtype not in _STORAGE_OF:
        expected = ", ".join(_STORAGE_OF)
        raise FormatError(f"{dtype} tensors cannot be written to torch archives: expected one of {expected}")
    storage = PersistentId(("storage", Global("torch", _STORAGE_OF[dtype]), key, "cpu", math.prod(shape)))
    hooks = Call(Global("collections", "OrderedDict"), ())
    return Call(
        Global("torch._utils", "_rebuild_tensor_v2"), (storage, 0, shape, row_major_strides(shape), False, hooks)
    )


def _leading_records(pickled: bytes) -> tuple[bytes, list[Listed]]:
    """The bytes of the records before the data, and their entries for the directory."""
    first = _record(PICKLE, pickled, 0)
    second = _record("byteorder", LITTLE_ENDIAN, 0)
    return first + second, [_list(PICKLE, pickled, 0), _list("byteorder", LITTLE_ENDIAN, len(first))]


def _list(name: str, content: bytes, offset: int, root: str = _ROOT) -> Listed:
    """The directory's entry for a record whose local header begins at byte ``offset`` of the archive."""
    return Listed(root=root, name=name, offset=offset, num_bytes=len(content), crc32=zlib.crc32(content))


def _record(name: str, content: bytes, padding: int, root: str = _ROOT) -> bytes:
    """A complete record: local header with ``padding`` bytes, content, descriptor."""
    return _local_header(name, padding, root) + content + _descriptor(len(content), zlib.crc32(content))


def _local_header(name: str, padding: int, root: str = _ROOT) -> bytes:
    """A local header without sizes and checksum, with ``padding`` bytes in the extra field that torch pads with."""
    path = f"{root}/{name}".encode()
    extra = struct.pack("<2H", _PADDING_FIELD, padding) + b"Z" * padding
    return LOCAL.pack(b"PK\3\4", 0, _FLAGS, 0, 0, 0, 0, 0, 0, len(path), len(extra)) + path + extra


def _descriptor(num_bytes: int, crc32: int) -> bytes:
    """The data descriptor that follows a record's content: CRC-32 and size."""
    return struct.pack("<4sI2Q" if num_bytes >= _ZIP64_BYTES else "<4s3I", b"PK\7\10", crc32, num_bytes, num_bytes)


def _central_directory(listed: Iterable[Listed], position: int) -> bytes:
    """The central directory, which begins at byte ``position`` of the archive, and the end records."""
    parts = []
    for record in listed:
        path = f"{record.root}/{record.name}".encode()
        size, size_long = _or_zip64(record.num_bytes)
        offset, offset_long = _or_zip64(record.offset)
        longs = size_long * 2 + offset_long
        extra = struct.pack("<2H", ZIP64_FIELD, len(longs)) + longs if longs else b""
        fixed = (0, 0, _FLAGS, 0, 0, 0, record.crc32, size, size, len(path), len(extra), 0, 0, 0, 0, offset)
        parts.append(CENTRAL.pack(b"PK\1\2", *fixed) + path + extra)
    directory = b"".join(parts)
    offset, is_long = _or_zip64(position)
    end64 = b""
    if is_long:
        counts = (len(parts), len(parts), len(directory), position)
        end64 = END64.pack(b"PK\6\6", END64.size - 12, 45, 45, 0, 0, *counts)
        end64 += LOCATOR64.pack(b"PK\6\7", 0, position + len(directory), 1)
    return directory + end64 + END.pack(b"PK\5\6", 0, 0, len(parts), len(parts), len(directory), offset, 0)


def _or_zip64(value: int) -> tuple[int, bytes]:
    """``value`` for a 32-bit field and no bytes; from ``_ZIP64_BYTES`` on 0xFFFFFFFF and its 8 bytes for ZIP64."""
    return (MAX32, struct.pack("<Q", value)) if value >= _ZIP64_BYTES else (value, b"")
