"""Buckets of a plan whose source files are ranks, against numpy arrays in place of their memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_ckpt_mistral.errors import ConfigError
from dist_ckpt_mistral.gather.buckets import Bucket, cut_buckets, lay_out
from dist_ckpt_mistral.gather.index import IndexedTensor, TensorIndex
from dist_ckpt_mistral.gather.links import whole
from dist_ckpt_mistral.gather.plan import BytePlan, plan_segments

#: float32 tensors: name -> shape.
SHAPES = {"a": (6, 4), "b": (5,), "c": (2, 3, 4)}


def planned(cuts: dict[str, int]) -> tuple[BytePlan, list[npt.NDArray[np.float32]], dict[str, npt.NDArray[np.float32]]]:
    """The plan of ``SHAPES``, each cut into two ranks' parts along its last axis; the memory of both; the truth."""
    truth = {
        name: np.arange(np.prod(shape), dtype=np.float32).reshape(shape) + number * 100
        for number, (name, shape) in enumerate(SHAPES.items())
    }
    memory: list[list[npt.NDArray[np.float32]]] = [[], []]
    tensors = {}
    for name, array in truth.items():
        chunks = []
        for rank, (low, high) in enumerate([(0, cuts[name]), (cuts[name], array.shape[-1])]):
            if low < high:
                part = array[..., low:high]
                position = sum(each.nbytes for each in memory[rank])
                chunks.append(((*(0,) * (array.ndim - 1), low), part.shape, rank, position))
                memory[rank].append(part.reshape(-1))
        tensors[name] = IndexedTensor.build(name, "float32", array.shape, chunks)
    index = TensorIndex(files=(Path("rank 0"), Path("rank 1")), tensors=tensors)
    plan = plan_segments(index, {name: (shape, [whole(name, shape)]) for name, shape in SHAPES.items()})
    flat = [np.concatenate([*parts, np.empty(0, np.float32)]) for parts in memory]
    return plan, flat, truth


def carried_out(plan: BytePlan, bucket: Bucket, memory: list[npt.NDArray[np.float32]]) -> list[npt.NDArray[np.float32]]:
    """Fill the buffer from the ranks' memory, each its span alone, and the tensors of the bucket from the buffer."""
    strided = np.lib.stride_tricks.as_strided
    buffer = np.zeros(bucket.num_bytes, np.uint8)
    for rank, pieces in bucket.pieces.items():
        low, high = bucket.spans[rank]
        for piece in pieces:
            assert low <= piece.position <= high
            assert piece.position % 8 == 0
            rows = strided(
                memory[rank][piece.source_byte // 4 :], (piece.rows, piece.row_elems), (piece.source_stride * 4, 4)
            )
            buffer[piece.position : piece.position + rows.nbytes] = (
                np.ascontiguousarray(rows).view(np.uint8).reshape(-1)
            )
    tensors = []
    by_segment = bucket.pieces_by_segment()
    for number in bucket.segments:
        target = np.full(plan.segments[number].num_bytes // 4, np.nan, np.float32)
        for piece in by_segment[number]:
            num_bytes = piece.rows * piece.row_elems * 4
            rows = strided(target[piece.target_offset :], (piece.rows, piece.row_elems), (piece.target_stride * 4, 4))
            rows[:] = buffer[piece.position : piece.position + num_bytes].view(np.float32).reshape(rows.shape)
        tensors.append(target)
    return tensors


@given(st.fixed_dictionaries({"a": st.integers(0, 4), "b": st.integers(0, 5), "c": st.integers(0, 4)}), st.booleans())
def test_a_buffer_carries_every_element_to_its_place(cuts: dict[str, int], one: bool) -> None:
    """However the tensors are cut: what ranks put into their spans of the buffers is the whole of each tensor."""
    plan, memory, truth = planned(cuts)
    buckets = cut_buckets(plan, None if one else 96)
    assert [list(bucket) for bucket in buckets] == ([[0, 1, 2]] if one else [[0], [1], [2]])
    found = [tensor for bucket in buckets for tensor in carried_out(plan, lay_out(plan, bucket), memory)]
    for name, tensor in zip(SHAPES, found, strict=True):
        assert np.array_equal(tensor, truth[name].reshape(-1))


def test_a_bucket_too_small_for_a_tensor_is_refused() -> None:
    """The error names the first of the largest tensors and its size; of that size, it is enough."""
    plan, *_ = planned({"a": 2, "b": 5, "c": 0})
    assert len(cut_buckets(plan, 116)) == 2
    with pytest.raises(ConfigError, match="bucket_bytes: expected at least 96, the bytes of 'a', got 95"):
        cut_buckets(plan, 95)
