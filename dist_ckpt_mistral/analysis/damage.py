"""Whether one checkpoint or Hugging Face directory is sound, by everything that it brings along to tell it by."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, Final, TypeVar

from dist_ckpt_mistral.analysis import archive_checksums
from dist_ckpt_mistral.analysis.archive_checksums import CheckedSpan, Fault, Piece
from dist_ckpt_mistral.errors import ConfigError, DistCkptMistralError, FormatError, UnsupportedFormatError
from dist_ckpt_mistral.formats import checkpoint_directory, hf_directory, stored_checkpoint
from dist_ckpt_mistral.formats.checkpoint_directory import METADATA_FILE
from dist_ckpt_mistral.formats.hf_directory import FileSet, tensor_spans
from dist_ckpt_mistral.formats.integrity import MANIFEST_FILE, Manifest, files_in, read_manifest
from dist_ckpt_mistral.formats.places import Kind, locate
from dist_ckpt_mistral.formats.stored_checkpoint import ZARR, StoredCheckpoint
from dist_ckpt_mistral.formats.torch_dist import common_state
from dist_ckpt_mistral.formats.torch_dist.common_state import COMMON_FILE, SHARDED_KEY
from dist_ckpt_mistral.gather.digest import Digest, digest
from dist_ckpt_mistral.gather.execute import DEFAULT_EFFORT, Effort, run_all
from dist_ckpt_mistral.gather.index import TensorIndex
from dist_ckpt_mistral.gather.links import Link, compose
from dist_ckpt_mistral.mapping.checkpoint_map import CheckpointMap, Twin
from dist_ckpt_mistral.mapping.configuration import checkpoint_config, matched
from dist_ckpt_mistral.mapping.source import open_hf, twin_differences
from dist_ckpt_mistral.messages import listed, printable
from dist_ckpt_mistral.model.config.mistral_config import ChosenConfig, GivenConfig, chosen_config
from dist_ckpt_mistral.model.table.entries import split_state_key
from dist_ckpt_mistral.storage import paths

#: As much of a SHA-256 as an error shows, like Megatron's own.
_SHOWN: Final = 16
T = TypeVar("T")


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
    parts_of: Callable[[str], tuple[list[CheckedSpan], list[Fault]]] = lambda _: ([], [])
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


def _wrong_parts(parts: list[CheckedSpan], found: Digest, sums_in: str) -> Iterator[Fault]:
    for part, crc32 in zip(parts, found.crc32, strict=True):
        if part.crc32 not in {None, crc32}:
            where = f"bytes {part.span.position} to {sum(part.span)}"
            yield Fault(part.piece, f"{where} have the CRC-32 {crc32:08x}: expected {part.crc32:08x} ({sums_in})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """What a check found wrong; what it looked at, and what it could not look at and why, in words."""

    directory: Path
    checked: tuple[str, ...]
    not_checked: tuple[str, ...]
    findings: tuple[Finding, ...]

    @property
    def is_sound(self) -> bool:
        """Whether nothing that was checked is wrong."""
        return not self.findings

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"sound": self.is_sound, **asdict(self), "directory": str(self.directory)}


def check(path: str | Path, *, config: GivenConfig | None = None, effort: Effort = DEFAULT_EFFORT) -> Check:
    """Look for damage in a Megatron checkpoint (root or iteration), a Hugging Face directory or a hub id.

    Every file is read once and held against integrity.json, every record of a checkpoint against the CRC-32 in its
    archive; and all tensors of the model must be there. ``config`` is for checkpoints that do not tell theirs. Raises
    DistCkptMistralError if ``path`` is none of them or of a format that is not read; what is wrong becomes a finding.
    """
    place, known = locate(path, Kind.HF, Kind.CONSOLIDATED, Kind.CHECKPOINT, Kind.BROKEN), chosen_config(config)
    if place.kind is Kind.BROKEN:
        return _Notes().sum_up(place.path, Finding(what=place.what))
    if place.kind is Kind.CHECKPOINT:
        return _check_megatron(place.path, known, effort)
    return _check_hf(place.path, known, effort)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Notes:
    """What a check has come across so far."""

    checked: list[str] = field(default_factory=list)
    not_checked: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    def attempt(self, work: Callable[[], T]) -> T | None:
        """The result of ``work``, or None if it failed, which is a finding; or no model is known to check against."""
        try:
            return work()
        except ConfigError as error:
            self.not_checked.append(f"whether all tensors of the model are there: {error}")
        except UnsupportedFormatError:
            raise  # what cannot be read is not damaged
        except DistCkptMistralError as error:
            self.findings.append(Finding(what=str(error)))
        return None

    def compare(self, index: TensorIndex, twins: Sequence[Twin], effort: Effort) -> None:
        """Hold what is stored a second time against the first."""
        found = self.attempt(lambda: [*twin_differences(index, twins, effort)]) if twins else None
        if found is not None:
            self.checked.append(f"{len(twins)} tensors against what is stored a second time for the same weights")
            self.findings.extend(Finding(tensor=twin.name, what=what) for twin, what in found)

    def check_files(self, contents: Contents, manifest: Manifest | None, effort: Effort) -> Check:
        """Check the files too, and sum up."""
        done = check_files(contents, manifest, effort)
        if done.num_parts:
            self.checked.append(f"{done.num_parts} parts of files by their CRC-32")
        if done.num_bare_parts and manifest is None:
            self.not_checked.append(f"{done.num_bare_parts} parts of files that were stored without a checksum")
        if manifest is None:
            self.not_checked.append(f"all other bytes, for want of a sound {MANIFEST_FILE}")
        else:
            self.checked.append(f"{done.num_files} files by their SHA-256 in {MANIFEST_FILE}")
        if done.unlisted:
            self.not_checked.append(
                f"files that {MANIFEST_FILE} does not list: {listed([*map(printable, done.unlisted)])}"
            )
        return self.sum_up(contents.directory, *done.findings)

    def sum_up(self, directory: Path, *more: Finding) -> Check:
        """The check as far as it went."""
        return Check(
            directory=directory,
            checked=tuple(self.checked),
            not_checked=tuple(self.not_checked),
            findings=(*self.findings, *more),
        )


def _check_hf(directory: Path, config: ChosenConfig | None, effort: Effort) -> Check:
    notes = _Notes()
    manifest = notes.attempt(lambda: read_manifest(directory))
    file_set = notes.attempt(lambda: hf_directory.read_directory(directory))
    if file_set is None:
        return notes.check_files(Contents(directory=directory), manifest, effort)
    source = notes.attempt(lambda: open_hf(directory, config=config))
    if source is not None:
        notes.checked.append(f"that all {len(source.tensors)} tensors of the model are there")
        notes.compare(source.index, source.twins, effort)
    parts = _tensor_parts(file_set, {} if manifest is None else manifest.crc32, notes)
    contents = Contents(
        directory=directory,
        files=parts,
        parts_of=lambda name: (parts.get(name, []), []),
        hf_names=_HfNames(() if source is None else source.links.values()),
    )
    return notes.check_files(contents, manifest, effort)


def _tensor_parts(file_set: FileSet, crc32: Mapping[str, str], notes: _Notes) -> dict[str, list[CheckedSpan]]:
    """The tensors of safetensors files, and the checksums that a manifest tells of them."""
    spans = tensor_spans(file_set)
    absent = crc32.keys() - {name for tensors in spans.values() for name in tensors}
    notes.findings.extend(Finding(file=MANIFEST_FILE, tensor=name, what="no file holds it") for name in sorted(absent))
    values = {name: int(value, 16) for name, value in crc32.items()}
    return {
        file: [CheckedSpan(span, values.get(name), Piece((name,))) for name, span in tensors.items()]
        for file, tensors in spans.items()
    }


def _check_megatron(directory: Path, config: ChosenConfig | None, effort: Effort) -> Check:
    notes = _Notes()
    manifest = notes.attempt(lambda: read_manifest(directory))
    stored = notes.attempt(lambda: stored_checkpoint.open_stored(directory, with_common_state=False))
    if stored is None:
        return notes.check_files(Contents(directory=directory), manifest, effort)
    if not (directory / COMMON_FILE).exists() and SHARDED_KEY not in stored.objects:  # so saves torch by itself
        notes.not_checked.append(f"the common state: there is no {COMMON_FILE}, and Megatron loads nothing without")
    found = notes.attempt(lambda: _match(stored, config))
    links: list[list[Link]] = []
    if found is not None:
        notes.checked.append(f"that all {len(found.names())} tensors of the model are there")
        _compare_twins(stored, found, notes, effort)
        links = [found.links(tensor) for tensor in found.table.hf_tensors().values() if not tensor.is_alias]
    archives, faults = archive_checksums.archives_by_file(stored)
    notes.checked.append(f"that the chunks of {len(stored.tensors)} stored tensors leave no gap and do not overlap")
    contents = Contents(
        directory=directory,
        files=archives,
        parts_of=lambda name: archive_checksums.read_parts(directory / name, archives.get(name, {})),
        hf_names=_HfNames(links),
        sums_in="its archive",
        named_in="its directory" if stored.backend == ZARR else checkpoint_directory.METADATA_FILE,
    )
    notes.findings.extend(contents.findings(checkpoint_directory.METADATA_FILE, faults))
    return notes.check_files(contents, manifest, effort)


def _compare_twins(stored: StoredCheckpoint, found: CheckpointMap, notes: _Notes, effort: Effort) -> None:
    """Hold against each other what the checkpoint stores under two keys."""
    twins = found.twins(stored.tensors)
    names = {name for twin in twins for name in (twin.name, twin.main)}
    index = notes.attempt(lambda: stored.index(sorted(names)))
    if index is not None:
        notes.compare(index, twins, effort)


def _match(stored: StoredCheckpoint, config: ChosenConfig | None) -> CheckpointMap:
    state = common_state.read(stored.directory, stored.objects.get(common_state.SHARDED_KEY))
    stored = replace(stored, common_state=state)
    return matched(stored, checkpoint_config(stored, config)).found


class _HfNames:
    """Of a box of a stored tensor, the Hugging Face tensors that it holds rows of, or optimizer state of rows."""

    def __init__(self, links: Iterable[Iterable[Link]]) -> None:
        """Know all ``links`` to Hugging Face tensors; none are known without a model."""
        self._links: dict[str, list[Link]] = defaultdict(list)
        for link in chain.from_iterable(links):
            self._links[link.source].append(link)

    def __call__(self, piece: Piece) -> tuple[str, ...]:
        """The names, in table order."""
        keys = [(split_state_key(name) or ("", name))[1] for name in piece.names]
        box = Link(source="", source_offset=piece.offset, target="", target_offset=piece.offset, shape=piece.shape)
        links = [link for key in keys for link in self._links.get(key, ()) if _meet(box, link)]
        return tuple(dict.fromkeys(link.target for link in links))


def _meet(box: Link, link: Link) -> bool:
    """Whether a box shares elements with a link's source; one that is stored in another shape may."""
    return len(box.target_offset) != len(link.source_offset) or compose(box, link) is not None
