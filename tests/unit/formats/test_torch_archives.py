"""Archives of torch.save against torch and zipfile: written, read at any place, and refused where they are damaged."""

from __future__ import annotations

import io
import shutil
import zipfile
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import refusal
from genuine import shards
from hypothesis import given, settings
from hypothesis import strategies as st
from random_tensors import random_tensor
from torch_reading import described, raw_bytes

from dist_ckpt_mistral.errors import FormatError
from dist_ckpt_mistral.formats.pickles.tensors import STORAGES, row_major_strides
from dist_ckpt_mistral.formats.torch_dist.archive import ArchivedTensor, ArchiveReader
from dist_ckpt_mistral.formats.torch_dist.archive_writer import ArchiveLayout, object_archive
from dist_ckpt_mistral.gather.dtypes import KNOWN_DTYPES
from dist_ckpt_mistral.storage.local import SourceFiles

SHAPES = [(), (0,), (1,), (7,), (3, 5), (4, 0, 2), (1, 6, 2), (2, 3, 1, 2), (200, 400)]


@pytest.mark.parametrize("position", [0, 64, 4032, 12_345 * 64])
@pytest.mark.parametrize("dtype", STORAGES.values())
def test_archives_that_are_written_load_with_torch(dtype: str, position: int) -> None:
    """torch.load takes what is laid out around the bytes of any tensor, zipfile finds the checksums right."""
    for shape in SHAPES:
        tensor = random_tensor(dtype, shape)
        raw = raw_bytes(tensor)
        layout = ArchiveLayout.for_tensor(dtype, shape, position)
        archive = layout.head + raw + layout.tail(zlib.crc32(raw))
        loaded = torch.load(io.BytesIO(archive), weights_only=True)
        assert described({"t": loaded}) == described({"t": tensor})
        assert loaded.stride() == tensor.stride()
        with zipfile.ZipFile(io.BytesIO(archive)) as zipped:
            assert zipped.testzip() is None
            assert zipped.read("archive/data/0") == raw
        assert len(archive) == layout.num_bytes
        assert (position + layout.data_offset) % 64 == 0
        assert (position + len(archive)) % 64 == 0
    assert len(raw) >= 80_000
    assert (position + layout.data_offset) % 4096 == 0


def test_what_torch_has_no_storage_for_is_not_written() -> None:
    """float8 has no typed storage: to write it in the form that all torch versions read is refused."""
    with pytest.raises(FormatError, match="float8_e4m3fn tensors cannot be written to torch archives: expected one of"):
        ArchiveLayout.for_tensor("float8_e4m3fn", (2,), 0)


def test_objects_that_are_written_load_with_torch() -> None:
    """Plain values come out of torch.load and of the archive reader, from archives of whole multiples of 64 bytes."""
    for value in ([None], {"a": [1, 2.5, "x"], "b": (True, None)}, "x" * 10_000, []):
        archive = object_archive(value)
        assert torch.load(io.BytesIO(archive), weights_only=True) == value
        assert len(archive) % 64 == 0
        with zipfile.ZipFile(io.BytesIO(archive)) as zipped:
            assert zipped.testzip() is None


LIMIT = 1 << 32


@pytest.mark.parametrize("num_bytes", [LIMIT - 8193, LIMIT - 8192, LIMIT - 1000, LIMIT - 1, LIMIT, LIMIT + 1, 5 << 30])
def test_archives_beyond_four_gibibytes(num_bytes: int, tmp_path: Path) -> None:
    """From 4 GiB on sizes and offsets are ZIP64: zipfile, torch and the reader find a last byte in a file of holes."""
    layout = ArchiveLayout.for_tensor("uint8", (num_bytes,), 0)
    path = tmp_path / "large.pt"
    with path.open("wb") as file:
        file.write(layout.head)
        file.seek(layout.data_offset + num_bytes - 1)
        file.write(b"\x7b" + layout.tail(0x12345678))
    assert path.stat().st_size == layout.num_bytes
    assert path.stat().st_blocks * 512 < 1 << 20
    with zipfile.ZipFile(path) as zipped:
        listed = zipped.getinfo("archive/data/0")
        assert (listed.file_size, listed.compress_size, listed.CRC) == (num_bytes, num_bytes, 0x12345678)
        assert (zipped.read("archive/version"), zipped.read("archive/byteorder")) == (b"3\n", b"little")
        with zipped.open("archive/data/0") as data:
            assert data.read(100) == bytes(100)
    loaded = torch.load(path, mmap=True, weights_only=True)
    assert (loaded.shape, loaded.dtype, loaded[0].item(), loaded[-1].item()) == ((num_bytes,), torch.uint8, 0, 0x7B)
    found = read_archive(path)
    assert (found.dtype, found.shape) == ("uint8", (num_bytes,))
    assert (found.data.position, found.data.num_bytes, found.data.crc32) == (layout.data_offset, num_bytes, 0x12345678)


def read_archive(path: Path, position: int = 0, num_bytes: int | None = None) -> ArchivedTensor:
    """What the reader makes of an archive inside a file."""
    with SourceFiles([path]) as files:
        size = files.size_bytes(0) - position if num_bytes is None else num_bytes
        return ArchiveReader(files, 0, position, size, "the archive").tensor()


@pytest.mark.parametrize("dtype", [name for name in KNOWN_DTYPES if hasattr(torch, name)])
def test_archives_of_torch_are_read(dtype: str, tmp_path: Path) -> None:
    """Of what torch.save wrote, anywhere in a file: dtype, shape, where the bytes are, and their checksum."""
    for number, shape in enumerate(SHAPES):
        tensor = random_tensor(dtype, shape, number)
        buffer = io.BytesIO()
        torch.save(tensor, buffer)
        path = tmp_path / str(number)
        path.write_bytes(b"before" * number + buffer.getvalue() + b"behind")
        found = read_archive(path, 6 * number, len(buffer.getvalue()))
        assert (found.dtype, found.shape) == (dtype, shape)
        raw = path.read_bytes()[found.data.position : found.data.position + found.data.num_bytes]
        assert raw == raw_bytes(tensor)
        assert found.data.crc32 == zlib.crc32(raw)


def test_zip64_archives_of_zipfile_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes and offsets in ZIP64 fields, as Python's zipfile writes them when it takes a kilobyte for the limit."""
    tensor = random_tensor("bfloat16", (50, 60))
    records = unzipped(tensor)
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 1000)
    path = tmp_path / "t.pt"
    rezip(path, records)
    assert path.read_bytes().count(b"PK\6\6") == 1
    found = read_archive(path)
    assert (found.dtype, found.shape, found.data.num_bytes) == ("bfloat16", (50, 60), 6000)
    assert path.read_bytes()[found.data.position :][:6000] == raw_bytes(tensor)


def unzipped(value: object) -> dict[str, bytes]:
    """The records of an archive of torch.save."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    with zipfile.ZipFile(buffer) as zipped:
        return {name: zipped.read(name) for name in zipped.namelist()}


def rezip(path: Path, records: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> None:
    """An archive of records."""
    with zipfile.ZipFile(path, "w", compression) as zipped:
        for name, content in records.items():
            zipped.writestr(name, content)


MATRIX = torch.arange(12, dtype=torch.float32).reshape(3, 4)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (MATRIX.t(), "holds a view of a larger tensor"),
        (MATRIX[1:], "holds a view of a larger tensor"),
        (MATRIX[:, :2], "holds a view of a larger tensor"),
        (MATRIX[:2], r"expected 32 bytes \(float32 \[2, 4\]\), got 48"),
        (MATRIX[:1].expand(3, 4), "holds a view of a larger tensor"),
        ([MATRIX], "holds no tensor"),
        ({"a": 1}, "holds no tensor"),
        ([MATRIX, MATRIX + 1], "an unexpected persistent object"),
        (MATRIX.to(torch.complex64), "ComplexFloatStorage, which is outside the allowlist"),
        (torch.nn.Parameter(MATRIX), "torch._utils._rebuild_parameter, which is outside the allowlist"),
        (MATRIX.to_sparse(), "torch._utils._rebuild_sparse_tensor, which is outside the allowlist"),
    ],
    ids=[
        *("transposed", "offset", "columns", "rows", "expanded", "list", "dict", "two", "complex", "parameter"),
        "sparse",
    ],
)
def test_what_is_no_plain_tensor_is_refused(value: object, expected: str, tmp_path: Path) -> None:
    """Views, containers, other classes: whatever is not one contiguous tensor is refused by name."""
    torch.save(value, tmp_path / "t.pt")
    with pytest.raises(FormatError, match=expected):
        read_archive(tmp_path / "t.pt")


def test_archives_of_other_machines_and_tools_are_refused(tmp_path: Path) -> None:
    """Big-endian data, compression, a record with a wrong checksum or without, no zip archive at all."""
    path, records = tmp_path / "t.pt", unzipped(MATRIX)
    top = next(iter(records)).partition("/")[0]
    rezip(path, records)
    assert read_archive(path).shape == (3, 4)
    rezip(path, records | {f"{top}/byteorder": b"big"})
    with pytest.raises(FormatError, match="big-endian"):
        read_archive(path)
    rezip(path, {name: content for name, content in records.items() if "data/0" not in name})
    with pytest.raises(FormatError, match="it has no data/0"):
        read_archive(path)
    rezip(path, records, zipfile.ZIP_DEFLATED)
    with pytest.raises(FormatError, match=r"damaged or compressed: record '.*data\.pkl' is not stored plainly"):
        read_archive(path)
    rezip(path, records)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"_rebuild_tensor_v2", b"_rebuild_tensor_v3"))
    with pytest.raises(FormatError, match=r"the checksum of data\.pkl is wrong"):
        read_archive(path)
    path.write_bytes(bytes(5000))
    with pytest.raises(FormatError, match=r"is not a torch\.save archive, or it is truncated"):
        read_archive(path)
    torch.save(MATRIX, path, _use_new_zipfile_serialization=False)
    with pytest.raises(FormatError, match=r"is not a torch\.save archive, or it is truncated"):
        read_archive(path)


def test_every_prefix_of_an_archive_is_refused(tmp_path: Path) -> None:
    """However many bytes are missing behind, of torch's archives and of ours: always our error, never another."""
    torch.save(MATRIX, tmp_path / "torch.pt")
    layout, raw = ArchiveLayout.for_tensor("float32", (3, 4), 0), raw_bytes(MATRIX)
    (tmp_path / "ours.pt").write_bytes(layout.head + raw + layout.tail(zlib.crc32(raw)))
    for name in ("torch.pt", "ours.pt"):
        assert read_archive(tmp_path / name).shape == (3, 4)
        for size in range((tmp_path / name).stat().st_size):
            with pytest.raises(FormatError):
                read_archive(tmp_path / name, 0, size)


@settings(max_examples=300)
@given(data=st.data())
def test_a_damaged_directory_never_misleads(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Any byte behind the data of torch's own archive changed: our error, or the same tensor in the same place."""
    path = tmp_path_factory.getbasetemp() / "damaged.pt"
    tensor = random_tensor("float32", (10, 30))
    torch.save(tensor, path)
    whole = read_archive(path)
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(whole.data.position + whole.data.num_bytes, len(content) - 1))
    content[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    try:
        found = read_archive(path)
    except FormatError:
        return
    assert (found.dtype, found.shape, found.data.position) == (whole.dtype, whole.shape, whole.data.position)


@pytest.mark.parametrize(
    ("field", "num_bytes"), [(1, 16), (1, 0xFFFF), (7, 9)], ids=["a field cut short", "a field of 64 kB", "another"]
)
def test_extra_fields_beyond_their_entry_are_refused(field: int, num_bytes: int, tmp_path: Path) -> None:
    """A ZIP64 field that says to be longer than what holds it is damage, to the reader and to ``inspect``."""
    directory = shutil.copytree(shards("td_0161"), tmp_path / "ckpt")
    path = directory / "common.pt"
    content = bytearray(path.read_bytes())
    at = content.index(b"PK\1\2")
    name_bytes = int.from_bytes(content[at + 28 : at + 30], "little")
    content[at + 20 : at + 28] = b"\xff" * 8  # both sizes are in the ZIP64 field
    content[at + 30 : at + 32] = (8).to_bytes(2, "little")
    extra = field.to_bytes(2, "little") + num_bytes.to_bytes(2, "little") + bytes(4)
    behind = at + 46 + name_bytes
    content[behind:behind] = extra
    end = content.index(b"PK\5\6")
    whole = int.from_bytes(content[end + 12 : end + 16], "little") + len(extra)
    content[end + 12 : end + 16] = whole.to_bytes(4, "little")
    path.write_bytes(content)
    assert "an extra field reaches beyond its record's entry" in refusal(tmp_path, "inspect", directory)


class Shaped:
    """A tensor of torch that says to have another shape."""

    def __init__(self, *shape: int) -> None:
        """Of this shape, in row-major order."""
        self.shape = shape

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        """As tensors do it."""
        of_torch: Any = torch.zeros(1)
        rebuild, (storage, offset, _, _, *rest) = of_torch.__reduce_ex__(2)
        return rebuild, (storage, offset, self.shape, row_major_strides(self.shape), *rest)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((1,) * 65, "holds a tensor of 65 axes: expected at most 64"),
        ((10**600,), "more than any memory holds"),
        ((10**5000,), "asks for the opcode LONG4, which is outside the allowlist"),
        ((2, 1 << 62), "more than any memory holds"),
    ],
    ids=["65 axes", "600 digits", "5000 digits", "2 ** 63 elements"],
)
def test_absurd_shapes_in_archives(shape: tuple[int, ...], expected: str, tmp_path: Path) -> None:
    """Axes and extents without end are refused, in an error that can be printed."""
    torch.save(Shaped(*shape), tmp_path / "t.pt")
    with pytest.raises(FormatError, match=expected):
        read_archive(tmp_path / "t.pt")
