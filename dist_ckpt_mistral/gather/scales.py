"""Which box of a quantized tensor shares which scale. Needs no numpy: ``inspect`` looks here too."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dist_ckpt_mistral.shapes import Shape

#: Scales are laid over rows and columns; the axes before count matrices, such as experts.
_MATRIX_AXES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaledTensor:
    """A stored tensor of 8-bit numbers and the tensor of its scales, by their names.

    Every box of ``block`` elements shares a scale; these lie in row-major order in a ``grid``, whatever shape the
    stored tensor of scales has. Both have an entry for every axis. The last box along an axis may be smaller.
    """

    name: str
    scale: str
    block: Shape
    grid: Shape


def scaled_tensor(
    name: str, shape: Shape, scale: str, scale_shape: Shape, block_size: tuple[int, int] | None
) -> ScaledTensor | None:
    """How scales of ``scale_shape`` lie over a tensor of ``shape``; None if there is no telling.

    There is one for the whole tensor, one for each of its matrices, or one for each block of a grid. Blocks are of
    ``block_size`` rows and columns and cut at the end, as the FP8 kernels of transformers 5.23 have it; where that is
    None, they divide the tensor evenly, as its ``Fp8Dequantize`` has it.
    """
    matrices = shape[:-_MATRIX_AXES]
    shared = (1,) * len(matrices)
    if math.prod(scale_shape) == 1:
        grid = (1,) * len(shape)
    elif matrices and scale_shape == matrices:
        grid = (*matrices, 1, 1)
    else:
        grid = scale_shape
    if len(shape) < _MATRIX_AXES or len(grid) != len(shape) or grid[:-_MATRIX_AXES] not in (shared, matrices):
        return None
    block = tuple(max(1, size // max(1, scales)) for size, scales in zip(shape, grid, strict=True))
    if block_size is not None and math.prod(grid[-_MATRIX_AXES:]) > 1:
        block = (*block[:-_MATRIX_AXES], *block_size)
    if grid != tuple(-(-size // each) for size, each in zip(shape, block, strict=True)):
        return None
    return ScaledTensor(name=name, scale=scale, block=block, grid=grid)
