"""The checksums that data files of checkpoints bring along: the CRC-32 of every record of every archive.

torch writes them into the central directory of each archive, unless ``torch.serialization.set_crc32_options(False)``
was called: then they are 0 (torch 2.6 to 2.15). The bare chunks of legacy ``zarr`` checkpoints have none.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from dist_ckpt_mistral.errors import FormatError, PlanError
from dist_ckpt_mistral.formats.checkpoint_directory import METADATA_FILE
from dist_ckpt_mistral.formats.stored_checkpoint import ZARR, StoredCheckpoint
from dist_ckpt_mistral.formats.torch_dist import common_state
from dist_ckpt_mistral.formats.torch_dist.archive import ArchiveReader, TensorLocator
from dist_ckpt_mistral.gather import dtypes
from dist_ckpt_mistral.gather.boxes import require_tiling
from dist_ckpt_mistral.gather.digest import Span
from dist_ckpt_mistral.gather.dtypes import Shape
from dist_ckpt_mistral.storage.local import SourceFiles


class Piece(NamedTuple):
    """Something stored, under one name or several: a whole object or tensor, or a box of a tensor, in elements.

    What ``is_bare`` is a file, without an archive around it.
    """

    names: tuple[str, ...]
    offset: Shape = ()
    shape: Shape = ()
    dtype: str | None = None
    is_bare: bool = False


class CheckedSpan(NamedTuple):
    """Bytes of a file that belong to a piece, and the CRC-32 that they had (None: nothing tells)."""

    span: Span
    crc32: int | None
    piece: Piece


class Fault(NamedTuple):
    """What is wrong with a piece."""

    piece: Piece
    what: str


#: The archives of one file: where each lies, and what it holds.
ArchivesByPlace = dict[Span, Piece]


def archives_by_file(checkpoint: StoredCheckpoint) -> tuple[dict[str, ArchivesByPlace], list[Fault]]:
    """All archives of a checkpoint, and the tensors whose chunks are not each stored once, or leave gaps or overlap."""
    files, found = list(checkpoint.file_bytes), defaultdict[str, ArchivesByPlace](dict)
    faults, is_bare = [], checkpoint.backend == ZARR
    for name, tensor in checkpoint.tensors.items():
        try:
            chunks = checkpoint.chunks(name)
            columns = (column.tolist() for column in chunks)
            for offset, shape, file, *span in zip(*columns, strict=True):
                _add(
                    found[files[file]], Span(*span), Piece((name,), tuple(offset), tuple(shape), tensor.dtype, is_bare)
                )
            require_tiling(chunks.offsets, chunks.shapes, tensor.stored_shape, f"the chunks in {METADATA_FILE}")
        except (FormatError, PlanError) as error:
            faults.append(Fault(Piece((name,)), str(error)))
    for name, entry in checkpoint.objects.items():
        _add(found[entry.file], Span(entry.offset, entry.num_bytes), Piece((name,)))
    common = checkpoint.directory / common_state.COMMON_FILE
    if common.is_file():
        _add(found[common.name], Span(0, common.stat().st_size), Piece(("the common state",)))
    return found, faults


def _add(archives: ArchivesByPlace, span: Span, piece: Piece) -> None:
    """Add an archive; several names may share one."""
    known = archives.get(span)
    archives[span] = piece if known is None else known._replace(names=(*known.names, *piece.names))


def read_parts(path: Path, archives: ArchivesByPlace) -> tuple[list[CheckedSpan], list[Fault]]:
    """The parts of one data file in ascending order, and the pieces whose archives are not what they should be."""
    parts, faults, end = list[CheckedSpan](), list[Fault](), 0
    with SourceFiles([path]) as files:
        size, locator = files.size_bytes(0), TensorLocator(files, [path])
        cut = {span for span, piece in archives.items() if sum(span) > size and not piece.is_bare}
        if cut:
            what = f"the file is truncated: expected at least {max(map(sum, cut))} bytes, got {size}"
            faults += [Fault(archives[span], what) for span in sorted(cut)]
        for span in sorted(archives.keys() - cut):
            try:
                parts += _parts(files, locator, span, archives[span], begin=end)
            except FormatError as error:
                faults.append(Fault(archives[span], str(error)))
            end = max(end, sum(span))
    return parts, faults


def _parts(
    files: SourceFiles, locator: TensorLocator, span: Span, piece: Piece, *, begin: int
) -> Sequence[CheckedSpan]:
    """The records of one archive, which must hold what the metadata says and not begin before ``begin``."""
    if span.position < begin:
        raise FormatError(f"its archive at byte {span.position} overlaps the one before, which ends at {begin}")
    if piece.is_bare and files.size_bytes(0) != span.num_bytes:
        raise FormatError(f"its file has {files.size_bytes(0)} bytes: expected {span.num_bytes}")
    if piece.is_bare:
        return [CheckedSpan(span, None, piece)]
    if piece.dtype in dtypes.KNOWN_DTYPES:
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
        is_told = member.crc32 != 0 or member.num_bytes == 0
        yield CheckedSpan(Span(member.position, member.num_bytes), member.crc32 if is_told else None, piece)
