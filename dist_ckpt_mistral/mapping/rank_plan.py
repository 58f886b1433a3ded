"""What a rank's model takes from a stored model, whatever that is stored as: one plan into memory."""

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


def plan_held(source: ModelSource, held: Sequence[LocalTensor], dtype: str) -> BytePlan:
    """The plan that fills the live rows of local tensors in ``dtype`` (a torch name) from ``source``.

    Target file ``i`` of the plan is the memory of ``held[i]``, from its first byte on. Local tensors must be described
    in stacked style and by the local spec, as ``local_tensors`` does by default.
    """
    names = [f"{number}: {each.module_name}" for number, each in enumerate(held)]
    tensors = {
        name: IndexedTensor.whole(name, dtype, (each.live_rows, *each.local_shape[1:]), file=number, position=0)
        for number, (name, each) in enumerate(zip(names, held, strict=True))
        if each.live_rows
    }
    target = TensorIndex(files=tuple(map(Path, names)), tensors=tensors)
    return plan_gather(source.index, target, _links(source, held, names))


def _links(source: ModelSource, held: Sequence[LocalTensor], names: list[str]) -> Iterator[Link]:
    """Stored boxes -> Hugging Face rows -> Megatron's rows -> local rows, each step a link that exists already."""
    megatron = new_checkpoint_map(source.table)
    stored: dict[tuple[str, Index], list[Link]] = defaultdict(list)
    wanted = {(each.mcore_key, each.index) for each in held}
    for tensor in source.tensors:
        for index, at in () if tensor.is_alias else tensor.packed():
            key = (tensor.rule.local.mcore_key, index)
            if key in wanted:
                into = [reverse(link) for link in megatron.links_of(tensor, index, at)]
                stored[key] += [
                    link
                    for first in source.links[tensor.hf_name]
                    for second in into
                    if (link := compose(first, second))
                ]
    for name, each in zip(names, held, strict=True):
        for local in _local_links(name, each):
            for link in stored[each.mcore_key, each.index]:
                found = compose(link, local)
                if found is not None:
                    yield found


def _local_links(name: str, held: LocalTensor) -> Iterator[Link]:
    """The boxes of Megatron's tensors that make up a local tensor, one below the other."""
    row = 0
    for box in held.boxes:
        shape = box.shape[held.prepended_axes :]
        origin = (row, *(0,) * len(shape[1:]))
        yield Link(
            source=box.mcore_key, source_offset=box.global_offset, target=name, target_offset=origin, shape=shape
        )
        row += shape[0]
