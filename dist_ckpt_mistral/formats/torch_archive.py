"""The zip archives of ``torch.save``: finding a tensor's bytes in one, and laying one out around bytes to come.

An archive holds ``data.pkl`` (a pickle), ``data/0`` (the bytes of the only storage), ``byteorder`` and ``version``, all
stored uncompressed (torch 2.6 to 2.15, ``caffe2/serialize/inline_container.cc``). torch writes sizes and checksums only
into the central directory, so that is what is read here. ZIP and ZIP64: PKWARE APPNOTE 6.3.10.
"""

from __future__ import annotations

import itertools
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from dist_ckpt_mistral import dtypes
from dist_ckpt_mistral.errors import FormatError
from dist_ckpt_mistral.formats import pickle_records
from dist_ckpt_mistral.formats.pickle_records import Call, Global, PersistentId
from dist_ckpt_mistral.gather.boxes import Shape
from dist_ckpt_mistral.storage import SourceFiles

_LOCAL: Final = struct.Struct("<4s5H3I2H")
_CENTRAL: Final = struct.Struct("<4s6H3I5H2I")
_END: Final = struct.Struct("<4s4H2IH")
_END64: Final = struct.Struct("<4sQ2H2I4Q")
_LOCATOR64: Final = struct.Struct("<4sIQI")
_MAX32: Final = 0xFFFFFFFF
_ZIP64_FIELD: Final = 1
_PADDING_FIELD: Final = 0x4246  # "FB": what torch pads local headers with
_UTF8_NAMES: Final = 0x800
_ROOT: Final = "archive"
#: Archive heads and tails fit in this many bytes in every checkpoint seen.
_EDGE_BYTES: Final = 2048
#: torch aligns storages to 64 bytes; whole pages make copies cheaper.
_ALIGNMENT: Final = 64
_PAGE_BYTES: Final = 4096

#: torch's typed storages, by the names that pickles use.
_STORAGES: Final = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
_STORAGE_OF: Final = {dtype: storage for storage, dtype in _STORAGES.items()}
_DTYPE_NAME: Final = re.compile(r"(u?int\d+|b?float\d+\w*|complex\d+|bool|qu?int\d+\w*|bits\w+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One record of an archive: its bytes ``[position, position + num_bytes)`` in the file, and their CRC-32."""

    position: int
    num_bytes: int
    crc32: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """A tensor of an archive: torch dtype name, shape in elements, and where its row-major bytes lie."""

    dtype: str
    shape: Shape
    data: Member


class ArchiveReader:
    """One archive inside a file. Reads its two edges once, and more only where that was not enough."""

    def __init__(self, files: SourceFiles, file: int, position: int, num_bytes: int, where: str) -> None:
        """The archive is bytes ``[position, position + num_bytes)`` of file ``file``; ``where`` names it in errors."""
        self._files, self._file, self._start, self._size, self._where = files, file, position, num_bytes, where
        edge = min(_EDGE_BYTES, num_bytes)
        self._head = files.read(file, position, edge)
        self._tail = self._head if edge == num_bytes else files.read(file, position + num_bytes - edge, edge)
        self._members = dict(self._walk())

    def member(self, name: str) -> Member:
        """Where the record ``name`` lies, without the archive's own top folder. Raises FormatError if there is none."""
        if name not in self._members:
            raise FormatError(f"{self._where} is not a torch.save archive: it has no {name}")
        offset, num_bytes, crc32 = self._members[name]
        header = _LOCAL.unpack(self._read(offset, _LOCAL.size))
        if header[0] != b"PK\3\4":
            raise FormatError(f"{self._where} is damaged: no local header of {name} at byte {offset}")
        begin = offset + _LOCAL.size + header[9] + header[10]
        if begin + num_bytes > self._size:
            raise FormatError(f"{self._where} is damaged: {name} reaches beyond its end")
        return Member(position=self._start + begin, num_bytes=num_bytes, crc32=crc32)

    def read(self, name: str) -> bytes:
        """The content of a small record. Raises FormatError if its checksum is wrong."""
        member = self.member(name)
        content = self._read(member.position - self._start, member.num_bytes)
        if zlib.crc32(content) != member.crc32:
            raise FormatError(f"{self._where} is damaged: the checksum of {name} is wrong")
        return content

    def tensor(self) -> StoredTensor:
        """The archive's only tensor. Raises FormatError for a view, big-endian data and anything but one tensor."""
        if "byteorder" in self._members and self.read("byteorder") != b"little":
            raise FormatError(f"{self._where} is big-endian, which is not supported")
        value = pickle_records.loads(self.read("data.pkl"), _tensor_global, self._where, persistent=_storage)
        if not isinstance(value, _Tensor):
            raise FormatError(f"{self._where} holds no tensor")
        dtype, shape = value.checked(self._where)
        data = self.member("data/0")
        expected = _numel(shape) * dtypes.itemsize_bytes(dtype)
        if data.num_bytes != expected:
            raise FormatError(
                f"{self._where} is damaged: expected {expected} bytes ({dtype} {list(shape)}), got {data.num_bytes}"
            )
        return StoredTensor(dtype=dtype, shape=shape, data=data)

    def object(self, find: Callable[[str, str], Any]) -> Any:  # noqa: ANN401  (whatever was saved)
        """The archive's pickled object, through the allowlist ``find``. Tensors in it become inert."""
        return pickle_records.loads(self.read("data.pkl"), find, self._where, persistent=lambda _: None)

    def _read(self, offset: int, num_bytes: int) -> bytes:
        """Bytes at ``offset`` of the archive, from an edge if they lie in one."""
        if offset < 0 or offset + num_bytes > self._size:
            raise FormatError(
                f"{self._where} is damaged: bytes [{offset}, {offset + num_bytes}) of {self._size} are asked for"
            )
        if offset + num_bytes <= len(self._head):
            return self._head[offset : offset + num_bytes]
        tail_start = self._size - len(self._tail)
        if offset >= tail_start:
            return self._tail[offset - tail_start : offset - tail_start + num_bytes]
        return self._files.read(self._file, self._start + offset, num_bytes)

    def _walk(self) -> Iterator[tuple[str, tuple[int, int, int]]]:
        """Yield (name, (offset of the local header, size in bytes, CRC-32)) of every record."""
        count, directory_bytes, offset = self._directory()
        directory = self._read(offset, directory_bytes)
        at = 0
        for _ in range(count):
            if at + _CENTRAL.size > len(directory):
                raise FormatError(f"{self._where} is damaged: its central directory is cut short")
            entry = _CENTRAL.unpack_from(directory, at)
            signature, method, crc32, packed, size, name_bytes, extra_bytes, comment_bytes, header = (
                *(entry[i] for i in (0, 4, 7, 8, 9, 10, 11, 12)),
                entry[16],
            )
            at += _CENTRAL.size
            name = directory[at : at + name_bytes].decode(errors="replace")
            extra = directory[at + name_bytes : at + name_bytes + extra_bytes]
            at += name_bytes + extra_bytes + comment_bytes
            size, packed, header = _zip64_values(extra, (size, packed, header))
            if signature != b"PK\1\2" or method != 0 or size != packed:
                raise FormatError(f"{self._where} is damaged or compressed: record {name!r} is not stored plainly")
            yield name.partition("/")[2], (header, size, crc32)

    def _directory(self) -> tuple[int, int, int]:
        """(records, bytes, offset) of the central directory."""
        at = self._tail.rfind(b"PK\5\6")
        if at < 0 or at + _END.size > len(self._tail):
            raise FormatError(f"{self._where} is not a torch.save archive, or it is truncated")
        _, _, _, _, count, num_bytes, offset, _ = _END.unpack_from(self._tail, at)
        if _MAX32 not in (num_bytes, offset) and count != 0xFFFF:  # noqa: PLR2004  (the 16-bit mark of ZIP64)
            return count, num_bytes, offset
        locator_at = self._size - len(self._tail) + at - _LOCATOR64.size
        signature, _, end_at, _ = _LOCATOR64.unpack(self._read(locator_at, _LOCATOR64.size))
        if signature != b"PK\6\7":
            raise FormatError(f"{self._where} is damaged: its ZIP64 locator is missing")
        end = _END64.unpack(self._read(end_at, _END64.size))
        return end[7], end[8], end[9]


def _zip64_values(extra: bytes, values: tuple[int, ...]) -> tuple[int, ...]:
    """``values`` with those that are 0xFFFFFFFF taken from the ZIP64 extra field, in order."""
    if _MAX32 not in values:
        return values
    at = 0
    while at + 4 <= len(extra):
        field, num_bytes = struct.unpack_from("<2H", extra, at)
        if field == _ZIP64_FIELD:
            longs = iter(struct.unpack_from(f"<{num_bytes // 8}Q", extra, at + 4))
            return tuple(next(longs, value) if value == _MAX32 else value for value in values)
        at += 4 + num_bytes
    return values


@dataclass(frozen=True, slots=True)
class _Storage:
    dtype: str | None
    numel: int


@dataclass(frozen=True, slots=True)
class _Tensor:
    """The arguments of ``torch._utils._rebuild_tensor_v2`` (and ``_v3``, which adds the dtype)."""

    storage: Any
    offset: Any
    shape: Any
    strides: Any
    dtype: Any = None

    def checked(self, where: str) -> tuple[str, Shape]:
        """Dtype and shape, if the tensor is the whole of its storage in row-major order."""
        is_plain = (
            isinstance(self.storage, _Storage)
            and all(
                isinstance(sizes, tuple) and all(isinstance(n, int) and n >= 0 for n in sizes)
                for sizes in (self.shape, self.strides)
            )
            and self.offset == 0
            and len(self.shape) == len(self.strides)
        )
        if not is_plain or not self._is_row_major():
            raise FormatError(f"{where} holds a view of a larger tensor, which is not supported")
        return dtypes.require_known(self.storage.dtype or self.dtype, where), self.shape

    def _is_row_major(self) -> bool:
        expected = list(itertools.accumulate(reversed((*self.shape[1:], 1)), lambda a, b: a * max(b, 1)))[::-1]
        return all(n <= 1 or s == e for n, s, e in zip(self.shape, self.strides, expected, strict=True)) or not _numel(
            self.shape
        )


def _numel(shape: Shape) -> int:
    numel = 1
    for extent in shape:
        numel *= extent
    return numel


def _rebuild_v2(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _Tensor:  # noqa: ANN401  (from a pickle)
    return _Tensor(storage, offset, shape, strides)


def _rebuild_v3(storage: Any, offset: Any, shape: Any, strides: Any, _: Any, __: Any, dtype: Any, *___: Any) -> _Tensor:  # noqa: ANN401
    return _Tensor(storage, offset, shape, strides, dtype)


def torch_dtype_name(module: str, name: str) -> str | None:
    """``bfloat16`` for the global ``torch.bfloat16``; None if this is no dtype."""
    return name if module == "torch" and _DTYPE_NAME.fullmatch(name) else None


def _tensor_global(module: str, name: str) -> Any:  # noqa: ANN401  (stand-ins of any kind)
    """The allowlist of a tensor's pickle."""
    dtype = torch_dtype_name(module, name)
    if dtype is not None:
        return dtype
    return {
        ("torch._utils", "_rebuild_tensor_v2"): _rebuild_v2,
        ("torch._utils", "_rebuild_tensor_v3"): _rebuild_v3,
        ("torch", "Size"): tuple,
        ("torch.storage", "UntypedStorage"): "",
        ("collections", "OrderedDict"): dict,
        **{("torch", storage): dtype for storage, dtype in _STORAGES.items()},
    }[module, name]


def _storage(pid: Any) -> _Storage:  # noqa: ANN401  (from a pickle)
    """torch.save's persistent id: ("storage", type, key, device, elements). Only storage 0 exists."""
    if not (isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage" and pid[2] == "0"):  # noqa: PLR2004
        raise FormatError(f"an unexpected persistent object {pid!r}")
    return _Storage(pid[1] if isinstance(pid[1], str) and pid[1] else None, pid[4])


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchiveLayout:
    """An archive around ``data_bytes`` bytes that are yet to come: where they go, and what stands around them.

    ``data_offset`` and ``num_bytes`` are relative to the archive, which starts at a multiple of 64 in its file.
    """

    pickled: bytes
    data_bytes: int
    data_offset: int
    num_bytes: int

    @classmethod
    def for_tensor(cls, dtype: str, shape: Shape, position: int) -> ArchiveLayout:
        """For a tensor of a torch dtype name, where the archive will start at byte ``position`` of its file."""
        data_bytes = _numel(shape) * dtypes.itemsize_bytes(dtype)
        pickled = pickle_records.dumps(_tensor_record(dtype, shape))
        before = (
            len(_records(_head_records(pickled)))
            + _LOCAL.size
            + len(f"{_ROOT}/data/0")
            + 4
            + _zip64_bytes(data_bytes, 2)
        )
        alignment = _PAGE_BYTES if data_bytes >= _PAGE_BYTES else _ALIGNMENT
        data_offset = before + -(position + before) % alignment
        layout = cls(pickled=pickled, data_bytes=data_bytes, data_offset=data_offset, num_bytes=0)
        return cls(
            pickled=pickled,
            data_bytes=data_bytes,
            data_offset=data_offset,
            num_bytes=data_offset + data_bytes + len(layout.tail(0)),
        )

    def head(self, crc32: int) -> bytes:
        """The bytes before the data, whose CRC-32 is ``crc32``."""
        start = _records(_head_records(self.pickled))
        return start + self._data_header(crc32)

    def tail(self, crc32: int) -> bytes:
        """The bytes behind the data: the ``version`` record, the central directory, and padding to 64 bytes."""
        end = self.data_offset + self.data_bytes
        small = _head_records(self.pickled)
        version = ("version", b"3\n")
        bare = self._tail(end, small, version, crc32, b"")
        return self._tail(end, small, version, crc32, b"\0" * (-(end + len(bare)) % _ALIGNMENT))

    def _data_header(self, crc32: int) -> bytes:
        name = f"{_ROOT}/data/0".encode()
        offset = len(_records(_head_records(self.pickled)))
        extra = _zip64_extra(self.data_bytes, self.data_bytes)
        padding = self.data_offset - offset - _LOCAL.size - len(name) - len(extra) - 4
        extra += struct.pack("<2H", _PADDING_FIELD, padding) + b"Z" * padding
        return _local_header(name, self.data_bytes, crc32, len(extra)) + name + extra

    def _tail(
        self, end: int, small: list[tuple[str, bytes]], version: tuple[str, bytes], crc32: int, comment: bytes
    ) -> bytes:
        entries, offset = [], 0
        for name, content in small:
            entries.append((name, len(content), zlib.crc32(content), offset))
            offset += len(_records([(name, content)]))
        entries.append(("data/0", self.data_bytes, crc32, offset))
        entries.append((version[0], len(version[1]), zlib.crc32(version[1]), end))
        body = _records([version])
        return body + _central_directory(entries, end + len(body), comment)


def object_archive(value: Any) -> bytes:  # noqa: ANN401  (plain values)
    """A whole ``torch.save`` archive of a plain value, without tensors."""
    return pickled_archive(pickle_records.dumps(value))


def pickled_archive(pickled: bytes) -> bytes:
    """A whole ``torch.save`` archive around a pickle without tensors."""
    records = [*_head_records(pickled), ("version", b"3\n")]
    body, entries = b"", []
    for name, content in records:
        entries.append((name, len(content), zlib.crc32(content), len(body)))
        body += _records([(name, content)])
    bare = _central_directory(entries, len(body), b"")
    return body + _central_directory(entries, len(body), b"\0" * (-(len(body) + len(bare)) % _ALIGNMENT))


def _tensor_record(dtype: str, shape: Shape) -> Call:
    """What ``torch.save`` pickles for a contiguous tensor that fills its storage."""
    if dtype not in _STORAGE_OF:
        raise FormatError(
            f"{dtype} tensors cannot be written to torch archives: expected one of {', '.join(_STORAGE_OF)}"
        )
    strides = tuple(itertools.accumulate(reversed((*shape[1:], 1)), lambda a, b: a * max(b, 1)))[::-1] if shape else ()
    storage = PersistentId(("storage", Global("torch", _STORAGE_OF[dtype]), "0", "cpu", _numel(shape)))
    hooks = Call(Global("collections", "OrderedDict"), ())
    return Call(Global("torch._utils", "_rebuild_tensor_v2"), (storage, 0, shape, strides, False, hooks))


def _head_records(pickled: bytes) -> list[tuple[str, bytes]]:
    return [("data.pkl", pickled), ("byteorder", b"little")]


def _records(records: list[tuple[str, bytes]]) -> bytes:
    """Local headers and contents of small records."""
    parts = []
    for name, content in records:
        path = f"{_ROOT}/{name}".encode()
        parts += [_local_header(path, len(content), zlib.crc32(content), 0), path, content]
    return b"".join(parts)


def _local_header(path: bytes, num_bytes: int, crc32: int, extra_bytes: int) -> bytes:
    size = min(num_bytes, _MAX32)
    return _LOCAL.pack(b"PK\3\4", 45, _UTF8_NAMES, 0, 0, 0, crc32, size, size, len(path), extra_bytes)


def _central_directory(entries: list[tuple[str, int, int, int]], position: int, comment: bytes) -> bytes:
    """The directory of ``(name, size, crc32, offset)`` at ``position`` of the archive, and the end records."""
    parts = []
    for name, num_bytes, crc32, offset in entries:
        path, size, at = f"{_ROOT}/{name}".encode(), min(num_bytes, _MAX32), min(offset, _MAX32)
        extra = _zip64_extra(*([num_bytes, num_bytes] if size == _MAX32 else []), *([offset] if at == _MAX32 else []))
        parts.append(
            _CENTRAL.pack(
                b"PK\1\2", 45, 45, _UTF8_NAMES, 0, 0, 0, crc32, size, size, len(path), len(extra), 0, 0, 0, 0, at
            )
            + path
            + extra
        )
    directory = b"".join(parts)
    end64 = b""
    if position >= _MAX32:
        count = len(entries)
        end64 = _END64.pack(b"PK\6\6", _END64.size - 12, 45, 45, 0, 0, count, count, len(directory), position)
        end64 += _LOCATOR64.pack(b"PK\6\7", 0, position + len(directory), 1)
    end = _END.pack(b"PK\5\6", 0, 0, len(entries), len(entries), len(directory), min(position, _MAX32), len(comment))
    return directory + end64 + end + comment


def _zip64_bytes(num_bytes: int, values: int) -> int:
    return 4 + 8 * values if num_bytes >= _MAX32 else 0


def _zip64_extra(*values: int) -> bytes:
    """The ZIP64 extra field for ``values``, or nothing if none of them needs it."""
    if not values or max(values) < _MAX32:
        return b""
    return struct.pack(f"<2H{len(values)}Q", _ZIP64_FIELD, 8 * len(values), *values)
