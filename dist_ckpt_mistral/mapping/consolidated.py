"""Links from the tensors of Mistral AI's consolidated files to Hugging Face tensors.

Consolidated files rotate neighbouring dimensions of a head, Hugging Face rotates dimensions half a head apart. So a
tensor of rows [d0, d1, d2, ...] is indexed with half as many rows of twice the length: [d0 d1], [d2 d3], ... The left
halves are then the rows of the first half of a head, the right halves those of the second half: both are boxes.
"""

from __future__ import annotations

from collections.abc import Iterator

from dist_ckpt_mistral.gather.dtypes import Shape
from dist_ckpt_mistral.gather.links import Link
from dist_ckpt_mistral.model.table.rules import Index, spell
from dist_ckpt_mistral.model.table.table import HfTensor


def consolidated_shapes(tensor: HfTensor) -> dict[str, Shape]:
    """Name -> shape, in elements, of the consolidated tensors that make up a Hugging Face tensor."""
    return {name: shape for name, _, shape in _consolidated(tensor)}


def indexed_shapes(tensor: HfTensor) -> dict[str, Shape]:
    """The shapes that ``consolidated_links`` expects in the index: two rows of a rotated tensor are one."""
    shapes = consolidated_shapes(tensor)
    return (
        {name: (rows // 2, 2 * columns) for name, (rows, columns) in shapes.items()} if tensor.rotated_rows else shapes
    )


def consolidated_links(tensor: HfTensor) -> list[Link]:
    """The boxes of consolidated tensors that make up a Hugging Face tensor."""
    return [link for name, at, shape in _consolidated(tensor) for link in _links(tensor, name, at, shape)]


def _consolidated(tensor: HfTensor) -> Iterator[tuple[str, Index, Shape]]:
    """Yield (name, position in ``tensor`` as leading axes and row, shape) of each consolidated tensor."""
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
