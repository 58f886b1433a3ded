"""Files held against what tells whether they have changed, each read once: whole ones, and their parts by name."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Final

from dist_ckpt_mistral.errors import FormatError
from dist_ckpt_mistral.formats.archive_checksums import Fault, Part, Piece
from dist_ckpt_mistral.formats.checkpoint_directory import METADATA_FILE
from dist_ckpt_mistral.formats.integrity import MANIFEST_FILE, Manifest, files_in
from dist_ckpt_mistral.gather.digest import Digest, digest
from dist_ckpt_mistral.gather.execute import Effort, run_all
from dist_ckpt_mistral.messages import listed, printable
from dist_ckpt_mistral.storage import paths

#: As much of a SHA-256 as an error shows, like Megatron's own.
_SHOWN: Final = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is wrong: in which file, with which stored tensor or object, which Hugging Face tensors it holds.

    ``file`` is relative to the directory; ``file`` and ``tensor`` are None where ``what`` is about no single one.
    """

    file: str | None = None
    tensor: str | None = None
    hf_names: tuple[str, ...] = ()
    what: str

    def __str__(self) -> str:
        """``file: tensor (Hugging Face names): what``."""
        names = "" if self.hf_names in {(), (self.tensor,)} else f" ({listed([*map(printable, self.hf_names)])})"
        tensor = None if self.tensor is None else printable(self.tensor) + names
        return ": ".join(each for each in (self.file and printable(self.file), tensor, self.what) if each)


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """What lies in the files of a directory.

    ``files`` have parts, which ``parts_of`` finds by name, in ascending order, with what is wrong before any is read.
    ``hf_names`` are those that a piece holds rows of, ``sums_in`` says where the checksums of parts stand, and
    ``named_in`` where the names of files do.
    """

    directory: Path
    files: Collection[str] = ()
    parts_of: Callable[[str], tuple[list[Part], list[Fault]]] = lambda _: ([], [])
    hf_names: Callable[[Piece], tuple[str, ...]] = lambda _: ()
    sums_in: str = MANIFEST_FILE
    named_in: str = METADATA_FILE

    def findings(self, file: str, faults: Iterable[Fault]) -> Iterator[Finding]:
        """What is wrong with pieces in ``file``: what is the same for several, such as its end, once."""
        by_what: dict[str, list[Piece]] = defaultdict(list)
        for fault in faults:
            by_what[fault.what].append(fault.piece)
        for what, pieces in by_what.items():
            names, hf_names = (
                tuple(dict.fromkeys(chain.from_iterable(each)))
                for each in zip(*((piece.names, self.hf_names(piece)) for piece in pieces), strict=True)
            )
            count = f" ({len(pieces)} pieces)" if len(pieces) > 1 else ""
            yield Finding(file=file, tensor=listed(names), hf_names=hf_names, what=what + count)


@dataclass(frozen=True, slots=True, kw_only=True)
class FilesCheck:
    """The outcome: sums of files and of parts that were compared, parts without any, files that no manifest lists."""

    findings: tuple[Finding, ...]
    num_files: int
    num_parts: int
    num_bare_parts: int
    unlisted: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Look:
    """What is wrong with one file; of how many of its parts a checksum tells, and of how many none."""

    findings: list[Finding]
    num_parts: int = 0
    num_bare_parts: int = 0


def check_files(contents: Contents, manifest: Manifest | None, effort: Effort) -> FilesCheck:
    """Read every file that ``manifest`` lists or that has parts, and compare."""
    sums = manifest.files if manifest is not None else {}
    expected = sorted({*contents.files, *sums})
    names = [name for name in expected if os.path.isfile(contents.directory / name)]  # noqa: PTH113  (never raises)
    missing = [
        Finding(file=name, what=f"it is missing, but {MANIFEST_FILE if name in sums else contents.named_in} names it")
        for name in sorted({*expected} - {*names})
    ]
    looks = run_all(
        lambda number: _look(contents, names[number], sums.get(names[number]), effort),
        range(len(names)),
        workers=effort.threads,
    )
    there = files_in(contents.directory) if manifest is not None else []
    return FilesCheck(
        findings=(*missing, *(finding for look in looks for finding in look.findings)),
        num_files=sum(name in sums for name in names),
        num_parts=sum(look.num_parts for look in looks),
        num_bare_parts=sum(look.num_bare_parts for look in looks),
        unlisted=tuple(name for name in there if name not in sums),
    )


def _look(contents: Contents, name: str, sha256: str | None, effort: Effort) -> _Look:
    path = contents.directory / name
    if path.parent != contents.directory and paths.leads_outside(path.parent, contents.directory):
        return _Look(findings=[Finding(file=name, what="it was not read: its folder is a link out of the directory")])
    try:
        parts, faults = contents.parts_of(name)
        found = digest(path, [part.span for part in parts], sha256=sha256 is not None, effort=effort)
    except FormatError as error:
        return _Look(findings=[Finding(file=name, what=str(error))])
    faults += _wrong_parts(parts, found, contents.sums_in)
    findings = [*contents.findings(name, faults)]
    num_bare_parts = sum(part.crc32 is None for part in parts)
    if sha256 is not None and found.sha256 != sha256:
        what = f"SHA-256 {str(found.sha256)[:_SHOWN]}...: expected {sha256[:_SHOWN]}... ({MANIFEST_FILE})"
        if parts and not faults and not num_bare_parts:
            what += "; the data of all tensors in it are as they were"
        findings.append(Finding(file=name, what=what))
    return _Look(findings=findings, num_parts=len(parts) - num_bare_parts, num_bare_parts=num_bare_parts)


def _wrong_parts(parts: list[Part], found: Digest, sums_in: str) -> Iterator[Fault]:
    for part, crc32 in zip(parts, found.crc32, strict=True):
        if part.crc32 not in {None, crc32}:
            where = f"bytes {part.span.position} to {sum(part.span)}"
            yield Fault(part.piece, f"{where} have the CRC-32 {crc32:08x}: expected {part.crc32:08x} ({sums_in})")
