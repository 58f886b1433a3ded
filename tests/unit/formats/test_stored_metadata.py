"""``.metadata`` as columns, against torch's own objects: whatever the order, the number and the pickle's protocol."""

from __future__ import annotations

import itertools
import pickle
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from genuine import GENUINE, shards
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch_reading import read_metadata as torch_reads

from dist_ckpt_mistral.errors import FormatError
from dist_ckpt_mistral.formats.pickles import opcodes
from dist_ckpt_mistral.formats.stored_metadata import StoredMetadata
from dist_ckpt_mistral.formats.torch_dist.metadata import read_metadata

#: (offset, shape, file, position, length) of a chunk.
Row = tuple[tuple[int, ...], tuple[int, ...], str, int, int]


def rows_of_torch(metadata: Any) -> dict[str, tuple[str, tuple[int, ...], list[Row]]]:  # noqa: ANN401  (torch's record)
    """Dtype, shape and chunks of every tensor, in ascending order of their offsets, as torch's objects have them."""
    found = {}
    for name, tensor in metadata.state_dict_metadata.items():
        if isinstance(tensor, TensorStorageMetadata):
            rows = []
            for chunk in tensor.chunks:
                place = metadata.storage_data[MetadataIndex(name, chunk.offsets)]
                rows.append((tuple(chunk.offsets), tuple(chunk.sizes), place.relative_path, place.offset, place.length))
            found[name] = (str(tensor.properties.dtype).removeprefix("torch."), tuple(tensor.size), sorted(rows))
    return found


def rows_as_read(metadata: StoredMetadata) -> dict[str, tuple[str, tuple[int, ...], list[Row]]]:
    """The same as the package reads them."""
    files = [*metadata.file_bytes]
    found = {}
    for name, tensor in metadata.tensors.items():
        offsets, shapes, numbers, positions, lengths = (column.tolist() for column in metadata.chunks(name))
        boxes = zip(map(tuple, offsets), map(tuple, shapes), strict=True)
        places = zip([files[number] for number in numbers], positions, lengths, strict=True)
        rows = [(*box, *place) for box, place in zip(boxes, places, strict=True)]
        assert tensor.num_chunks == len(rows)
        found[name] = (tensor.dtype, tensor.stored_shape, rows)
    return found


def as_read(pickled: bytes) -> StoredMetadata:
    """What the package makes of ``.metadata``."""
    return read_metadata(lambda: pickled, "it")


def ended_before_plans(pickled: bytes) -> bytes:
    """The pickle without Megatron's plans."""
    return opcodes.ended_before(pickled, "all_local_plans", unless_behind="mcore_data")


@pytest.mark.parametrize("case", GENUINE)
def test_genuine_metadata_is_what_torch_reads(case: str) -> None:
    """Of every chunk of every genuine checkpoint: box, file, position and length, and where every file ends."""
    metadata = torch_reads(shards(case))
    for name in ("all_local_plans", "mcore_data"):
        vars(metadata).pop(name, None)
    pickled = (shards(case) / ".metadata").read_bytes()
    assert len(ended_before_plans(pickled)) < len(pickled)
    for content in (pickled, pickle.dumps(metadata, protocol=2)):
        found = as_read(content)
        assert rows_as_read(found) == rows_of_torch(metadata)
        ends: dict[str, int] = {}
        for place in metadata.storage_data.values():
            ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
        assert found.file_bytes == ends
        places = {index.fqn: place for index, place in metadata.storage_data.items() if index.offset is None}
        objects = {name: (at.file, at.offset, at.num_bytes) for name, at in found.objects.items()}
        assert objects == {name: (at.relative_path, at.offset, at.length) for name, at in places.items()}


POSITIONS = st.integers(0, 3) | st.sampled_from([1 << 8, 1 << 16, 1 << 31, 1 << 40])
SIZES = st.integers(0, 3) | st.sampled_from([1 << 8, 1 << 14])  # four of these can be counted


@st.composite
def any_metadata(draw: st.DrawFn) -> Metadata:
    """Metadata of some tensors and objects; chunks are described and stored in orders of their own."""
    described: dict[str, Any] = {}
    stored = []
    names = draw(st.lists(st.sampled_from([*"abcde", "all_local_plans", "storage_data"]), unique=True, max_size=5))
    for name in names:
        if draw(st.integers(0, 4)) == 0:
            described[name] = BytesStorageMetadata()
            stored.append(MetadataIndex(name))
            continue
        shape = draw(st.lists(SIZES, max_size=4))
        offsets = draw(st.lists(st.tuples(*[POSITIONS] * len(shape)), unique=True, max_size=6))
        chunks = [
            ChunkStorageMetadata(torch.Size(offset), torch.Size(draw(st.tuples(*[SIZES] * len(shape)))))
            for offset in offsets
        ]
        dtype = draw(st.sampled_from([torch.bfloat16, torch.float32, torch.int64]))
        described[name] = TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(shape), chunks)
        stored += [MetadataIndex(name, offset) for offset in offsets]
    storage_data = {
        index: _StorageInfo(draw(st.sampled_from(["__0_0.distcp", "__1_0.distcp"])), draw(POSITIONS), draw(POSITIONS))
        for index in draw(st.permutations(stored))
    }
    return Metadata(state_dict_metadata=described, storage_data=storage_data)


@settings(max_examples=150)
@given(metadata=any_metadata(), protocol=st.sampled_from([2, 4, 5]), plans=st.sampled_from(["none", "first", "last"]))
def test_any_metadata_is_what_torch_reads(metadata: Metadata, protocol: int, plans: str) -> None:
    """Any chunks in any order, with Megatron's plans before or behind the rest, or without: as torch's objects say."""
    items = [
        WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=TensorWriteData(chunk, each.properties, each.size))
        for index, (name, each) in itertools.product(metadata.storage_data, metadata.state_dict_metadata.items())
        if isinstance(each, TensorStorageMetadata) and index.fqn == name
        for chunk in each.chunks[:1]
    ]
    attributes = dict(vars(metadata))
    both = {"all_local_plans": [SavePlan(items)], **attributes}
    order = {"none": [*attributes], "first": [*both], "last": [*attributes, "all_local_plans"]}[plans]
    vars(metadata).clear()
    vars(metadata).update({name: both[name] for name in order})
    pickled = pickle.dumps(metadata, protocol=protocol)
    assert rows_as_read(as_read(pickled)) == rows_of_torch(metadata)


def test_plans_that_stand_last_are_not_read() -> None:
    """Plans that the allowlist would refuse are never unpickled where they stand last, else they are refused."""
    metadata: Any = torch_reads(shards("td_0192"))
    metadata.all_local_plans = [Path.home]
    found = as_read(pickle.dumps(metadata))
    assert rows_as_read(found) == rows_of_torch(metadata)
    metadata.mcore_data = {}
    assert ended_before_plans(pickle.dumps(metadata)) == pickle.dumps(metadata)
    with pytest.raises(FormatError, match="outside the allowlist"):
        as_read(pickle.dumps(metadata, protocol=2))


def test_every_prefix_of_metadata_is_refused() -> None:
    """However many bytes are missing behind, also of the plans that are not read: it is not sound."""
    pickled = (shards("td_0192") / ".metadata").read_bytes()
    for size in [*range(0, len(pickled), 97), *range(len(pickled) - 20, len(pickled))]:
        with pytest.raises(FormatError):
            as_read(pickled[:size])


def test_many_frames() -> None:
    """Pickles of many frames are ended in the right one, and are not believed complete when the last is missing."""
    chunks = [ChunkStorageMetadata(torch.Size([row]), torch.Size([1])) for row in range(9000)]
    tensor = TensorStorageMetadata(TensorProperties(dtype=torch.float32), torch.Size([9000]), chunks)
    places = {MetadataIndex("t", [row]): _StorageInfo("f", row * 10, 10) for row in range(9000)}
    metadata: Any = Metadata(state_dict_metadata={"t": tensor}, storage_data=places)
    metadata.all_local_plans = [list(range(100_000))]
    pickled = pickle.dumps(metadata)
    short = ended_before_plans(pickled)
    assert len(short) < len(pickled) - 100_000
    chunk_columns = as_read(pickled).chunks("t")
    assert np.array_equal(chunk_columns.offsets[:, 0], np.arange(9000))
    assert np.array_equal(chunk_columns.positions, np.arange(9000) * 10)
    last = pickled.rfind(pickle.FRAME, 0, len(pickled) - 8)
    for size in (last, len(pickled) - 1):
        assert ended_before_plans(pickled[:size]) == pickled[:size]


def test_what_a_chunk_costs() -> None:
    """Reading takes less than 1 750 bytes and two calls a chunk; another copy of the pickle would exceed the bytes."""
    numbers = range(20_000)
    chunks = [ChunkStorageMetadata(torch.Size([row * 1000, 0]), torch.Size([1000, 300])) for row in numbers]
    tensor = TensorStorageMetadata(TensorProperties(dtype=torch.float32), torch.Size([20_000_000, 300]), chunks)
    places = {
        MetadataIndex("t", chunk.offsets): _StorageInfo("f", row * 1000, 1000) for row, chunk in enumerate(chunks)
    }
    metadata: Any = Metadata(state_dict_metadata={"t": tensor}, storage_data=places)
    write_data = [TensorWriteData(chunk, tensor.properties, tensor.size) for chunk in chunks]
    items = [
        WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data)
        for index, data in zip(places, write_data, strict=True)
    ]
    metadata.all_local_plans = [SavePlan(items)]
    pickled = pickle.dumps(metadata)
    tracemalloc.start()
    try:
        as_read(pickled)
        _, most_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most_bytes < 1750 * len(numbers)
    events: list[str] = []
    sys.setprofile(lambda _, event, __: events.append(event))
    try:
        as_read(pickled)
    finally:
        sys.setprofile(None)
    assert events.count("call") + events.count("c_call") < 2 * len(numbers)


def of_shared_parts(size: torch.Size, box: torch.Size, *, num_chunks: int, num_tensors: int = 1) -> bytes:
    """``.metadata`` of tensors that share one list of chunks, which share one box; objects are stored besides."""
    chunks = [ChunkStorageMetadata(box, box) for _ in range(num_chunks)]
    properties = TensorProperties(dtype=torch.float32)
    described: Any = {f"t{i}": TensorStorageMetadata(properties, size, chunks) for i in range(num_tensors)}
    stored = [MetadataIndex("t0", box), *(MetadataIndex(f"o{i}") for i in range(1, num_chunks))]
    place = _StorageInfo("f", 0, 10)
    return pickle.dumps(Metadata(state_dict_metadata=described, storage_data=dict.fromkeys(stored, place)))


LONG = torch.Size([1] * 20_000)


@pytest.mark.parametrize(
    ("pickled", "complaint"),
    [
        (of_shared_parts(torch.Size([2000]), LONG, num_chunks=2000), "has 20000 axes, the tensor has 1"),
        (of_shared_parts(LONG, LONG, num_chunks=2000), "at most 64 axes, got 20000"),
        (
            of_shared_parts(torch.Size([9]), torch.Size([9]), num_chunks=2000, num_tensors=2000),
            "4000000 chunks are described, but only 2000 archives are stored",
        ),
    ],
    ids=["long boxes", "long everything", "shared lists"],
)
def test_parts_that_are_shared_do_not_fill_the_memory(pickled: bytes, complaint: str) -> None:
    """A long tuple or list costs its pickle a few bytes for each use: refused before a use costs more."""
    assert len(pickled) < 300_000
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match=complaint):
            as_read(pickled)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def test_tensors_may_have_as_many_axes_as_torch_allows() -> None:
    """64 axes are read, 65 are refused."""
    most = torch.Size([1] * 64)
    assert as_read(of_shared_parts(most, most, num_chunks=1)).tensors["t0"].stored_shape == most
    more = torch.Size([1] * 65)
    with pytest.raises(FormatError, match="at most 64 axes, got 65"):
        as_read(of_shared_parts(more, more, num_chunks=1))


def with_another_key(name: Any, record: Any) -> bytes:  # noqa: ANN401  (a hostile pickle)
    """``.metadata`` of an object, and of something else, under the key ``name``."""
    described: Any = {"1": BytesStorageMetadata(), name: record}
    stored = [MetadataIndex("1"), MetadataIndex(name)]
    return pickle.dumps(
        Metadata(state_dict_metadata=described, storage_data=dict.fromkeys(stored, _StorageInfo("f", 0, 10)))
    )


@pytest.mark.parametrize(
    ("name", "record", "complaint"),
    [
        (1, BytesStorageMetadata(), "it has the key 1: expected a string"),
        (None, BytesStorageMetadata(), "it has the key None: expected a string"),
        ("\ud800", BytesStorageMetadata(), "surrogates not allowed"),
        ("2", ChunkStorageMetadata(torch.Size([1]), torch.Size([1])), "'2' is a ChunkStorageMetadata: expected"),
        ("2", {}, "'2' is a dict: expected"),
    ],
)
def test_keys_are_strings_and_stand_for_tensors_or_objects(name: Any, record: Any, complaint: str) -> None:  # noqa: ANN401
    """1 is never taken for "1", nor anything unknown for an object."""
    assert [*as_read(with_another_key("2", BytesStorageMetadata())).objects] == ["1", "2"]
    with pytest.raises(FormatError, match=complaint):
        as_read(with_another_key(name, record))
