"""Two tensor indexes and the links between them -> ``BytePlan``. Pure: numbers in, numbers out, no I/O.

Totality is proved here: every target byte is written exactly once, and from bytes that are stored exactly once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dist_ckpt_mistral.errors import PlanError, TensorMismatchError, for_all
from dist_ckpt_mistral.gather import dtypes
from dist_ckpt_mistral.gather.boxes import IntArray, require_tiling, row_major_strides, shared_runs
from dist_ckpt_mistral.gather.casts import widened, widest
from dist_ckpt_mistral.gather.dtypes import Shape
from dist_ckpt_mistral.gather.index import IndexedTensor, TensorIndex
from dist_ckpt_mistral.gather.links import Link
from dist_ckpt_mistral.messages import listed
from dist_ckpt_mistral.storage.local import DerivedFile

#: One strided copy: ``rows`` pieces of ``row_bytes`` bytes. Source positions count from the start of the source file,
#: target offsets from the start of the segment. All in bytes.
COPY = np.dtype(
    [
        ("source_file", np.int64),
        ("source_position", np.int64),
        ("source_stride", np.int64),
        ("target_offset", np.int64),
        ("target_stride", np.int64),
        ("rows", np.int64),
        ("row_bytes", np.int64),
    ]
)
CopyArray = npt.NDArray[np.void]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Segment:
    """One contiguous run of one target file (a tensor of a safetensors file, the data of a chunk) and what fills it.

    ``copies`` fill ``num_bytes`` bytes of ``source_dtype``, which are stored as ``dtype``. ``sources`` are the names of
    the tensors that they come from.
    """

    tensor: str
    file: int
    position: int
    source_dtype: str
    dtype: str
    num_bytes: int
    copies: CopyArray
    sources: tuple[str, ...]

    @property
    def stored_bytes(self) -> int:
        """Bytes that the segment takes in its file."""
        return self.num_bytes // dtypes.itemsize_bytes(self.source_dtype) * dtypes.itemsize_bytes(self.dtype)

    def stored(self, low: int, high: int) -> tuple[int, int]:
        """Where in the file bytes ``[low, high)`` of a segment that has any are stored, and how many they are there."""
        first, end = (self.stored_bytes * at // self.num_bytes for at in (low, high))
        return self.position + first, end - first


class Part(NamedTuple):
    """Bytes ``[low, high)`` of segment ``number`` of a plan: what is copied at a time."""

    number: int
    low: int
    high: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BytePlan:
    """What to copy where: segments in the order of their target files and positions.

    Source files are those of the index, and ``derived_files`` are counted on from there.
    """

    source_files: tuple[Path, ...]
    target_files: tuple[Path, ...]
    segments: tuple[Segment, ...]
    derived_files: tuple[DerivedFile, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Bytes that the plan writes."""
        return sum(segment.stored_bytes for segment in self.segments)

    @property
    def files_to_read(self) -> tuple[Path, ...]:
        """The source files that any segment is copied from; what derived files read is not among them."""
        numbers = {number for segment in self.segments for number in segment.copies["source_file"].tolist()}
        return tuple(path for number, path in enumerate(self.source_files) if number in numbers)


def plan_gather(source: TensorIndex, target: TensorIndex, links: Iterable[Link]) -> BytePlan:
    """Plan how to fill every chunk of ``target`` from the chunks of ``source``.

    What is stored in several element types is brought to one that holds all their values, then to that of its target.

    Raises PlanError where links, source chunks or target chunks leave a gap or overlap, TensorMismatchError where no
    element type holds all values.
    """
    by_target = defaultdict[str, list[Link]](list)
    for link in links:
        by_target[link.target].append(link)
    for_all(
        lambda name: _require_whole(source.tensors[name]), sorted({link.source for link in chain(*by_target.values())})
    )
    source, links_to = _unmixed(source, by_target)
    segments = [
        segment
        for tensor in target.tensors.values()
        for segment in _fill(source, tensor, links_to.get(tensor.name, []))
    ]
    segments.sort(key=lambda segment: (segment.file, segment.position))
    return BytePlan(
        source_files=source.files,
        target_files=target.files,
        segments=tuple(segments),
        derived_files=source.derived,
    )


def plan_reading(source: TensorIndex, wanted: Mapping[str, tuple[Shape, Sequence[Link]]]) -> BytePlan:
    """A plan for reading: one segment for each of ``wanted``, in this order, given its shape and the links to it."""
    tensors = {
        name: IndexedTensor.whole(name, only_dtype(source, links), shape, file=number, position=0)
        for number, (name, (shape, links)) in enumerate(wanted.items())
    }
    target = TensorIndex(files=tuple(map(Path, wanted)), tensors=tensors)
    return plan_gather(source, target, chain.from_iterable(links for _, links in wanted.values()))


def only_dtype(source: TensorIndex, links: Sequence[Link]) -> str:
    """The element type (a torch name) of what ``links``, all to one target, read of ``source``.

    Raises TensorMismatchError where there are several, and names them: then a target needs one that is chosen.
    """
    found: dict[str, list[str]] = defaultdict(list)
    for link in links:
        found[source.tensors[link.source].dtype].append(link.source)
    if len(found) > 1:
        told = "; ".join(f"{dtype}: {listed([*dict.fromkeys(names)])}" for dtype, names in sorted(found.items()))
        raise TensorMismatchError(
            f"{links[0].target!r} would mix element types: expected its parts in one, got {told}. "
            "Give --dtype, to which all are converted."
        )
    return next(iter(found))


def _unmixed(source: TensorIndex, by_target: Mapping[str, list[Link]]) -> tuple[TensorIndex, Mapping[str, list[Link]]]:
    """Where links to one target read several element types, they read all in one that holds all values."""
    tensors, derived, links_to = dict(source.tensors), list(source.derived), dict(by_target)
    for target, links in by_target.items():
        stored = sorted({source.tensors[link.source].dtype for link in links})
        if len(stored) <= 1:
            continue
        wide = widest(stored)
        if wide is None:
            raise TensorMismatchError(f"{target!r} would mix element types: {', '.join(stored)}")
        links_to[target] = []
        for link in links:
            name = link.source if tensors[link.source].dtype == wide else f"{link.source} as {wide}"
            if name not in tensors:
                first_file = len(source.files) + len(derived)
                tensors[name], files = widened(tensors[link.source], wide, first_file)
                derived += files
            links_to[target].append(replace(link, source=name))
    return replace(source, tensors=tensors, derived=tuple(derived)), links_to


def _require_whole(tensor: IndexedTensor) -> None:
    tensor.require_whole(f"the stored chunks of {tensor.name!r} are not whole")


def _fill(source: TensorIndex, target: IndexedTensor, links: list[Link]) -> list[Segment]:
    """The segments of one target tensor."""
    _require_total(target, links)
    by_source: dict[str, list[Link]] = defaultdict(list)
    for link in links:
        by_source[link.source].append(link)
    source_dtype = source.tensors[links[0].source].dtype if links else target.dtype
    names = [source.tensors[name].name for name in by_source]
    found = [_copies(source.tensors[name], target, group) for name, group in by_source.items()]
    chunks = np.concatenate([np.empty(0, dtype=np.int64), *(each for each, _ in found)])
    copies = np.concatenate([np.empty(0, dtype=COPY), *(each for _, each in found)])
    order = np.lexsort((copies["target_offset"], chunks))
    copies = copies[order]
    ends = np.bincount(chunks, minlength=target.num_chunks).cumsum().tolist()
    num_bytes = target.shapes.prod(axis=1) * dtypes.itemsize_bytes(source_dtype)
    _require_filled(chunks[order], copies, num_bytes, target.name)
    columns = (target.files.tolist(), target.positions.tolist(), num_bytes.tolist())
    return [
        Segment(
            tensor=target.name,
            file=file,
            position=position,
            source_dtype=source_dtype,
            dtype=target.dtype,
            num_bytes=size,
            copies=copies[start:end],
            sources=sources,
        )
        for file, position, size, start, end, sources in zip(
            *columns, [0, *ends[:-1]], ends, _sources(names, found, target.num_chunks), strict=True
        )
    ]


def _sources(
    names: Iterable[str], found: Sequence[tuple[IntArray, CopyArray]], num_chunks: int
) -> list[tuple[str, ...]]:
    """Of each chunk, which of the sources ``names`` have copies into it, given what ``_copies`` gave of each."""
    into: list[list[str]] = [[] for _ in range(num_chunks)]
    for name, (chunks, _) in zip(names, found, strict=True):
        for chunk in np.unique(chunks).tolist():
            into[chunk].append(name)
    return [tuple(each) for each in into]


def _require_filled(chunks: IntArray, copies: CopyArray, num_bytes: IntArray, name: str) -> None:
    """Raise PlanError unless the copies into each chunk fill it."""
    filled = np.zeros_like(num_bytes)
    np.add.at(filled, chunks, copies["rows"] * copies["row_bytes"])
    faulty = np.flatnonzero(filled != num_bytes)
    if faulty.size:  # a fault of this module, not of the data: never write such a plan
        raise PlanError(f"the plan fills {filled[faulty[0]]} of {num_bytes[faulty[0]]} bytes of {name!r}")


def _require_total(target: IndexedTensor, links: list[Link]) -> None:
    """Links and chunks must each cover the target tensor exactly once."""
    ndim = len(target.global_shape)
    offsets = np.array([link.target_offset for link in links], dtype=np.int64).reshape(len(links), ndim)
    shapes = np.array([(1,) * (ndim - len(link.shape)) + link.shape for link in links], dtype=np.int64)
    what = f"the source does not fill {target.name!r} exactly"
    require_tiling(offsets, shapes.reshape(len(links), ndim), target.global_shape, what)
    target.require_whole(f"the chunks of {target.name!r} are not whole")


def _copies(source: IndexedTensor, target: IndexedTensor, links: list[Link]) -> tuple[IntArray, CopyArray]:
    """What ``links`` bring from one source tensor: the chunk of ``target`` that each copy goes into, and the copies."""
    itemsize = dtypes.itemsize_bytes(source.dtype)
    ndim = len(links[0].shape)
    in_source, in_target = slice(len(source.global_shape) - ndim, None), slice(len(target.global_shape) - ndim, None)
    source_lows, target_lows, shapes = _columns(links)
    source_highs = source_lows + _padded(shapes, len(source.global_shape))
    _require_inside(source_highs, source)
    read = source.meeting(source_lows, source_highs)

    lows = target_lows[read.box]  # what is read of each chunk, as boxes of the target
    lows[:, in_target] += (read.low - source_lows[read.box])[:, in_source]
    written = target.meeting(lows, lows + _padded((read.high - read.low)[:, in_source], len(target.global_shape)))

    source_chunk, source_low = read.chunk[written.box], read.low[written.box]
    source_low[:, in_source] += (written.low - lows[written.box])[:, in_target]
    source_strides = row_major_strides(source.shapes[source_chunk], itemsize)
    target_strides = row_major_strides(target.shapes[written.chunk], itemsize)
    runs = shared_runs(
        (written.high - written.low)[:, in_target],
        source.positions[source_chunk] + ((source_low - source.offsets[source_chunk]) * source_strides).sum(axis=1),
        source_strides[:, in_source],
        ((written.low - target.offsets[written.chunk]) * target_strides).sum(axis=1),
        target_strides[:, in_target],
        itemsize,
    )
    copies = np.empty(len(runs.box), dtype=COPY)
    columns = (source.files[source_chunk][runs.box], *runs[1:])
    for name, column in zip(COPY.names or (), columns, strict=True):
        copies[name] = column
    return written.chunk[runs.box], copies


def _columns(links: list[Link]) -> Iterator[IntArray]:
    """Source offsets, target offsets and shapes of links between the same two tensors, ``[links, axes]``."""
    for rows in (
        [link.source_offset for link in links],
        [link.target_offset for link in links],
        [link.shape for link in links],
    ):
        yield np.array(rows, dtype=np.int64).reshape(len(links), -1 if rows[0] else 0)


def _padded(shapes: IntArray, ndim: int) -> IntArray:
    """Shapes with leading axes of extent 1, so that there are ``ndim``."""
    padded = np.ones((len(shapes), ndim), dtype=np.int64)
    padded[:, ndim - shapes.shape[1] :] = shapes
    return padded


def _require_inside(ends: IntArray, source: IndexedTensor) -> None:
    """Raise PlanError if a link ends outside its source."""
    outside = np.flatnonzero((ends > np.array(source.global_shape, dtype=np.int64)).any(axis=1))
    if outside.size:
        end = ends[outside[0]].tolist()
        raise PlanError(f"a link ends at {end}, outside {source.name!r} of {list(source.global_shape)}")
