"""Files: reads and writes at positions, and read-ahead.

Sources may also be objects in a store, which ``SourceFiles`` reads through ``remote_reads``.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import re
import resource
import threading
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Final, NamedTuple, Protocol, Self, TypeVar

from dist_ckpt_mistral.errors import FormatError, SourceError
from dist_ckpt_mistral.storage.remote_path import RemotePath
from dist_ckpt_mistral.storage.remote_reads import Held, RemoteFiles, Wanted
from dist_ckpt_mistral.storage.shared_rows import SharedRows
from dist_ckpt_mistral.storage.sources import Sources, Stamp, open_to_read
from dist_ckpt_mistral.storage.store import Info

T = TypeVar("T")

#: An escaped character in /proc/self/mountinfo: ``\040`` is a space (proc(5)).
_OCTAL: Final = re.compile(rb"\\([0-7]{3})")
#: Each ``SourceFiles`` may open a quarter of the descriptors: up to three groups of files (two sources and a target)
#: are open at once, and a few others.
_SHARE_OF_DESCRIPTORS: Final = 4
#: Buffers that one preadv may fill (IOV_MAX, linux/uio.h).
_MOST_BUFFERS: Final = 1024
#: Bytes of one write, for which Linux's page cache takes a large folio of that size if it can (6.16 and newer, ext4,
#: XFS). Where all memory is free, larger ones take up to a tenth less time; where it is in pieces, three times as long,
#: it seems because other programs leave pieces of this size: tools/bench/README.md has the states of memory.
_WRITE_BYTES: Final = 64 << 10
_SYNC_FILE_RANGE_WRITE: Final = 2  # linux/fs.h
#: ``ReadAhead`` requests this many reads at once; more made no difference.
_REQUESTED: Final = 256
#: After one read from the page cache, ``ReadAhead`` expects this many there: a test takes longer than such a read.
_TRUSTED: Final = 16


class Span(NamedTuple):
    """Bytes ``[position, position + num_bytes)`` of a file."""

    position: int
    num_bytes: int


def mount_points() -> list[Path]:
    """Return all mount points (proc(5)), with bind mounts on the same device, which ``os.path.ismount`` misses."""
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return []
    fields = (line.split()[4] for line in lines)
    return [Path(os.fsdecode(_OCTAL.sub(lambda match: bytes([int(match[1], 8)]), field))) for field in fields]


class DerivedFile(Protocol):
    """A virtual file whose content is computed, when it is read, from other files of the same ``SourceFiles``."""

    def read_into(self, files: Readable, position: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with the bytes from ``position`` on. May be called from any thread."""

    def stored(self, position: int, num_bytes: int) -> Sequence[Wanted]:
        """Return the bytes of other files that ``num_bytes`` bytes from ``position`` on are computed from."""


class Readable(Protocol):
    """What the content of files can be read from: the files themselves, or parts of them in memory."""

    def read_into(self, file: int, position: int, *buffers: memoryview) -> None:
        """Fill ``buffers``, one after the other, with the bytes from ``position`` on."""


class _Descriptor:
    """An open file, closed with its last reference, so that its number is not reused while a thread still reads."""

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        """Take over the descriptor ``number``."""
        self.number = number

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        """Close the file. ``close`` is a default argument because ``os`` may be gone when Python shuts down."""
        close(self.number)


class SourceFiles:
    """Files to read at positions from several threads. They are opened on first use and closed together.

    If there are more files than may be open at once, the rest are opened for each read.
    """

    def __init__(self, paths: Sequence[Path], derived: Sequence[DerivedFile] = ()) -> None:
        """File ``i`` of the other methods is ``paths[i]``, and ``derived[i - len(paths)]`` from ``len(paths)`` on."""
        self._paths = tuple(paths)
        self._derived = dict(enumerate(derived, len(self._paths)))
        self._descriptors: dict[int, _Descriptor] = {}
        self._sources = Sources.active()
        objects = {number: path for number, path in enumerate(self._paths) if isinstance(path, RemotePath)}
        self._remote = RemoteFiles(objects, self._note) if objects else None
        self._most_open = allow_open_files(len(self._paths) - len(objects))
        self._shared = threading.local()
        self._most_shared_bytes = 0

    @property
    def is_remote(self) -> bool:
        """Whether any of the files is an object in a store, so that reading many ranges at once pays."""
        return self._remote is not None

    def share(self, most_bytes: int) -> None:
        """Keep up to ``most_bytes`` of rows that several target files want pieces of: of objects, or in each thread."""
        if self._remote is not None:
            self._remote.share(most_bytes)
        else:
            self._most_shared_bytes = most_bytes

    def _note(self, path: RemotePath, info: Info) -> None:
        if self._sources is not None:
            self._sources.note(path, Stamp.of_object(info))

    def hold(self, wanted: Iterable[Wanted]) -> Readable:
        """Begin to fetch what is wanted of objects, and return what reads it from memory when it has come.

        Of local files, shared rows are read at once, and stay in the memory of this thread until it holds others.
        """
        if self._remote is None:
            if not self._most_shared_bytes:
                return self
            if not hasattr(self._shared, "rows"):
                self._shared.rows = SharedRows(self.read_into, self._most_shared_bytes)
            rows: SharedRows = self._shared.rows
            return rows.hold(wanted)
        stored = (
            of_file
            for each in wanted
            for of_file in (
                self._derived[each.file].stored(each.start, each.stop - each.start)
                if each.file in self._derived
                else [each]
            )
        )
        return Held(self, self._remote.fetch(stored))

    def __enter__(self) -> Self:
        """Open nothing yet."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close all files. A file in use is closed when its call returns."""
        self._descriptors.clear()

    def _call(self, file: int, function: Callable[..., T], *arguments: object) -> T:
        """Call a function of the operating system with a file's descriptor."""
        descriptor = self._descriptors.get(file)
        if descriptor is None:
            descriptor = _Descriptor(open_to_read(self._paths[file], self._sources))
            if len(self._descriptors) < self._most_open:
                descriptor = self._descriptors.setdefault(file, descriptor)  # another thread may have been faster
        return function(descriptor.number, *arguments)

    def size_bytes(self, file: int) -> int:
        """Return the size of a file in bytes."""
        if self._remote is not None and file in self._remote:
            return self._remote.size_bytes(file)
        return self._call(file, os.fstat).st_size

    def read_into(self, file: int, position: int, *buffers: memoryview) -> None:
        """Fill ``buffers``, one after the other, with the bytes from ``position`` on.

        Raises FormatError if the file ends before.
        """
        if file in self._derived:
            self.derive_into(file, position, buffers, self)
            return
        if self._remote is not None and file in self._remote:
            self._remote.read_into(file, position, *buffers)
            return
        buffers = _after(buffers, 0)
        try:
            while buffers:
                step = self._call(file, os.preadv, buffers[:_MOST_BUFFERS], position)
                if step == 0:
                    break
                position += step
                buffers = _after(buffers, step)
        except OSError as error:
            raise SourceError(f"cannot read {self._paths[file]}: {error.strerror}") from error
        if buffers:
            path, size = self._paths[file], self.size_bytes(file)
            raise truncated(path, position + sum(map(len, buffers)), size)

    def is_derived(self, file: int) -> bool:
        """Whether a file is a virtual one, whose content is computed."""
        return file in self._derived

    def derive_into(self, file: int, position: int, buffers: tuple[memoryview, ...], stored: Readable) -> None:
        """Fill ``buffers`` from a derived file, which computes long pieces in less time than short ones.

        What it is computed from is read from ``stored``.
        """
        if len(buffers) == 1:
            self._derived[file].read_into(stored, position, buffers[0])
            return
        whole, begin = memoryview(bytearray(sum(map(len, buffers)))), 0
        self._derived[file].read_into(stored, position, whole)
        for buffer in buffers:
            buffer[:] = whole[begin : begin + len(buffer)]
            begin += len(buffer)

    def read(self, file: int, position: int, num_bytes: int) -> bytes:
        """Return the ``num_bytes`` bytes from ``position`` on. Raises FormatError if the file ends before."""
        if self._remote is not None and file in self._remote:
            return self._remote.read(file, position, num_bytes)
        try:
            data = self._call(file, os.pread, num_bytes, position)
        except OSError as error:
            raise SourceError(f"cannot read {self._paths[file]}: {error.strerror}") from error
        if len(data) == num_bytes:
            return data
        buffer = bytearray(num_bytes)  # a short read, or the end of the file
        self.read_into(file, position, memoryview(buffer))
        return bytes(buffer)

    def read_cached(self, file: int, position: int, num_bytes: int) -> bytes | None:
        """Read like ``read``, but return None if some bytes are not in the page cache or the kernel cannot tell."""
        if self._remote is not None and file in self._remote:
            return None
        buffer = bytearray(num_bytes)
        try:
            done = self._call(file, os.preadv, (buffer,), position, os.RWF_NOWAIT)
        except OSError:  # ``read`` raises it again
            return None
        return bytes(buffer) if done == num_bytes else None

    def ask_for(self, file: int, position: int, num_bytes: int) -> None:
        """Start reading ahead (posix_fadvise WILLNEED). Errors are ignored here and raised by the read itself."""
        if self._remote is not None and file in self._remote:
            self._remote.ask_for(file, position, num_bytes)
            return
        with contextlib.suppress(OSError):
            self._call(file, os.posix_fadvise, position, num_bytes, os.POSIX_FADV_WILLNEED)


def truncated(path: Path, expected_bytes: int, got_bytes: int) -> FormatError:
    """Return the error for a file that ends before the bytes that something else says it has."""
    return FormatError(
        f"{path} is truncated: expected at least {expected_bytes} bytes, got {got_bytes}. "
        "Copy the file again from where it came from."
    )


def _after(buffers: tuple[memoryview, ...], num_bytes: int) -> tuple[memoryview, ...]:
    """Return what remains of ``buffers`` after ``num_bytes`` bytes: preadv may fill fewer than requested."""
    for number, buffer in enumerate(buffers):
        if num_bytes < len(buffer):
            return (buffer[num_bytes:], *buffers[number + 1 :])
        num_bytes -= len(buffer)
    return ()


def allow_open_files(count: int) -> int:
    """Return how many of ``count`` files may be open at once, after raising the soft limit if it is too low."""
    limit, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit not in {hard, resource.RLIM_INFINITY} and count > limit // _SHARE_OF_DESCRIPTORS:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        limit = hard
    return count if limit == resource.RLIM_INFINITY else min(count, limit // _SHARE_OF_DESCRIPTORS)


class Writable(Protocol):
    """What bytes can be written into at positions: a ``TargetFile``, or something around one."""

    def write(self, position: int, data: bytes) -> None:
        """Write all of ``data`` at ``position``."""


class TargetFile:
    """A file to write at positions, from several threads and processes."""

    def __init__(self, path: Path, num_bytes: int | None = None, *, kept: bool = False, durable: bool = False) -> None:
        """Create ``path`` with ``num_bytes`` reserved, or open an existing file if ``num_bytes`` is None.

        A new file must not exist, unless its content is to be ``kept``: then it is cut or extended to ``num_bytes``.
        With ``durable``, ``start_writeback`` takes effect.
        """
        self.path = path
        self._durable = durable
        created = 0 if num_bytes is None else os.O_CREAT | (0 if kept else os.O_EXCL)
        self._descriptor = os.open(path, os.O_RDWR | created | os.O_CLOEXEC, 0o666)  # the umask applies
        try:
            if num_bytes is not None:
                _reserve(self._descriptor, num_bytes)
        except BaseException:
            os.close(self._descriptor)
            raise

    def write(self, position: int, data: memoryview | bytes) -> None:
        """Write all of ``data`` at ``position``."""
        view = memoryview(data)
        while view:
            step = self._call(os.pwrite, view[:_WRITE_BYTES], position)
            if step == 0:
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(self.path))
            view, position = view[step:], position + step

    def read(self, position: int, num_bytes: int) -> bytes:
        """Read up to ``num_bytes`` bytes at ``position``; fewer at the end of the file."""
        return self._call(os.pread, num_bytes, position)

    def start_writeback(self, position: int, num_bytes: int) -> None:
        """Start writing bytes to the disk if the file is durable, so that a later ``sync`` has less to wait for."""
        if not self._durable:
            return
        sync_file_range = linux_call("sync_file_range", "c_int", "c_int64", "c_int64", "c_uint")
        sync_file_range(self._descriptor, position, num_bytes, _SYNC_FILE_RANGE_WRITE)  # a hint: errors do not matter

    def sync(self) -> None:
        """Wait until the content is on the disk (fsync)."""
        self._call(os.fsync)

    def _call(self, function: Callable[..., T], *arguments: object) -> T:
        """Call a function of the operating system with the descriptor, and add the file's name to an OSError."""
        try:
            return function(self._descriptor, *arguments)
        except OSError as error:
            error.filename = str(self.path)
            raise

    def close(self) -> None:
        """Close the file. Bytes that were not synced may be lost if the machine fails."""
        os.close(self._descriptor)


def _reserve(descriptor: int, num_bytes: int) -> None:
    """Set the size and reserve the space with fallocate(2), if the file system supports that.

    glibc's posix_fallocate would write zeros on other file systems.
    """
    os.ftruncate(descriptor, num_bytes)
    if num_bytes:
        fallocate = linux_call("fallocate", "c_int", "c_int", "c_int64", "c_int64")
        code = fallocate(descriptor, 0, 0, num_bytes)
        if code in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
            raise OSError(code, os.strerror(code))


@functools.cache
def linux_call(name: str, *argument_types: str) -> Callable[..., int]:
    """Return a C library function that Python does not wrap. Its result is 0 or an errno; ENOSYS if it is missing."""
    function = getattr(ctypes.CDLL(None, use_errno=True), name, None)
    if function is None:
        return lambda *_: errno.ENOSYS
    function.argtypes = [getattr(ctypes, argument_type) for argument_type in argument_types]
    return lambda *arguments: ctypes.get_errno() if function(*arguments) != 0 else 0


class ReadAhead:
    """Reads small pieces at known places, and requests the next ones from the disk in advance.

    Reads in another order, or at other places, return the same bytes but take longer.
    """

    def __init__(self, files: SourceFiles, places: Iterable[tuple[int, int]]) -> None:
        """Expect reads at ``places``, (file, position in bytes), in this order."""
        self._files, self._places = files, iter(places)
        self._num_reads = 0
        self._next_test = 0  # number of the next read that tests whether its bytes are in the page cache
        self._num_consumed = 0  # of the places

    def read(self, file: int, position: int, num_bytes: int) -> bytes:
        """Return the ``num_bytes`` bytes from ``position`` on. Raises FormatError if the file ends before."""
        number, self._num_reads = self._num_reads, self._num_reads + 1
        if number >= self._next_test:
            cached = self._files.read_cached(file, position, num_bytes)
            if cached is not None:
                self._next_test = number + _TRUSTED
                return cached
            self._request(number, num_bytes)
        return self._files.read(file, position, num_bytes)

    def _request(self, number: int, num_bytes: int) -> None:
        """Start reading ahead for the next reads, from read ``number`` on, ``num_bytes`` bytes each."""
        self._next_test = number + _REQUESTED
        for file, position in islice(self._places, number - self._num_consumed, self._next_test - self._num_consumed):
            self._files.ask_for(file, position, num_bytes)
        self._num_consumed = self._next_test
