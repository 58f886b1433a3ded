"""Make a ``BytePlan`` from two tensor indexes and the links between them. Pure arithmetic without I/O.

A plan writes every target byte exactly once, from bytes that are stored exactly once; otherwise PlanError is raised.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dist_ckpt_mistral.errors import PlanError, TensorMismatchError, for_all
from dist_ckpt_mistral.gather import dtypes
from dist_ckpt_mistral.gather.boxes import IntArray, distinct, require_tiling, row_major_strides, shared_runs
from dist_ckpt_mistral.gather.casts import widened, widest
from dist_ckpt_mistral.gather.dtypes import Shape
from dist_ckpt_mistral.gather.index import IndexedTensor, JoinedTensors, TensorIndex
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

    @property
    def shares_rows(self) -> npt.NDArray[np.bool_]:
        """Which copies read rows with gaps between them: pieces of rows that other files want, too."""
        return (self.copies["rows"] > 1) & (self.copies["source_stride"] > self.copies["row_bytes"])

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
    for tensor in target.tensors.values():
        _require_total(tensor, links_to.get(tensor.name, []))
    segments = _segments(source, [*target.tensors.values()], links_to)
    return BytePlan(
        source_files=source.files,
        target_files=target.files,
        segments=tuple(sorted(segments, key=lambda segment: (segment.file, segment.position))),
        derived_files=source.derived,
    )


def plan_segments(
    source: TensorIndex, targets: Mapping[str, tuple[Shape, Sequence[Link]]], dtype: str | None = None
) -> BytePlan:
    """Plan to read whole tensors: one segment for each of ``targets`` (name -> shape, links to it), in this order.

    They are converted to ``dtype`` (a torch name); None keeps the dtype of each.
    """
    tensors = {
        name: IndexedTensor.whole(name, dtype or only_dtype(source, links), shape, file=number, position=0)
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


def _require_total(target: IndexedTensor, links: list[Link]) -> None:
    """Raise PlanError unless links and chunks each cover the target tensor exactly once."""
    ndim = len(target.global_shape)
    offsets = np.array([link.target_offset for link in links], dtype=np.int64).reshape(len(links), ndim)
    shapes = np.array([(1,) * (ndim - len(link.shape)) + link.shape for link in links], dtype=np.int64)
    what = f"the source does not fill {target.name!r} exactly"
    require_tiling(offsets, shapes.reshape(len(links), ndim), target.global_shape, what)
    target.require_whole(f"the chunks of {target.name!r} are not whole")


class _Pair(NamedTuple):
    """All links from one source tensor to one target tensor.

    ``first_chunk`` is the number of the target's first chunk among the chunks of all targets.
    """

    source: IndexedTensor
    target: IndexedTensor
    first_chunk: int
    links: list[Link]

    @property
    def kind(self) -> tuple[int, ...]:
        """The size of an element in bytes, and the number of axes of source, target and links."""
        shapes = (self.source.global_shape, self.target.global_shape, self.links[0].shape)
        return dtypes.itemsize_bytes(self.source.dtype), *map(len, shapes)


def _segments(
    source: TensorIndex, targets: Sequence[IndexedTensor], links_to: Mapping[str, list[Link]]
) -> Iterator[Segment]:
    """Yield the segments of ``targets``, one for each of their chunks."""
    *first_chunks, num_chunks = accumulate((target.num_chunks for target in targets), initial=0)
    pairs: list[_Pair] = []
    for target, first_chunk in zip(targets, first_chunks, strict=True):
        by_source: dict[str, list[Link]] = defaultdict(list)
        for link in links_to.get(target.name, []):
            by_source[link.source].append(link)
        pairs += (_Pair(source.tensors[name], target, first_chunk, links) for name, links in by_source.items())
    chunks, numbers, copies = _all_copies(pairs)
    order = np.lexsort((copies["target_offset"], chunks))
    chunks, numbers, copies = chunks[order], numbers[order], copies[order]
    ends = np.bincount(chunks, minlength=num_chunks).cumsum().tolist()
    starts = [0, *ends[:-1]]
    sources: list[list[str]] = [[] for _ in range(num_chunks)]
    for chunk_and_number in distinct(chunks * len(pairs) + numbers).tolist():
        chunk, number = divmod(chunk_and_number, len(pairs))
        sources[chunk].append(pairs[number].source.name)
    filled = np.zeros(num_chunks, dtype=np.int64)
    np.add.at(filled, chunks, copies["rows"] * copies["row_bytes"])
    for target, first_chunk in zip(targets, first_chunks, strict=True):
        links = links_to.get(target.name)
        source_dtype = source.tensors[links[0].source].dtype if links else target.dtype
        num_bytes = target.shapes.prod(axis=1) * dtypes.itemsize_bytes(source_dtype)
        columns = (target.files.tolist(), target.positions.tolist(), num_bytes.tolist())
        for chunk, (file, position, size) in enumerate(zip(*columns, strict=True), first_chunk):
            if filled[chunk] != size:  # an error of this module, not of the data
                raise PlanError(f"the plan fills {filled[chunk]} of {size} bytes of {target.name!r}")
            yield Segment(
                tensor=target.name,
                file=file,
                position=position,
                source_dtype=source_dtype,
                dtype=target.dtype,
                num_bytes=size,
                copies=copies[starts[chunk] : ends[chunk]],
                sources=tuple(sources[chunk]),
            )


def _all_copies(pairs: Sequence[_Pair]) -> tuple[IntArray, IntArray, CopyArray]:
    """Return the copies of ``pairs``. Besides, of each: the number of its target chunk among all, and of its pair."""
    by_kind: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for number, pair in enumerate(pairs):
        by_kind[pair.kind].append(number)
    empty = np.empty(0, dtype=np.int64)
    chunks, numbers, copies = [empty], [empty], [np.empty(0, dtype=COPY)]
    for alike in by_kind.values():
        some_chunks, rows, some_copies = _copies([pairs[number] for number in alike])
        chunks.append(some_chunks)
        numbers.append(np.array(alike)[rows])
        copies.append(some_copies)
    return np.concatenate(chunks), np.concatenate(numbers), np.concatenate(copies)


def _copies(pairs: Sequence[_Pair]) -> tuple[IntArray, IntArray, CopyArray]:
    """Return what ``_all_copies`` does, for pairs of one kind; pairs are numbered as in ``pairs``."""
    itemsize, source_ndim, target_ndim, ndim = pairs[0].kind
    in_source, in_target = slice(source_ndim - ndim, None), slice(target_ndim - ndim, None)
    source, target = JoinedTensors([pair.source for pair in pairs]), JoinedTensors([pair.target for pair in pairs])
    links = [link for pair in pairs for link in pair.links]
    number = np.repeat(np.arange(len(pairs)), [len(pair.links) for pair in pairs])
    source_lows = np.array([link.source_offset for link in links], dtype=np.int64)
    target_lows = np.array([link.target_offset for link in links], dtype=np.int64)
    shapes = np.array([link.shape for link in links], dtype=np.int64)
    source_highs = source_lows + _padded(shapes, source_ndim)
    _require_inside(source_highs, pairs, number)
    read = source.overlaps(number, source_lows, source_highs)

    number, lows = number[read.box], target_lows[read.box]  # the overlaps with source chunks, as boxes of the target
    lows[:, in_target] += (read.low - source_lows[read.box])[:, in_source]
    highs = lows + _padded((read.high - read.low)[:, in_source], target_ndim)
    written = target.overlaps(number, lows, highs)

    number, source_chunk, source_low = number[written.box], read.chunk[written.box], read.low[written.box]
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
    first_chunks = np.array([pair.first_chunk for pair in pairs])
    chunk = written.chunk - target.first_rows[number] + first_chunks[number]
    return chunk[runs.box], number[runs.box], copies


def _padded(shapes: IntArray, ndim: int) -> IntArray:
    """Prepend axes of extent 1 to ``shapes`` ``[n, axes]``, so that there are ``ndim``."""
    padded = np.ones((len(shapes), ndim), dtype=np.int64)
    padded[:, ndim - shapes.shape[1] :] = shapes
    return padded


def _require_inside(ends: IntArray, pairs: Sequence[_Pair], numbers: IntArray) -> None:
    """Raise PlanError if a link ends outside its source; ``numbers`` are the links' pairs."""
    global_shapes = np.array([pair.source.global_shape for pair in pairs], dtype=np.int64)
    outside = np.flatnonzero((ends > global_shapes[numbers]).any(axis=1))
    if outside.size:
        end, source = ends[outside[0]].tolist(), pairs[numbers[outside[0]]].source
        raise PlanError(f"a link ends at {end}, outside {source.name!r} of {list(source.global_shape)}")
