"""Reads of objects in stores: small ones from pages that are kept, large ones by many requests at once."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Final, NamedTuple

from dist_ckpt_mistral.errors import FormatError
from dist_ckpt_mistral.storage.remote_path import RemotePath
from dist_ckpt_mistral.storage.store import Info, Range, pool, read_many, split_range

if TYPE_CHECKING:
    from dist_ckpt_mistral.storage.local import SourceFiles

#: Two ranges of a file with less between them are one request: it takes a request longer to begin.
GAP_BYTES: Final = 64 << 10
#: Reads of at most this size come from pages.
_SMALL_BYTES: Final = 64 << 10


class Wanted(NamedTuple):
    """Bytes ``[start, stop)`` of a file of a ``SourceFiles``."""

    file: int
    start: int
    stop: int


def coalesced(wanted: Iterable[Wanted], gap_bytes: int = GAP_BYTES) -> list[Wanted]:
    """Return the fewest ranges that hold all of ``wanted``, with at most ``gap_bytes`` more between two of them."""
    found: list[Wanted] = []
    for each in sorted(wanted):
        if each.start >= each.stop:
            continue
        if found and found[-1].file == each.file and each.start - found[-1].stop <= gap_bytes:
            found[-1] = found[-1]._replace(stop=max(found[-1].stop, each.stop))
        else:
            found.append(each)
    return found


class RemoteFiles:
    """The objects among the files of a ``SourceFiles``, by number. Every read is of the version that was seen first."""

    def __init__(self, paths: Mapping[int, RemotePath], note: Callable[[RemotePath, Info], None]) -> None:
        """Ask for nothing yet; ``note`` is called when an object is opened, and may raise."""
        self._paths, self._note = paths, note
        self._opened: dict[int, Info] = {}

    def __contains__(self, file: int) -> bool:
        """Whether a file is an object."""
        return file in self._paths

    def _open(self, file: int) -> tuple[RemotePath, Info]:
        path = self._paths[file]
        info = self._opened.get(file)
        if info is None:
            info = path.snapshot.require(path.key)
            self._note(path, info)
            self._opened[file] = info
        return path, info

    def size_bytes(self, file: int) -> int:
        """Size of an object."""
        return self._open(file)[1].num_bytes

    def _require_inside(self, file: int, stop: int) -> tuple[RemotePath, Info]:
        path, info = self._open(file)
        if stop > info.num_bytes:
            raise FormatError(
                f"{path} is truncated: expected at least {stop} bytes, got {info.num_bytes}. "
                "Copy the file again from where it came from."
            )
        return path, info

    def _read(self, file: int, start: int, stop: int) -> memoryview:
        path, info = self._require_inside(file, stop)
        if start >= stop:
            return memoryview(b"")
        if stop - start <= _SMALL_BYTES:
            return path.snapshot.small_read(path.key, start, stop)
        return read_many(path.snapshot.store, path.key, [Range(start, stop)], info.version)[0]

    def read(self, file: int, position: int, num_bytes: int) -> bytes:
        """Read bytes."""
        return bytes(self._read(file, position, position + num_bytes))

    def read_into(self, file: int, position: int, *buffers: memoryview) -> None:
        """Fill ``buffers``, one after the other."""
        data, at = self._read(file, position, position + sum(map(len, buffers))), 0
        for buffer in buffers:
            buffer[:] = data[at : at + len(buffer)]
            at += len(buffer)

    def ask_for(self, file: int, position: int, num_bytes: int) -> None:
        """Begin to fetch the pages with some bytes; errors are raised by the read itself."""
        path, info = self._open(file)
        stop = min(position + num_bytes, info.num_bytes)
        if position < stop:
            pool().submit(path.snapshot.small_read, path.key, position, stop)

    def fetch(self, wanted: Iterable[Wanted]) -> Iterator[Fetched]:
        """Yield what is being fetched of the objects among the files of ``wanted``."""
        for each in coalesced(each for each in wanted if each.file in self._paths):
            path, info = self._require_inside(each.file, each.stop)
            for piece in split_range(Range(each.start, each.stop)):
                read = pool().submit(path.snapshot.store.read, path.key, *piece, info.version)
                yield Fetched(each.file, piece.start, piece.stop, read)


class Fetched(NamedTuple):
    """Bytes ``[start, stop)`` of a file, which come when they come."""

    file: int
    start: int
    stop: int
    data: Future[memoryview]


class Held:
    """Reads files from what was fetched of them, and the rest from the files themselves."""

    def __init__(self, files: SourceFiles, fetched: Iterable[Fetched]) -> None:
        """Read from ``fetched``, else from ``files``."""
        self._files = files
        by_file: dict[int, list[Fetched]] = defaultdict(list)
        for each in fetched:
            by_file[each.file].append(each)
        self._fetched = by_file
        self._starts = {file: [each.start for each in pieces] for file, pieces in by_file.items()}

    def read_into(self, file: int, position: int, *buffers: memoryview) -> None:
        """Fill ``buffers``, one after the other, with the bytes from ``position`` on."""
        if self._files.is_derived(file):
            self._files.derive_into(file, position, buffers, self)
            return
        for buffer in buffers:
            if not self._fill(file, position, buffer):
                self._files.read_into(file, position, buffer)
            position += len(buffer)

    def _fill(self, file: int, position: int, buffer: memoryview) -> bool:
        """Fill a buffer from consecutive pieces. Returns whether they hold all of it."""
        pieces: Sequence[Fetched] = self._fetched.get(file, ())
        number = bisect_right(self._starts.get(file, ()), position) - 1
        done = 0
        while done < len(buffer):
            if not 0 <= number < len(pieces):
                return False
            piece = pieces[number]
            if not piece.start <= position + done < piece.stop:
                return False
            low = position + done - piece.start
            part = piece.data.result()[low : low + len(buffer) - done]
            buffer[done : done + len(part)] = part
            done += len(part)
            number += 1
        return True
