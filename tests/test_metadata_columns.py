"""Chunks that are read without a record for each, against the unpickler: the same, or left to it, whatever is wrong."""

from __future__ import annotations

import io
import pickle
import pickletools
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from genuine import GENUINE, shards
from hypothesis import given, settings
from hypothesis import strategies as st
from test_stored_metadata import any_metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from dist_ckpt_mistral.errors import FormatError
from dist_ckpt_mistral.formats import (
    metadata_columns,
    metadata_pickle,
    metadata_records,
    pickle_opcodes,
    pickle_reading,
    record_columns,
)
from dist_ckpt_mistral.formats.stored_metadata import StoredMetadata

allowlist: Any = getattr(metadata_pickle, "_allowlist")  # noqa: B009  (its own, fresh for every load)


@pytest.fixture(autouse=True)
def smallest_batches() -> Iterator[None]:
    """Also batches of one record are cut out."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record_columns, "_LEAST", 1)
        yield


def told(metadata: StoredMetadata) -> object:
    """All that it says, orders included."""
    tensors = [[getattr(tensor, name) for name in tensor.__slots__] for tensor in metadata.tensors.values()]
    return [
        [*metadata.file_bytes.items()],
        metadata.archives,
        [*metadata.objects.items()],
        [*metadata.tensors],
        tensors,
    ]


def by_records(pickled: bytes) -> object:
    """What the unpickler makes of it; None if it refuses it."""
    try:
        metadata = metadata_records.attributes(pickle_reading.loads(pickled, allowlist(), "it"))
        return told(metadata_records.parse(metadata))
    except (AttributeError, FormatError, LookupError, OverflowError, TypeError, ValueError):
        return None


def by_columns(pickled: bytes) -> object:
    """What is read in columns; None if it is left to the unpickler."""
    found = metadata_columns.read(pickled[:2], pickle_opcodes.unframed(pickled), allowlist(), "it")
    return None if found is None else told(found)


def num_cut(pickled: bytes) -> int:
    """How many records and pairs of records are never unpickled."""
    find = allowlist()
    items = getattr(metadata_columns, "_items")(find)  # noqa: B009  (its own)
    remains = record_columns.cut(pickled[:2], pickle_opcodes.unframed(pickled), items, find)
    return 0 if remains is None else sum(map(len, remains.batches))


class SmallBatches(pickle._Pickler):  # noqa: SLF001  (the only one that can)
    """A pickler that ends batches after three items, where CPython's own has a thousand."""

    _BATCHSIZE = 3


def pickled_small(value: object, protocol: int = 4) -> bytes:
    """A pickle of many batches."""
    buffer = io.BytesIO()
    SmallBatches(buffer, protocol).dump(value)
    return buffer.getvalue()


def many_chunks(count: int, *, names: int = 2) -> Metadata:
    """Metadata of tensors with so many chunks in all, of one and two axes, in three files."""
    described: dict[str, Any] = {}
    storage_data = {}
    for number in range(names):
        rows = range(count // names)
        boxes = [(row * 300, row)[: 1 + number % 2] for row in rows]
        chunks = [ChunkStorageMetadata(torch.Size(box), torch.Size([70_000] * len(box))) for box in boxes]
        properties = TensorProperties(dtype=torch.bfloat16)
        described[f"t{number}"] = TensorStorageMetadata(properties, torch.Size([1 << 33] * (1 + number % 2)), chunks)
        for row, box in zip(rows, boxes, strict=True):
            where = _StorageInfo(f"__{row % 3}_0.distcp", row << 24, 1 << (number + 20))
            storage_data[MetadataIndex(f"t{number}", torch.Size(box))] = where
    return Metadata(state_dict_metadata=described, storage_data=storage_data)


@pytest.mark.parametrize("case", GENUINE)
def test_genuine_metadata(case: str) -> None:
    """Every genuine checkpoint is read in columns, most of its chunks without a record, and says the same."""
    pickled = (shards(case) / ".metadata").read_bytes()
    short = pickle_opcodes.ended_before(pickled, "all_local_plans", unless_behind="mcore_data")
    assert short is not None
    expected = by_records(short)
    assert expected is not None
    assert by_columns(short) == expected
    assert num_cut(short) > 10


@settings(max_examples=150)
@given(metadata=any_metadata(), protocol=st.sampled_from([4, 5]), is_small=st.booleans())
def test_any_metadata(metadata: Metadata, protocol: int, is_small: bool) -> None:
    """Any chunks in any order, in batches of any length: the same, if it is not left to the unpickler."""
    pickled = pickled_small(metadata, protocol) if is_small else pickle.dumps(metadata, protocol)
    assert by_columns(pickled) in (None, by_records(pickled))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_protocols(protocol: int) -> None:
    """From protocol 4 on nearly all is cut out; of older ones nothing is."""
    pickled = pickle.dumps(many_chunks(5000), protocol)
    assert by_columns(pickled) == (by_records(pickled) if protocol >= 4 else None)
    assert num_cut(pickled) == (8000 if protocol >= 4 else 0)


@settings(max_examples=400)
@given(data=st.data())
def test_spoiled_metadata(data: st.DataObject) -> None:
    """Any byte another, doubled or gone: the same as the unpickler gives, or left to it; never anything else."""
    pickled = data.draw(st.sampled_from(SPOILED))
    at = data.draw(st.integers(2, len(pickled) - 1))
    kind = data.draw(st.sampled_from(["flip", "set", "double", "cut"]))
    byte = {
        "flip": bytes([pickled[at] ^ (1 << data.draw(st.integers(0, 7)))]),
        "set": data.draw(
            st.sampled_from([b"(", b"e", b"u", b"a", b"s", b"\x94", b"K", b"J", b"h", b"t", b"N", b"\x8c"])
        ),
        "double": pickled[at : at + 1] * 2,
        "cut": b"",
    }[kind]
    opcodes = pickled[2:at] + byte + pickled[at + 1 :]
    spoiled = pickled[:2] + opcodes
    found = by_columns(spoiled)
    assert found is None or found == by_records(spoiled)


def unframed(pickled: bytes) -> bytes:
    """The same pickle without frames, which a change of its length would break."""
    return pickled[:2] + pickle_opcodes.unframed(pickled)


SPOILED = [
    unframed(pickled_small(many_chunks(16))),
    unframed(pickle.dumps(many_chunks(2200), 4)),
    unframed((shards("td_0161") / ".metadata").read_bytes()),
]


def with_chunks(chunks: list[Any]) -> Metadata:
    """Metadata of one tensor, which is said to be stored as often as it has chunks."""
    tensor = TensorStorageMetadata(TensorProperties(dtype=torch.float32), torch.Size([100]), chunks)
    places = {MetadataIndex("t", torch.Size([row])): _StorageInfo("f", row, 1) for row in range(len(chunks))}
    return Metadata(state_dict_metadata={"t": tensor}, storage_data=places)


def shared_chunk() -> Metadata:
    """A chunk that stands in its list again, behind the batch that has it."""
    chunks = [ChunkStorageMetadata(torch.Size([row]), torch.Size([1])) for row in range(9)]
    return with_chunks([*chunks, chunks[4]])


def shared_box() -> Metadata:
    """A box that a later batch refers to."""
    chunks = [ChunkStorageMetadata(torch.Size([row]), torch.Size([1])) for row in range(9)]
    return with_chunks([*chunks, ChunkStorageMetadata(chunks[4].offsets, chunks[4].sizes)])


def shared_list() -> Metadata:
    """Two tensors with the same list of chunks."""
    metadata = many_chunks(40, names=1)
    both: dict[str, Any] = {"t0": metadata.state_dict_metadata["t0"], "other": metadata.state_dict_metadata["t0"]}
    return Metadata(state_dict_metadata=both, storage_data=metadata.storage_data)


def of_another_class() -> Metadata:
    """Places in the place of chunks."""
    return with_chunks([_StorageInfo("f", row, 1) for row in range(9)])


def beyond_64_bits() -> Metadata:
    """Archives that end where no number of 64 bits is."""
    metadata = with_chunks([ChunkStorageMetadata(torch.Size([row]), torch.Size([1])) for row in range(40)])
    metadata.storage_data[MetadataIndex("t", torch.Size([0]))] = _StorageInfo("f", 1 << 62, 1 << 62)
    return metadata


@pytest.mark.parametrize("make", [shared_chunk, shared_box, shared_list, of_another_class, beyond_64_bits])
def test_what_no_pickler_of_megatron_writes_is_left_to_the_unpickler(make: Callable[[], Metadata]) -> None:
    """Records that are used twice, that are of another class, or that count too far."""
    assert by_columns(pickled_small(make())) is None


def test_a_string_is_not_there_before_it_is_written() -> None:
    """What refers to a string that stands further behind in the same batch refers to nothing."""
    metadata = many_chunks(30, names=1)
    files = [f"{number}.distcp" for number in range(6)]
    for row, place in enumerate(metadata.storage_data.values()):
        object.__setattr__(place, "relative_path", files[row // 5])
    pickled = unframed(pickled_small(metadata))
    expected = by_records(pickled)
    assert by_columns(pickled) == expected is not None
    operations = [(opcode.name, argument) for opcode, argument, _ in pickletools.genops(pickled)]
    memoized = [before[1] for before, (name, _) in pairwise(operations) if name == "MEMOIZE"]
    first, second = (pickle.LONG_BINGET + memoized.index(name).to_bytes(4, "little") for name in files[1:3])
    before, _, behind = pickled.rpartition(first)  # of row 9; it is row 10 that has the second name
    spoiled = before + second + behind
    assert spoiled != pickled
    assert by_records(spoiled) is None
    assert by_columns(spoiled) is None


@pytest.mark.parametrize("has_plans", [True, False])
def test_large_files_are_read_in_columns(has_plans: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """No record of a chunk is looked at, with Megatron's plans behind or without."""
    monkeypatch.setattr(metadata_pickle, "_LARGE", 100_000)
    metadata: Any = many_chunks(4000)
    expected = by_records(pickle.dumps(metadata))
    if has_plans:
        metadata.all_local_plans = [[*range(100)]]
    pickled = pickle.dumps(metadata)
    assert len(pickled) > 200_000
    monkeypatch.setattr(metadata_pickle, "parse", None)
    assert told(metadata_pickle.read_metadata(lambda: pickled, "it")) == expected


def test_what_is_wrong_in_a_large_file_is_told_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """By who reads it record by record."""
    monkeypatch.setattr(metadata_pickle, "_LARGE", 100_000)
    metadata = many_chunks(4000)
    object.__setattr__(next(reversed(metadata.storage_data.values())), "relative_path", "../x")
    pickled = pickle.dumps(metadata)
    with pytest.raises(FormatError, match=r"names the file '../x': expected the plain name"):
        metadata_pickle.read_metadata(lambda: pickled, "it")
