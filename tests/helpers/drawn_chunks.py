"""Tensors in chunks of any tiling on a disk in memory, drawn by hypothesis, and what numpy makes of them."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from dist_ckpt_mistral.gather.bands import BandReader
from dist_ckpt_mistral.gather.index import IndexedTensor
from dist_ckpt_mistral.gather.plan import BytePlan
from dist_ckpt_mistral.storage.local import SourceFiles

Array = npt.NDArray[Any]
#: Offset and shape in elements.
Box = tuple[tuple[int, ...], tuple[int, ...]]
DTYPES = {"uint8": 1, "bfloat16": 2, "float32": 4, "int64": 8}


def sizes(most: int) -> st.SearchStrategy[int]:
    """Extents, odd ones and 1 among them."""
    return st.integers(1, most)


def shapes(*, least_axes: int = 0, most_axes: int = 4) -> st.SearchStrategy[tuple[int, ...]]:
    """Shapes from scalars to four axes, some of them empty."""
    extents = sizes(7) | st.sampled_from([0, 1, 13])
    return st.lists(extents, min_size=least_axes, max_size=most_axes).map(tuple)


@st.composite
def tilings(draw: st.DrawFn, shape: tuple[int, ...]) -> list[Box]:
    """Boxes that cover ``shape`` once, in any order: a grid, or what comes of cutting boxes in two again and again."""
    if draw(st.booleans()):
        cuts = [sorted({0, *draw(st.lists(st.integers(0, extent), max_size=3)), extent}) for extent in shape]
        axes = [list(itertools.pairwise(axis)) or [(0, 0)] for axis in cuts]
        boxes = [(tuple(a for a, _ in cell), tuple(b - a for a, b in cell)) for cell in itertools.product(*axes)]
    else:
        boxes = [((0,) * len(shape), shape)]
        for _ in range(draw(st.integers(0, 6)) if shape else 0):
            offset, extent = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
            axis = draw(st.integers(0, len(shape) - 1))
            at = draw(st.integers(0, extent[axis]))
            for start, stop in ((0, at), (at, extent[axis])):
                low, size = list(offset), list(extent)
                low[axis] += start
                size[axis] = stop - start
                if stop > start or not math.prod(shape):
                    boxes.append((tuple(low), tuple(size)))
        boxes = list(dict.fromkeys(boxes))
    return draw(st.permutations(boxes))


def region(box: Box) -> tuple[slice, ...]:
    """The box for numpy."""
    return tuple(slice(low, low + size) for low, size in zip(*box, strict=True))


@dataclass
class Disk:
    """Files in memory. Reading stops the test where nothing was stored, and remembers every read."""

    is_remote: bool = False
    files: list[bytearray] = field(default_factory=lambda: [bytearray(), bytearray(), bytearray()])
    stored: list[list[tuple[int, int]]] = field(default_factory=lambda: [[], [], []])
    reads: list[tuple[int, int, int]] = field(default_factory=list)

    def hold(self, wanted: object) -> Disk:  # noqa: ARG002  (nothing is kept for others)
        """What is wanted is read from the files themselves."""
        return self

    def store(self, file: int, gap: int, data: bytes) -> int:
        """Append bytes behind a gap of rubbish; gives their position."""
        self.files[file] += b"\xa5" * gap + data
        position = len(self.files[file]) - len(data)
        self.stored[file].append((position, position + len(data)))
        return position

    def read_into(self, file: int, position: int, *buffers: memoryview) -> None:
        """Read as SourceFiles does, but only inside one chunk at a time."""
        num_bytes = sum(map(len, buffers))
        assert all(map(len, buffers))
        self.reads.append((file, position, num_bytes))
        assert any(low <= position and position + num_bytes <= high for low, high in self.stored[file])
        for buffer in buffers:
            buffer[:] = self.files[file][position : position + len(buffer)]
            position += len(buffer)


def elements(shape: tuple[int, ...], itemsize: int, seed: int) -> Array:
    """An array of elements that are all different, as far as their size allows, as bytes ``[*shape, itemsize]``."""
    count = math.prod(shape)
    values = np.random.default_rng(seed).permutation(count).astype(np.uint64)
    return values.view(np.uint8).reshape(count, 8)[:, :itemsize].reshape(*shape, itemsize)


@st.composite
def stored_tensors(draw: st.DrawFn, disk: Disk, name: str, dtype: str, array: Array) -> IndexedTensor:
    """``array`` on the disk, in chunks of any tiling that lie anywhere in any file."""
    shape = array.shape[:-1]
    chunks = []
    for offset, size in draw(tilings(shape)):
        file = draw(st.integers(0, 2))
        position = disk.store(file, draw(st.integers(0, 9)), array[region((offset, size))].tobytes())
        chunks.append((offset, size, file, position))
    return IndexedTensor.build(name, dtype, shape, chunks)


@st.composite
def planned_tensors(draw: st.DrawFn, ends: list[int], name: str, dtype: str, shape: tuple[int, ...]) -> IndexedTensor:
    """A tensor that is to be written, in chunks of any tiling, one behind the other in any file."""
    chunks = []
    for offset, size in draw(tilings(shape)):
        file = draw(st.integers(0, len(ends) - 1))
        ends[file] += draw(st.integers(0, 9))
        chunks.append((offset, size, file, ends[file]))
        ends[file] += math.prod(size) * DTYPES[dtype]
    return IndexedTensor.build(name, dtype, shape, chunks)


def gathered(plan: BytePlan, disk: Disk, band_bytes: int) -> dict[tuple[int, int], bytes]:
    """What the plan brings to each (file, position), band by band, none longer than ``band_bytes``."""
    reader = BandReader(cast("SourceFiles", disk), band_bytes)
    result = {}
    for segment in plan.segments:
        bands = [bytes(band) for band in reader.bands(segment)]
        assert all(0 < len(band) <= band_bytes for band in bands)
        assert len(bands) == -(-segment.num_bytes // band_bytes)
        result[segment.file, segment.position] = b"".join(bands)
    return result


def expected_chunks(tensor: IndexedTensor, array: Array) -> dict[tuple[int, int], bytes]:
    """What numpy puts into each chunk of a tensor."""
    boxes = zip(map(tuple, tensor.offsets.tolist()), map(tuple, tensor.shapes.tolist()), strict=True)
    places = zip(tensor.files.tolist(), tensor.positions.tolist(), strict=True)
    return {place: array[region(box)].tobytes() for place, box in zip(places, boxes, strict=True)}
