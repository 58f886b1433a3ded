"""Two tensor indexes and the links between them -> ``BytePlan``. Pure: numbers in, numbers out, no I/O.

Totality is proved here: every target byte is written exactly once, and from bytes that are stored exactly once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from operator import add, gt, mul, sub
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dist_ckpt_mistral import dtypes
from dist_ckpt_mistral.errors import PlanError, TensorMismatchError
from dist_ckpt_mistral.gather.boxes import require_tiling, row_major_strides, shared_runs
from dist_ckpt_mistral.gather.links import Link
from dist_ckpt_mistral.gather.tensor_index import IndexedTensor, TensorIndex
from dist_ckpt_mistral.shapes import Shape

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

    ``copies`` fill ``num_bytes`` bytes of ``source_dtype``, which are stored as ``dtype``.
    """

    tensor: str
    file: int
    position: int
    source_dtype: str
    dtype: str
    num_bytes: int
    copies: CopyArray

    @property
    def stored_bytes(self) -> int:
        """Bytes that the segment takes in its file."""
        return self.num_bytes // dtypes.itemsize_bytes(self.source_dtype) * dtypes.itemsize_bytes(self.dtype)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BytePlan:
    """What to copy where: segments in the order of their target files and positions."""

    source_files: tuple[Path, ...]
    target_files: tuple[Path, ...]
    segments: tuple[Segment, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes that the plan writes."""
        return sum(segment.stored_bytes for segment in self.segments)


def plan_gather(source: TensorIndex, target: TensorIndex, links: Iterable[Link]) -> BytePlan:
    """Plan how to fill every chunk of ``target`` from the chunks of ``source``.

    Raises PlanError where links, source chunks or target chunks leave a gap or overlap, TensorMismatchError where one
    target tensor would mix element types.
    """
    by_target: dict[str, list[Link]] = defaultdict(list)
    for link in links:
        by_target[link.target].append(link)
    for name in sorted({link.source for group in by_target.values() for link in group}):
        tensor = source.tensors[name]
        require_tiling(
            tensor.offsets, tensor.shapes, tensor.global_shape, f"the stored chunks of {name!r} are not whole"
        )
    segments = [
        segment
        for tensor in target.tensors.values()
        for segment in _fill(source, tensor, by_target.get(tensor.name, []))
    ]
    segments.sort(key=lambda segment: (segment.file, segment.position))
    return BytePlan(source_files=source.files, target_files=target.files, segments=tuple(segments))


def _fill(source: TensorIndex, target: IndexedTensor, links: list[Link]) -> list[Segment]:
    """The segments of one target tensor."""
    _require_total(target, links)
    source_dtypes = sorted({source.tensors[link.source].dtype for link in links}) or [target.dtype]
    if len(source_dtypes) > 1:
        raise TensorMismatchError(
            f"{target.name!r} would mix element types: its parts are stored as {', '.join(source_dtypes)}. "
            "Convert the source to one dtype first."
        )
    copies: list[list[tuple[int, ...]]] = [[] for _ in range(target.num_chunks)]
    for link in links:
        _link_copies(source.tensors[link.source], target, link, copies)
    itemsize = dtypes.itemsize_bytes(source_dtypes[0])
    segments = [
        Segment(
            tensor=target.name,
            file=int(target.files[chunk]),
            position=int(target.positions[chunk]),
            source_dtype=source_dtypes[0],
            dtype=target.dtype,
            num_bytes=int(target.shapes[chunk].prod()) * itemsize,
            copies=np.array(sorted(rows, key=lambda copy: copy[3]), dtype=COPY),
        )
        for chunk, rows in enumerate(copies)
    ]
    for segment in segments:
        filled = int((segment.copies["rows"] * segment.copies["row_bytes"]).sum())
        if filled != segment.num_bytes:  # a fault of this module, not of the data: never write such a plan
            raise PlanError(f"the plan fills {filled} of {segment.num_bytes} bytes of {segment.tensor!r}")
    return segments


def _require_total(target: IndexedTensor, links: list[Link]) -> None:
    """Links and chunks must each cover the target tensor exactly once."""
    ndim = len(target.global_shape)
    offsets = np.array([link.target_offset for link in links], dtype=np.int64).reshape(len(links), ndim)
    shapes = np.array([(1,) * (ndim - len(link.shape)) + link.shape for link in links], dtype=np.int64)
    what = f"the source does not fill {target.name!r} exactly"
    require_tiling(offsets, shapes.reshape(len(links), ndim), target.global_shape, what)
    what = f"the chunks of {target.name!r} are not whole"
    require_tiling(target.offsets, target.shapes, target.global_shape, what)


def _link_copies(source: IndexedTensor, target: IndexedTensor, link: Link, copies: list[list[tuple[int, ...]]]) -> None:
    """Append to ``copies[chunk]`` what ``link`` brings into each chunk of ``target``."""
    ndim = len(link.shape)
    source_lead, target_lead = len(source.global_shape) - ndim, len(target.global_shape) - ndim
    itemsize = dtypes.itemsize_bytes(source.dtype)
    shift = tuple(map(sub, link.target_offset[target_lead:], link.source_offset[source_lead:]))
    source_end = _end(link.source_offset, link.shape)
    if any(map(gt, source_end, source.global_shape)):
        raise PlanError(f"a link ends at {list(source_end)}, outside {source.name!r} of {list(source.global_shape)}")
    for source_chunk, low, high in source.meeting(link.source_offset, source_end):
        source_at, source_shape, file, position = source.chunk(source_chunk)
        source_strides = row_major_strides(source_shape, itemsize)
        target_low = link.target_offset[:target_lead] + tuple(map(add, low[source_lead:], shift))
        extent = tuple(map(sub, high[source_lead:], low[source_lead:]))
        for target_chunk, inner_low, inner_high in target.meeting(target_low, _end(target_low, extent)):
            target_at, target_shape, _, _ = target.chunk(target_chunk)
            target_strides = row_major_strides(target_shape, itemsize)
            in_source = low[:source_lead] + tuple(map(sub, inner_low[target_lead:], shift))
            for run in shared_runs(
                tuple(map(sub, inner_high[target_lead:], inner_low[target_lead:])),
                position + sum(map(mul, map(sub, in_source, source_at), source_strides)),
                source_strides[source_lead:],
                sum(map(mul, map(sub, inner_low, target_at), target_strides)),
                target_strides[target_lead:],
                itemsize,
            ):
                copies[target_chunk].append((file, *run))


def _end(offset: Shape, shape: Shape) -> Shape:
    """Where a box ends that has extent 1 on the leading axes that ``shape`` leaves out."""
    return tuple(map(add, offset, (1,) * (len(offset) - len(shape)) + shape))
