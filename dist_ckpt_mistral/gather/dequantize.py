"""Quantized tensors as files of their values: the gather reads what they stand for, and knows nothing of scales.

What is read is ``float32(number) * float32(scale of its block)``, rounded once to the dtype that is wanted, as by
``Fp8Dequantize`` of transformers 5.23 (integrations/finegrained_fp8.py); the same bits. Where an element lies in the
stored tensor says which scale it has, and that is lost once it is gathered: so this happens as it is read.
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
from dist_ckpt_mistral.gather.casts import numpy_dtype
from dist_ckpt_mistral.gather.dtypes import Shape
from dist_ckpt_mistral.gather.index import IndexedTensor, TensorIndex, boxes_of_range
from dist_ckpt_mistral.storage.local import DerivedFile, SourceFiles

#: Scales are laid over rows and columns; the axes before count matrices, such as experts.
_MATRIX_AXES = 2
FloatArray = npt.NDArray[np.float32]


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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DequantizedFile:
    """The values of one quantized tensor, in row-major order, as a file (``DerivedFile``).

    The 8-bit numbers of ``stored_dtype`` and ``shape`` (in elements) begin at byte ``position`` of file ``file``, and
    every box of ``block`` of them shares one of ``scales``, which has as many axes. Values are given in ``dtype``, and
    buffers hold whole ones.
    """

    file: int
    position: int
    stored_dtype: str
    shape: Shape
    block: Shape
    scales: FloatArray
    dtype: str

    def read_into(self, files: SourceFiles, position: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with values, from byte ``position`` of them on."""
        values = np.frombuffer(buffer, dtype=numpy_dtype(self.dtype))
        first = position // values.itemsize
        stored = np.empty(values.size, dtype=np.uint8)
        files.read_into(self.file, self.position + first, stored.data)
        products = _values_of_bytes(self.stored_dtype).take(stored)
        with np.errstate(over="ignore", invalid="ignore"):  # as in torch: too large is infinite, NaN stays NaN
            for offset, extents, at in boxes_of_range(self.shape, first, first + values.size):
                box = products[at - first : at - first + math.prod(extents)].reshape(extents)
                np.multiply(box, self._scales_of(offset, extents), out=box)
            values[...] = products

    def _scales_of(self, offset: Shape, extents: Shape) -> FloatArray:
        """The scales of the elements of a box: of its shape, or of extent 1 along axes where all share one."""
        blocks = [
            np.arange(start, start + extent) // block
            for start, extent, block in zip(offset, extents, self.block, strict=True)
        ]
        scales = self.scales[tuple(slice(int(each[0]), int(each[-1]) + 1) for each in blocks)]
        for axis in reversed(range(scales.ndim)):  # columns first: then rows are copied whole
            if scales.shape[axis] > 1:
                scales = scales.take(blocks[axis] - blocks[axis][0], axis=axis)
        return scales


@functools.cache
def _values_of_bytes(dtype: str) -> FloatArray:
    """What each of the 256 bytes means in an 8-bit dtype: looking it up is several times faster than converting."""
    return np.arange(256, dtype=np.uint8).view(numpy_dtype(dtype)).astype(np.float32)


def dequantized(index: TensorIndex, tensors: Iterable[ScaledTensor], dtype: str) -> TensorIndex:
    """``index`` with the values of quantized ``tensors``, in ``dtype``, in the place of what is stored of them.

    The scales are read now. Raises FormatError where one is negative or no finite number.
    """
    derived: list[DerivedFile] = [*index.derived]
    found = dict(index.tensors)
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
            found[tensor.name] = IndexedTensor.whole(tensor.name, dtype, stored.global_shape, file=number, position=0)
            derived.append(values)
    return TensorIndex(files=index.files, tensors=found, derived=tuple(derived))


def _read_scales(sources: SourceFiles, index: TensorIndex, tensor: ScaledTensor) -> FloatArray:
    """The scales of a tensor, in its grid."""
    stored = index.tensors[tensor.scale]
    num_bytes = math.prod(tensor.grid) * dtypes.itemsize_bytes(stored.dtype)
    data = sources.read(int(stored.files[0]), int(stored.positions[0]), num_bytes)
    scales = np.frombuffer(data, dtype=numpy_dtype(stored.dtype)).astype(np.float32).reshape(tensor.grid)
    faulty = scales[~(np.isfinite(scales) & (scales >= 0))]
    if faulty.size:
        raise FormatError(
            f"bad scale of {tensor.name!r}: expected finite numbers that are not negative, got {faulty[0]} in "
            f"{tensor.scale!r} of {index.files[int(stored.files[0])]}. Copy the file again from where it came from."
        )
    return scales
