"""The tensors of Mistral AI's own files ("consolidated"), as boxes of Hugging Face's.

Their rotary embeddings turn neighbouring dimensions of a head, Hugging Face's turn those half a head apart. A tensor of
rows [d0, d1, d2, ...] is indexed as one of half as many rows, twice as long: [d0 d1], [d2 d3], ... The left half of
those are then the rows of the first half of a head, the right half those of the second, and both are plain boxes.
"""

from __future__ import annotations

from collections.abc import Iterator

from dist_ckpt_mistral.gather.dtypes import Shape
from dist_ckpt_mistral.gather.links import Link
from dist_ckpt_mistral.model.table.rules import Index, OwnRows, spell
from dist_ckpt_mistral.model.table.table import HfTensor


def own_shapes(tensor: HfTensor) -> dict[str, Shape]:
    """The tensors of Mistral AI's own files that make up a Hugging Face tensor: their shapes by name."""
    return {name: (own.rows, *columns) for own, name, _, columns in _own(tensor)}


def indexed_shapes(tensor: HfTensor) -> dict[str, Shape]:
    """The shapes in which ``own_links`` takes them: where heads are rotated, two rows are one."""
    return {
        name: (own.rows // 2, 2 * columns[0]) if own.rotated_rows else (own.rows, *columns)
        for own, name, _, columns in _own(tensor)
    }


def own_links(tensor: HfTensor) -> list[Link]:
    """The boxes of them that make up a Hugging Face tensor."""
    return [link for own, name, at, columns in _own(tensor) for link in _links(tensor, own, name, at, columns)]


def _own(tensor: HfTensor) -> Iterator[tuple[OwnRows, str, Index, Shape]]:
    """Of each: its rows, its name, where these stand on the leading axes of ``tensor``, and the shape of a row."""
    for index, at in tensor.packed():
        for own in tensor.own:
            yield own, spell(own.name, index), at, tensor.shape[len(at) + 1 :]


def _links(tensor: HfTensor, own: OwnRows, name: str, at: Index, columns: Shape) -> Iterator[Link]:
    origin = (0,) * len(columns)
    if not own.rotated_rows:
        shape = (own.rows, *columns)
        yield Link(
            source=name,
            source_offset=(0, *origin),
            target=tensor.hf_name,
            target_offset=(*at, own.first_row, *origin),
            shape=shape,
        )
        return
    half = own.rotated_rows // 2
    for row in range(0, own.rows, half):
        head, side = divmod(row, own.rotated_rows)
        yield Link(
            source=name,
            source_offset=(head * half, (side > 0) * columns[0]),
            target=tensor.hf_name,
            target_offset=(*at, own.first_row + row, *origin),
            shape=(half, *columns),
        )
