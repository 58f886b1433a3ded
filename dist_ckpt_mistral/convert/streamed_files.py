"""Target files in a store that are written from the first byte to the last, as by a live model: nothing is read again.

Each file is an upload of its own, which begins with the first part that is full.
"""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

from zlib_ng import zlib_ng

from dist_ckpt_mistral.convert.uploads import Uploaded
from dist_ckpt_mistral.errors import PlanError
from dist_ckpt_mistral.gather.bands import Stopped
from dist_ckpt_mistral.gather.execute import Copied
from dist_ckpt_mistral.gather.parts import Around, part_bytes_of
from dist_ckpt_mistral.storage.store import Store

#: Parts that wait, and parts on their way.
_WAITING: Final = 2
_IN_FLIGHT: Final = 2
_LOOK_S: Final = 0.1


class StreamedFile:
    """A target file. Its ``write`` takes consecutive bytes alone; what stands around segments is added on the way."""

    def __init__(
        self, store: Store, folder: str, name: str, num_bytes: int, around: Sequence[Around], *, sha256: bool
    ) -> None:
        """Start nothing yet. ``around`` must not depend on checksums of segments behind which it does not stand."""
        self._store, self._key, self._name, self._num_bytes = store, f"{folder}/{name}", name, num_bytes
        self._around = sorted((each for each in around if each.num_bytes), key=lambda each: -each.position)
        self._part_bytes = part_bytes_of(num_bytes)
        self._part = bytearray()
        self._at = self._crc32 = 0
        self._sha256 = hashlib.sha256() if sha256 else None
        self._parts: queue.Queue[bytearray | None] = queue.Queue(_WAITING)
        self._is_stopped = threading.Event()
        self._uploaders = ThreadPoolExecutor(1, thread_name_prefix="upload")
        self._upload: Future[str | None] | None = None

    def write(self, position: int, data: memoryview) -> None:
        """Take the next bytes. Raises PlanError unless they are, and Stopped if the upload has failed."""
        self._add_around()
        if position != self._at:
            raise PlanError(f"expected bytes to be written to {self._name} at {self._at}, got {position}")
        self._add(data)
        self._add_around()

    def start_writeback(self, position: int, num_bytes: int) -> None:
        """Do nothing: full parts are on their way already."""

    def finish(self, copied: Mapping[int, Copied]) -> Uploaded:
        """Wait until the object is there. ``copied`` are the results of its segments. Raises what the upload raised."""
        self._add_around()
        if self._at != self._num_bytes:
            raise PlanError(f"expected {self._num_bytes} bytes to be written to {self._name}, got {self._at}")
        if self._part:
            self._put(self._part)
        self._put(None)
        version = self._begun().result()
        self._uploaders.shutdown()
        return Uploaded(
            name=self._name,
            num_bytes=self._num_bytes,
            version=version,
            crc32=self._crc32,
            sha256=self._sha256.hexdigest() if self._sha256 else None,
            copied=copied,
        )

    def stop(self) -> BaseException | None:
        """Give the upload up, so that nothing of it is left. Returns the error with which it had ended by itself."""
        is_over = self._upload is not None and self._upload.done()
        self._is_stopped.set()
        self._uploaders.shutdown()
        return self._upload.exception() if is_over and self._upload is not None else None

    def _add_around(self) -> None:
        while self._around and self._around[-1].position == self._at:
            self._add(memoryview(self._around.pop().content({})))

    def _add(self, data: memoryview) -> None:
        view = data.cast("B")
        self._crc32 = zlib_ng.crc32(view, self._crc32)
        if self._sha256:
            self._sha256.update(view)
        self._at += len(view)
        while view:
            room = self._part_bytes - len(self._part)
            self._part += view[:room]
            view = view[room:]
            if len(self._part) == self._part_bytes:
                self._put(self._part)
                self._part = bytearray()

    def _put(self, part: bytearray | None) -> None:
        """Hand a part over, when there is room for it."""
        upload = self._begun()
        while not upload.done():
            try:
                self._parts.put(part, timeout=_LOOK_S)
            except queue.Full:
                continue
            return
        raise Stopped

    def _begun(self) -> Future[str | None]:
        """The upload, which begins when it is first asked for."""
        if self._upload is None:
            self._upload = self._uploaders.submit(self._run)
        return self._upload

    def _run(self) -> str | None:
        return self._store.upload(self._key, self._taken(), self._part_bytes, in_flight=_IN_FLIGHT)

    def _taken(self) -> Iterator[memoryview]:
        while not self._is_stopped.is_set():
            try:
                part = self._parts.get(timeout=_LOOK_S)
            except queue.Empty:
                continue
            if part is None:
                return
            yield memoryview(part)
        raise Stopped
