"""The tensors of Mistral AI's own files ("consolidated"), as boxes of Hugging Face's.

Their rotary embeddings turn neighbouring dimensions of a head, Hugging Face's turn those half a head apart. A tensor of
rows [d0, d1, d2, ...] is indexed as one of half as many rows, twice as long: [d0 d1], [d2 d3], ... The left half of
those are then the rows of the first half of a head, the right half those of the second, and both are plain boxes.
"""

from __future__ import annotations

from collections.abc import Iterator

from dist_ckpt_mistral.gather.dtypes import Shape
from dist_ckpt_mistral.gather.links import Link
from dist_ckpt_mistral.model.table.rules import Index, spell
from dist_ckpt_mistral.model.table.table import HfTensor


def consolidated_shapes(tensor: HfTensor) -> dict[str, Shape]:
    """The tensors of Mistral AI's own files that make up a Hugging Face tensor: their shapes by name."""
    return {name: shape for name, _, shape in _consolidated(tensor)}


def indexed_shapes(tensor: HfTensor) -> dict[str, Shape]:
    """The shapes in which ``consolidated_links`` takes them: where heads are rotated, two rows are one."""
    shapes = consolidated_shapes(tensor)
    return (
        {name: (rows // 2, 2 * columns) for name, (rows, columns) in shapes.items()} if tensor.rotated_rows else shapes
    )


def consolidated_links(tensor: HfTensor) -> list[Link]:
    """The boxes of them that make up a Hugging Face tensor."""
    return [link for name, at, shape in _consolidated(tensor) for link in _links(tensor, name, at, shape)]


def _consolidated(tensor: HfTensor) -> Iterator[tuple[str, Index, Shape]]:
    """Of each: its name, where it begins in ``tensor`` (leading axes and row), and its shape."""
    rows = tensor.rows.hf_rows // len(tensor.consolidated)
    for index, at in tensor.packed():
        for number, name in enumerate(tensor.consolidated):
            yield spell(name, index), (*at, number * rows), (rows, *tensor.shape[len(at) + 1 :])


def _links(tensor: HfTensor, name: str, at: Index, shape: Shape) -> Iterator[Link]:
    rows, *columns = shape
    origin = (0,) * len(columns)
    if not tensor.rotated_rows:
        yield Link(
            source=name, source_offset=(0, *origin), target=tensor.hf_name, target_offset=(*at, *origin), shape=shape
        )
        return
    half = tensor.rotated_rows // 2
    for row in range(0, rows, half):
        head, side = divmod(row, tensor.rotated_rows)
        yield Link(
            source=name,
            source_offset=(head * half, (side > 0) * columns[0]),
            target=tensor.hf_name,
            target_offset=(*at[:-1], at[-1] + row, *origin),
            shape=(half, *columns),
        )
