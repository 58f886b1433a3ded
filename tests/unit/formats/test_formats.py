"""Bytes on disk, each format against its own library: torch.save archives, pickles, metadata, safetensors headers."""

from __future__ import annotations

import gc
import io
import json
import math
import pickle
import pickletools
import shutil
import types
import warnings
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from command_line import refusal
from genuine import GENUINE, ZARR, shards
from hf_models import random_model, saved
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch_reading import described, raw_bytes, read_metadata

from dist_ckpt_mistral.convert.from_hf import from_hf
from dist_ckpt_mistral.errors import FormatError, UnsafePickleError
from dist_ckpt_mistral.formats.pickles import reader, writer
from dist_ckpt_mistral.formats.pickles.tensors import STORAGES, row_major_strides
from dist_ckpt_mistral.formats.pickles.writer import Call, Global, Instance, LazyDict, LazyList, PersistentId
from dist_ckpt_mistral.formats.safetensors import new_file, parse_header
from dist_ckpt_mistral.formats.stored_checkpoint import open_stored
from dist_ckpt_mistral.formats.torch_dist import common_state
from dist_ckpt_mistral.formats.torch_dist.archive import ArchivedTensor, ArchiveReader
from dist_ckpt_mistral.formats.torch_dist.archive_writer import ArchiveLayout, object_archive
from dist_ckpt_mistral.gather.dtypes import KNOWN_DTYPES, to_safetensors
from dist_ckpt_mistral.storage.local import SourceFiles

SHAPES = [(), (0,), (1,), (7,), (3, 5), (4, 0, 2), (1, 6, 2), (2, 3, 1, 2), (200, 400)]


def random_tensor(dtype: str, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """A tensor of random bits."""
    generator = torch.Generator().manual_seed(seed)
    torch_dtype: torch.dtype = getattr(torch, dtype)
    most = 2 if dtype == "bool" else 256
    raw = torch.randint(0, most, (math.prod(shape) * torch_dtype.itemsize,), generator=generator).to(torch.uint8)
    return raw.view(torch_dtype).reshape(shape)


# torch.save archives


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


def test_keys_of_the_common_state_are_strings(tmp_path: Path) -> None:
    """1 and "1" are not one entry."""
    torch.save({"1": 1, 1: 2}, tmp_path / "common.pt")
    with pytest.raises(FormatError, match="keys that are no strings"):
        common_state.read(tmp_path, None)


@pytest.mark.parametrize("state", [{"iteration": 10**600}, {"args": {"window_size": (10**600, 0)}}])
def test_numbers_beyond_all_floats_are_refused(state: dict[str, Any], tmp_path: Path) -> None:
    """No number of Megatron's comes near, and calculating with them overflows."""
    if "args" in state:
        state = {"args": types.SimpleNamespace(**state["args"])}
    torch.save(state, tmp_path / "common.pt")
    with pytest.raises(FormatError, match="has a number of more than 1024 bits"):
        common_state.read(tmp_path, None)


# Pickles

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 500), 1 << 500)
    | st.sampled_from([0, 255, 256, -1, (1 << 31) - 1, 1 << 31, -(1 << 31), -(1 << 31) - 1, 1 << 63])
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.lists(inner, max_size=5).map(tuple)
        | st.dictionaries(st.text(max_size=3) | st.integers(0, 9), inner, max_size=5)
    ),
    max_leaves=20,
)


@settings(max_examples=200)
@given(PLAIN)
def test_plain_values_load_with_pickle(value: object) -> None:
    """Python's own unpickler gives back what was written, types included, and its disassembler finds no fault."""
    written = writer.dumps(value)
    pickletools.dis(written, io.StringIO())
    assert repr(pickle.loads(written)) == repr(value)  # noqa: S301  (our own bytes)


def test_long_lists_load_with_pickle() -> None:
    """Many items, made one by one, and repeated strings, which are stored once."""
    words = [f"word {number % 300}" for number in range(70_000)]
    for value in (words, LazyList(iter(words))):
        written = writer.dumps(value)
        assert pickle.loads(written) == words  # noqa: S301  (our own bytes)
        assert len(written) < 6 * len(words) + 300 * 30


def test_records_load_with_pickle() -> None:
    """Globals, calls, instances and dicts of record keys become the very objects of Python's own classes."""
    record = {
        "global": Global("collections", "OrderedDict"),
        "call": Call(Global("builtins", "complex"), (1.5, -2.0)),
        "instance": Instance(Global("types", "SimpleNamespace"), {"a": [1], "b": Global("builtins", "len")}),
        "pairs": LazyDict([(Call(Global("builtins", "complex"), (0.0, 1.0)), "i"), ("two", 2)]),
        "lazy pairs": LazyDict((number, str(number)) for number in range(2000)),
    }
    written = writer.dumps(record)
    pickletools.dis(written, io.StringIO())
    assert pickle.loads(written) == {  # noqa: S301  (our own bytes)
        "global": OrderedDict,
        "call": complex(1.5, -2.0),
        "instance": types.SimpleNamespace(a=[1], b=len),
        "pairs": {1j: "i", "two": 2},
        "lazy pairs": {number: str(number) for number in range(2000)},
    }

    class Outside(pickle.Unpickler):
        def persistent_load(self, pid: object) -> object:
            return ["outside", pid]

    written = writer.dumps([PersistentId(("storage", 3))])
    assert Outside(io.BytesIO(written)).load() == [["outside", ("storage", 3)]]


def test_reading_asks_for_every_name() -> None:
    """Each global is looked up in the allowlist and nowhere else; what is not there is refused, and so is a torso."""
    asked = []

    def find(module: str, name: str) -> object:
        asked.append((module, name))
        return {("types", "SimpleNamespace"): reader.record_class("Stand-in")}[module, name]

    written = pickle.dumps(types.SimpleNamespace(a=[1, "x"]), protocol=2)
    found = reader.loads(written, find, "it")
    assert (type(found).__name__, [*found]) == ("Stand-in", [{"a": [1, "x"]}])
    assert asked == [("types", "SimpleNamespace")]
    with pytest.raises(UnsafePickleError, match=r"^it is refused: its pickle asks for builtins.len, which is outside"):
        reader.loads(pickle.dumps(len), find, "it")
    with pytest.raises(UnsafePickleError, match="asks for the persistent object 'x', which is outside"):
        reader.loads(writer.dumps(PersistentId("x")), find, "it")
    for size in range(len(written)):
        with pytest.raises(FormatError, match="it is not a readable pickle"):
            reader.loads(written[:size], find, "it")


def test_the_collector_is_paused_and_goes_on() -> None:
    """It is off inside, on again behind, also after an error, and stays off for whoever had it off."""
    assert gc.isenabled()
    with reader.paused_collector():
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError), reader.paused_collector():
        _ = 1 // 0
    assert gc.isenabled()
    gc.disable()
    try:
        with reader.paused_collector():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


# .metadata


def test_metadata_is_what_torch_would_have_made(tmp_path: Path) -> None:
    """Plain pickle makes torch's own objects of ``.metadata``, equal to those that torch's constructors give."""
    from_hf(saved(random_model(), tmp_path / "hf"), tmp_path / "ckpt", tp=2, pp=2)
    directory = tmp_path / "ckpt" / "release"
    metadata: Any = pickle.loads((directory / ".metadata").read_bytes())  # noqa: S301  (our own bytes)
    assert metadata.__class__ is Metadata
    assert (metadata.planner_data, metadata.storage_meta) == (None, None)
    size = torch.Size
    norm, fc2 = "decoder.final_layernorm.weight", "decoder.layers.mlp.linear_fc2.weight"
    properties = TensorProperties(dtype=torch.bfloat16)
    assert metadata.state_dict_metadata[norm] == TensorStorageMetadata(
        properties, size([24]), [ChunkStorageMetadata(size([0]), size([24]))]
    )
    cells = [
        ChunkStorageMetadata(size([layer, 0, 10 * half]), size([1, 24, 10])) for layer in range(2) for half in range(2)
    ]
    assert metadata.state_dict_metadata[fc2] == TensorStorageMetadata(properties, size([2, 24, 20]), cells)
    extra = "decoder.layers.mlp.linear_fc2._extra_state/shard_1_2"
    assert metadata.state_dict_metadata[extra] == BytesStorageMetadata()
    places = {index: info for index, info in metadata.storage_data.items() if index.fqn in (norm, fc2, extra)}
    assert set(places) == {
        MetadataIndex(norm, [0]),
        MetadataIndex(extra),
        *(MetadataIndex(fc2, cell.offsets) for cell in cells),
    }
    assert all(type(info) is _StorageInfo for info in places.values())
    assert places[MetadataIndex(norm, [0])].relative_path == "__2_0.distcp"
    assert {type(index.offset) for index in places if index.fqn == fc2} == {size}
    again: Any = pickle.loads(pickle.dumps(metadata))  # noqa: S301  (our own bytes)
    (directory / ".metadata").write_bytes(pickle.dumps(again))
    checkpoint = open_stored(directory)
    assert sorted([*checkpoint.tensors, *checkpoint.objects]) == sorted(metadata.state_dict_metadata)
    checkpoint.index(checkpoint.tensors)


@pytest.mark.parametrize(
    "case", [case for case in (*GENUINE, *ZARR) if case.startswith(("common", "mlm", "opt", "moe_zarr", "fsms", "dpz"))]
)
def test_common_state_is_what_torch_reads(case: str) -> None:
    """The plain values of a genuine common state, in common.pt or in the shards, are those that torch.load gives."""
    checkpoint = open_stored(shards(case))
    if (shards(case) / "common.pt").exists():
        source = io.BytesIO((shards(case) / "common.pt").read_bytes())
    else:
        places: Any = read_metadata(shards(case)).storage_data
        at = places[MetadataIndex("common_state/shard_0_1")]
        source = io.BytesIO((shards(case) / at.relative_path).read_bytes()[at.offset : at.offset + at.length])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # unpickling imports megatron, which warns of much
        expected = torch.load(source, weights_only=False)
    expected = expected[0] if isinstance(expected, list) else expected
    found = checkpoint.common_state
    assert sorted(found) == sorted(expected)
    assert (found["iteration"], found["checkpoint_version"]) == (expected["iteration"], expected["checkpoint_version"])
    assert found.get("content_metadata") == expected.get("content_metadata")
    args = vars(expected["args"])
    plain = {name: value for name, value in args.items() if type(value) in (int, float, str, bool, type(None))}
    assert {"num_layers", "hidden_size"} <= set(plain)
    assert (len(plain) > 20) == case.startswith(("mlm_", "moe_zarr"))
    assert {name: found["args"][name] for name in plain} == plain
    assert sorted(found["args"]) == sorted(args)


# safetensors

NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6).filter(lambda n: n != "__metadata__")
TENSORS = st.dictionaries(
    NAMES,
    st.tuples(st.sampled_from([*KNOWN_DTYPES]), st.lists(st.integers(0, 3), max_size=3).map(tuple)),
    max_size=6,
)


@settings(max_examples=200)
@given(TENSORS)
def test_headers_are_laid_out_as_the_library_does(tensors: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    """For any names, dtypes and shapes the planned head of a file is, byte for byte, what safetensors writes."""
    written = save({name: random_tensor(*kind) for name, kind in tensors.items()}, metadata={"format": "pt"})
    planned = new_file((name, *kind) for name, kind in tensors.items())
    assert written[: planned.data_start] == planned.head
    assert planned.num_bytes == len(written)


deserialize: Callable[[bytes], list[tuple[str, dict[str, Any]]]] = safetensors.deserialize


def library_reads(content: bytes) -> dict[str, tuple[str, list[int], bytes]] | None:
    """Name -> (dtype, shape, bytes) as the safetensors library reads a file; None if it refuses it."""
    try:
        found = deserialize(content)
    except safetensors.SafetensorError:
        return None
    return {name: (entry["dtype"], entry["shape"], bytes(entry["data"])) for name, entry in found}


def we_read(text: bytes, data: bytes) -> dict[str, tuple[str, list[int], bytes]] | None:
    """The same as the package reads it."""
    try:
        file = parse_header(text, "it", data_bytes=len(data))
    except FormatError:
        return None
    assert file.head == len(text).to_bytes(8, "little") + text
    return {t.name: (to_safetensors(t.dtype), list(t.shape), data[t.begin : t.end]) for t in file.tensors}


VALUES: st.SearchStrategy[Any] = st.sampled_from(
    [0, 1, 2, 4, 8, 16, -1, 2**40, 2**63, 2**64, 1.0, 4.5, True, None, "4", [], [4], {}]
)
VALUE_LISTS: st.SearchStrategy[Any] = st.lists(VALUES, max_size=3)
ENDINGS: st.SearchStrategy[bytes] = st.sampled_from([b"", b"", b"x"])


@st.composite
def spoiled_entries(draw: st.DrawFn, entry: dict[str, Any]) -> dict[str, Any]:
    """A header entry with one thing changed, left out, or added."""
    key = draw(st.sampled_from(["dtype", "shape", "data_offsets", "more"]))
    if key == "more":
        return entry | {key: draw(VALUES)}
    if draw(st.integers(0, 4)) == 0:
        return {name: value for name, value in entry.items() if name != key}
    if key == "dtype":
        return entry | {key: draw(st.sampled_from(["F32", "BF16", "I8", "X9", "f32", "", None, 3]))}
    values = list(entry[key])
    if bool(values) and draw(st.booleans()):
        values[draw(st.integers(0, len(values) - 1))] = draw(VALUES)
        return entry | {key: values}
    return entry | {key: draw(st.one_of(VALUES, VALUE_LISTS))}


@settings(max_examples=500)
@given(data=st.data(), tensors=TENSORS)
def test_headers_are_taken_and_refused_as_the_library_does(
    data: st.DataObject, tensors: dict[str, tuple[str, tuple[int, ...]]]
) -> None:
    """Headers with anything wrong or odd in them: what the library refuses is refused, what it takes is read alike."""
    content = save({name: random_tensor(*kind) for name, kind in tensors.items()})
    length = int.from_bytes(content[:8], "little")
    header, raw = json.loads(content[8 : 8 + length]), content[8 + length :]
    for name in data.draw(st.sets(st.sampled_from(sorted(header)), max_size=2)) if header else ():
        header[name] = data.draw(spoiled_entries(header[name]))
    raw = raw[: len(raw) - data.draw(st.sampled_from([0, 0, 1]))] + data.draw(ENDINGS)
    text = json.dumps(header, ensure_ascii=data.draw(st.booleans())).encode() + b" " * data.draw(st.integers(0, 9))
    assert we_read(text, raw) == library_reads(len(text).to_bytes(8, "little") + text + raw)


@pytest.mark.parametrize(
    "shape", ["[0, 18446744073709551616]", "[9223372036854775808, 2, 0]", "[0, 9223372036854775808]"]
)
def test_empty_tensors_with_absurd_axes(shape: str) -> None:
    """Axes and products that 64 bits cannot hold are refused as by the library, even where nothing is stored."""
    text = f'{{"a":{{"dtype":"U8","shape":{shape},"data_offsets":[0,0]}}}}'.encode()
    assert we_read(text, b"") == library_reads(len(text).to_bytes(8, "little") + text)


@pytest.mark.parametrize(
    "text",
    [
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}',
        b'[{"dtype":"U8","shape":[1],"data_offsets":[0,1]}]',
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}x',
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}\0',
        '{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'.encode("utf-16-le"),
        b'\xef\xbb\xbf{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        b'{"\xff":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,1]}}',
        b"",
    ],
)
def test_headers_that_are_no_json_are_refused(text: bytes) -> None:
    """Other encodings, rubbish behind, no object: refused by the library and here."""
    assert library_reads(len(text).to_bytes(8, "little") + text + b"x") is None
    assert we_read(text, b"x") is None
