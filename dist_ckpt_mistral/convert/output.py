"""Carrying out a byte plan into a new output: every rank copies its share, one of them publishes, all or nothing."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from dist_ckpt_mistral.convert.conversion import REFUSE, Loss, LossPolicy
from dist_ckpt_mistral.convert.journal import Journal, Recipe, begin, has_seen, has_work, may_resume
from dist_ckpt_mistral.convert.manifest import NewManifest, write_manifest
from dist_ckpt_mistral.convert.ranks import Ranks
from dist_ckpt_mistral.errors import OutputError
from dist_ckpt_mistral.gather.execute import Copied, Effort, execute, run_all
from dist_ckpt_mistral.gather.plan import BytePlan
from dist_ckpt_mistral.storage import documents, local
from dist_ckpt_mistral.storage.local import TargetFile
from dist_ckpt_mistral.storage.staging import Staging

_LOG = logging.getLogger(__name__)

#: CRC-32 of every segment of a plan, by its number; empty if none were asked for.
Checksums = Mapping[int, int]


def write_output(
    output: Path,
    plan: BytePlan,
    file_bytes: Mapping[str, int],
    *,
    complete: Callable[[Path, Mapping[int, TargetFile], Checksums], None],
    manifest: NewManifest | None,
    checksums: bool,
    recipe: Recipe,
    beside: Sequence[Path],
    overwrite: bool,
    resume: bool,
    dry_run: bool,
    effort: Effort,
    ranks: Ranks,
    losses: LossPolicy = REFUSE,
) -> tuple[Loss, ...]:
    """Write ``plan`` into new files (names relative to ``output``, sizes in bytes; in the order of its target files).

    ``complete`` then adds what else belongs to the output, copies of ``beside`` among it, on the first rank, given the
    directory that will become ``output``, the open files and the checksums; ``manifest`` then tells what all files
    hold. Nothing appears at ``output`` unless all of this succeeds on all ranks.

    With ``dry_run`` all is checked that can be known before the first byte is written, and nothing is touched.

    A run that fails, is interrupted or is killed leaves the parts that it has copied, if any, beside ``output``: with
    ``resume`` the next run keeps those that still have their checksums, unless ``recipe`` or plan are others; without,
    it removes them. So a full disk after hours costs no more than a kill: the error says how to go on.

    Returns which values a conversion of element types destroyed, where ``losses`` allows that.

    Raises OutputError where the output cannot be written or the run not be resumed, or where values would be destroyed,
    FormatError where a source changes while it is read, and whatever went wrong on any rank.
    """
    names, staging = list(file_bytes), Staging(output)
    with _left_behind(staging, recipe), recipe.inputs:
        must_prove = ranks.on_first(
            lambda: _begin(
                staging, plan, file_bytes, recipe, beside, overwrite=overwrite, resume=resume, dry_run=dry_run
            )
        )
        if dry_run:
            return ()

        numbers = share(plan, ranks)
        own = {
            file: staging.output / names[file] for file in sorted({plan.segments[number].file for number in numbers})
        }

        def copy_share() -> dict[int, Copied]:
            with (
                _as_output_errors(staging),
                _opened(own) as targets,
                contextlib.closing(Journal(staging.path, ranks.rank, plan, targets, must_prove=must_prove)) as journal,
            ):
                return execute(plan, targets, effort=effort, numbers=numbers, checksums=checksums, record=journal)

        copied = {number: each for share in ranks.together(copy_share) for number, each in share.items()}
        found = ranks.on_first(lambda: losses.accept(plan, copied))

        def finish() -> None:
            everything = {file: staging.output / name for file, name in enumerate(names)}
            with _as_output_errors(staging), _opened(everything) as targets:
                complete(staging.output, targets, {number: each.crc32 for number, each in copied.items()})

        def sync_share() -> None:
            with _as_output_errors(staging), _opened(own) as targets:
                _sync(targets, effort)

        def publish() -> None:
            with _as_output_errors(staging):
                staging.publish(overwrite=overwrite, durable=effort.durable)

        ranks.on_first(finish)
        ranks.together(lambda: local.require_unchanged(recipe.inputs))  # each rank what it has read
        if manifest is not None:
            with _as_output_errors(staging):
                write_manifest(staging.output, manifest, effort=effort, ranks=ranks)
        if effort.durable:
            ranks.together(sync_share)  # the disk has been writing meanwhile
        ranks.on_first(publish)
    return found


def _begin(
    staging: Staging,
    plan: BytePlan,
    file_bytes: Mapping[str, int],
    recipe: Recipe,
    beside: Sequence[Path],
    *,
    overwrite: bool,
    resume: bool,
    dry_run: bool,
) -> bool:
    """Hold the staging directory, with all files in their final sizes: new ones, or those of a run to resume.

    Returns whether what is kept must be proven: then sources are not the very files any more that it was copied from.
    """
    documents.total_bytes([path for path in plan.files_to_read if path not in recipe.inputs.opened])  # or raises
    staging.require_room(sum(file_bytes.values()) + documents.total_bytes(beside))
    fingerprint = recipe.fingerprint(plan, file_bytes)
    if dry_run:
        staging.require_free(overwrite=overwrite, resume=resume)
    else:
        staging.hold(overwrite=overwrite, resume=resume)
    with _as_output_errors(staging):
        resumed = resume and may_resume(staging, fingerprint)
        must_prove = resumed and not has_seen(staging, recipe)
        if dry_run:
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
def _opened(paths: Mapping[int, Path]) -> Iterator[dict[int, TargetFile]]:
    local.allow_open_files(len(paths))
    targets: dict[int, TargetFile] = {}
    try:
        for number, path in paths.items():
            targets[number] = TargetFile(path)
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
