"""Arrays of a zarr checkpoint against tensorstore: any shape, chunks and dtype, any name and any bits."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch_reading import described, load_tensors, objects, raw_bytes
from zarr_checkpoints import (
    DTYPES,
    edit_array,
    new_checkpoint,
    numbered,
    read_arrays,
    save_objects,
    unlisted,
    write_array,
)

import dist_ckpt_mistral as dcm
from dist_ckpt_mistral.errors import FormatError
from dist_ckpt_mistral.formats.stored_checkpoint import open_stored


def test_unpatched_bfloat16(tmp_path: Path) -> None:
    """What zarr itself calls bfloat16, two bytes of no type, is bfloat16."""
    old = new_checkpoint(tmp_path / "old")
    expected = {}
    for key, name in {"patched": "bfloat16", "little": "<V2", "neither": "|V2"}.items():
        expected[key] = numbered([6, 2], torch.bfloat16)
        write_array(old / key, expected[key], (4, 2))
        edit_array(old / key, dtype=name)
    dcm.migrate(old, tmp_path / "new")
    assert described(load_tensors(tmp_path / "new")) == described(expected)


@st.composite
def arrays(draw: st.DrawFn) -> tuple[torch.Tensor, tuple[int, ...]]:
    """An array of any shape and dtype, and the shape of its chunks; along the first axis the last may be cut."""
    chunk = draw(st.lists(st.integers(1, 3), max_size=4))
    shape = [size * draw(st.integers(0, 3)) for size in chunk]
    lead = next((axis for axis, size in enumerate(chunk) if size > 1), None)
    if lead is not None and shape[lead]:
        shape[lead] -= draw(st.integers(0, chunk[lead] - 1))
    return numbered(shape, draw(st.sampled_from([*DTYPES]))), tuple(chunk)


@settings(max_examples=40)
@given(st.lists(arrays(), min_size=1, max_size=4), st.integers(1, 400))
@example([(torch.empty((0, 0)), (1, 1)), (torch.tensor([[0.0, 1.0]]), (1, 1))], 1)  # no chunk, then several
def test_any_arrays(drawn: list[tuple[torch.Tensor, tuple[int, ...]]], most: int) -> None:
    """Whatever shapes, chunks and dtypes: the index points to what tensorstore reads, which the new one holds too."""
    with tempfile.TemporaryDirectory() as name:
        old, new = new_checkpoint(Path(name) / "old"), Path(name) / "new"
        for number, (tensor, chunk) in enumerate(drawn):
            write_array(old / f"key.{number}", tensor, chunk)
        expected = described(read_arrays(old))
        assert expected == described({f"key.{number}": tensor for number, (tensor, _) in enumerate(drawn)})
        assert described(indexed(old)) == expected
        dcm.migrate(old, new, output=dcm.Output(max_file_bytes=most, checksums=False))
        assert described(load_tensors(new)) == expected


@settings(max_examples=60)
@given(st.data())
def test_cut_chunks(data: st.DataObject) -> None:
    """Chunks cut along any axes are read as tensorstore reads them, or the array is refused: never anything else."""
    chunk = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    shape = [data.draw(st.integers(1, 7)) for _ in chunk]
    with tempfile.TemporaryDirectory() as name:
        old = new_checkpoint(Path(name) / "old")
        write_array(old / "key", numbered(shape), tuple(chunk))
        try:
            found = indexed(old)
        except FormatError as error:
            assert "expected a multiple of the chunks" in str(error)  # noqa: PT017  (it may be read as well)
            assert sum(size % step > 0 for size, step in zip(shape, chunk, strict=True))
        else:
            assert described(found) == described(read_arrays(old))


def indexed(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor, put together from the bytes that the index points to."""
    checkpoint, found = open_stored(directory), {}
    index = checkpoint.index(checkpoint.tensors)
    for name, tensor in index.tensors.items():
        whole = torch.full(tensor.global_shape, 1, dtype=getattr(torch, tensor.dtype))
        for offset, shape, file, at in zip(tensor.offsets, tensor.shapes, tensor.files, tensor.positions, strict=True):
            data = index.files[file].read_bytes()[at : at + int(np.prod(shape)) * whole.itemsize]
            part = torch.frombuffer(bytearray(data), dtype=whole.dtype).reshape(tuple(shape))
            whole[tuple(slice(low, low + size) for low, size in zip(offset, shape, strict=True))] = part
        found[name] = whole
    return found


def test_keys_that_are_named_like_locks(tmp_path: Path) -> None:
    """An array and an object whose keys end as the names of lock directories do come along; locks stay behind."""
    old = new_checkpoint(tmp_path / "old")
    write_array(old / "a", numbered([4]), (2,))
    write_array(old / "a.sync", numbered([6]), (3,))
    save_objects(old, {"b.sync/shard_0_1": {"x": 1}})
    for key in ("c", "d"):
        write_array(old / key, numbered([4]), (2,))
    (old / "c.sync").mkdir()
    (old / "d.sync").mkdir()
    (old / "d.sync" / ".zarray").touch()
    dcm.migrate(old, tmp_path / "new")
    arrays = {"a": numbered([4]), "a.sync": numbered([6]), "c": numbered([4]), "d": numbered([4])}
    assert described(load_tensors(tmp_path / "new")) == described(arrays)
    assert unlisted(objects(tmp_path / "new")) == {"b.sync/shard_0_1": {"x": 1}}


def test_bits_survive_whatever_they_mean(tmp_path: Path) -> None:
    """NaN of every kind, denormal numbers and negative zero are copied, not converted."""
    old = new_checkpoint(tmp_path / "old")
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        write_array(old / str(dtype)[6:], bits.view(dtype), (1 << 14,))
    dcm.migrate(old, tmp_path / "new")
    found = load_tensors(tmp_path / "new")
    assert {raw_bytes(tensor) for tensor in found.values()} == {raw_bytes(bits)}
