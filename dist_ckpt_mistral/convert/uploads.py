"""Target files as uploads: parts are gathered ahead by threads, summed in order, and on their way once.

Files that want pieces of the same rows are written in step (``in_step``), so that each row is fetched once.
"""

from __future__ import annotations

import contextlib
import hashlib
import queue
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, Final, Self

from zlib_ng import zlib_ng

from dist_ckpt_mistral.gather.bands import ByteArray, Stopped, aligned_buffer
from dist_ckpt_mistral.gather.casts import NOTHING, Lost
from dist_ckpt_mistral.gather.execute import Copied, Effort, threads_for
from dist_ckpt_mistral.gather.parts import LEAST_PART_BYTES, PART_BYTES, Around, Summed, TargetParts
from dist_ckpt_mistral.gather.plan import BytePlan
from dist_ckpt_mistral.gather.turns import in_step
from dist_ckpt_mistral.storage.local import SourceFiles
from dist_ckpt_mistral.storage.store import Store, pool, wait_for

#: A part is in memory while it is gathered, while it waits, and while it is on its way, and its sources beside it.
_TIMES_IN_MEMORY: Final = 5
_MOST_IN_STEP: Final = 16
_SCRATCH_BYTES: Final = 512 << 10
#: How long a thread waits before it looks whether the run was stopped.
_LOOK_S: Final = 0.1
#: After an interrupt, uploads have this long to be aborted, which they are when one of their parts has been answered.
_INTERRUPTED_WAIT_S: Final = 1.3


@dataclass(frozen=True, slots=True, kw_only=True)
class Uploaded:
    """A whole object: its name below the output, size, version and checksums, and the result of each segment in it."""

    name: str
    num_bytes: int
    version: str | None
    crc32: int
    sha256: str | None
    copied: Mapping[int, Copied]

    def to_json(self) -> dict[str, Any]:
        """JSON values, from which ``from_json`` makes an equal one."""
        copied = [[number, each.crc32, *each.lost] for number, each in self.copied.items()]
        facts = {"name": self.name, "bytes": self.num_bytes, "version": self.version}
        return {**facts, "crc32": self.crc32, "sha256": self.sha256, "copied": copied}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """What ``to_json`` recorded. Raises KeyError, TypeError or ValueError if it is something else."""
        return cls(
            name=str(content["name"]),
            num_bytes=int(content["bytes"]),
            version=content["version"],
            crc32=int(content["crc32"]),
            sha256=content["sha256"],
            copied={int(n): Copied(int(crc32), Lost(int(o), int(v))) for n, crc32, o, v in content["copied"]},
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class UploadJob:
    """The files of a plan, to be uploaded into a store.

    The target files have the names in ``file_bytes``, below the key ``folder``; ``around`` gives what stands around the
    segments of a file. ``require_held`` is called before each object appears, and raises if it must not any more;
    ``done`` is called with each whole object. Both are called from any thread.
    """

    plan: BytePlan
    store: Store
    folder: str
    file_bytes: Mapping[str, int]
    around: Callable[[int], Iterable[Around]]
    sha256: bool
    require_held: Callable[[], None]
    done: Callable[[int, Uploaded], None]
    stop: threading.Event = field(default_factory=threading.Event)

    def run(self, files: Sequence[int], effort: Effort) -> list[Uploaded]:
        """Upload ``files``. The first error, or an interrupt, stops all of them, and no part is left on the server."""
        numbers_of: dict[int, list[int]] = defaultdict(list)
        for number, segment in enumerate(self.plan.segments):
            numbers_of[segment.file].append(number)
        memory_bytes = effort.memory_for(is_remote=True)
        most = max(1, min(_MOST_IN_STEP, memory_bytes // (LEAST_PART_BYTES * _TIMES_IN_MEMORY)))
        found: list[Uploaded] = []
        with SourceFiles(self.plan.source_files, self.plan.derived_files) as sources:
            sources.share(memory_bytes // 4)
            threads = threads_for(effort, sources)
            for batch in in_step(self.plan, files, most):
                part_bytes, ahead = _room(memory_bytes, len(batch))
                uploads = [_Upload(self, file, numbers_of[file], effort, part_bytes, ahead) for file in batch]
                found += self._run_batch(uploads, sources, threads)
        return found

    def _run_batch(self, uploads: list[_Upload], sources: SourceFiles, threads: int) -> list[Uploaded]:
        own = threading.local()

        def gather(upload: _Upload, number: int) -> tuple[ByteArray, list[Summed]]:
            if self.stop.is_set():
                raise Stopped
            if not hasattr(own, "scratch"):
                own.scratch = aligned_buffer(_SCRATCH_BYTES)
            return upload.parts.gather(number, sources, own.scratch)

        gatherers = ThreadPoolExecutor(threads, thread_name_prefix="gather")
        uploaders = ThreadPoolExecutor(len(uploads), thread_name_prefix="upload")
        running: list[Future[Uploaded]] = []
        try:
            running.extend(uploaders.submit(upload.run) for upload in uploads)
            with contextlib.suppress(Stopped):  # one of the uploads says why
                for number, upload in _by_turns(uploads):
                    upload.wait_for_room()
                    upload.put(gatherers.submit(gather, upload, number))
            wait_for(running)
        except BaseException as interrupt:
            self.stop.set()
            if wait(running, timeout=_INTERRUPTED_WAIT_S).not_done:
                interrupt.add_note("Parts of uploads may be left in the store, which a lifecycle rule of it removes.")
            raise
        finally:
            for each in (gatherers, uploaders):
                each.shutdown(wait=False, cancel_futures=True)
        errors = [error for future in running if (error := future.exception()) is not None]
        if errors:
            raise next((error for error in errors if not isinstance(error, Stopped)), errors[0])
        return [future.result() for future in running]


class _Upload:
    """One file on its way."""

    def __init__(
        self, job: UploadJob, file: int, numbers: Sequence[int], effort: Effort, part_bytes: int, ahead: int
    ) -> None:
        self._job, self._file, self._ahead, self._progress = job, file, ahead, effort.progress
        self._name = [*job.file_bytes][file]
        self._num_bytes = job.file_bytes[self._name]
        self.parts = TargetParts.of(job.plan, numbers, job.around(file), self._num_bytes, part_bytes)
        self._gathered: queue.Queue[Future[tuple[ByteArray, list[Summed]]]] = queue.Queue(ahead)
        self._copied = {number: Copied(0, NOTHING) for number in numbers}
        self._crc32_of: dict[int, int] = {}
        self._crc32, self._sha256 = 0, hashlib.sha256()

    def wait_for_room(self) -> None:
        """Wait until another part may be gathered. Raises Stopped."""
        while self._gathered.full():
            if self._job.stop.wait(_LOOK_S / 10):
                raise Stopped

    def put(self, gathered: Future[tuple[ByteArray, list[Summed]]]) -> None:
        """Take the next part, which is being gathered."""
        self._gathered.put(gathered)

    def run(self) -> Uploaded:
        """Upload all parts; stops the job if that fails."""
        job = self._job
        try:
            key = f"{job.folder}/{self._name}"
            version = job.store.upload(key, self._blocks(), self.parts.part_bytes, in_flight=max(1, self._ahead // 2))
            uploaded = Uploaded(
                name=self._name,
                num_bytes=self._num_bytes,
                version=version,
                crc32=self._crc32,
                sha256=self._sha256.hexdigest() if job.sha256 else None,
                copied=self._copied,
            )
            job.done(self._file, uploaded)
        except BaseException:
            job.stop.set()
            raise
        return uploaded

    def _blocks(self) -> Iterator[memoryview]:
        for number in range(len(self.parts)):
            part, sums = self._next()
            for each in sums:
                self._add(each)
            self.parts.put_around(number, part, self._crc32_of)
            self._crc32 = zlib_ng.crc32(part.data, self._crc32)
            if self._job.sha256:
                self._sha256.update(part.data)
            self._progress.advance(sum(each.piece.high - each.piece.low for each in sums))
            yield part.data
            del part, sums  # not kept while the next ones are waited for
        # The object appears next. obstore panics if it is called within its own call, so another thread asks.
        if self._job.stop.is_set():
            raise Stopped
        pool().submit(self._job.require_held).result()

    def _next(self) -> tuple[ByteArray, list[Summed]]:
        """Return the next part when it is there. Raises Stopped, also while its sources are not answered."""
        gathered: Future[tuple[ByteArray, list[Summed]]] | None = None
        while not self._job.stop.is_set():
            try:
                gathered = gathered or self._gathered.get(timeout=_LOOK_S)
                return gathered.result(timeout=_LOOK_S)
            except queue.Empty:
                continue
            except TimeoutError:
                if gathered is not None and gathered.done():
                    raise
        raise Stopped

    def _add(self, summed: Summed) -> None:
        piece, before = summed.piece, self._copied[summed.piece.number]
        crc32 = zlib_ng.crc32_combine(before.crc32, summed.crc32, piece.high - piece.low)
        self._copied[piece.number] = Copied(crc32, before.lost.plus(summed.lost))
        self._crc32_of[piece.number] = crc32


def _room(memory_bytes: int, num_files: int) -> tuple[int, int]:
    """The length of parts and how many of each file are gathered ahead, if ``num_files`` are on their way at once."""
    for part_bytes in (PART_BYTES, LEAST_PART_BYTES):
        if ahead := memory_bytes // (part_bytes * _TIMES_IN_MEMORY * num_files):
            return part_bytes, ahead
    return LEAST_PART_BYTES, 1


def _by_turns(uploads: Sequence[_Upload]) -> Iterator[tuple[int, _Upload]]:
    """Yield the number of each part, those of all files in step."""
    for number in range(max(len(upload.parts) for upload in uploads)):
        for upload in uploads:
            if number < len(upload.parts):
                yield number, upload


def files_of_rank(file_bytes: Sequence[int], rank: int, world_size: int) -> list[int]:
    """The numbers of the files that a rank uploads: consecutive ones, of about equal bytes for each rank."""
    total, before, numbers = max(1, sum(file_bytes)), 0, []
    for number, num_bytes in enumerate(file_bytes):
        middle = before + num_bytes // 2
        if min(world_size - 1, middle * world_size // total) == rank:
            numbers.append(number)
        before += num_bytes
    return numbers
