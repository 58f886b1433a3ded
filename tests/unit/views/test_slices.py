"""Parts of tensors out of an open checkpoint: the bits of the live model, and no more bytes than they have."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from genuine import GENUINE, ZARR, folder, true_bytes
from reads import counted_reads

import dist_ckpt_mistral as dcm
from dist_ckpt_mistral.gather import dtypes

CASES = (*GENUINE, *ZARR)


def opened(case: str) -> dcm.LazyCheckpoint:
    """A genuine checkpoint, opened."""
    return dcm.open_checkpoint(folder(case) / "checkpoint", config=folder(case))


def array(case: str, name: str) -> np.ndarray[Any, Any]:
    """A tensor of the live model."""
    dtype, shape, content = true_bytes(case)[name]
    return np.frombuffer(content, dtypes.to_numpy(dtypes.from_safetensors(dtype, name))).reshape(shape)


@pytest.mark.parametrize("case", CASES)
def test_all_of_every_case_without_torch(case: str) -> None:
    """``numpy`` gives the dtype, the shape and the bits of every tensor of the live model, reading each byte once."""
    expected = true_bytes(case)
    with opened(case) as checkpoint, counted_reads() as read:
        assert set(checkpoint) == set(expected)
        for name, (dtype, shape, content) in expected.items():
            read.clear()
            value = checkpoint.numpy(name)
            assert (dtypes.to_safetensors(value.dtype.name), value.shape) == (dtype, shape)
            assert value.tobytes() == content
            assert sum(read) == len(content)


@pytest.mark.parametrize("case", ["te_moe_0192", "mistral4_0192", "fsms_zarr_0153"])
@pytest.mark.parametrize(
    "index",
    [
        (slice(3, 11),),
        (slice(-5, None),),
        (slice(4, 4),),
        (slice(7, 3),),
        (2,),
        (-1,),
        (...,),
        (..., slice(2, 6)),
        (slice(1, 9), slice(8, 24)),
        (np.int64(2), slice(0, 5)),
        (0, ..., 1),
        (..., 3),
        (slice(None, 10_000),),
    ],
    ids=str,
)
def test_parts_are_those_that_numpy_selects(case: str, index: tuple[Any, ...]) -> None:
    """Slices, integers and an ellipsis select what they select of an array, and read just that."""
    with opened(case) as checkpoint, counted_reads() as read:
        names = [name for name in checkpoint if len(checkpoint.shape(name)) >= len(index) - index.count(...)]
        for name in names:
            expected = array(case, name)[index]
            read.clear()
            value = checkpoint.numpy(name, *index)
            assert value.shape == expected.shape
            assert value.tobytes() == expected.tobytes()
            assert sum(read) == expected.nbytes


def test_a_name_with_an_index_gives_tensors() -> None:
    """``checkpoint[name, rows]`` is the same as a torch tensor."""
    torch = pytest.importorskip("torch")
    name = "model.embed_tokens.weight"
    with opened("td_0192") as checkpoint:
        part = checkpoint[name, 10:20, 3]
        assert (part.dtype, tuple(part.shape)) == (torch.bfloat16, (10,))
        assert torch.equal(part, checkpoint[name][10:20, 3])
        assert torch.equal(checkpoint[name, -1], checkpoint[name][-1])
        assert checkpoint[name, 5:5].shape == (0, 64)


def test_what_cannot_be_selected() -> None:
    """Names that are not there, indices out of range, too many axes, steps: the errors that Python has for them."""
    name = "model.norm.weight"
    with opened("td_0192") as checkpoint:
        for key, kind, text in (
            (("?", 0), KeyError, "?"),
            ((name, 64), IndexError, "has 64 elements on axis 0: got the index 64"),
            ((name, -65), IndexError, "got the index -65"),
            ((name, 0, 0), IndexError, "has 1 axis"),
            ((name, ..., ...), IndexError, "has 1 axis"),
            ((name, slice(None, None, 2)), IndexError, "a slice without a step"),
            ((name, 1.5), TypeError, "integer"),
        ):
            with pytest.raises(kind, match=text.replace("?", r"\?")):
                checkpoint.numpy(*key)
    for index in ((), (0,)):
        with pytest.raises(dcm.DistCkptMistralError, match="was closed"):
            checkpoint.numpy(name, *index)


def test_bfloat16_has_a_type_that_computes() -> None:
    """Of bfloat16 numpy gets ml_dtypes' type."""
    with opened("td_0192") as checkpoint:
        value = checkpoint.numpy("model.embed_tokens.weight", slice(0, 4))
    assert value.dtype == np.dtype(ml_dtypes.bfloat16)
    assert np.isfinite(value.astype(np.float32)).all()


def test_lazy_tensors_are_read_when_indexed() -> None:
    """``slices`` reads nothing; what safetensors' slices have, these have too, and indexing reads just the part."""
    torch = pytest.importorskip("torch")
    name = "model.embed_tokens.weight"
    with opened("td_0192") as checkpoint, counted_reads() as read:
        slices = checkpoint.slices()
        assert set(slices) == set(checkpoint)
        assert (slices[name].get_shape(), slices[name].get_dtype()) == ([250, 64], "BF16")
        assert read == []
        assert torch.equal(slices[name][2:5, 8:], checkpoint[name][2:5, 8:])
        read.clear()
        assert slices[name][1:3].shape == (2, 64)
        assert sum(read) == 2 * 64 * 2
        assert torch.equal(slices[name][...], checkpoint[name])


def test_threads_read_parts() -> None:
    """Eight threads that read rows of all tensors at once get the rows of the live model."""
    expected = {name: array("te_moe_0192", name) for name in true_bytes("te_moe_0192")}
    started = threading.Barrier(8)
    with opened("te_moe_0192") as checkpoint, ThreadPoolExecutor(8) as pool:

        def wrong(first: int) -> list[str]:
            started.wait()
            rows = slice(first, first + 3)
            return [
                name for name in expected if checkpoint.numpy(name, rows).tobytes() != expected[name][rows].tobytes()
            ]

        assert [*pool.map(wrong, range(8))] == [[]] * 8
