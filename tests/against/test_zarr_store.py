"""zarr-python reads genuine checkpoints through a store of its own kind."""

from __future__ import annotations

import asyncio
import pickle
from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np
import pytest
import zarr
from genuine import GENUINE, ZARR, folder, true_bytes
from reads import counted_reads
from zarr.abc.store import OffsetByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.core.buffer import default_buffer_prototype

import dist_ckpt_mistral as dcm
from dist_ckpt_mistral.views import zarr_store


def store_of(case: str) -> dcm.ZarrStore:
    """A store of a genuine checkpoint."""
    return dcm.zarr_store(folder(case) / "checkpoint", folder(case))


@pytest.mark.parametrize("case", [*GENUINE, *ZARR])
def test_every_tensor_is_an_array(case: str) -> None:
    """Names, shapes, dtypes and bits of the live model, bfloat16 as what ml_dtypes calls it."""
    expected = true_bytes(case)
    group = zarr.open_group(store_of(case), mode="r")
    assert {*group.array_keys()} == expected.keys()
    for name, (dtype, shape, content) in expected.items():
        value = group[name][...]
        assert value.dtype == {"BF16": np.dtype(ml_dtypes.bfloat16), "F32": np.dtype("float32")}[dtype]
        assert (value.shape, value.tobytes()) == (shape, content)


def test_a_part_is_read_alone() -> None:
    """Of an array in several chunks only those are read that hold the part; the last one is shorter than the others."""
    name = "model.embed_tokens.weight"
    _, (rows, columns), content = true_bytes("td_0192")[name]
    with mock.patch.object(zarr_store, "_CHUNK_BYTES", 7 * columns * 2):
        array: Any = zarr.open_group(store_of("td_0192"), mode="r")[name]
        assert array.chunks == (7, columns)
        with counted_reads() as read:
            assert array[8:13].tobytes() == content[8 * columns * 2 : 13 * columns * 2]
        assert sum(read) == 7 * columns * 2
        assert array[rows - 1].tobytes() == content[-columns * 2 :]
        assert array[...].tobytes() == content


def test_rows_of_experts_are_chunks() -> None:
    """A tensor of three axes whose planes are larger than a chunk is cut along two of them."""
    expected = {name: each for name, each in true_bytes("mistral4_0192").items() if len(each[1]) == 3}
    name, (_, shape, content) = next(iter(expected.items()))
    with mock.patch.object(zarr_store, "_CHUNK_BYTES", 5 * shape[2] * 2):
        array: Any = zarr.open_group(store_of("mistral4_0192"), mode="r")[name]
        assert array.chunks == (1, 5, shape[2])
        assert array[...].tobytes() == content


def test_a_store_as_an_object() -> None:
    """It is pickled with its index, equals itself alone, lists its keys, cannot be written, and can be closed."""
    store = store_of("td_0192")
    name = "model.norm.weight"
    copy = pickle.loads(pickle.dumps(store))  # noqa: S301  (our own)
    assert zarr.open_group(copy, mode="r")[name][...].tobytes() == true_bytes("td_0192")[name][2]
    assert store == store  # noqa: PLR0124
    assert store != copy
    assert len({store, copy}) == 2
    assert "td_0192" in str(store)

    async def keys() -> tuple[list[str], list[str], list[str]]:
        return (
            [key async for key in store.list()],
            [key async for key in store.list_dir(name)],
            [key async for key in store.list_prefix(f"{name}/c")],
        )

    all_keys, below, chunks = asyncio.run(keys())
    assert set(all_keys) >= {"zarr.json", f"{name}/zarr.json", f"{name}/c/0"}
    assert (sorted(below), chunks) == (["c", "zarr.json"], [f"{name}/c/0"])
    for key in (f"{name}/c/1", f"{name}/c", f"{name}/c/x", "other/zarr.json", f"{name}/c/0/0"):
        assert not asyncio.run(store.exists(key))
        assert asyncio.run(store.get(key, default_buffer_prototype())) is None
    for write in (store.set("zarr.json", None), store.delete("zarr.json")):
        with pytest.raises(dcm.UnsupportedFormatError, match="read only"):
            asyncio.run(write)
    store.close()
    with pytest.raises(dcm.DistCkptMistralError, match="was closed"):
        asyncio.run(store.get(f"{name}/c/0", default_buffer_prototype()))


@pytest.mark.parametrize(
    ("request_", "part"),
    [
        (RangeByteRequest(3, 9), slice(3, 9)),
        (OffsetByteRequest(100), slice(100, None)),
        (SuffixByteRequest(10), slice(-10, None)),
    ],
)
def test_ranges_of_a_value(request_: object, part: slice) -> None:
    """The three kinds of requests for a part of a value."""
    name = "model.embed_tokens.weight"
    got = asyncio.run(store_of("td_0192").get(f"{name}/c/0/0", default_buffer_prototype(), request_))
    assert got.to_bytes() == true_bytes("td_0192")[name][2][part]


def test_bfloat16_as_a_data_type() -> None:
    """It is found for the numpy type and for its name, has scalars, and is refused where it has no name."""
    zarr_store.register_bfloat16()
    kind = zarr_store.BFloat16.from_native_dtype(np.dtype(ml_dtypes.bfloat16))
    assert kind.to_json(3) == "bfloat16"
    assert [kind.to_json_scalar(kind.cast_scalar(number), zarr_format=3) for number in (1.5, float("inf"))] == [
        1.5,
        "Infinity",
    ]
    assert kind.from_json_scalar("NaN", zarr_format=3) != kind.from_json_scalar("NaN", zarr_format=3)
    with pytest.raises(dcm.UnsupportedFormatError, match="version 2"):
        kind.to_json(2)
    array = zarr.create_array({}, shape=(4,), dtype=np.dtype(ml_dtypes.bfloat16))
    array[:] = np.arange(4, dtype=ml_dtypes.bfloat16)
    assert array[...].tolist() == [0, 1, 2, 3]
