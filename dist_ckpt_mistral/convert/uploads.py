"""Target files as uploads: parts are gathered ahead by threads, summed in order, and on their way once.

Files that want pieces of the same rows are written in step (``in_step``), so that each row is fetched once.
"""

from __future__ import annotations

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
from dist_ckpt_mistral.gather.execute import Copied, Effort, in_step, threads_for
from dist_ckpt_mistral.gather.parts import PART_BYTES, Around, Summed, TargetParts
from dist_ckpt_mistral.gather.plan import BytePlan
from dist_ckpt_mistral.storage.local import SourceFiles
from dist_ckpt_mistral.storage.store import Store

#: A part is in memory while it is gathered, while it waits, and while it is on its way, and its sources beside it.
_TIMES_IN_MEMORY: Final = 5
_MOST_IN_STEP: Final = 16
_SCRATCH_BYTES: Final = 512 << 10
#: How long a thread waits before it looks whether the run was stopped.
_LOOK_S: Final = 0.1


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

    ``names`` are those of the target files, below the key ``folder``; ``around`` gives what stands around the segments
    of a file; ``done`` is called with each whole object, from any thread.
    """

    plan: BytePlan
    store: Store
    folder: str
    file_bytes: Mapping[str, int]
    around: Callable[[int], Iterable[Around]]
    sha256: bool
    done: Callable[[int, Uploaded], None]
    stop: threading.Event = field(default_factory=threading.Event)

    def run(self, files: Sequence[int], effort: Effort) -> list[Uploaded]:
        """Upload ``files``. The first error, or an interrupt, stops all of them, and no part is left on the server."""
        numbers_of: dict[int, list[int]] = defaultdict(list)
        for number, segment in enumerate(self.plan.segments):
            numbers_of[segment.file].append(number)
        memory_bytes = effort.memory_for(is_remote=True)
        most = max(1, min(_MOST_IN_STEP, memory_bytes // (PART_BYTES * _TIMES_IN_MEMORY)))
        found: list[Uploaded] = []
        with SourceFiles(self.plan.source_files, self.plan.derived_files) as sources:
            sources.share(memory_bytes // 4)
            threads = threads_for(effort, sources)
            for batch in in_step(self.plan, files, most):
                ahead = max(1, most // len(batch))
                uploads = [_Upload(self, file, numbers_of[file], effort, ahead) for file in batch]
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

        with (
            ThreadPoolExecutor(threads, thread_name_prefix="gather") as gatherers,
            ThreadPoolExecutor(len(uploads), thread_name_prefix="upload") as uploaders,
        ):
            running = [uploaders.submit(upload.run) for upload in uploads]
            try:
                for number in range(max(len(upload.parts) for upload in uploads)):
                    for upload in uploads:
                        if number < len(upload.parts):
                            upload.wait_for_room()
                            upload.put(gatherers.submit(gather, upload, number))
                wait(running)
            except Stopped:
                wait(running)  # one of them says why
            finally:  # also if this thread is interrupted
                if not all(future.done() and future.exception() is None for future in running):
                    self.stop.set()
        errors = [error for future in running if (error := future.exception()) is not None]
        if errors:
            raise next((error for error in errors if not isinstance(error, Stopped)), errors[0])
        return [future.result() for future in running]


class _Upload:
    """One file on its way."""

    def __init__(self, job: UploadJob, file: int, numbers: Sequence[int], effort: Effort, ahead: int) -> None:
        self._job, self._file, self._ahead, self._progress = job, file, ahead, effort.progress
        self._name = [*job.file_bytes][file]
        self._num_bytes = job.file_bytes[self._name]
        self.parts = TargetParts.of(job.plan, numbers, job.around(file), self._num_bytes)
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
            part, sums = self._next().result()
            for each in sums:
                self._add(each)
            self.parts.put_around(number, part, self._crc32_of)
            self._crc32 = zlib_ng.crc32(part.data, self._crc32)
            if self._job.sha256:
                self._sha256.update(part.data)
            self._progress.advance(sum(each.piece.high - each.piece.low for each in sums))
            yield part.data

    def _next(self) -> Future[tuple[ByteArray, list[Summed]]]:
        while not self._job.stop.is_set():
            try:
                return self._gathered.get(timeout=_LOOK_S)
            except queue.Empty:
                continue
        raise Stopped

    def _add(self, summed: Summed) -> None:
        piece, before = summed.piece, self._copied[summed.piece.number]
        crc32 = zlib_ng.crc32_combine(before.crc32, summed.crc32, piece.high - piece.low)
        self._copied[piece.number] = Copied(crc32, before.lost.plus(summed.lost))
        self._crc32_of[piece.number] = crc32


def files_of_rank(file_bytes: Sequence[int], rank: int, world_size: int) -> list[int]:
    """The numbers of the files that a rank uploads: consecutive ones, of about equal bytes for each rank."""
    total, before, numbers = max(1, sum(file_bytes)), 0, []
    for number, num_bytes in enumerate(file_bytes):
        middle = before + num_bytes // 2
        if min(world_size - 1, middle * world_size // total) == rank:
            numbers.append(number)
        before += num_bytes
    return numbers
