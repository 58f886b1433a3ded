"""Present an FP8 tensor as a virtual file of dequantized values, so that the plan can copy it like any other tensor.

A value is ``float32(number) * float32(scale of its block)``, rounded once to the target dtype, bit for bit as by
``Fp8Dequantize`` of transformers 5.23 (integrations/finegrained_fp8.py). It is computed when it is read: the position
in the stored tensor determines the scale of an element, and gathering loses that position.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dist_ckpt_mistral.errors import FormatError
from dist_ckpt_mistral.gather import dtypes
from dist_ckpt_mistral.gather.dtypes import Shape
from dist_ckpt_mistral.gather.index import IndexedTensor, TensorIndex, boxes_of_range
from dist_ckpt_mistral.storage.local import DerivedFile, Readable, SourceFiles
from dist_ckpt_mistral.storage.remote_reads import Wanted

#: Scales apply to blocks of rows and columns; the axes before them count matrices, such as experts.
_MATRIX_AXES = 2
FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaledTensor:
    """The names of a stored tensor of 8-bit numbers and of the tensor of its scales, and the blocks that share a scale.

    ``block`` is the shape of a block in elements; the last block along an axis may be smaller. ``grid`` is the number
    of blocks along each axis. The scales are stored in row-major order of the grid, whatever shape their tensor has.
    """

    name: str
    scale: str
    block: Shape
    grid: Shape


def scaled_tensor(
    name: str, shape: Shape, scale: str, scale_shape: Shape, block_size: tuple[int, int] | None
) -> ScaledTensor | None:
    """Find the blocks of a tensor of ``shape`` that share a scale, from the ``scale_shape`` of its scales.

    There is one scale for the whole tensor, for each matrix, or for each block of a grid. Blocks have ``block_size``
    rows and columns, except the last ones, as in the FP8 kernels of transformers 5.23. If ``block_size`` is None, they
    divide the tensor evenly, as in its ``Fp8Dequantize``. Returns None if the shapes fit none of these.
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
    if grid != tuple(-(-size // extent) for size, extent in zip(shape, block, strict=True)):
        return None
    return ScaledTensor(name=name, scale=scale, block=block, grid=grid)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DequantizedFile:
    """A virtual file (``DerivedFile``): the values of one quantized tensor in ``dtype``, in row-major order.

    The 8-bit numbers of ``stored_dtype`` and ``shape`` (in elements) begin at byte ``position`` of file ``file``. Each
    block of shape ``block`` shares one element of ``scales``, whose shape is the grid of the blocks. Only whole values
    can be read.
    """

    file: int
    position: int
    stored_dtype: str
    shape: Shape
    block: Shape
    scales: FloatArray
    dtype: str

    def read_into(self, files: Readable, position: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with dequantized values, from byte ``position`` of this file on."""
        values = np.frombuffer(buffer, dtype=dtypes.to_numpy(self.dtype))
        first = position // values.itemsize
        stored = np.empty(values.size, dtype=np.uint8)
        files.read_into(self.file, self.position + first, stored.data)
        products = _values_of_bytes(self.stored_dtype).take(stored)
        with np.errstate(over="ignore", invalid="ignore"):  # as torch does: values too large become infinite
            for offset, extents, at in boxes_of_range(self.shape, first, first + values.size):
                box = products[at - first : at - first + math.prod(extents)].reshape(extents)
                np.multiply(box, self._scales_of(offset, extents), out=box)
            values[...] = products

    def stored(self, position: int, num_bytes: int) -> list[Wanted]:
        """Return the stored numbers of dequantized values."""
        itemsize = dtypes.itemsize_bytes(self.dtype)
        start = self.position + position // itemsize
        return [Wanted(self.file, start, start + num_bytes // itemsize)]

    def _scales_of(self, offset: Shape, extents: Shape) -> FloatArray:
        """Return the scales of a box's elements, in the box's shape, or extent 1 along axes where all are equal."""
        blocks = [
            np.arange(start, start + extent) // block
            for start, extent, block in zip(offset, extents, self.block, strict=True)
        ]
        scales = self.scales[tuple(slice(int(numbers[0]), int(numbers[-1]) + 1) for numbers in blocks)]
        for axis in reversed(range(scales.ndim)):  # columns first, so that whole rows are copied next
            if scales.shape[axis] > 1:
                scales = scales.take(blocks[axis] - blocks[axis][0], axis=axis)
        return scales


@functools.cache
def _values_of_bytes(dtype: str) -> FloatArray:
    """Return the values of the 256 bytes of an 8-bit dtype: a look-up is several times faster than a conversion."""
    return np.arange(256, dtype=np.uint8).view(dtypes.to_numpy(dtype)).astype(np.float32)


def dequantized(index: TensorIndex, tensors: Iterable[ScaledTensor], dtype: str) -> TensorIndex:
    """Return ``index`` with the quantized ``tensors`` replaced by virtual files of their values in ``dtype``.

    The scales are read now. Raises FormatError if one is negative or not finite.
    """
    derived: list[DerivedFile] = [*index.derived]
    result = dict(index.tensors)
    with SourceFiles(index.files) as sources:
        for tensor in tensors:
            stored = index.tensors[tensor.name]
            values = DequantizedFile(
                file=int(stored.files[0]),
                position=int(stored.positions[0]),
                stored_dtype=stored.dtype,
                shape=stored.global_shape,
                block=tensor.block,
                scales=_read_scales(sources, index, tensor),
                dtype=dtype,
            )
            number = len(index.files) + len(derived)
            result[tensor.name] = IndexedTensor.whole(tensor.name, dtype, stored.global_shape, file=number, position=0)
            derived.append(values)
    return TensorIndex(files=index.files, tensors=result, derived=tuple(derived))


def _read_scales(sources: SourceFiles, index: TensorIndex, tensor: ScaledTensor) -> FloatArray:
    """Read the scales of a tensor, in the shape of its grid."""
    stored = index.tensors[tensor.scale]
    num_bytes = math.prod(tensor.grid) * dtypes.itemsize_bytes(stored.dtype)
    data = sources.read(int(stored.files[0]), int(stored.positions[0]), num_bytes)
    scales = np.frombuffer(data, dtype=dtypes.to_numpy(stored.dtype)).astype(np.float32).reshape(tensor.grid)
    faulty = scales[~(np.isfinite(scales) & (scales >= 0))]
    if faulty.size:
        raise FormatError(
            f"bad scale of {tensor.name!r}: expected finite numbers that are not negative, got {faulty[0]} in "
            f"{tensor.scale!r} of {index.files[int(stored.files[0])]}. Copy the file again from where it came from."
        )
    return scales
