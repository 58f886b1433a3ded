"""How an output becomes whole or nothing: every rank copies its share of a plan, and the first one publishes."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from dist_ckpt_mistral.convert.conversion import REFUSE, Loss, LossPolicy
from dist_ckpt_mistral.convert.journal import Journal, Recipe, begin, has_seen, has_work, may_resume
from dist_ckpt_mistral.convert.ranks import Ranks
from dist_ckpt_mistral.errors import ConfigError, OutputError
from dist_ckpt_mistral.formats.hf_directory import TensorSpans
from dist_ckpt_mistral.formats.integrity import MANIFEST_FILE, Manifest, files_in
from dist_ckpt_mistral.gather.digest import Digest, digest
from dist_ckpt_mistral.gather.execute import Copied, Effort, execute, run_all
from dist_ckpt_mistral.gather.plan import BytePlan
from dist_ckpt_mistral.storage import documents, local
from dist_ckpt_mistral.storage.local import TargetFile
from dist_ckpt_mistral.storage.staging import Staging

_LOG = logging.getLogger(__name__)

#: CRC-32 of every segment of a plan, by its number; empty if none were asked for.
Checksums = Mapping[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """How a conversion writes what it makes.

    Args:
        overwrite: Replace an existing output, once the new one is complete.
        resume: Keep what an interrupted run has copied into the same output, where its checksums are right.
        dry_run: Check everything that can be checked before the first byte is written, and touch nothing.
        manifest: Add integrity.json, the checksums of all files, for ``check`` and megatron-core 0.18 or newer.
        durable: Publish the output only when its bytes are on the disk, not when the operating system has them.
        max_file_bytes: Maximum size of one file of tensors, for ``to_hf`` and ``migrate``; a larger tensor or chunk
            gets a file of its own. ``from_hf`` and ``reshard`` write a file for each rank of the layout.

    Raises:
        ConfigError: ``max_file_bytes`` is below 1.

    Example:
        >>> dist_ckpt_mistral.to_hf("ckpt", "out", output=Output(overwrite=True))  # doctest: +SKIP
    """

    overwrite: bool = False
    resume: bool = False
    dry_run: bool = False
    manifest: bool = True
    durable: bool = True
    max_file_bytes: int = 5_000_000_000

    def __post_init__(self) -> None:
        """Refuse a size that no file can have."""
        if self.max_file_bytes < 1:
            raise ConfigError(f"max_file_bytes: expected at least 1, got {self.max_file_bytes}")


#: A new output, whole, on the disk and with its checksums.
DEFAULT_OUTPUT: Final = Output()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class NewFiles:
    """What one run writes.

    ``file_bytes`` has the files that ``plan`` fills: names relative to the output -> sizes in bytes, in the order of
    the plan's target files. ``complete`` adds what else belongs to the output, copies of ``beside`` among it: it gets
    the directory that will become the output, the open files, and the CRC-32 of all segments if ``checksums`` is set.
    ``manifest`` says what a manifest is to tell of. ``recipe`` is what the output depends on, and ``losses`` what to do
    where a conversion of element types destroys values.
    """

    plan: BytePlan
    file_bytes: Mapping[str, int]
    complete: Callable[[Path, Mapping[int, TargetFile], Checksums], None]
    manifest: NewManifest
    checksums: bool
    recipe: Recipe
    beside: Sequence[Path]
    losses: LossPolicy = REFUSE


def write_output(target: Path, new: NewFiles, *, output: Output, effort: Effort, ranks: Ranks) -> tuple[Loss, ...]:
    """Write ``new`` to ``target``: every rank copies its share of the plan, and the first one publishes.

    Nothing appears at ``target`` unless all of it succeeds on all ranks. With ``output.dry_run`` all is checked that
    can be known before the first byte is written, and nothing is touched.

    A run that fails, is interrupted or is killed leaves the parts that it has copied, if any, beside ``target``: with
    ``output.resume`` the next run keeps those that still have their checksums, unless recipe or plan are others;
    without, it removes them. So a full disk after hours costs no more than a kill: the error says how to go on.

    Returns:
        Which values a conversion of element types destroyed, where that was allowed.

    Raises:
        OutputError: The output cannot be written, the run not be resumed, or values would be destroyed.
        FormatError: A source changed while it was read.
        DistCkptMistralError: Whatever went wrong on another rank.
    """
    plan, recipe = new.plan, new.recipe
    names, staging = list(new.file_bytes), Staging(target)
    with _left_behind(staging, recipe), recipe.inputs:
        must_prove = ranks.on_first(lambda: _begin(staging, new, output))
        if output.dry_run:
            return ()

        numbers = share(plan, ranks)
        my_files = {
            file: staging.output / names[file] for file in sorted({plan.segments[number].file for number in numbers})
        }

        def copy_share() -> dict[int, Copied]:
            with (
                _as_output_errors(staging),
                _opened(my_files, durable=output.durable) as targets,
                contextlib.closing(Journal(staging.path, ranks.rank, plan, targets, must_prove=must_prove)) as journal,
            ):
                return execute(plan, targets, effort=effort, numbers=numbers, checksums=new.checksums, record=journal)

        copied = {number: each for share in ranks.together(copy_share) for number, each in share.items()}
        found = ranks.on_first(lambda: new.losses.accept(plan, copied))

        def finish() -> None:
            everything = {file: staging.output / name for file, name in enumerate(names)}
            with _as_output_errors(staging), _opened(everything) as targets:
                new.complete(staging.output, targets, {number: each.crc32 for number, each in copied.items()})

        def sync_share() -> None:
            with _as_output_errors(staging), _opened(my_files) as targets:
                _sync(targets, effort)

        def publish() -> None:
            with _as_output_errors(staging):
                staging.publish(overwrite=output.overwrite, durable=output.durable)

        ranks.on_first(finish)
        ranks.together(lambda: local.require_unchanged(recipe.inputs))  # each rank what it has read
        if output.manifest:
            with _as_output_errors(staging):
                write_manifest(staging.output, new.manifest, effort=effort, ranks=ranks)
        if output.durable:
            ranks.together(sync_share)  # the disk has been writing meanwhile
        ranks.on_first(publish)
    return found


def _begin(staging: Staging, new: NewFiles, output: Output) -> bool:
    """Hold the staging directory, with all files in their final sizes: new ones, or those of a run to resume.

    Returns whether what is kept must be proven: then sources are not the very files any more that it was copied from.
    """
    plan, file_bytes, recipe = new.plan, new.file_bytes, new.recipe
    documents.total_bytes([path for path in plan.files_to_read if path not in recipe.inputs.opened])  # or raises
    staging.require_room(sum(file_bytes.values()) + documents.total_bytes(new.beside))
    fingerprint = recipe.fingerprint(plan, file_bytes)
    if output.dry_run:
        staging.require_free(overwrite=output.overwrite, resume=output.resume)
    else:
        staging.hold(overwrite=output.overwrite, resume=output.resume)
    with _as_output_errors(staging):
        resumed = output.resume and may_resume(staging, fingerprint)
        must_prove = resumed and not has_seen(staging, recipe)
        if output.dry_run:
            return must_prove
        if resumed:
            _LOG.info(
                "resuming %s: what lies in %s is kept where its checksums are right%s",
                staging.target,
                staging.path,
                ", also those of the sources, which may have changed" if must_prove else "",
            )
            staging.keep(file_bytes)
        else:
            staging.clear()
        for name, num_bytes in file_bytes.items():
            (staging.output / name).parent.mkdir(parents=True, exist_ok=True)
            TargetFile(staging.output / name, num_bytes, kept=resumed).close()
        if not resumed:
            begin(staging, fingerprint, recipe)
    return must_prove


@contextlib.contextmanager
def _left_behind(staging: Staging, recipe: Recipe) -> Iterator[None]:
    """After a failure: what was copied, if a later run can go on with it. The error tells."""
    try:
        yield
    except BaseException as error:
        if staging.is_published:
            error.add_note(f"{staging.target} is complete.")
        elif staging.is_held:
            error.add_note("Nothing was published.")
            if has_work(staging) and not recipe.inputs.looks_changed():
                error.add_note(f"--resume continues what is kept in {staging.path}.")
                staging.release()
            else:
                staging.remove()
        raise


def _sync(targets: Mapping[int, TargetFile], effort: Effort) -> None:
    """Make the content of all files durable."""
    files = list(targets.values())
    run_all(lambda number: files[number].sync(), range(len(files)), workers=effort.threads)


def share(plan: BytePlan, ranks: Ranks) -> list[int]:
    """The segments that this rank copies: a run of neighbours, so that ranks write different files, of equal bytes."""
    total = max(1, plan.num_bytes)
    numbers, before = [], 0
    for number, segment in enumerate(plan.segments):
        middle = before + segment.stored_bytes // 2
        if min(ranks.world_size - 1, middle * ranks.world_size // total) == ranks.rank:
            numbers.append(number)
        before += segment.stored_bytes
    return numbers


@contextlib.contextmanager
def _opened(paths: Mapping[int, Path], *, durable: bool = False) -> Iterator[dict[int, TargetFile]]:
    local.allow_open_files(len(paths))
    targets: dict[int, TargetFile] = {}
    try:
        for number, path in paths.items():
            targets[number] = TargetFile(path, durable=durable)
        yield targets
    finally:
        for target in targets.values():
            target.close()


@contextlib.contextmanager
def _as_output_errors(staging: Staging) -> Iterator[None]:
    """What the operating system says, as an error that names the file of the output."""
    try:
        yield
    except OSError as error:
        path = Path(error.filename or staging.output)
        if path.is_relative_to(staging.output):
            path = staging.target / path.relative_to(staging.output)
        raise OutputError(f"cannot write {path}: {error.strerror or error}.") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class NewManifest:
    """A manifest to write into ``folder`` of an output, and which tensors it shall tell the CRC-32 of."""

    folder: Path
    tensors: TensorSpans = field(default_factory=dict)


def write_manifest(output: Path, new: NewManifest, *, effort: Effort, ranks: Ranks) -> None:
    """Write the manifest of ``new.folder`` in ``output``, whose files are complete."""
    directory = output / new.folder
    names = ranks.on_first(lambda: _by_size(directory))[ranks.rank :: ranks.world_size]
    shares = ranks.together(lambda: _digests(directory, names, new.tensors, effort))
    ranks.on_first(
        lambda: _write_file(directory, new.tensors, {name: each for own in shares for name, each in own.items()})
    )


def _by_size(directory: Path) -> list[str]:
    """The files, the largest first, so that ranks and threads end together."""
    return sorted(files_in(directory), key=lambda name: (directory / name).stat().st_size, reverse=True)


def _digests(directory: Path, names: Sequence[str], tensors: TensorSpans, effort: Effort) -> dict[str, Digest]:
    def work(number: int) -> Digest:
        spans = tensors.get(names[number], {})
        return digest(directory / names[number], [*spans.values()], sha256=True, effort=effort)

    return dict(zip(names, run_all(work, range(len(names)), workers=effort.threads), strict=True))


def _write_file(directory: Path, tensors: TensorSpans, found: Mapping[str, Digest]) -> None:
    crc32 = {
        name: f"{value:08x}"
        for file, spans in tensors.items()
        for name, value in zip(spans, found[file].crc32, strict=True)
    }
    files = {name: str(each.sha256) for name, each in found.items()}
    documents.write_bytes(directory / MANIFEST_FILE, Manifest(files=files, crc32=crc32).to_json())
