"""Check one Megatron checkpoint or Hugging Face directory for damage, with its checksums and the tensor table."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path

from dist_ckpt_mistral.analysis import archive_checksums
from dist_ckpt_mistral.analysis.archive_checksums import ArchivesByPlace, CheckedSpan, Fault, Piece
from dist_ckpt_mistral.analysis.file_sums import Contents, ExpectedSums, check_files, expected_sums
from dist_ckpt_mistral.analysis.findings import Check, Finding, Results
from dist_ckpt_mistral.arguments import require_types
from dist_ckpt_mistral.formats import hf_directory, stored_checkpoint
from dist_ckpt_mistral.formats.checkpoint_directory import METADATA_FILE
from dist_ckpt_mistral.formats.hf_directory import FileSet, tensor_spans
from dist_ckpt_mistral.formats.kinds import Kind
from dist_ckpt_mistral.formats.legacy_torch import RANK_FILE
from dist_ckpt_mistral.formats.ocdbt import MANIFEST_FILE as INDEX_FILE
from dist_ckpt_mistral.formats.places import locate
from dist_ckpt_mistral.formats.stored_checkpoint import TORCH, StoredCheckpoint
from dist_ckpt_mistral.formats.torch_dist.common_state import COMMON_FILE, SHARDED_KEY
from dist_ckpt_mistral.gather.execute import DEFAULT_EFFORT, Effort
from dist_ckpt_mistral.gather.index import TensorIndex
from dist_ckpt_mistral.gather.links import Link, compose
from dist_ckpt_mistral.mapping.checkpoint_map import Twin
from dist_ckpt_mistral.mapping.configuration import Matched, checkpoint_config, matched
from dist_ckpt_mistral.mapping.source import adapter_file_set, open_adapter, open_hf
from dist_ckpt_mistral.mapping.twins import twin_differences
from dist_ckpt_mistral.messages import counted
from dist_ckpt_mistral.model.config.mistral_config import ChosenConfig, GivenConfig, chosen_config
from dist_ckpt_mistral.model.table.entries import split_state_key
from dist_ckpt_mistral.views.tensorstore_index import index_problems


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
    require_types(check, **locals())
    wanted = (Kind.HF, Kind.CONSOLIDATED, Kind.CHECKPOINT, Kind.ADAPTER, Kind.BROKEN)
    place, chosen = locate(path, *wanted), chosen_config(config)
    results = Results(directory=place.path)
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


def _check_hf(results: Results, config: ChosenConfig | None, effort: Effort, *, is_adapter: bool) -> None:
    directory, contents = results.directory, Contents()
    expected = expected_sums(results)
    read, opened = (adapter_file_set, open_adapter) if is_adapter else (hf_directory.read_directory, open_hf)
    file_set = results.attempt(lambda: read(directory))
    if file_set is not None:
        source = results.attempt(lambda: opened(directory, config=config))
        if source is not None:
            results.checked.append(f"that all {len(source.tensors)} tensors of the model are there")
            _compare_twins(results, source.index, source.twins, effort)
        parts = _tensor_parts(results, file_set, expected)
        contents = Contents(
            files=parts,
            parts_of=lambda name: (parts.get(name, []), []),
            sums_in=" and ".join(sorted({where for _, where in expected.tensors.values()})),
            hf_names=_hf_names_of_pieces(() if source is None else source.links.values()),
        )
    check_files(results, contents, expected, effort)


def _tensor_parts(results: Results, file_set: FileSet, expected: ExpectedSums) -> dict[str, list[CheckedSpan]]:
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


def _check_megatron(results: Results, config: ChosenConfig | None, effort: Effort) -> None:
    directory, contents = results.directory, Contents()
    expected = expected_sums(results)
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
        contents = Contents(
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
    check_files(results, contents, expected, effort)


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


def _compare_twins(results: Results, index: TensorIndex, twins: Sequence[Twin], effort: Effort) -> None:
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
