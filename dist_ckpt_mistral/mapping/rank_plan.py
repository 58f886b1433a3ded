"""The plan that fills one rank's local tensors in memory from a stored model of any format."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from dist_ckpt_mistral.gather.index import IndexedTensor, TensorIndex
from dist_ckpt_mistral.gather.links import Link, compose, reverse
from dist_ckpt_mistral.gather.plan import BytePlan, plan_gather
from dist_ckpt_mistral.mapping.checkpoint_map import new_checkpoint_map
from dist_ckpt_mistral.mapping.source import ModelSource
from dist_ckpt_mistral.model.layout.local_tensors import LocalTensor
from dist_ckpt_mistral.model.table.rules import Index


def plan_local_tensors(source: ModelSource, local_tensors: Sequence[LocalTensor], dtype: str) -> BytePlan:
    """The plan that fills ``local_tensors`` from ``source``, but for vocabulary padding, in ``dtype`` (a torch name).

    Target file ``i`` of the plan is the memory of ``local_tensors[i]``, from its first byte on. They must be in the
    stacked key style and by the local spec, the defaults of ``model.layout.local_tensors``.
    """
    names = [f"{number}: {each.module_name}" for number, each in enumerate(local_tensors)]
    tensors = {
        name: IndexedTensor.whole(name, dtype, (each.live_rows, *each.local_shape[1:]), file=number, position=0)
        for number, (name, each) in enumerate(zip(names, local_tensors, strict=True))
        if each.live_rows
    }
    target = TensorIndex(files=tuple(map(Path, names)), tensors=tensors)
    return plan_gather(source.index, target, _links(source, local_tensors, names))


def _links(source: ModelSource, local_tensors: Sequence[LocalTensor], names: list[str]) -> Iterator[Link]:
    """Compose three links: stored boxes -> Hugging Face rows -> Megatron rows -> local rows."""
    megatron = new_checkpoint_map(source.table)
    stored: dict[tuple[str, Index], list[Link]] = defaultdict(list)
    needed = {(each.mcore_key, each.index) for each in local_tensors}
    for tensor in source.tensors:
        for index, at in () if tensor.is_alias else tensor.packed():
            key = (tensor.rule.local.mcore_key, index)
            if key in needed:
                into = [reverse(link) for link in megatron.links_of(tensor, index, at)]
                stored[key] += [
                    link
                    for first in source.links[tensor.hf_name]
                    for second in into
                    if (link := compose(first, second))
                ]
    for name, each in zip(names, local_tensors, strict=True):
        for local in _local_links(name, each):
            for link in stored[each.mcore_key, each.index]:
                if (into_local := compose(link, local)) is not None:
                    yield into_local


def _local_links(name: str, tensor: LocalTensor) -> Iterator[Link]:
    """The boxes of Megatron tensors that make up a local tensor, one below the other."""
    row = 0
    for box in tensor.boxes:
        shape = box.shape[tensor.prepended_axes :]
        origin = (row, *(0,) * len(shape[1:]))
        yield Link(
            source=box.mcore_key, source_offset=box.global_offset, target=name, target_offset=origin, shape=shape
        )
        row += shape[0]
