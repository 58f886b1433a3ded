"""Reads of objects in stores: small ones from pages that are kept, large ones by many requests at once."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from dist_ckpt_mistral.errors import FormatError
from dist_ckpt_mistral.storage.remote_path import RemotePath
from dist_ckpt_mistral.storage.store import MOST_BYTES_OF_A_READ, Info, Range, pool, read_many, split_range

if TYPE_CHECKING:
    from concurrent.futures import Future

    from dist_ckpt_mistral.storage.local import SourceFiles

#: Two ranges of a file with less between them are one request: it takes a request longer to begin.
GAP_BYTES: Final = 64 << 10
#: Blocks that several files share begin and end at multiples of this.
_SHARED_PAGE_BYTES: Final = 256 << 10
#: Reads of at most this size come from pages.
_SMALL_BYTES: Final = 64 << 10


class Wanted(NamedTuple):
    """Bytes ``[start, stop)`` of a file of a ``SourceFiles``.

    ``is_shared`` means that what lies in the gaps is wanted too, by the files beside: of rows that tensor parallelism
    cuts, every rank wants a piece.
    """

    file: int
    start: int
    stop: int
    is_shared: bool = False


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
        self._shared: _SharedBlocks | None = None

    def share(self, most_bytes: int) -> None:
        """Keep up to ``most_bytes`` of what is wanted as shared, for others that want it soon."""
        self._shared = _SharedBlocks(most_bytes)

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
        of_objects = [each for each in wanted if each.file in self._paths]
        keeps_shared = self._shared is not None
        for each in coalesced(each for each in of_objects if not (keeps_shared and each.is_shared)):
            self._require_inside(each.file, each.stop)
            for piece in split_range(Range(each.start, each.stop)):
                yield self._begin(each.file, *piece)
        if self._shared is not None:
            for each in coalesced(each for each in of_objects if each.is_shared):
                _, info = self._require_inside(each.file, each.stop)
                yield from self._shared.fetch(each, info.num_bytes, self._begin)

    def _begin(self, file: int, start: int, stop: int, *, is_shared: bool = False) -> Fetched:
        path, info = self._open(file)
        read = pool().submit(path.snapshot.store.read, path.key, start, stop, info.version)
        return Fetched(file, start, stop, read, is_shared)


class Fetched(NamedTuple):
    """Bytes ``[start, stop)`` of a file, which come when they come."""

    file: int
    start: int
    stop: int
    data: Future[memoryview]
    is_shared: bool = False


class _SharedBlocks:
    """Blocks of objects that several readers want at about the same time: each is fetched once, and kept for a while.

    A block is as many consecutive pages as were missing when they were wanted.
    """

    def __init__(self, most_bytes: int) -> None:
        """Keep up to ``most_bytes``; blocks that are in use stay in memory besides."""
        self._most_bytes, self._num_bytes = most_bytes, 0
        self._blocks: OrderedDict[tuple[int, int], Fetched] = OrderedDict()  # by file and first byte
        self._block_of: dict[tuple[int, int], Fetched] = {}  # by file and page
        self._lock = threading.Lock()

    def fetch(self, wanted: Wanted, num_bytes: int, begin: Callable[..., Fetched]) -> list[Fetched]:
        """Return the blocks with what is wanted of an object of ``num_bytes`` bytes."""
        found: list[Fetched] = []
        with self._lock:
            page, end = wanted.start // _SHARED_PAGE_BYTES, -(-wanted.stop // _SHARED_PAGE_BYTES)
            while page < end:
                block = self._block_of.get((wanted.file, page))
                if block is None:
                    stop = page + 1
                    most = min(end, page + MOST_BYTES_OF_A_READ // _SHARED_PAGE_BYTES)
                    while stop < most and (wanted.file, stop) not in self._block_of:
                        stop += 1
                    span = page * _SHARED_PAGE_BYTES, min(num_bytes, stop * _SHARED_PAGE_BYTES)
                    block = begin(wanted.file, *span, is_shared=True)
                    self._add(block)
                self._blocks.move_to_end((block.file, block.start))
                found.append(block)
                page = -(-block.stop // _SHARED_PAGE_BYTES)
        return found

    def _add(self, block: Fetched) -> None:
        self._blocks[block.file, block.start] = block
        self._block_of |= dict.fromkeys(_pages(block), block)
        self._num_bytes += block.stop - block.start
        while self._num_bytes > self._most_bytes and len(self._blocks) > 1:
            _, oldest = self._blocks.popitem(last=False)
            self._num_bytes -= oldest.stop - oldest.start
            for page in _pages(oldest):
                del self._block_of[page]


def _pages(block: Fetched) -> list[tuple[int, int]]:
    """The file and number of every page of a block."""
    numbers = range(block.start // _SHARED_PAGE_BYTES, -(-block.stop // _SHARED_PAGE_BYTES))
    return [(block.file, number) for number in numbers]


class Held:
    """Reads files from what was fetched of them, and the rest from the files themselves."""

    def __init__(self, files: SourceFiles, fetched: Iterable[Fetched]) -> None:
        """Read from ``fetched``, else from ``files``."""
        self._files = files
        by_file: dict[tuple[int, bool], list[Fetched]] = defaultdict(list)
        for each in fetched:
            by_file[each.file, each.is_shared].append(each)
        self._fetched = by_file
        self._starts = {which: [each.start for each in pieces] for which, pieces in by_file.items()}

    def read_into(self, file: int, position: int, *buffers: memoryview) -> None:
        """Fill ``buffers``, one after the other, with the bytes from ``position`` on."""
        if self._files.is_derived(file):
            self._files.derive_into(file, position, buffers, self)
            return
        for buffer in buffers:
            if not any(self._fill((file, is_shared), position, buffer) for is_shared in (False, True)):
                self._files.read_into(file, position, buffer)
            position += len(buffer)

    def _fill(self, which: tuple[int, bool], position: int, buffer: memoryview) -> bool:
        """Fill a buffer from consecutive pieces. Returns whether they hold all of it."""
        pieces: Sequence[Fetched] = self._fetched.get(which, ())
        number = bisect_right(self._starts.get(which, ()), position) - 1
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
