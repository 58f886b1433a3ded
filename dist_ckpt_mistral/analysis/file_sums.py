"""Compare the files of a directory, and the parts of them, with their stored checksums; every file is read once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Final

from dist_ckpt_mistral.analysis.archive_checksums import CheckedSpan, Fault, Piece
from dist_ckpt_mistral.analysis.findings import Finding, Results, is_unreachable
from dist_ckpt_mistral.errors import SourceError
from dist_ckpt_mistral.formats.checkpoint_directory import METADATA_FILE
from dist_ckpt_mistral.formats.checksums import CHECKSUMS_FILE, FileSum, read_checksums
from dist_ckpt_mistral.formats.integrity import MANIFEST_FILE, files_in, read_manifest
from dist_ckpt_mistral.gather.digest import Digest, digest
from dist_ckpt_mistral.gather.execute import INTERRUPTED_WAIT_S, Effort, run_all
from dist_ckpt_mistral.messages import counted, listed, printable
from dist_ckpt_mistral.storage import paths
from dist_ckpt_mistral.storage.remote_path import RemotePath

#: Hexadecimal digits of a SHA-256 in a message, as many as Megatron shows.
_SHOWN_DIGITS: Final = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """The data files of a directory and their parts, the smallest spans with a checksum.

    ``parts_of`` returns the parts of a file in ascending order, and faults that were found without reading them.
    ``hf_names`` returns the Hugging Face tensors that have rows in a piece. ``sums_in`` and ``named_in`` say, in words,
    where the checksums of parts and the names of ``files`` are stored.
    """

    files: Collection[str] = ()
    parts_of: Callable[[str], tuple[list[CheckedSpan], list[Fault]]] = lambda _: ([], [])
    hf_names: Callable[[Piece], tuple[str, ...]] = lambda _: ()
    sums_in: str = ""
    named_in: str = METADATA_FILE

    def findings(self, file: str, faults: Iterable[Fault]) -> Iterator[Finding]:
        """The faults in ``file`` as findings; pieces with the same fault share one."""
        by_what: dict[str, list[Piece]] = defaultdict(list)
        for fault in faults:
            by_what[fault.what].append(fault.piece)
        for what, pieces in by_what.items():
            names = dict.fromkeys(chain.from_iterable(piece.names for piece in pieces))
            hf_names = dict.fromkeys(chain.from_iterable(map(self.hf_names, pieces)))
            count = f" ({len(pieces)} pieces)" if len(pieces) > 1 else ""
            yield Finding(file=file, tensor=listed([*names]), hf_names=tuple(hf_names), what=what + count)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpectedSums:
    """The checksums of a directory's files and tensors, and the names of the files that hold them."""

    lists: tuple[str, ...]
    sha256: Mapping[str, str]
    sums: Mapping[str, FileSum]
    tensors: Mapping[str, tuple[int, str]]

    def listed_in(self, name: str) -> str | None:
        """A list that names the file ``name``."""
        listing = {CHECKSUMS_FILE: self.sums, MANIFEST_FILE: self.sha256}
        return next((where for where, files in listing.items() if name in files), None)


def expected_sums(results: Results) -> ExpectedSums:
    """What the lists of checksums in a directory say; a damaged list is a finding."""
    own = results.attempt(lambda: read_checksums(results.directory))
    manifest = results.attempt(lambda: read_manifest(results.directory))
    tensors = {} if manifest is None else {name: (crc32, MANIFEST_FILE) for name, crc32 in manifest.crc32.items()}
    tensors |= {} if own is None else {name: (crc32, CHECKSUMS_FILE) for name, crc32 in own.tensors.items()}
    found = {CHECKSUMS_FILE: own, MANIFEST_FILE: manifest}
    return ExpectedSums(
        lists=tuple(name for name, content in found.items() if content is not None),
        sha256={} if manifest is None else manifest.files,
        sums={} if own is None else own.files,
        tensors=tensors,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _FileCheck:
    """The findings in one file, the number of parts whose CRC-32 was compared, and of parts without one."""

    findings: list[Finding]
    num_parts: int = 0
    num_bare_parts: int = 0


def check_files(results: Results, contents: Contents, expected: ExpectedSums, effort: Effort) -> None:
    """Read every file that has parts or is listed, and compare its checksums."""
    names = sorted({*contents.files, *expected.sha256, *expected.sums})
    present = [name for name in names if paths.is_file(results.directory / name)]
    for name in sorted({*names} - {*present}):
        what = f"it is missing, but {expected.listed_in(name) or contents.named_in} names it"
        results.findings.append(Finding(file=name, what=what))
    sizes = [(results.directory / name).stat().st_size for name in present]
    effort.progress.phase("check", sum(sizes))
    files = run_all(
        lambda number: _check_file(results.directory, contents, present[number], expected, effort),
        range(len(present)),
        workers=effort.threads,
        patience_s=INTERRUPTED_WAIT_S if isinstance(results.directory, RemotePath) else None,
    )
    results.findings.extend(finding for file in files for finding in file.findings)
    if num_parts := sum(file.num_parts for file in files):
        results.checked.append(f"{counted(num_parts, 'part')} of files by their CRC-32")
    if num_summed := sum(name in expected.sums for name in present):
        results.checked.append(f"{counted(num_summed, 'file')} by their CRC-32 in {CHECKSUMS_FILE}")
    if num_hashed := sum(name in expected.sha256 for name in present):
        results.checked.append(f"{counted(num_hashed, 'file')} by their SHA-256 in {MANIFEST_FILE}")
    if not expected.lists:
        if num_bare_parts := sum(file.num_bare_parts for file in files):
            results.not_checked.append(f"{num_bare_parts} parts of files that were stored without a checksum")
        results.not_checked.append(f"all other bytes, for want of a sound {CHECKSUMS_FILE} or {MANIFEST_FILE}")
        return
    if unlisted := [printable(name) for name in files_in(results.directory) if not _is_listed(name, expected)]:
        verb = "does" if len(expected.lists) == 1 else "do"
        results.not_checked.append(f"files that {' and '.join(expected.lists)} {verb} not list: {listed(unlisted)}")


def _is_listed(name: str, expected: ExpectedSums) -> bool:
    """Whether a file has a checksum of its own, or is itself a list of them."""
    return expected.listed_in(name) is not None or name in expected.lists


def _check_file(directory: Path, contents: Contents, name: str, expected: ExpectedSums, effort: Effort) -> _FileCheck:
    """Compare a file and its parts with their checksums, in one read."""
    path, sha256, file_sum = directory / name, expected.sha256.get(name), expected.sums.get(name)
    if path.parent != directory and paths.leads_outside(path.parent, directory):
        what = "it was not read: its folder is a link out of the directory"
        return _FileCheck(findings=[Finding(file=name, what=what)])
    try:
        parts, faults = contents.parts_of(name)
        actual = digest(path, [part.span for part in parts], sha256=sha256 is not None, effort=effort)
    except SourceError as error:
        if is_unreachable(error, directory):
            raise
        return _FileCheck(findings=[Finding(file=name, what=str(error))])
    for part, crc32 in zip(parts, actual.spans, strict=True):
        if part.crc32 not in {None, crc32}:
            span = f"bytes {part.span.position} to {sum(part.span)}"
            what = f"{span} have the CRC-32 {crc32:08x}: expected {part.crc32:08x} ({contents.sums_in})"
            faults.append(Fault(part.piece, what))
    findings = [*contents.findings(name, faults)]
    num_bare_parts = sum(part.crc32 is None for part in parts)
    wrong = [*_differences(actual, sha256, file_sum)]
    if wrong:
        intact = "; the data of all tensors in it are as they were" if parts and not (faults or num_bare_parts) else ""
        findings.append(Finding(file=name, what="; ".join(wrong) + intact))
    return _FileCheck(findings=findings, num_parts=len(parts) - num_bare_parts, num_bare_parts=num_bare_parts)


def _differences(actual: Digest, sha256: str | None, file_sum: FileSum | None) -> Iterator[str]:
    """What a whole file has other than its stored checksums, in words."""
    if file_sum is not None and file_sum.num_bytes != actual.num_bytes:
        yield f"{actual.num_bytes} bytes: expected {file_sum.num_bytes} ({CHECKSUMS_FILE})"
    elif file_sum is not None and file_sum.crc32 != actual.crc32:
        yield f"CRC-32 {actual.crc32:08x}: expected {file_sum.crc32:08x} ({CHECKSUMS_FILE})"
    if sha256 not in {None, actual.sha256}:
        digits = f"{str(actual.sha256)[:_SHOWN_DIGITS]}...: expected {str(sha256)[:_SHOWN_DIGITS]}..."
        yield f"SHA-256 {digits} ({MANIFEST_FILE})"
