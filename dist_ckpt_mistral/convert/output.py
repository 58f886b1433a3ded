"""Write an output completely or not at all: every rank copies its share of a plan, and the first rank publishes it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, TypeAlias

from zlib_ng import zlib_ng

from dist_ckpt_mistral.arguments import require_types, require_whole
from dist_ckpt_mistral.convert.conversion import REFUSE, Loss, LossPolicy
from dist_ckpt_mistral.convert.job_progress import begin_phase, copying
from dist_ckpt_mistral.convert.journal import Journal, Recipe, begin, has_seen, has_work, may_resume
from dist_ckpt_mistral.convert.ranks import Ranks
from dist_ckpt_mistral.errors import OutputError
from dist_ckpt_mistral.formats.checksums import CHECKSUMS_FILE, FileChecksums, FileSum
from dist_ckpt_mistral.formats.hf_directory import TensorSpans
from dist_ckpt_mistral.formats.integrity import MANIFEST_FILE, Manifest, files_in
from dist_ckpt_mistral.formats.kinds import Kind
from dist_ckpt_mistral.formats.places import require_not_swapped, resolve_directory
from dist_ckpt_mistral.gather.digest import SummedSpan, crc32_of_file, digest
from dist_ckpt_mistral.gather.execute import Copied, Effort, Target, execute, run_all
from dist_ckpt_mistral.gather.parts import Around
from dist_ckpt_mistral.gather.plan import BytePlan
from dist_ckpt_mistral.gather.progress import NO_PROGRESS
from dist_ckpt_mistral.messages import concise_repr
from dist_ckpt_mistral.storage import documents, local, paths, sources
from dist_ckpt_mistral.storage.local import Span, TargetFile
from dist_ckpt_mistral.storage.remote_path import RemotePath
from dist_ckpt_mistral.storage.staging import Staging

_LOG = logging.getLogger(__name__)

#: CRC-32 of every segment of a plan, by its number.
Checksums = Mapping[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """How a conversion writes its output.

    Args:
        overwrite: Replace an existing output, once the new one is complete.
        resume: Resume an interrupted run: keep the copied data whose checksums match.
        dry_run: Write nothing, but run all checks that come before the first byte is written.
        checksums: Add checksums.json, the CRC-32 of all files and of each exported tensor, with which ``check`` finds
            damage. The bytes are not read again for it.
        sha256: Add integrity.json, the SHA-256 of all files, which megatron-core 0.17.1 and newer verify, too. For that
            all files are read again.
        durable: Wait until the output is on the disk before it is published.
        max_file_bytes: Maximum size of one file of tensors, for ``to_hf`` and ``migrate``; a larger tensor or chunk
            gets its own file. ``from_hf`` and ``reshard`` write one file for each rank of the layout.

    Raises:
        ConfigError: ``max_file_bytes`` is no whole number of at least 1, or one of the others no bool.

    Example:
        >>> dist_ckpt_mistral.to_hf("ckpt", "out", output=Output(overwrite=True))  # doctest: +SKIP
    """

    overwrite: bool = False
    resume: bool = False
    dry_run: bool = False
    checksums: bool = True
    sha256: bool = False
    durable: bool = True
    max_file_bytes: int = 5_000_000_000

    __repr__ = concise_repr

    def __post_init__(self) -> None:
        """Check the switches, and the number."""
        switches = ("overwrite", "resume", "dry_run", "checksums", "sha256", "durable")
        require_types(Output, **{name: getattr(self, name) for name in switches})
        require_whole("max_file_bytes", self.max_file_bytes, least=1, meaning="bytes")


#: Copies the segments with these numbers into the open files, by number, as ``execute`` does. Into a store, each file
#: is written from its first byte to its last.
Copy: TypeAlias = Callable[[Sequence[int], Mapping[int, Target]], dict[int, Copied]]
#: A new output with checksums, published when it is on the disk.
DEFAULT_OUTPUT: Final = Output()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class NewFiles:
    """The content of an output.

    Args:
        plan: The copies that fill the files in ``file_bytes``.
        file_bytes: Name of each file relative to the output -> size in bytes, in the order of the plan's target files.
        around: Gives, for the number of a file, what stands around the segments in it, such as headers.
        complete: Adds all other files to the unpublished directory, its argument.
        commit: Names of the files that readers open first, relative to the output. A store gets them last, in this
            order; a directory gets everything at once.
        folder: The directory of the output that its checksums are written to, and describe.
        tensors: The tensors whose CRC-32 is written with those of the files.
        recipe: Everything besides the plan that determines the output.
        copied_files: Files that ``complete`` copies.
        losses: What to do if a conversion of dtypes destroys values.
    """

    plan: BytePlan
    file_bytes: Mapping[str, int]
    around: Callable[[int], Iterable[Around]]
    complete: Callable[[Path], None]
    commit: Sequence[str]
    folder: Path
    tensors: TensorSpans = field(default_factory=dict)
    recipe: Recipe
    copied_files: Sequence[Path]
    losses: LossPolicy = REFUSE


def write_output(
    target: Path, new: NewFiles, *, output: Output, effort: Effort, ranks: Ranks, copy: Copy | None = None
) -> tuple[Loss, ...]:
    """Write ``new`` to ``target``: every rank copies its share of the plan, and the first rank publishes the output.

    If the bytes do not come from files, ``copy`` copies them; all ranks call it, and the first one writes all.

    Nothing appears at ``target`` unless everything succeeds on all ranks. With ``output.dry_run`` nothing is written;
    only the checks before the first written byte are run.

    A run that fails, is interrupted or is killed leaves the copied parts beside ``target``. With ``output.resume`` the
    next run keeps the parts whose checksums match, if recipe and plan are the same. Without it, the next run removes
    them. An error, such as a full disk, says how to resume.

    Returns:
        The values that a conversion of dtypes destroyed, if that is allowed.

    Raises:
        OutputError: The output cannot be written, the run cannot be resumed, or values would be destroyed.
        FormatError: A source changed while it was read.
        DistCkptMistralError: An error on another rank.
    """
    if not isinstance(target, RemotePath):
        return _write_to_directory(target, new, output=output, effort=effort, ranks=ranks, copy=copy)
    from dist_ckpt_mistral.convert.store_output import write_to_store  # noqa: PLC0415  (only URLs need it)

    return write_to_store(target, new, output=output, effort=effort, ranks=ranks, copy=copy)


def _write_to_directory(
    target: Path, new: NewFiles, *, output: Output, effort: Effort, ranks: Ranks, copy: Copy | None
) -> tuple[Loss, ...]:
    """Write ``new`` to a local directory, which appears by one rename."""
    plan, recipe = new.plan, new.recipe
    names, staging = list(new.file_bytes), Staging(target)
    with _cleaned_up(staging, recipe), recipe.inputs:
        must_prove = ranks.on_first(lambda: _begin(staging, new, output))
        if output.dry_run:
            return ()

        numbers = share(plan, ranks, first_alone=copy is not None)
        my_files = {
            file: staging.output / names[file] for file in sorted({plan.segments[number].file for number in numbers})
        }

        def copy_share() -> dict[int, Copied]:
            if copy is not None:
                with _as_output_errors(staging), _opened(my_files, durable=output.durable) as targets:
                    return copy(numbers, targets)
            with (
                _as_output_errors(staging),
                _opened(my_files, durable=output.durable) as targets,
                contextlib.closing(Journal(staging.path, ranks.rank, plan, targets, must_prove=must_prove)) as journal,
            ):
                return execute(plan, targets, effort=effort, numbers=numbers, checksums=True, record=journal)

        with copying(plan, numbers, staging.path, effort.progress, ranks):
            shares = ranks.together(copy_share)
        copied = {number: outcome for share in shares for number, outcome in share.items()}
        losses = ranks.on_first(lambda: new.losses.accept(plan, copied))

        def finish() -> None:
            all_files = {file: staging.output / name for file, name in enumerate(names)}
            checksums = {number: outcome.crc32 for number, outcome in copied.items()}
            with _as_output_errors(staging), _opened(all_files) as targets:
                sums = {file: _write_around(target, new.around(file), checksums) for file, target in targets.items()}
                new.complete(staging.output)
                if output.checksums:
                    write_checksums(staging.output, new, checksums, _file_sums(new, checksums, sums), effort)

        def sync_share() -> None:
            with _as_output_errors(staging), _opened(my_files) as targets:
                _sync(targets, effort, ranks)

        def publish() -> None:
            with _as_output_errors(staging):
                staging.publish(overwrite=output.overwrite, durable=output.durable)

        ranks.on_first(finish)
        ranks.together(lambda: sources.require_unchanged(recipe.inputs))  # each rank checks the files that it has read
        if output.sha256:
            with _as_output_errors(staging):
                write_manifest(staging.output / new.folder, effort=effort, ranks=ranks)
        if output.durable:
            ranks.together(sync_share)  # late, when the operating system has written most of it
        ranks.on_first(publish)
    return losses


def _begin(staging: Staging, new: NewFiles, output: Output) -> bool:
    """Lock the staging directory and make all files in their final sizes, or take over those of a run to resume.

    Returns whether kept data must be compared with the sources, because these may have changed since it was copied.
    """
    plan, file_bytes, recipe = new.plan, new.file_bytes, new.recipe
    documents.total_bytes([path for path in plan.files_to_read if path not in recipe.inputs.opened])  # or raises
    staging.require_room(sum(file_bytes.values()) + documents.total_bytes(new.copied_files))
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
                "resuming %s: data in %s is kept where its checksums match%s",
                staging.target,
                staging.path,
                ", also those of the sources, which may have changed" if must_prove else "",
            )
            staging.keep(file_bytes)
        else:
            staging.clear()
        staging.output.mkdir(exist_ok=True)
        for name, num_bytes in file_bytes.items():
            (staging.output / name).parent.mkdir(parents=True, exist_ok=True)
            TargetFile(staging.output / name, num_bytes, kept=resumed).close()
        if not resumed:
            begin(staging, fingerprint, recipe)
    return must_prove


@contextlib.contextmanager
def _cleaned_up(staging: Staging, recipe: Recipe) -> Iterator[None]:
    """After an error, keep the copied data if a later run can resume, else remove it. A note on the error says so."""
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


def _sync(targets: Mapping[int, TargetFile], effort: Effort, ranks: Ranks) -> None:
    """Wait until the content of all files is on the disk."""
    files = [*targets.values()]
    sizes = [file.path.stat().st_size for file in files]
    begin_phase("sync", sum(sizes), effort.progress, ranks)

    def sync(number: int) -> None:
        files[number].sync()
        effort.progress.advance(sizes[number])

    run_all(sync, range(len(files)), workers=effort.threads)


def share(plan: BytePlan, ranks: Ranks, *, first_alone: bool = False) -> list[int]:
    """The numbers of the segments that this rank copies: consecutive ones, of about equal bytes for each rank.

    With ``first_alone`` the first one copies all.
    """
    if first_alone:
        return [*range(len(plan.segments))] if ranks.is_first else []
    total = max(1, plan.num_bytes)
    numbers, before = [], 0
    for number, segment in enumerate(plan.segments):
        middle = before + segment.stored_bytes // 2
        if min(ranks.world_size - 1, middle * ranks.world_size // total) == ranks.rank:
            numbers.append(number)
        before += segment.stored_bytes
    return numbers


def source_directory(checkpoint: Path, target: Path, output: Output) -> Path:
    """The directory of the iteration in ``checkpoint``.

    Raises DistCkptMistralError if it is none, if ``target`` must not be written, or if one lies in the other.
    """
    require_not_swapped(checkpoint, target, Kind.CHECKPOINT)
    paths.require_apart(checkpoint, target)
    paths.require_writable(target, overwrite=output.overwrite)
    directory = resolve_directory(checkpoint)
    paths.require_apart(directory, target)  # which may be mounted a second time without its root
    return directory


@contextlib.contextmanager
def _opened(files: Mapping[int, Path], *, durable: bool = False) -> Iterator[dict[int, TargetFile]]:
    local.allow_open_files(len(files))
    targets: dict[int, TargetFile] = {}
    try:
        for number, path in files.items():
            targets[number] = TargetFile(path, durable=durable)
        yield targets
    finally:
        for target in targets.values():
            target.close()


@contextlib.contextmanager
def _as_output_errors(staging: Staging) -> Iterator[None]:
    """Turn an OSError into an OutputError that names the file of the output."""
    try:
        yield
    except OSError as error:
        path = Path(error.filename or staging.output)
        if path.is_relative_to(staging.output):
            path = staging.target / path.relative_to(staging.output)
        raise OutputError(f"cannot write {path}: {error.strerror or error}.") from error


def _write_around(target: TargetFile, around: Iterable[Around], checksums: Checksums) -> list[SummedSpan]:
    """Write what stands around the segments of a file, and return its CRC-32."""
    spans = []
    for each in around:
        data = each.content(checksums)
        target.write(each.position, data)
        spans.append(SummedSpan(each.position, len(data), zlib_ng.crc32(data)))
    return spans


def _file_sums(new: NewFiles, checksums: Checksums, around: Mapping[int, list[SummedSpan]]) -> list[int]:
    """The CRC-32 of every file, from those of its segments and of what stands around them."""
    spans = {file: [*summed] for file, summed in around.items()}
    for number, segment in enumerate(new.plan.segments):
        spans[segment.file].append(SummedSpan(segment.position, segment.stored_bytes, checksums[number]))
    return [crc32_of_file(num_bytes, spans[file]) for file, num_bytes in enumerate(new.file_bytes.values())]


def write_checksums(
    output: Path, new: NewFiles, checksums: Checksums, file_sums: Sequence[int], effort: Effort
) -> None:
    """Write checksums.json into ``new.folder`` of ``output``, which holds the small files; only these are read for it.

    ``checksums`` are the CRC-32 of the segments, ``file_sums`` those of the files in ``new.file_bytes``.
    """
    segments: dict[int, dict[Span, int]] = {file: {} for file in range(len(new.file_bytes))}
    for number, segment in enumerate(new.plan.segments):
        segments[segment.file][Span(segment.position, segment.stored_bytes)] = checksums[number]
    folder, files, tensors = output / new.folder, dict[str, FileSum](), dict[str, int]()
    for file, (name, num_bytes) in enumerate(new.file_bytes.items()):
        files[Path(name).relative_to(new.folder).as_posix()] = FileSum(num_bytes, file_sums[file])
        tensors |= {tensor: segments[file].get(span, 0) for tensor, span in new.tensors.get(name, {}).items()}
    for name in {*files_in(folder)} - {*files, CHECKSUMS_FILE}:
        small = digest(folder / name, sha256=False, effort=replace(effort, progress=NO_PROGRESS))
        files[name] = FileSum(small.num_bytes, small.crc32)
    documents.write_bytes(folder / CHECKSUMS_FILE, FileChecksums(files=files, tensors=tensors).to_json())


def write_manifest(directory: Path, *, effort: Effort, ranks: Ranks) -> None:
    """Write integrity.json into ``directory``, whose files are complete. The ranks share the reading."""
    names = ranks.on_first(lambda: _by_size(directory))[ranks.rank :: ranks.world_size]
    begin_phase("checksum", sum((directory / name).stat().st_size for name in names), effort.progress, ranks)

    def sha256_of(number: int) -> str:
        return str(digest(directory / names[number], sha256=True, effort=effort).sha256)

    def digest_share() -> dict[str, str]:
        return dict(zip(names, run_all(sha256_of, range(len(names)), workers=effort.threads), strict=True))

    files = {name: each for share in ranks.together(digest_share) for name, each in share.items()}
    ranks.on_first(lambda: documents.write_bytes(directory / MANIFEST_FILE, Manifest(files=files).to_json()))


def _by_size(directory: Path) -> list[str]:
    """The names of all files, the largest first, so that ranks and threads finish at about the same time."""
    return sorted(files_in(directory), key=lambda name: (directory / name).stat().st_size, reverse=True)
