"""Make a ``BytePlan`` from two tensor indexes and the links between them. Pure arithmetic without I/O.

A plan writes every target byte exactly once, from bytes that are stored exactly once; otherwise PlanError is raised.
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

#: A strided copy of ``rows`` pieces of ``row_bytes`` bytes. ``source_position`` counts from the start of the source
#: file, ``target_offset`` from the start of the segment. Positions, offsets and strides are in bytes.
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
    """A contiguous run of bytes of one target file: a tensor of a safetensors file, or the data of a chunk.

    ``copies`` fill ``num_bytes`` bytes of ``source_dtype``, which are converted to ``dtype`` and stored from byte
    ``position`` of the file on. ``sources`` are the names of the source tensors.
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
        """Size of the segment in its file, in bytes of ``dtype``."""
        return self.num_bytes // dtypes.itemsize_bytes(self.source_dtype) * dtypes.itemsize_bytes(self.dtype)

    def stored(self, low: int, high: int) -> tuple[int, int]:
        """Return (position in the file, number of bytes there) of the bytes ``[low, high)`` in ``source_dtype``."""
        first, end = (self.stored_bytes * at // self.num_bytes for at in (low, high))
        return self.position + first, end - first


class Part(NamedTuple):
    """Bytes ``[low, high)`` of segment ``number`` of a plan, in its ``source_dtype``: the unit of work of a thread."""

    number: int
    low: int
    high: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BytePlan:
    """All copies from source files to target files: segments, ordered by target file and position.

    Source files ``len(source_files)`` and up are the ``derived_files``.
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
        """The source files that the segments are copied from, without those that derived files read."""
        numbers = {number for segment in self.segments for number in segment.copies["source_file"].tolist()}
        return tuple(path for number, path in enumerate(self.source_files) if number in numbers)


def plan_gather(source: TensorIndex, target: TensorIndex, links: Iterable[Link]) -> BytePlan:
    """Plan how to fill every chunk of ``target`` from the chunks of ``source``.

    If the parts of one target tensor have several element types, they are converted to one that holds all values, and
    then to the target's.

    Raises:
        PlanError: Links, source chunks or target chunks leave a gap or overlap.
        TensorMismatchError: No element type holds all values of a target tensor's parts.
    """
    by_target = defaultdict[str, list[Link]](list)
    for link in links:
        by_target[link.target].append(link)
    sources = sorted({link.source for link in chain(*by_target.values())})
    for_all(_require_whole, [source.tensors[name] for name in sources])
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


def plan_segments(source: TensorIndex, targets: Mapping[str, tuple[Shape, Sequence[Link]]]) -> BytePlan:
    """Plan to read whole tensors: one segment for each of ``targets`` (name -> shape, links to it), in this order."""
    tensors = {
        name: IndexedTensor.whole(name, only_dtype(source, links), shape, file=number, position=0)
        for number, (name, (shape, links)) in enumerate(targets.items())
    }
    target = TensorIndex(files=tuple(map(Path, targets)), tensors=tensors)
    return plan_gather(source, target, chain.from_iterable(links for _, links in targets.values()))


def only_dtype(source: TensorIndex, links: Sequence[Link]) -> str:
    """Return the element type (a torch name) of the source tensors of ``links``, which all have the same target.

    Raises TensorMismatchError if there are several: then the user must choose one.
    """
    names_of: dict[str, list[str]] = defaultdict(list)
    for link in links:
        names_of[source.tensors[link.source].dtype].append(link.source)
    if len(names_of) > 1:
        types = "; ".join(f"{dtype}: {listed([*dict.fromkeys(names)])}" for dtype, names in sorted(names_of.items()))
        raise TensorMismatchError(
            f"{links[0].target!r} would mix element types: expected one for all its parts, got {types}. "
            "Give --dtype to convert all of them."
        )
    return next(iter(names_of))


def _unmixed(source: TensorIndex, by_target: Mapping[str, list[Link]]) -> tuple[TensorIndex, Mapping[str, list[Link]]]:
    """Replace links that give one target several element types by links to widened tensors, which are added."""
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
    """Return the segments of one target tensor, one per chunk."""
    _require_total(target, links)
    by_source: dict[str, list[Link]] = defaultdict(list)
    for link in links:
        by_source[link.source].append(link)
    source_dtype = source.tensors[links[0].source].dtype if links else target.dtype
    names = [source.tensors[name].name for name in by_source]
    copies_of = [_copies(source.tensors[name], target, group) for name, group in by_source.items()]
    chunks = np.concatenate([np.empty(0, dtype=np.int64), *(numbers for numbers, _ in copies_of)])
    copies = np.concatenate([np.empty(0, dtype=COPY), *(array for _, array in copies_of)])
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
            *columns, [0, *ends[:-1]], ends, _sources(names, copies_of, target.num_chunks), strict=True
        )
    ]


def _sources(
    names: Iterable[str], copies_of: Sequence[tuple[IntArray, CopyArray]], num_chunks: int
) -> list[tuple[str, ...]]:
    """Return the names of each chunk's sources, from the names of all sources and the ``_copies`` of each."""
    sources: list[list[str]] = [[] for _ in range(num_chunks)]
    for name, (chunks, _) in zip(names, copies_of, strict=True):
        for chunk in np.unique(chunks).tolist():
            sources[chunk].append(name)
    return [*map(tuple, sources)]


def _require_filled(chunks: IntArray, copies: CopyArray, num_bytes: IntArray, name: str) -> None:
    """Raise PlanError unless the sizes of the copies into each chunk add up to its size."""
    filled = np.zeros_like(num_bytes)
    np.add.at(filled, chunks, copies["rows"] * copies["row_bytes"])
    faulty = np.flatnonzero(filled != num_bytes)
    if faulty.size:  # an error of this module, not of the data
        raise PlanError(f"the plan fills {filled[faulty[0]]} of {num_bytes[faulty[0]]} bytes of {name!r}")


def _require_total(target: IndexedTensor, links: list[Link]) -> None:
    """Raise PlanError unless links and chunks each cover the target tensor exactly once."""
    ndim = len(target.global_shape)
    offsets = np.array([link.target_offset for link in links], dtype=np.int64).reshape(len(links), ndim)
    shapes = np.array([(1,) * (ndim - len(link.shape)) + link.shape for link in links], dtype=np.int64)
    what = f"the source does not fill {target.name!r} exactly"
    require_tiling(offsets, shapes.reshape(len(links), ndim), target.global_shape, what)
    target.require_whole(f"the chunks of {target.name!r} are not whole")


def _copies(source: IndexedTensor, target: IndexedTensor, links: list[Link]) -> tuple[IntArray, CopyArray]:
    """Return the copies of ``links`` from one source tensor, and the number of the target chunk of each copy."""
    itemsize = dtypes.itemsize_bytes(source.dtype)
    ndim = len(links[0].shape)
    in_source, in_target = slice(len(source.global_shape) - ndim, None), slice(len(target.global_shape) - ndim, None)
    source_lows, target_lows, shapes = _columns(links)
    source_highs = source_lows + _padded(shapes, len(source.global_shape))
    _require_inside(source_highs, source)
    read = source.overlaps(source_lows, source_highs)

    lows = target_lows[read.box]  # the overlaps with source chunks, as boxes of the target
    lows[:, in_target] += (read.low - source_lows[read.box])[:, in_source]
    written = target.overlaps(lows, lows + _padded((read.high - read.low)[:, in_source], len(target.global_shape)))

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
    """Yield source offsets, target offsets and shapes of links between the same two tensors, each ``[links, axes]``."""
    for rows in (
        [link.source_offset for link in links],
        [link.target_offset for link in links],
        [link.shape for link in links],
    ):
        yield np.array(rows, dtype=np.int64).reshape(len(links), -1 if rows[0] else 0)


def _padded(shapes: IntArray, ndim: int) -> IntArray:
    """Prepend axes of extent 1 to ``shapes`` ``[n, axes]``, so that there are ``ndim``."""
    padded = np.ones((len(shapes), ndim), dtype=np.int64)
    padded[:, ndim - shapes.shape[1] :] = shapes
    return padded


def _require_inside(ends: IntArray, source: IndexedTensor) -> None:
    """Raise PlanError if a link ends outside its source."""
    outside = np.flatnonzero((ends > np.array(source.global_shape, dtype=np.int64)).any(axis=1))
    if outside.size:
        end = ends[outside[0]].tolist()
        raise PlanError(f"a link ends at {end}, outside {source.name!r} of {list(source.global_shape)}")
