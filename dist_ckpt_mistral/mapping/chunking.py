"""How a checkpoint's tensors are cut into chunks so that every rank of a layout reads whole ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from dist_ckpt_mistral.gather.dtypes import Shape
from dist_ckpt_mistral.mapping.checkpoint_map import CheckpointMap
from dist_ckpt_mistral.model.layout.layout import ParallelLayout
from dist_ckpt_mistral.model.layout.local_tensors import LocalBox, LocalTensor, local_tensors
from dist_ckpt_mistral.model.table.rules import LayerSpec

#: Chunks are cut as training reads them, which is with Transformer Engine.
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
    """The chunks that the ranks of ``layout`` would save of the tensors ``found``, spelled as there.

    ``shapes`` are the stored ones by name. A vocabulary keeps its rows, whatever the layout pads it to: chunks end
    where ranks end, the last one where the rows do. Sizes must have passed ``layout.check``.
    """
    for rank in range(layout.world_size):
        at = layout.coordinates(rank)
        if at.dp_cp and at.edp:
            continue  # a copy of ranks that save all of this
        for chunk in layout.model_chunks(found.table.num_layers, at.pp):
            for held in local_tensors(layout, found.table, chunk, at, style=found.style, spec=SPEC):
                if held.is_main_replica:
                    yield from _cut(found, shapes, held, rank)
    for rule in found.table.carried:  # no rank reads them: the first one keeps them, whole
        name = found.stored_name(rule.mcore_key)
        yield ChunkBox(name=name, global_shape=rule.shape, offset=(0,) * len(rule.shape), shape=rule.shape, rank=0)


def _cut(found: CheckpointMap, shapes: Mapping[str, Shape], held: LocalTensor, rank: int) -> Iterator[ChunkBox]:
    names = found.spelling(held.mcore_key, held.index)
    for box in held.boxes:
        name = names[box.mcore_key]
        spans = _rows(box, shapes[name][0]) if held.has_padding else [(box.global_offset[0], box.shape[0])]
        for start, rows in spans:
            offset, shape = (start, *box.global_offset[1:]), (rows, *box.shape[1:])
            yield ChunkBox(name=name, global_shape=shapes[name], offset=offset, shape=shape, rank=rank)


def _rows(box: LocalBox, stored_rows: int) -> Iterator[tuple[int, int]]:
    """(start, rows) of the chunks of a box of rows, of which ``stored_rows`` are stored.

    There may be fewer than the layout pads to; what there is more goes along with the last rank, as a further chunk.
    """
    start, end = box.global_offset[0], box.global_offset[0] + box.shape[0]
    if start < stored_rows:
        yield start, min(end, stored_rows) - start
    if end == box.global_shape[0] < stored_rows:
        yield end, stored_rows - end
