"""Read the zip archives of ``torch.save`` without torch: find the bytes of a tensor, or unpickle an object.

An archive holds the records ``data.pkl`` (a pickle), ``data/0`` (the bytes of the only storage), ``byteorder`` and
``version``, all uncompressed (torch 2.6 to 2.15, ``caffe2/serialize/inline_container.cc``). torch writes sizes and
checksums only behind the data and into the central directory, so this module reads the central directory. ZIP and
ZIP64: PKWARE APPNOTE 6.3.10.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import Any, Final, NamedTuple

from dist_ckpt_mistral.errors import FormatError
from dist_ckpt_mistral.formats.pickles import reader
from dist_ckpt_mistral.formats.pickles.tensors import read_tensor
from dist_ckpt_mistral.gather import dtypes
from dist_ckpt_mistral.gather.dtypes import Shape
from dist_ckpt_mistral.storage.local import ReadAhead, SourceFiles

LOCAL: Final = struct.Struct("<4s5H3I2H")
CENTRAL: Final = struct.Struct("<4s6H3I5H2I")
END: Final = struct.Struct("<4s4H2IH")
END64: Final = struct.Struct("<4sQ2H2I4Q")
LOCATOR64: Final = struct.Struct("<4sIQI")
EXTRA: Final = struct.Struct("<2H")
MAX32: Final = 0xFFFFFFFF
ZIP64_FIELD: Final = 1
#: What precedes and follows the data fits in this many bytes in every checkpoint seen.
_EDGE_BYTES: Final = 2048
#: Pickles, directories and small records of more bytes are refused: Megatron writes none.
_MAX_RECORD_BYTES: Final = 16 << 20
LITTLE_ENDIAN: Final = b"little"


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One record of an archive: its bytes ``[position, position + num_bytes)`` in the file, and their CRC-32.

    Saved after ``torch.serialization.set_crc32_options(False)``, all records have 0 for a CRC-32 (torch 2.6 to 2.15).
    """

    position: int
    num_bytes: int
    crc32: int


class Listed(NamedTuple):
    """One record as the central directory lists it: ``ROOT/NAME``, where all records have the same top folder.

    ``offset`` is the byte of the archive where its local header begins.
    """

    root: str
    name: str
    offset: int
    num_bytes: int
    crc32: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchivedTensor:
    """The tensor of an archive: torch dtype name, shape in elements, and the record with its row-major bytes."""

    dtype: str
    shape: Shape
    data: Member


class TensorLocator:
    """Find tensors in the archives of one checkpoint.

    Archives of equal chunks begin with the same bytes. An archive is parsed only if its head differs from the last one.
    """

    def __init__(self, files: SourceFiles, paths: Sequence[Path], places: Iterable[tuple[int, int]] = ()) -> None:
        """Read from ``files``, which are at ``paths``; ``places`` are (file, position) to read ahead, in order."""
        self._files, self._paths = files, paths
        self._heads = ReadAhead(files, places)
        self._known: dict[tuple[str, Shape, int], bytes] = {}

    def locate(
        self, name: str, dtype: str, shape: Shape, num_bytes: int, places: Iterable[tuple[int, int]]
    ) -> Iterator[int]:
        """Yield the byte of its file where the data of each archive begins; ``places`` are (file, position) of each.

        Archives are ``num_bytes`` long and hold equal chunks of the tensor ``name``. Raises FormatError unless each
        holds one tensor of the given torch dtype name and shape (in elements).
        """
        kind = (dtype, shape, num_bytes)
        head = self._known.get(kind, b"")
        for file, position in places:
            if not head or self._heads.read(file, position, len(head)) != head:
                try:
                    head = self._known[kind] = self._head(file, position, num_bytes, dtype, shape)
                except FormatError as error:
                    where = f"the chunk of {name!r} at byte {position} of {self._paths[file]}"
                    raise FormatError(f"{where}: {error}") from error
            yield position + len(head)

    def _head(self, file: int, position: int, num_bytes: int, dtype: str, shape: Shape) -> bytes:
        """The bytes before the data of an archive. Raises FormatError unless it holds the given dtype and shape."""
        stored = ArchiveReader(self._files, file, position, num_bytes, "the archive").tensor()
        # A tensor that is stacked with others here may be stored alone (torch_dcp), without the axes of the stack.
        axes = len(shape) - len(stored.shape)
        if (stored.dtype, (*(1,) * axes, *stored.shape)) != (dtype, shape):
            raise FormatError(
                f"it does not match the metadata: expected {dtype} {list(shape)}, "
                f"got {stored.dtype} {list(stored.shape)}"
            )
        return self._files.read(file, position, stored.data.position - position)


class ArchiveReader:
    """One archive inside a file. Reads its first and last bytes once, and more only where that is not enough."""

    def __init__(self, files: SourceFiles, file: int, position: int, num_bytes: int, where: str) -> None:
        """The archive is bytes ``[position, position + num_bytes)`` of file ``file``; ``where`` names it in errors."""
        self._files, self._file, self._start, self._size, self._where = files, file, position, num_bytes, where
        edge = min(_EDGE_BYTES, num_bytes)
        self._head = files.read(file, position, edge)
        self._tail = self._head if edge == num_bytes else files.read(file, position + num_bytes - edge, edge)
        self.listed = tuple(self._walk())
        self._members = {record.name: record for record in self.listed}
        if len(self._members) < len(self.listed):
            raise FormatError(f"{where} is damaged: its directory lists a record twice")

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the records, without the top folder."""
        return tuple(self._members)

    @property
    def directory_offset(self) -> int:
        """The byte of the archive where the central directory begins."""
        return self._directory()[2]

    def member(self, name: str) -> Member:
        """The bytes of the record ``name``, given without the top folder. Raises FormatError if there is none."""
        if name not in self._members:
            raise FormatError(f"{self._where} is not a torch.save archive: it has no {name}")
        _, _, offset, num_bytes, crc32 = self._members[name]
        header = LOCAL.unpack(self._read(offset, LOCAL.size))
        if header[0] != b"PK\3\4":
            raise FormatError(f"{self._where} is damaged: no local header of {name} at byte {offset}")
        begin = offset + LOCAL.size + header[9] + header[10]
        if begin + num_bytes > self.directory_offset:
            raise FormatError(f"{self._where} is damaged: {name} does not end before its directory")
        return Member(position=self._start + begin, num_bytes=num_bytes, crc32=crc32)

    def read(self, name: str) -> bytes:
        """The content of a small record. Raises FormatError if its checksum is wrong."""
        member = self.member(name)
        self._require_small(name, member.num_bytes)
        content = self._read(member.position - self._start, member.num_bytes)
        if member.crc32 and zlib.crc32(content) != member.crc32:
            raise FormatError(f"{self._where} is damaged: the checksum of {name} is wrong")
        return content

    def tensor(self) -> ArchivedTensor:
        """The only tensor of the archive. Raises FormatError for views, big-endian data, and other content."""
        if "byteorder" in self._members and self.read("byteorder") != LITTLE_ENDIAN:
            raise FormatError(f"{self._where} is big-endian, which is not supported")
        dtype, shape = read_tensor(self.read("data.pkl"), self._where)
        data = self.member("data/0")
        expected = math.prod(shape) * dtypes.itemsize_bytes(dtype)
        if data.num_bytes != expected:
            raise FormatError(
                f"{self._where} is damaged: expected {expected} bytes ({dtype} {list(shape)}), got {data.num_bytes}"
            )
        return ArchivedTensor(dtype=dtype, shape=shape, data=data)

    def object(self, find: Callable[[str, str], Any]) -> Any:  # noqa: ANN401  (whatever was saved)
        """The pickled object of the archive, unpickled through the allowlist ``find``. Tensors in it become inert."""
        return reader.loads(self.read("data.pkl"), find, self._where, persistent=lambda _: None)

    def _require_small(self, name: str, num_bytes: int) -> None:
        """Raise FormatError if the part ``name`` is too large to be read whole."""
        if num_bytes > _MAX_RECORD_BYTES:
            raise FormatError(
                f"{self._where} has {num_bytes} bytes of {name}: expected at most {_MAX_RECORD_BYTES}. It is damaged."
            )

    def _read(self, offset: int, num_bytes: int) -> bytes:
        """Bytes at ``offset`` of the archive, from what is in memory if they are there."""
        if offset < 0 or offset + num_bytes > self._size:
            raise FormatError(
                f"{self._where} is damaged: it refers to bytes [{offset}, {offset + num_bytes}) of {self._size}"
            )
        if offset + num_bytes <= len(self._head):
            return self._head[offset : offset + num_bytes]
        tail_start = self._size - len(self._tail)
        if offset >= tail_start:
            return self._tail[offset - tail_start : offset - tail_start + num_bytes]
        return self._files.read(self._file, self._start + offset, num_bytes)

    def _walk(self) -> Iterator[Listed]:
        """Yield every record in the order of the central directory."""
        count, directory_bytes, offset = self._directory()
        self._require_small("central directory", directory_bytes)
        directory = self._read(offset, directory_bytes)
        at = 0
        for _ in range(count):
            if at + CENTRAL.size > len(directory):
                raise FormatError(f"{self._where} is damaged: its central directory is cut short")
            entry = CENTRAL.unpack_from(directory, at)
            signature, method, crc32, packed, size, name_bytes, extra_bytes, comment_bytes, header = (
                *(entry[i] for i in (0, 4, 7, 8, 9, 10, 11, 12)),
                entry[16],
            )
            at += CENTRAL.size
            name = directory[at : at + name_bytes].decode(errors="replace")
            extra = directory[at + name_bytes : at + name_bytes + extra_bytes]
            at += name_bytes + extra_bytes + comment_bytes
            size, packed, header = self._zip64_values(extra, (size, packed, header))
            if signature != b"PK\1\2" or method != 0 or size != packed:
                raise FormatError(f"{self._where} is damaged or compressed: record {short(name)} is not stored plainly")
            root, _, record = name.partition("/")
            yield Listed(root, record, header, size, crc32)

    def _zip64_values(self, extra: bytes, values: tuple[int, ...]) -> tuple[int, ...]:
        """``values``, where each 0xFFFFFFFF is replaced by the next number of the ZIP64 extra field."""
        at = 0
        while MAX32 in values and at + EXTRA.size <= len(extra):
            field, num_bytes = EXTRA.unpack_from(extra, at)
            at += EXTRA.size
            if at + num_bytes > len(extra):
                raise FormatError(f"{self._where} is damaged: an extra field reaches beyond its record's entry")
            if field == ZIP64_FIELD:
                longs = iter(struct.unpack_from(f"<{num_bytes // 8}Q", extra, at))
                return tuple(next(longs, value) if value == MAX32 else value for value in values)
            at += num_bytes
        return values

    def _directory(self) -> tuple[int, int, int]:
        """(records, bytes, offset) of the central directory."""
        at = self._tail.rfind(b"PK\5\6")
        if at < 0 or at + END.size > len(self._tail):
            raise FormatError(f"{self._where} is not a torch.save archive, or it is truncated")
        _, _, _, _, count, num_bytes, offset, _ = END.unpack_from(self._tail, at)
        if MAX32 not in (num_bytes, offset) and count != 0xFFFF:  # noqa: PLR2004  (the 16-bit mark of ZIP64)
            return count, num_bytes, offset
        locator_at = self._size - len(self._tail) + at - LOCATOR64.size
        signature, _, end_at, _ = LOCATOR64.unpack(self._read(locator_at, LOCATOR64.size))
        if signature != b"PK\6\7":
            raise FormatError(f"{self._where} is damaged: its ZIP64 locator is missing")
        end = END64.unpack(self._read(end_at, END64.size))
        return end[7], end[8], end[9]
