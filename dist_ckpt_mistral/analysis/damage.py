"""Check one Megatron checkpoint or Hugging Face directory for damage, with its checksums and the tensor table."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Final, TypeVar

from dist_ckpt_mistral.analysis import archive_checksums
from dist_ckpt_mistral.analysis.archive_checksums import ArchivesByPlace, CheckedSpan, Fault, Piece
from dist_ckpt_mistral.errors import ConfigError, DistCkptMistralError, FormatError, SourceError, UnsupportedFormatError
from dist_ckpt_mistral.formats import hf_directory, stored_checkpoint
from dist_ckpt_mistral.formats.checkpoint_directory import METADATA_FILE
from dist_ckpt_mistral.formats.checksums import CHECKSUMS_FILE, FileSum, read_checksums
from dist_ckpt_mistral.formats.hf_directory import FileSet, tensor_spans
from dist_ckpt_mistral.formats.integrity import MANIFEST_FILE, files_in, read_manifest
from dist_ckpt_mistral.formats.kinds import Kind
from dist_ckpt_mistral.formats.legacy_torch import RANK_FILE
from dist_ckpt_mistral.formats.ocdbt import MANIFEST_FILE as INDEX_FILE
from dist_ckpt_mistral.formats.places import locate
from dist_ckpt_mistral.formats.stored_checkpoint import TORCH, StoredCheckpoint
from dist_ckpt_mistral.formats.torch_dist.common_state import COMMON_FILE, SHARDED_KEY
from dist_ckpt_mistral.gather.digest import Digest, digest
from dist_ckpt_mistral.gather.execute import DEFAULT_EFFORT, INTERRUPTED_WAIT_S, Effort, run_all
from dist_ckpt_mistral.gather.index import TensorIndex
from dist_ckpt_mistral.gather.links import Link, compose
from dist_ckpt_mistral.mapping.checkpoint_map import Twin
from dist_ckpt_mistral.mapping.configuration import Matched, checkpoint_config, matched
from dist_ckpt_mistral.mapping.source import adapter_file_set, open_adapter, open_hf
from dist_ckpt_mistral.mapping.twins import twin_differences
from dist_ckpt_mistral.messages import concise_repr, counted, listed, printable
from dist_ckpt_mistral.model.config.mistral_config import ChosenConfig, GivenConfig, chosen_config
from dist_ckpt_mistral.model.table.entries import split_state_key
from dist_ckpt_mistral.storage import paths
from dist_ckpt_mistral.storage.remote_path import RemotePath
from dist_ckpt_mistral.views.tensorstore_index import index_problems

#: Hexadecimal digits of a SHA-256 in a message, as many as Megatron shows.
_SHOWN_DIGITS: Final = 16
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One problem.

    Args:
        file: The damaged file, relative to the checked directory; None if the problem is in no single file.
        tensor: The key of the damaged stored tensor or object; None if the problem is in no single one.
        hf_names: The Hugging Face tensors with rows in the damaged data.
        what: The problem, in words.
    """

    file: str | None = None
    tensor: str | None = None
    hf_names: tuple[str, ...] = ()
    what: str

    __repr__ = concise_repr

    def __str__(self) -> str:
        """``file: tensor (Hugging Face names): what``."""
        names = "" if self.hf_names in {(), (self.tensor,)} else f" ({listed([*map(printable, self.hf_names)])})"
        tensor = None if self.tensor is None else printable(self.tensor) + names
        return ": ".join(part for part in (self.file and printable(self.file), tensor, self.what) if part)


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """The result of ``check``.

    Args:
        directory: The checked directory.
        checked: What was checked, in words.
        not_checked: What could not be checked, and why, in words.
        findings: All problems.
    """

    directory: Path
    checked: tuple[str, ...]
    not_checked: tuple[str, ...]
    findings: tuple[Finding, ...]

    __repr__ = concise_repr

    @property
    def is_sound(self) -> bool:
        """Whether there are no findings."""
        return not self.findings

    def to_json(self) -> dict[str, Any]:
        """The content of ``verify A --json``, in JSON types."""
        return {"sound": self.is_sound, **asdict(self), "directory": str(self.directory)}


def check(path: str | Path, *, config: GivenConfig | None = None, effort: Effort = DEFAULT_EFFORT) -> Check:
    """Check a Megatron checkpoint or a Hugging Face directory for damage.

    Every file is read once. Files are compared with the CRC-32 in checksums.json and the SHA-256 in integrity.json, the
    records of a checkpoint's archives with the CRC-32 that torch stored there. All tensors of the model must be
    present.

    Args:
        path: Megatron checkpoint (root, ``iter_*`` or ``release`` directory), Hugging Face directory or hub id.
        config: Configuration for a checkpoint that has lost its own.
        effort: Threads and memory to use.

    Returns:
        All problems, and what was and was not checked.

    Raises:
        FormatError: ``path`` is neither a checkpoint nor a Hugging Face directory.
        UnsupportedFormatError: ``path`` is in a format that is not read.

    Example:
        >>> dist_ckpt_mistral.check("ckpt").is_sound  # doctest: +SKIP
        True
    """
    wanted = (Kind.HF, Kind.CONSOLIDATED, Kind.CHECKPOINT, Kind.ADAPTER, Kind.BROKEN)
    place, chosen = locate(path, *wanted), chosen_config(config)
    results = _Results(directory=place.path)
    if place.kind is Kind.BROKEN:
        results.findings.append(Finding(what=place.what))
    elif place.kind is Kind.CHECKPOINT:
        _check_megatron(results, chosen, effort)
    else:
        _check_hf(results, chosen, effort, is_adapter=place.kind is Kind.ADAPTER)
    return Check(
        directory=results.directory,
        checked=tuple(results.checked),
        not_checked=tuple(results.not_checked),
        findings=tuple(results.findings),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Results:
    """The results of a check so far, as in ``Check``."""

    directory: Path
    checked: list[str] = field(default_factory=list)
    not_checked: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    def attempt(self, work: Callable[[], T]) -> T | None:
        """The result of ``work``, or None after an error. The error becomes a finding.

        Without a known configuration the tensors of the model are not checked: ConfigError goes to ``not_checked``.
        """
        try:
            return work()
        except ConfigError as error:
            self.not_checked.append(f"whether all tensors of the model are there: {error}")
        except UnsupportedFormatError:
            raise  # an unsupported format is no damage
        except DistCkptMistralError as error:
            if _is_unreachable(error, self.directory):
                raise
            self.findings.append(Finding(what=str(error)))
        return None


def _is_unreachable(error: DistCkptMistralError, directory: Path) -> bool:
    """Whether a store could not be read, which says nothing about what it holds."""
    return paths.is_url(directory) and isinstance(error, SourceError) and not isinstance(error, FormatError)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Contents:
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
class _Expected:
    """The checksums of a directory's files and tensors, and the names of the files that hold them."""

    lists: tuple[str, ...]
    sha256: Mapping[str, str]
    sums: Mapping[str, FileSum]
    tensors: Mapping[str, tuple[int, str]]

    def listed_in(self, name: str) -> str | None:
        """A list that names the file ``name``."""
        listing = {CHECKSUMS_FILE: self.sums, MANIFEST_FILE: self.sha256}
        return next((where for where, files in listing.items() if name in files), None)


def _expected(results: _Results) -> _Expected:
    """What the lists of checksums in a directory say; a damaged list is a finding."""
    own = results.attempt(lambda: read_checksums(results.directory))
    manifest = results.attempt(lambda: read_manifest(results.directory))
    tensors = {} if manifest is None else {name: (crc32, MANIFEST_FILE) for name, crc32 in manifest.crc32.items()}
    tensors |= {} if own is None else {name: (crc32, CHECKSUMS_FILE) for name, crc32 in own.tensors.items()}
    found = {CHECKSUMS_FILE: own, MANIFEST_FILE: manifest}
    return _Expected(
        lists=tuple(name for name, content in found.items() if content is not None),
        sha256={} if manifest is None else manifest.files,
        sums={} if own is None else own.files,
        tensors=tensors,
    )


def _check_hf(results: _Results, config: ChosenConfig | None, effort: Effort, *, is_adapter: bool) -> None:
    directory, contents = results.directory, _Contents()
    expected = _expected(results)
    read, opened = (adapter_file_set, open_adapter) if is_adapter else (hf_directory.read_directory, open_hf)
    file_set = results.attempt(lambda: read(directory))
    if file_set is not None:
        source = results.attempt(lambda: opened(directory, config=config))
        if source is not None:
            results.checked.append(f"that all {len(source.tensors)} tensors of the model are there")
            _compare_twins(results, source.index, source.twins, effort)
        parts = _tensor_parts(results, file_set, expected)
        contents = _Contents(
            files=parts,
            parts_of=lambda name: (parts.get(name, []), []),
            sums_in=" and ".join(sorted({where for _, where in expected.tensors.values()})),
            hf_names=_hf_names_of_pieces(() if source is None else source.links.values()),
        )
    _check_files(results, contents, expected, effort)


def _tensor_parts(results: _Results, file_set: FileSet, expected: _Expected) -> dict[str, list[CheckedSpan]]:
    """The tensors of each safetensors file, with their stored CRC-32. A listed tensor in no file is a finding."""
    spans = tensor_spans(file_set)
    stored = {name for tensors in spans.values() for name in tensors}
    results.findings.extend(
        Finding(file=where, tensor=name, what="no file holds it")
        for name, (_, where) in sorted(expected.tensors.items())
        if name not in stored
    )
    return {
        file: [
            CheckedSpan(span, expected.tensors.get(name, (None, ""))[0], Piece((name,)))
            for name, span in tensors.items()
        ]
        for file, tensors in spans.items()
    }


def _check_megatron(results: _Results, config: ChosenConfig | None, effort: Effort) -> None:
    directory, contents = results.directory, _Contents()
    expected = _expected(results)
    stored = results.attempt(lambda: stored_checkpoint.open_stored(directory, with_common_state=False))
    if stored is not None:
        has_state = stored.is_of_modules or (directory / COMMON_FILE).exists() or SHARDED_KEY in stored.objects
        if not has_state:  # as torch's own DCP saves
            results.not_checked.append(
                f"the common state: there is no {COMMON_FILE}, and Megatron loads nothing without"
            )
        match = results.attempt(partial(_match, stored, config))
        links: list[list[Link]] = []
        if match is not None:
            model, stored = match.found, match.stored
            results.checked.append(f"that all {len(model.names())} tensors of the model are there")
            found = results.attempt(partial(_twins, match))
            if found is not None:
                _compare_twins(results, *found, effort)
            links = [model.links(tensor) for tensor in model.table.hf_tensors().values() if not tensor.is_alias]
        archives, faults = archive_checksums.archives_by_file(stored)
        results.checked.append(
            f"that the chunks of {len(stored.tensors)} stored tensors leave no gap and do not overlap"
        )
        contents = _Contents(
            files=archives,
            parts_of=_parts_reader(stored, archives),
            hf_names=_hf_names_of_pieces(links),
            sums_in="its archive",
            named_in="its directory" if stored.is_bare else METADATA_FILE,
        )
        results.findings.extend(contents.findings(METADATA_FILE, faults))
        if (directory / INDEX_FILE).is_file():
            results.checked.append(f"that the index in {INDEX_FILE} is that of these files")
            for problem in results.attempt(lambda: index_problems(directory)) or ():
                results.findings.append(Finding(file=INDEX_FILE, what=f"out of date, run index again: {problem}"))
    _check_files(results, contents, expected, effort)


def _parts_reader(
    stored: StoredCheckpoint, archives: Mapping[str, ArchivesByPlace]
) -> Callable[[str], tuple[list[CheckedSpan], list[Fault]]]:
    """The function that finds the parts of a data file: records of many archives, or of the one that a rank saved."""

    def parts_of(name: str) -> tuple[list[CheckedSpan], list[Fault]]:
        is_rank = stored.backend == TORCH and Path(name).name == RANK_FILE
        read = archive_checksums.read_records if is_rank else archive_checksums.read_parts
        return read(stored.directory / name, archives.get(name, {}))

    return parts_of


def _match(stored: StoredCheckpoint, config: ChosenConfig | None) -> Matched:
    stored = stored_checkpoint.with_state(stored)
    return matched(stored, checkpoint_config(stored, config))


def _twins(match: Matched) -> tuple[TensorIndex, tuple[Twin, ...]]:
    """All tensors that are stored twice, and an index that has them and what they repeat."""
    twins = match.found.twins(match.stored.tensors)
    copies = () if match.ranks is None else match.ranks.copies
    mains = {link.source for twin in copies for link in twin.links}
    index = match.stored.index(sorted({name for twin in twins for name in (twin.name, twin.main)} | mains))
    if match.ranks is not None:
        names = [twin.name for twin in copies]
        index = index.joined(match.ranks.raw.index(names), names)
    return index, (*twins, *copies)


def _compare_twins(results: _Results, index: TensorIndex, twins: Sequence[Twin], effort: Effort) -> None:
    """Compare tensors that are stored twice."""
    differences = results.attempt(lambda: [*twin_differences(index, twins, effort)]) if twins else None
    if differences is not None:
        results.checked.append(
            f"{counted(len(twins), 'tensor')} against what is stored a second time for the same weights"
        )
        results.findings.extend(Finding(tensor=twin.name, what=what) for twin, what in differences)


def _hf_names_of_pieces(links: Iterable[Iterable[Link]]) -> Callable[[Piece], tuple[str, ...]]:
    """A function that returns the Hugging Face tensors with rows, or optimizer state of rows, in a piece.

    ``links`` are those of all Hugging Face tensors. The names are in the order of the links.
    """
    by_source: dict[str, list[Link]] = defaultdict(list)
    for link in chain.from_iterable(links):
        by_source[link.source].append(link)

    def hf_names(piece: Piece) -> tuple[str, ...]:
        keys = [(split_state_key(name) or ("", name))[1] for name in piece.names]
        box = Link(source="", source_offset=piece.offset, target="", target_offset=piece.offset, shape=piece.shape)
        return tuple(
            dict.fromkeys(link.target for key in keys for link in by_source.get(key, ()) if _may_overlap(box, link))
        )

    return hf_names


def _may_overlap(box: Link, link: Link) -> bool:
    """Whether a box shares elements with a link's source, or has another number of axes, so that it may."""
    return len(box.target_offset) != len(link.source_offset) or compose(box, link) is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class _FileCheck:
    """The findings in one file, the number of parts whose CRC-32 was compared, and of parts without one."""

    findings: list[Finding]
    num_parts: int = 0
    num_bare_parts: int = 0


def _check_files(results: _Results, contents: _Contents, expected: _Expected, effort: Effort) -> None:
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


def _is_listed(name: str, expected: _Expected) -> bool:
    """Whether a file has a checksum of its own, or is itself a list of them."""
    return expected.listed_in(name) is not None or name in expected.lists


def _check_file(directory: Path, contents: _Contents, name: str, expected: _Expected, effort: Effort) -> _FileCheck:
    """Compare a file and its parts with their checksums, in one read."""
    path, sha256, file_sum = directory / name, expected.sha256.get(name), expected.sums.get(name)
    if path.parent != directory and paths.leads_outside(path.parent, directory):
        what = "it was not read: its folder is a link out of the directory"
        return _FileCheck(findings=[Finding(file=name, what=what)])
    try:
        parts, faults = contents.parts_of(name)
        actual = digest(path, [part.span for part in parts], sha256=sha256 is not None, effort=effort)
    except SourceError as error:
        if _is_unreachable(error, directory):
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
