"""Carrying out a byte plan into a new output: every rank copies its share, one of them publishes, all or nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from dist_ckpt_mistral import storage
from dist_ckpt_mistral.errors import DistCkptMistralError, OutputError
from dist_ckpt_mistral.gather.executor import Effort, execute, run_all
from dist_ckpt_mistral.gather.plan import BytePlan
from dist_ckpt_mistral.manifest import NewManifest, write_manifest
from dist_ckpt_mistral.ranks import Ranks
from dist_ckpt_mistral.storage import TargetFile

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
    overwrite: bool,
    effort: Effort,
    ranks: Ranks,
) -> None:
    """Write ``plan`` into new files (names relative to ``output``, sizes in bytes; in the order of its target files).

    ``complete`` then adds what else belongs to the output, on the first rank, given the directory that will become
    ``output``, the open files and the checksums; ``manifest`` then tells what all files hold. Nothing appears at
    ``output`` unless all of this succeeds on all ranks. Raises OutputError where the output cannot be written, and
    whatever went wrong on any rank.
    """
    names = list(file_bytes)
    staging = ranks.on_first(lambda: _prepare(output, file_bytes, overwrite=overwrite))
    try:
        with _open_share(staging, names, plan, ranks) as targets:

            def copy_share() -> Checksums:
                with _as_output_errors(output):
                    found = execute(plan, targets, effort=effort, numbers=share(plan, ranks), checksums=checksums)
                    _sync(targets, effort)
                    return found

            shares = ranks.together(copy_share)

        def finish() -> None:
            with _as_output_errors(output), _open_all(staging, names) as all_targets:
                complete(staging, all_targets, {number: crc for found in shares for number, crc in found.items()})

        def publish() -> None:
            with _as_output_errors(output):
                storage.publish(staging, output, durable=effort.durable)

        ranks.on_first(finish)
        if manifest is not None:
            with _as_output_errors(output):
                write_manifest(staging, manifest, effort=effort, ranks=ranks)
        ranks.on_first(publish)
    finally:
        if ranks.is_first:
            storage.discard(staging)


def _sync(targets: Mapping[int, TargetFile], effort: Effort) -> None:
    """Make the content of all files durable, if asked for."""
    if effort.durable:
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


def _prepare(output: Path, file_bytes: Mapping[str, int], *, overwrite: bool) -> Path:
    """A staging directory with all files in their final sizes."""
    staging = storage.new_staging(output, overwrite=overwrite, num_bytes=sum(file_bytes.values()))
    try:
        with _as_output_errors(output):
            for name, num_bytes in file_bytes.items():
                (staging / name).parent.mkdir(parents=True, exist_ok=True)
                TargetFile(staging / name, num_bytes).close()
    except BaseException:
        storage.discard(staging)
        raise
    return staging


@contextlib.contextmanager
def _open_share(staging: Path, names: list[str], plan: BytePlan, ranks: Ranks) -> Iterator[dict[int, TargetFile]]:
    """The target files of this rank's segments, by number."""
    numbers = sorted({plan.segments[number].file for number in share(plan, ranks)})
    with _opened({number: staging / names[number] for number in numbers}) as targets:
        yield targets


@contextlib.contextmanager
def _open_all(staging: Path, names: list[str]) -> Iterator[dict[int, TargetFile]]:
    with _opened({number: staging / name for number, name in enumerate(names)}) as targets:
        yield targets


@contextlib.contextmanager
def _opened(paths: Mapping[int, Path]) -> Iterator[dict[int, TargetFile]]:
    storage.allow_open_files(len(paths))
    targets: dict[int, TargetFile] = {}
    try:
        for number, path in paths.items():
            targets[number] = TargetFile(path)
        yield targets
    finally:
        for target in targets.values():
            target.close()


@contextlib.contextmanager
def _as_output_errors(output: Path) -> Iterator[None]:
    """What the operating system says, as an error that names the output."""
    try:
        yield
    except DistCkptMistralError:
        raise
    except OSError as error:
        raise OutputError(f"cannot write {output}: {error.strerror or error}. Nothing was published.") from error
