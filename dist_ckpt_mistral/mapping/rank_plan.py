"""The plan that fills arrays in memory, such as what one rank's model holds, from a stored model of any format."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dist_ckpt_mistral.gather.dtypes import Shape
from dist_ckpt_mistral.gather.index import IndexedTensor, TensorIndex
from dist_ckpt_mistral.gather.links import Link, compose
from dist_ckpt_mistral.gather.plan import BytePlan, plan_gather
from dist_ckpt_mistral.mapping.source import ModelSource


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldArray:
    """A row-major array in memory that holds boxes of Hugging Face tensors, each element once.

    Args:
        name: What it is, for errors. No two arrays of a plan have the same.
        dtype: The torch name of its dtype.
        shape: Its shape in elements.
        links: For each box the link from the Hugging Face tensor, with this array as its target.
    """

    name: str
    dtype: str
    shape: Shape
    links: tuple[Link, ...]


def box_array(name: str, dtype: str, hf_name: str, offset: Shape, shape: Shape) -> HeldArray:
    """The array of one box of a Hugging Face tensor: ``offset`` and ``shape`` in elements, on all of its axes."""
    origin = (0,) * len(shape)
    link = Link(source=hf_name, source_offset=offset, target=name, target_offset=origin, shape=shape)
    return HeldArray(name=name, dtype=dtype, shape=shape, links=(link,))


def plan_arrays(source: ModelSource, arrays: Sequence[HeldArray]) -> BytePlan:
    """The plan that reads ``arrays`` from ``source``. None of them may be empty.

    Target file ``i`` of the plan is the memory of ``arrays[i]``, from its first byte on, and segment ``i`` fills it.
    """
    tensors = {
        array.name: IndexedTensor.whole(array.name, array.dtype, array.shape, file=number, position=0)
        for number, array in enumerate(arrays)
    }
    target = TensorIndex(files=tuple(map(Path, tensors)), tensors=tensors)
    return plan_gather(source.index, target, _links(source, arrays))


def _links(source: ModelSource, arrays: Sequence[HeldArray]) -> Iterator[Link]:
    """Compose two links: stored boxes -> Hugging Face boxes -> boxes in memory."""
    for array in arrays:
        for second in array.links:
            for first in source.links[second.source]:
                if (link := compose(first, second)) is not None:
                    yield link
