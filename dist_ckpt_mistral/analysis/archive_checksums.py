"""The CRC-32 checksums in the data files of a checkpoint: one for every record of every archive.

torch stores them in the central directory of each archive. After ``torch.serialization.set_crc32_options(False)`` it
stores 0 instead (torch 2.6 to 2.15). The chunks of legacy ``zarr`` checkpoints are bare bytes without a checksum.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from operator import add
from pathlib import Path
from typing import NamedTuple

from dist_ckpt_mistral.errors import FormatError, PlanError
from dist_ckpt_mistral.formats.checkpoint_directory import METADATA_FILE
from dist_ckpt_mistral.formats.legacy_torch import RANK_FILE
from dist_ckpt_mistral.formats.stored_checkpoint import TORCH, ZARR, StoredCheckpoint
from dist_ckpt_mistral.formats.torch_dist import common_state
from dist_ckpt_mistral.formats.torch_dist.archive import ArchiveReader, TensorLocator
from dist_ckpt_mistral.gather import dtypes
from dist_ckpt_mistral.gather.boxes import require_tiling
from dist_ckpt_mistral.gather.dtypes import Shape
from dist_ckpt_mistral.storage.local import SourceFiles, Span


class Piece(NamedTuple):
    """An object, a tensor, or a box of a tensor (in elements), with all keys that it is stored under.

    ``is_bare`` marks a chunk that is a whole file, without an archive around it.
    """

    names: tuple[str, ...]
    offset: Shape = ()
    shape: Shape = ()
    dtype: str | None = None
    is_bare: bool = False


class CheckedSpan(NamedTuple):
    """A span of a file that belongs to a piece, and its stored CRC-32 (None: no checksum is stored)."""

    span: Span
    crc32: int | None
    piece: Piece


class Fault(NamedTuple):
    """A piece that is damaged, and how."""

    piece: Piece
    what: str


#: The archives of one file: the span and the content of each.
ArchivesByPlace = dict[Span, Piece]


def archives_by_file(checkpoint: StoredCheckpoint) -> tuple[dict[str, ArchivesByPlace], list[Fault]]:
    """The archives in each file of a checkpoint, and the tensors whose chunks overlap or leave gaps."""
    files, archives = list(checkpoint.file_bytes), defaultdict[str, ArchivesByPlace](dict)
    faults, is_bare = [], checkpoint.backend == ZARR
    for name, tensor in checkpoint.tensors.items():
        try:
            chunks = checkpoint.chunks(name)
            columns = (column.tolist() for column in chunks)
            for offset, shape, file, *span in zip(*columns, strict=True):
                piece = Piece((name,), tuple(offset), tuple(shape), tensor.dtype, is_bare)
                _add(archives[files[file]], Span(*span), piece)
            require_tiling(chunks.offsets, chunks.shapes, tensor.stored_shape, f"the chunks in {METADATA_FILE}")
        except (FormatError, PlanError) as error:
            faults.append(Fault(Piece((name,)), str(error)))
    for name, entry in checkpoint.objects.items():
        if checkpoint.backend == TORCH and Path(entry.file).name == RANK_FILE:
            continue  # the archive of its rank, which has the tensors too
        _add(archives[entry.file], Span(entry.offset, entry.num_bytes), Piece((name,)))
    common = checkpoint.directory / common_state.COMMON_FILE
    if common.is_file():
        _add(archives[common.name], Span(0, common.stat().st_size), Piece(("the common state",)))
    return archives, faults


def read_records(path: Path, tensors: ArchivesByPlace) -> tuple[list[CheckedSpan], list[Fault]]:
    """The records of a file that is one archive, in ascending order; ``tensors`` are the spans of tensors in it."""
    with SourceFiles([path]) as files:
        span = Span(0, files.size_bytes(0))
        try:
            records = sorted(_records(files, span, Piece(())), key=lambda part: part.span)
        except FormatError as error:
            return [], [Fault(Piece(("all of it",)), str(error))]
    ordered, parts, at = sorted(tensors), list[CheckedSpan](), 0
    for record in records:
        first = at
        while at < len(ordered) and ordered[at].position < sum(record.span):
            at += 1
        parts.append(record._replace(piece=_around([tensors[span] for span in ordered[first:at]])))
    return parts, []


def _around(pieces: Sequence[Piece]) -> Piece:
    """All of ``pieces`` as one: the box around them if they are of one tensor."""
    names = tuple(dict.fromkeys(name for piece in pieces for name in piece.names))
    if len(names) != 1:
        return Piece(names or ("what is no tensor of the model",))
    low = tuple(map(min, zip(*(piece.offset for piece in pieces), strict=True)))
    ends = zip(*(map(add, piece.offset, piece.shape) for piece in pieces), strict=True)
    return Piece(names, low, tuple(max(end) - start for end, start in zip(ends, low, strict=True)))


def _add(archives: ArchivesByPlace, span: Span, piece: Piece) -> None:
    """Add an archive. If it is there already, add the names of ``piece`` to its own."""
    present = archives.get(span)
    archives[span] = piece if present is None else present._replace(names=(*present.names, *piece.names))


def read_parts(path: Path, archives: ArchivesByPlace) -> tuple[list[CheckedSpan], list[Fault]]:
    """The records of all archives in one data file, in ascending order, and the pieces with a damaged archive."""
    parts, faults, end = list[CheckedSpan](), list[Fault](), 0
    with SourceFiles([path]) as files:
        size, locator = files.size_bytes(0), TensorLocator(files, [path])
        beyond_end = {span for span, piece in archives.items() if sum(span) > size and not piece.is_bare}
        if beyond_end:
            what = f"the file is truncated: expected at least {max(map(sum, beyond_end))} bytes, got {size}"
            faults += [Fault(archives[span], what) for span in sorted(beyond_end)]
        for span in sorted(archives.keys() - beyond_end):
            try:
                parts += _parts(files, locator, span, archives[span], begin=end)
            except FormatError as error:
                faults.append(Fault(archives[span], str(error)))
            end = max(end, sum(span))
    return parts, faults


def _parts(
    files: SourceFiles, locator: TensorLocator, span: Span, piece: Piece, *, begin: int
) -> Sequence[CheckedSpan]:
    """The records of one archive, in ascending order.

    Raises FormatError if the archive begins before byte ``begin``, or differs from its description in the metadata.
    """
    if span.position < begin:
        raise FormatError(f"its archive at byte {span.position} overlaps the one before, which ends at {begin}")
    if piece.is_bare:
        if files.size_bytes(0) != span.num_bytes:
            raise FormatError(f"its file has {files.size_bytes(0)} bytes: expected {span.num_bytes}")
        return [CheckedSpan(span, None, piece)]
    if piece.dtype in dtypes.KNOWN_DTYPES:  # locating the data checks the archive
        [*locator.locate(piece.names[0], piece.dtype, piece.shape, span.num_bytes, [(0, span.position)])]
    parts = sorted(_records(files, span, piece), key=lambda part: part.span)
    for before, after in itertools.pairwise(parts):
        if sum(before.span) > after.span.position:
            raise FormatError(f"records of its archive at byte {span.position} overlap")
    return parts


def _records(files: SourceFiles, span: Span, piece: Piece) -> Iterator[CheckedSpan]:
    reader = ArchiveReader(files, 0, *span, f"the archive at byte {span.position}")
    for name in reader.names:
        member = reader.member(name)
        has_crc32 = member.crc32 != 0 or member.num_bytes == 0
        yield CheckedSpan(Span(member.position, member.num_bytes), member.crc32 if has_crc32 else None, piece)
