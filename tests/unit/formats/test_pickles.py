"""Pickles against Python's own unpickler and torch: plain values, records, .metadata and the common state."""

from __future__ import annotations

import gc
import io
import pickle
import pickletools
import types
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from genuine import GENUINE, ZARR, shards
from hf_models import random_model, saved
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
from torch_reading import read_metadata

from dist_ckpt_mistral.convert.from_hf import from_hf
from dist_ckpt_mistral.errors import FormatError, UnsafePickleError
from dist_ckpt_mistral.formats.pickles import reader, writer
from dist_ckpt_mistral.formats.pickles.writer import Call, Global, Instance, LazyDict, LazyList, PersistentId
from dist_ckpt_mistral.formats.stored_checkpoint import open_stored
from dist_ckpt_mistral.formats.torch_dist import common_state


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
