"""Cut the tensors of a checkpoint into the chunks that the ranks of a layout save, and later read whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from dist_ckpt_mistral.gather.dtypes import Shape
from dist_ckpt_mistral.mapping.checkpoint_map import CheckpointMap
from dist_ckpt_mistral.model.layout.layout import ParallelLayout
from dist_ckpt_mistral.model.layout.local_tensors import LocalBox, LocalTensor, local_tensors, require_divisible
from dist_ckpt_mistral.model.table.rules import LayerSpec

#: The layer spec whose ranks the chunks are cut for: training uses Transformer Engine.
SPEC: Final = LayerSpec.TRANSFORMER_ENGINE


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkBox:
    """One chunk: a box of the stored tensor ``name``, in elements, that ``rank`` saves and reads."""

    name: str
    global_shape: Shape
    offset: Shape
    shape: Shape
    rank: int


def cut_chunks(found: CheckpointMap, shapes: Mapping[str, Shape], layout: ParallelLayout) -> Iterator[ChunkBox]:
    """Yield the chunks that the ranks of ``layout`` would save, under the names of the checkpoint ``found``.

    ``shapes`` maps stored names to stored shapes, in elements. The vocabulary keeps its number of rows, whatever the
    layout would pad it to: the last chunk ends where the stored rows end. The layout must have passed ``check``.
    """
    require_divisible(layout, found.table)
    for rank in range(layout.world_size):
        at = layout.coordinates(rank)
        if at.dp_cp and at.edp:
            continue  # a data-parallel copy: another rank saves the same
        for chunk in layout.model_chunks(found.table.num_layers, at.pp):
            for tensor in local_tensors(layout, found.table, chunk, at, style=found.style, spec=SPEC):
                if tensor.is_main_replica:
                    yield from _cut(found, shapes, tensor, rank)
    for rule in found.table.carried:  # Megatron's model does not have them: rank 0 saves them whole
        name = found.stored_name(rule.mcore_key)
        yield ChunkBox(name=name, global_shape=rule.shape, offset=(0,) * len(rule.shape), shape=rule.shape, rank=0)


def _cut(found: CheckpointMap, shapes: Mapping[str, Shape], tensor: LocalTensor, rank: int) -> Iterator[ChunkBox]:
    names = found.spelling(tensor.mcore_key, tensor.index)
    for box in tensor.boxes:
        name = names[box.mcore_key]
        spans = _rows(box, shapes[name][0]) if tensor.has_padding else [(box.global_offset[0], box.shape[0])]
        for start, rows in spans:
            offset, shape = (start, *box.global_offset[1:]), (rows, *box.shape[1:])
            yield ChunkBox(name=name, global_shape=shapes[name], offset=offset, shape=shape, rank=rank)


def _rows(box: LocalBox, stored_rows: int) -> Iterator[tuple[int, int]]:
    """Yield (first row, number of rows) of the chunks in a box of vocabulary rows, of which ``stored_rows`` are stored.

    If more rows are stored than the layout pads to, they become one more chunk of the last rank.
    """
    start, end = box.global_offset[0], box.global_offset[0] + box.shape[0]
    if start < stored_rows:
        yield start, min(end, stored_rows) - start
    if end == box.global_shape[0] < stored_rows:
        yield end, stored_rows - end
