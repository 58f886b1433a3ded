"""Write an output into a store, such as a bucket: whole or not at all, as readers see it.

A store has no rename of folders, but every object in it appears whole. So the data come first, then the small files,
and last those that readers open first (``NewFiles.commit``). Until then ``OUT/.incomplete/run.json``, which only one
run can create, says what is being written, and one record beside it for each whole data object.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import logging
import os
import socket
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from dist_ckpt_mistral.convert.conversion import Loss
from dist_ckpt_mistral.convert.job_progress import begin_phase
from dist_ckpt_mistral.convert.journal import Fingerprint, differences
from dist_ckpt_mistral.convert.output import Copy, NewFiles, Output, write_checksums
from dist_ckpt_mistral.convert.ranks import Ranks
from dist_ckpt_mistral.convert.streamed_files import StreamedFile
from dist_ckpt_mistral.convert.uploads import Uploaded, UploadJob, files_of_rank
from dist_ckpt_mistral.errors import DistCkptMistralError, LostRankError, OutputError
from dist_ckpt_mistral.formats.integrity import MANIFEST_FILE, Manifest
from dist_ckpt_mistral.gather.bands import Stopped
from dist_ckpt_mistral.gather.digest import digest
from dist_ckpt_mistral.gather.execute import DEFAULT_EFFORT, Copied, Effort
from dist_ckpt_mistral.gather.parts import PART_BYTES
from dist_ckpt_mistral.storage import documents, sources
from dist_ckpt_mistral.storage.paths import RUN_FILE
from dist_ckpt_mistral.storage.remote_path import RemotePath
from dist_ckpt_mistral.storage.store import Info, ObjectExistsError, Store, commit, pool

_LOG = logging.getLogger(__name__)
#: After an interrupt, the store is waited for no longer, and what is there stays.
_INTERRUPTED_WAIT_S: Final = 0.5
_FOLDER: Final = RUN_FILE.partition("/")[0]
_RECORD: Final = f"{_FOLDER}/done-{{file}}.json"


def write_to_store(
    target: RemotePath, new: NewFiles, *, output: Output, effort: Effort, ranks: Ranks, copy: Copy | None = None
) -> tuple[Loss, ...]:
    """Write ``new`` below ``target``: every rank uploads its share of the files, and the first rank commits them.

    With ``copy``, which all ranks call, the first rank uploads all. Returns and raises as ``output.write_output``.
    """
    run = _Run(target, new, output)
    with _concluded(run, ranks), new.recipe.inputs:
        kept, run.version = ranks.on_first(run.begin)
        if output.dry_run:
            return ()
        sizes = [*new.file_bytes.values()]
        mine = files_of_rank(sizes, ranks.rank, ranks.world_size if copy is None else 1)
        begin_phase("copy", sum(sizes[file] for file in mine), effort.progress, ranks)
        uploaded: dict[int, Uploaded] = {}
        for share in ranks.together(lambda: run.upload(mine, kept, effort) if copy is None else run.stream(mine, copy)):
            uploaded |= share
        copied = {number: each for file in uploaded.values() for number, each in file.copied.items()}
        losses = ranks.on_first(lambda: new.losses.accept(new.plan, copied))
        ranks.together(lambda: sources.require_unchanged(new.recipe.inputs))  # each rank what it has read
        ranks.on_first(lambda: run.commit(uploaded))
    return losses


class _Run:
    """A run that writes one output into a store."""

    def __init__(self, target: RemotePath, new: NewFiles, output: Output) -> None:
        """Ask for nothing yet."""
        self.target, self._new, self._output = target, new, output
        self._store: Store = target.snapshot.store
        self._names = [*new.file_bytes]
        self._id = os.urandom(8).hex()
        self.is_held = self.is_committing = self.is_committed = False
        self.version: str | None = None  # of the run's own file

    def _key(self, name: str) -> str:
        return f"{self.target.key}/{name}"

    def begin(self) -> tuple[dict[int, Uploaded], str | None]:
        """Take hold of the output.

        Returns the whole objects of an earlier run that are kept, by number of the file, and the version of the run's
        own file, by which all ranks see whether another run has taken over.

        Raises OutputError if another run holds it, or it exists and is not to be replaced.
        """
        new, output = self._new, self._output
        inputs = new.recipe.inputs
        documents.total_bytes([path for path in new.plan.files_to_read if path not in inputs.opened])  # or raises
        head = self._key("")
        present = {key.removeprefix(head): info for key, info in self._store.below(self.target.key).items()}
        earlier = self._earlier(present)
        facts = new.recipe.fingerprint(new.plan, new.file_bytes)
        kept: dict[int, Uploaded] = {}
        if earlier is not None and output.resume:
            if different := differences(earlier["facts"], facts):
                raise OutputError(
                    f"cannot resume {self.target}, because the earlier run differs: {different}. Start again with "
                    "--overwrite, which removes what is there."
                )
            kept = self._whole(present)
        elif earlier is not None and not (earlier["ended"] or output.overwrite):
            raise OutputError(
                f"another run is writing {self.target}, or was killed: {earlier['who']} since {earlier['begun']}. If "
                "it runs no more, --resume continues it, and --overwrite starts again."
            )
        elif present and earlier is None and not output.overwrite:
            raise OutputError(f"the output {self.target} exists. Choose another name or give --overwrite.")
        if output.dry_run:
            return {}, None
        version = self._hold(facts, replaces=earlier is not None)
        self._clear(present, kept)
        return kept, version

    def _earlier(self, present: Mapping[str, Info]) -> dict[str, Any] | None:
        """What the run says that has left the output unfinished; None if there is none."""
        if RUN_FILE not in present:
            return None
        try:
            found = json.loads(self._read(RUN_FILE, present[RUN_FILE]))
        except ValueError:
            found = {}
        return {"facts": {}, "ended": False, "who": "?", "begun": "?", **(found if isinstance(found, dict) else {})}

    def _read(self, name: str, info: Info) -> bytes:
        return bytes(self._store.read(self._key(name), 0, info.num_bytes, info.version)) if info.num_bytes else b""

    def _whole(self, present: Mapping[str, Info]) -> dict[int, Uploaded]:
        """The objects that an earlier run has recorded as whole, and that are there as it left them."""
        kept = {}
        for file, name in enumerate(self._names):
            record = _RECORD.format(file=file)
            if record not in present or name not in present:
                continue
            with contextlib.suppress(KeyError, TypeError, ValueError):
                uploaded = Uploaded.from_json(json.loads(self._read(record, present[record])))
                is_same = (uploaded.name, uploaded.num_bytes, uploaded.version) == (name, *present[name])
                if is_same and (uploaded.sha256 or not self._output.sha256):
                    kept[file] = uploaded
        _LOG.info("resuming %s: %d of %d files are there", self.target, len(kept), len(self._names))
        return kept

    def _hold(self, facts: Fingerprint, *, replaces: bool) -> str | None:
        """Create the run's own file, which only one run can, and return its version."""
        key = self._key(RUN_FILE)
        if replaces:
            self._store.delete([key])
        try:
            version = self._store.write(key, self._about(facts, ended=False), only_new=True)
        except ObjectExistsError as error:
            raise OutputError(
                f"another run is writing {self.target}. Wait for it, or choose another output."
            ) from error
        self.is_held, self._facts = True, facts
        return version

    def _about(self, facts: Fingerprint, *, ended: bool) -> bytes:
        who = f"process {os.getpid()} on {socket.gethostname()}"
        begun = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
        content = {"id": self._id, "who": who, "begun": begun, "ended": ended, "facts": facts}
        return json.dumps(content, indent=1).encode()

    def _clear(self, present: Mapping[str, Info], kept: Mapping[int, Uploaded]) -> None:
        """Delete everything that is not kept: first what readers open, so that none takes the rest for an output."""
        stay = {RUN_FILE, *(each.name for each in kept.values()), *(_RECORD.format(file=file) for file in kept)}
        visible = [name for name in reversed(self._new.commit) if name in present]
        rest = [name for name in present if name not in {*stay, *visible}]
        if visible and self._output.overwrite:
            _LOG.warning("%s is removed now, and there is none until the new one is complete", self.target)
        for name in visible:
            self._store.delete([self._key(name)])
        self._store.delete([self._key(name) for name in rest])

    def upload(self, files: Sequence[int], kept: Mapping[int, Uploaded], effort: Effort) -> dict[int, Uploaded]:
        """Upload those of ``files`` that are not kept, each with a record of it."""
        lock, done = threading.Lock(), {file: kept[file] for file in files if file in kept}
        for each in done.values():
            effort.progress.advance(each.num_bytes)

        def note(file: int, uploaded: Uploaded) -> None:
            self._store.write(self._key(_RECORD.format(file=file)), json.dumps(uploaded.to_json()).encode())
            with lock:
                done[file] = uploaded

        job = UploadJob(
            plan=self._new.plan,
            store=self._store,
            folder=self.target.key,
            file_bytes=self._new.file_bytes,
            around=self._new.around,
            sha256=self._output.sha256,
            require_held=self._require_held,
            done=note,
        )
        job.run([file for file in files if file not in kept], effort)
        return done

    def stream(self, files: Sequence[int], copy: Copy) -> dict[int, Uploaded]:
        """Upload ``files`` as ``copy`` writes them. Nothing of it can be kept for another run."""
        new, names = self._new, self._names
        targets = {
            file: StreamedFile(
                self._store,
                self.target.key,
                names[file],
                new.file_bytes[names[file]],
                [*new.around(file)],
                sha256=self._output.sha256,
            )
            for file in files
        }
        numbers = [number for number, segment in enumerate(new.plan.segments) if segment.file in targets]
        try:
            copied = copy(numbers, targets)
            of_file: dict[int, dict[int, Copied]] = {file: {} for file in files}
            for number, each in copied.items():
                of_file[new.plan.segments[number].file][number] = each
            return {file: target.finish(of_file[file]) for file, target in targets.items()}
        except BaseException as error:
            failures = [failure for target in targets.values() if (failure := target.stop()) is not None]
            if failures and isinstance(error, Stopped):
                raise failures[0] from None
            raise

    def commit(self, uploaded: Mapping[int, Uploaded]) -> None:
        """Write the small files, and last those that readers open first. Then nothing of the run is left."""
        with tempfile.TemporaryDirectory(prefix="dist-ckpt-mistral-") as folder:
            small = self._small_files(Path(folder), uploaded)
            self._require_held()
            self._require_whole(uploaded)
            self.is_committing = True
            last = [name for name in self._new.commit if name in small]
            others = sorted(small.keys() - {*last})
            put = documents.put_file
            [*pool().map(lambda name: put(small[name], self._store, self._key(name), PART_BYTES), others)]
            commit(
                self._store, [(self._key(name), documents.read_bytes(small[name], most_bytes=None)) for name in last]
            )
        self.is_committed = True
        self._store.delete(self._store.below(self._key(_FOLDER)))

    def _small_files(self, staging: Path, uploaded: Mapping[int, Uploaded]) -> dict[str, Path]:
        """Make all other files of the output in ``staging``, and return them by name."""
        new, output = self._new, self._output
        for name in self._names:
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
        new.complete(staging)
        if output.checksums:
            crc32_of = {number: each.crc32 for file in uploaded.values() for number, each in file.copied.items()}
            file_sums = [uploaded[file].crc32 for file in range(len(self._names))]
            write_checksums(staging, new, crc32_of, file_sums, DEFAULT_EFFORT)
        found = {path.relative_to(staging).as_posix(): path for path in _files_below(staging)}
        if output.sha256:
            folder = "" if new.folder == Path() else f"{new.folder.as_posix()}/"
            sums = {each.name: str(each.sha256) for each in uploaded.values()}
            for name, path in found.items():
                sums[name] = str(digest(path, sha256=True, effort=DEFAULT_EFFORT).sha256)
            inside = {name.removeprefix(folder): each for name, each in sums.items() if name.startswith(folder)}
            manifest = staging / new.folder / MANIFEST_FILE
            documents.write_bytes(manifest, Manifest(files=inside).to_json())
            found[folder + MANIFEST_FILE] = manifest
        return found

    def _require_held(self) -> None:
        """Raise OutputError if another run has taken the output over: every object of it is that run's from now on."""
        if not self._holds():
            raise OutputError(f"another run has taken {self.target} over. Choose another output.")

    def _holds(self) -> bool:
        info = self._store.info(self._key(RUN_FILE))
        return info is not None and info.version == self.version

    def _require_whole(self, uploaded: Mapping[int, Uploaded]) -> None:
        """Raise OutputError unless every data object is there as it was uploaded."""
        present = self._store.below(self.target.key)
        for each in uploaded.values():
            key, expected = self._key(each.name), Info(each.num_bytes, each.version)
            if expected != present.get(key) and expected != self._store.info(key):
                raise OutputError(
                    f"{self.target / each.name} was written or deleted by something else. Find out what uses "
                    f"{self.target}, and continue with --resume."
                )

    def conclude(self, error: BaseException) -> str:
        """After an error: keep what a later run can use, else remove it. Returns what to say of it."""
        if self.is_committed:
            return f"{self.target} is complete."
        if not self.is_held:
            return ""
        said = "All data are written, and some may be seen." if self.is_committing else "Nothing was published."
        kept = f"{said} --resume continues what is kept in {self.target}."
        if isinstance(error, LostRankError):  # other ranks may still be writing
            return kept
        cleaner = ThreadPoolExecutor(1)  # not the pool of requests, all of whose threads may wait for answers
        try:
            patience_s = None if isinstance(error, Exception) else _INTERRUPTED_WAIT_S
            return cleaner.submit(self._clean_up, said, kept).result(patience_s)
        except TimeoutError:
            return kept
        finally:
            cleaner.shutdown(wait=False)

    def _clean_up(self, said: str, kept: str) -> str:
        try:
            if not self._holds():  # what is there is another run's
                return said
            present = self._store.below(self.target.key)
            has_work = any(key.startswith(self._key(_RECORD.partition("{")[0])) for key in present)
            if has_work and not self._new.recipe.inputs.looks_changed():
                self._store.write(self._key(RUN_FILE), self._about(self._facts, ended=True))
                return kept
            self._store.delete(present)
        except DistCkptMistralError as failure:
            return f"{said} {self.target}/{_FOLDER} may be left: {failure}"
        return said


@contextlib.contextmanager
def _concluded(run: _Run, ranks: Ranks) -> Iterator[None]:
    """After an error, the first rank cleans up. A note on the error says how."""
    try:
        yield
    except BaseException as error:
        if ranks.is_first and (note := run.conclude(error)):
            error.add_note(note)
        elif isinstance(error, LostRankError):  # it may have been the first
            error.add_note(f"If {run.target} is not complete, --resume continues what is kept there.")
        raise


def _files_below(folder: Path) -> Iterator[Path]:
    """Yield all files; links to folders, which stores do not have, are left out."""
    for path in sorted(folder.iterdir()):
        if path.is_symlink():
            _LOG.info("%s is a link, which a store does not have: it is left out", path.name)
        elif path.is_dir():
            yield from _files_below(path)
        else:
            yield path
