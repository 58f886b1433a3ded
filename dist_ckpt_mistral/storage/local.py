"""Files: reading at positions, writing at positions, small ones whole; and what becomes of them meanwhile."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import re
import resource
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar, Token
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Final, NamedTuple, Protocol, Self, TypeVar

from dist_ckpt_mistral.errors import FormatError

T = TypeVar("T")

#: How mountinfo spells blanks and backslashes.
_OCTAL: Final = re.compile(rb"\\([0-7]{3})")
_SYNC_FILE_RANGE_WRITE: Final = 2  # linux/fs.h
#: At most three such groups of files are open at once (two sources and a target), and then some others.
_SHARE_OF_DESCRIPTORS: Final = 4
#: So many places are asked for at once: more made no difference.
_PLACES: Final = 256
#: After one place that is in memory, so many are taken to be there too: looking takes longer than reading.
_TRUSTED: Final = 16


class Stamp(NamedTuple):
    """What tells one state of one file from all others: its size, times (ns since 1970), inode and device.

    ``cp -p``, ``rsync -t`` and ``touch`` set ``mtime_ns`` as they like. Nothing but a change of the file sets
    ``ctime_ns``: of its content, its name, its owner or its mode. Another machine may see another ``device``, and some
    network file systems show another ``ctime_ns`` or ``inode`` after they were mounted again.
    """

    num_bytes: int
    mtime_ns: int
    ctime_ns: int
    inode: int
    device: int | None

    @classmethod
    def of(cls, status: os.stat_result) -> Self:
        """The stamp of a file that has this status."""
        return cls(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev)

    def is_same(self, other: Stamp) -> bool:
        """Whether both are of one state of one file; a device of None is any."""
        return self[:4] == other[:4] and (None in {self.device, other.device} or self.device == other.device)

    def looks_like(self, other: Stamp) -> bool:
        """Whether ``ls -l`` shows no difference: equal sizes and times of change. Only reading tells more."""
        return self[:2] == other[:2]


def stamps(paths: Iterable[Path]) -> dict[Path, Stamp]:
    """The stamps of those of ``paths`` that are files. What is absent or something else is left out."""
    found = {}
    for path in paths:
        with contextlib.suppress(OSError):
            status = path.stat()
            if stat.S_ISREG(status.st_mode):
                found[path] = Stamp.of(status)
    return found


class Sources:
    """The files that a run looks at, and the stamp of each when the run first came to it.

    Within a ``with`` block every file that this thread opens to read (``storage``) is noted here. A block may be
    entered again. The threads of a gather share the ``SourceFiles`` that this thread made.
    """

    def __init__(self) -> None:
        """Nothing was looked at yet."""
        self._first: dict[Path, Stamp] = {}
        self._opened: set[Path] = set()
        self._tokens: list[Token[Sources | None]] = []

    def __getstate__(self) -> dict[str, object]:
        """What a copy in another process notes by: another machine may see the same files on another device."""
        first = {path: stamp._replace(device=None) for path, stamp in self._first.items()}
        return {"_first": first, "_opened": set(self._opened), "_tokens": []}

    def __enter__(self) -> Self:
        """Note the files that are opened from now on."""
        self._tokens.append(_ACTIVE.set(self))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Note no more."""
        _ACTIVE.reset(self._tokens.pop())

    @staticmethod
    def active() -> Sources | None:
        """Where this thread notes the files that it opens."""
        return _ACTIVE.get()

    @property
    def first(self) -> Mapping[Path, Stamp]:
        """The first stamps of all files that were looked at."""
        return self._first

    def look_at(self, paths: Iterable[Path]) -> None:
        """Note those of ``paths`` that are files and were not looked at before."""
        self._first = {**stamps(path for path in paths if path not in self._first), **self._first}

    @property
    def opened(self) -> frozenset[Path]:
        """The files that were opened."""
        return frozenset(self._opened)

    def note(self, path: Path, status: os.stat_result) -> None:
        """Note an opened file. Raises FormatError unless it is what the run has seen at this path before."""
        stamp = Stamp.of(status)
        if not self._first.setdefault(path, stamp).is_same(stamp):
            raise changed(path)
        self._opened.add(path)

    def looks_changed(self) -> bool:
        """Whether any file has another size or time of change than at first. One that is absent may come back."""
        return any(not self._first[path].looks_like(stamp) for path, stamp in stamps(self._first).items())


_ACTIVE: ContextVar[Sources | None] = ContextVar("sources", default=None)


def changed(path: Path) -> FormatError:
    """The error that says so."""
    what = "changed" if path.exists() else "vanished"
    return FormatError(f"{path} {what} while it was read. Start again when nobody touches it.")


def open_to_read(path: Path, sources: Sources | None) -> int:
    """A descriptor of a regular file, wherever links lead, noted in ``sources``.

    Nobody may wait for the other end of a pipe.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL
        raise FormatError(f"cannot open {path}: {getattr(error, 'strerror', None) or error}") from error
    status = os.fstat(descriptor)
    try:
        if not stat.S_ISREG(status.st_mode):
            raise FormatError(f"cannot read {path}: it is no regular file")  # noqa: TRY301  (its descriptor is closed)
        if sources is not None:
            sources.note(path, status)
    except FormatError:
        os.close(descriptor)
        raise
    return descriptor


def require_unchanged(sources: Sources) -> None:
    """Raise FormatError unless all files that were opened are still what they were.

    Each is opened again: a network file system answers from its memory else.
    """
    for path in sources.opened:
        try:
            os.close(open_to_read(path, sources))
        except FormatError as error:
            raise error if path.exists() else changed(path) from None


def mount_points() -> list[Path]:
    """Where file systems are mounted, those of one device too, which ``os.path.ismount`` does not see (proc(5))."""
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return []
    fields = (line.split()[4] for line in lines)
    return [Path(os.fsdecode(_OCTAL.sub(lambda found: bytes([int(found[1], 8)]), each))) for each in fields]


class DerivedFile(Protocol):
    """A file that lies nowhere: what is read of it is computed from other files of the same ``SourceFiles``."""

    def read_into(self, files: SourceFiles, position: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from ``position`` on, from any thread."""


class _Descriptor:
    """An open file, closed with the last reference: no other file gets its number while a thread still reads."""

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        """Own ``number``."""
        self.number = number

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        """Close the file; ``os`` may be gone by then."""
        close(self.number)


class SourceFiles:
    """Files to read at positions from several threads. Opened on first use, closed together.

    Where there are more than may be open, the others are opened anew for each read.
    """

    def __init__(self, paths: Sequence[Path], derived: Sequence[DerivedFile] = ()) -> None:
        """Remember them; file ``i`` of the other methods is ``paths[i]``, and ``derived`` are counted on from there."""
        self._paths = tuple(paths)
        self._derived = dict(enumerate(derived, len(self._paths)))
        self._descriptors: dict[int, _Descriptor] = {}
        self._sources = Sources.active()
        self._most_open = allow_open_files(len(self._paths))

    def __enter__(self) -> Self:
        """Nothing is opened yet."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close all files, each when the call that uses it is over."""
        self._descriptors.clear()

    def _call(self, file: int, function: Callable[..., T], *arguments: object) -> T:
        """A call of the operating system on a file."""
        descriptor = self._descriptors.get(file)
        if descriptor is None:
            descriptor = _Descriptor(open_to_read(self._paths[file], self._sources))
            if len(self._descriptors) < self._most_open:
                descriptor = self._descriptors.setdefault(file, descriptor)  # another thread's, if that was quicker
        return function(descriptor.number, *arguments)

    def size_bytes(self, file: int) -> int:
        """Size of a file."""
        return self._call(file, os.fstat).st_size

    def read_into(self, file: int, position: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from ``position`` on. Raises FormatError if there are too few bytes."""
        if file in self._derived:
            self._derived[file].read_into(self, position, buffer)
            return
        done = 0
        while done < len(buffer):  # again after a short read, behind what came
            step = self._preadv(file, buffer[done:], position + done)
            if step == 0:
                path, size = self._paths[file], self.size_bytes(file)
                raise FormatError(
                    f"{path} is truncated: expected at least {position + len(buffer)} bytes, got {size}. "
                    "Copy the file again from where it came from."
                )
            done += step

    def _preadv(self, file: int, buffer: memoryview, position: int) -> int:
        try:
            return self._call(file, os.preadv, (buffer,), position)
        except OSError as error:
            raise FormatError(f"cannot read {self._paths[file]}: {error.strerror}") from error

    def read(self, file: int, position: int, num_bytes: int) -> bytes:
        """``num_bytes`` bytes from ``position`` on."""
        try:
            data = self._call(file, os.pread, num_bytes, position)
        except OSError as error:
            raise FormatError(f"cannot read {self._paths[file]}: {error.strerror}") from error
        if len(data) == num_bytes:
            return data
        buffer = bytearray(num_bytes)  # a short read, or an end
        self.read_into(file, position, memoryview(buffer))
        return bytes(buffer)

    def read_cached(self, file: int, position: int, num_bytes: int) -> bytes | None:
        """The same without waiting for a disk: None where any of it is not in memory, or the kernel cannot tell."""
        buffer = bytearray(num_bytes)
        try:
            done = self._call(file, os.preadv, (buffer,), position, os.RWF_NOWAIT)
        except OSError:  # whatever it is, reading in the ordinary way tells it
            return None
        return bytes(buffer) if done == num_bytes else None

    def ask_for(self, file: int, position: int, num_bytes: int) -> None:
        """Have the kernel begin to bring bytes into memory, without waiting. A hint: what is amiss, reading tells."""
        with contextlib.suppress(OSError):
            self._call(file, os.posix_fadvise, position, num_bytes, os.POSIX_FADV_WILLNEED)


def allow_open_files(count: int) -> int:
    """How many of ``count`` files may be open: others are open besides. The soft limit is raised where it is near."""
    limit, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit not in {hard, resource.RLIM_INFINITY} and count > limit // _SHARE_OF_DESCRIPTORS:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        limit = hard
    return count if limit == resource.RLIM_INFINITY else min(count, limit // _SHARE_OF_DESCRIPTORS)


class TargetFile:
    """One file to write at positions, from several threads and processes."""

    def __init__(self, path: Path, num_bytes: int | None = None, *, kept: bool = False, durable: bool = False) -> None:
        """Create ``path`` with ``num_bytes`` reserved, or join in writing an existing one.

        A file to create must not exist, unless what it holds is to be ``kept``, as far as it fits. Of a file that is to
        be ``durable`` the disk gets to work early.
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
            step = self._call(os.pwrite, view, position)
            if step == 0:
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(self.path))
            view, position = view[step:], position + step

    def read(self, position: int, num_bytes: int) -> bytes:
        """What stands at ``position``: ``num_bytes`` bytes, or as many as there are."""
        return self._call(os.pread, num_bytes, position)

    def start_writeback(self, position: int, num_bytes: int) -> None:
        """Have the kernel begin to write bytes to the disk, without waiting, if a later ``sync`` would wait for it."""
        if not self._durable:
            return
        sync_file_range = linux_call("sync_file_range", "c_int", "c_int64", "c_int64", "c_uint")
        sync_file_range(self._descriptor, position, num_bytes, _SYNC_FILE_RANGE_WRITE)  # a hint: may fail

    def sync(self) -> None:
        """Make the content durable."""
        self._call(os.fsync)

    def _call(self, function: Callable[..., T], *arguments: object) -> T:
        """A call that knows but the descriptor, and whose errors are to have the name of the file."""
        try:
            return function(self._descriptor, *arguments)
        except OSError as error:
            error.filename = str(self.path)
            raise

    def close(self) -> None:
        """Close the file; what was not synced may be lost with the machine."""
        os.close(self._descriptor)


def _reserve(descriptor: int, num_bytes: int) -> None:
    """fallocate(2) where the file system has it. glibc's posix_fallocate would write zeros where it has not."""
    os.ftruncate(descriptor, num_bytes)
    if num_bytes:
        fallocate = linux_call("fallocate", "c_int", "c_int", "c_int64", "c_int64")
        code = fallocate(descriptor, 0, 0, num_bytes)
        if code in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
            raise OSError(code, os.strerror(code))


@functools.cache
def linux_call(name: str, *argument_types: str) -> Callable[..., int]:
    """A function of the C library that Python does not offer; it returns an error number, ENOSYS if there is none."""
    import ctypes  # noqa: PLC0415  (slow, and only writing needs it)

    function = getattr(ctypes.CDLL(None, use_errno=True), name, None)
    if function is None:
        return lambda *_: errno.ENOSYS
    function.argtypes = [getattr(ctypes, argument_type) for argument_type in argument_types]
    return lambda *arguments: ctypes.get_errno() if function(*arguments) != 0 else 0


class ReadAhead:
    """Reads at places in about the order given; another order, or other places, cost time and nothing else."""

    def __init__(self, files: SourceFiles, places: Iterable[tuple[int, int]]) -> None:
        """``places`` are (file, position) of the reads to come."""
        self._files, self._places = files, iter(places)
        self._reads = self._looking_at = self._taken = 0

    def read(self, file: int, position: int, num_bytes: int) -> bytes:
        """``num_bytes`` bytes from ``position`` on."""
        number, self._reads = self._reads, self._reads + 1
        if number >= self._looking_at:
            found = self._files.read_cached(file, position, num_bytes)
            if found is not None:
                self._looking_at = number + _TRUSTED
                return found
            self._ask(number, num_bytes)
        return self._files.read(file, position, num_bytes)

    def _ask(self, number: int, num_bytes: int) -> None:
        """Have what is read from read ``number`` on brought into memory."""
        self._looking_at = number + _PLACES
        for file, position in islice(self._places, number - self._taken, self._looking_at - self._taken):
            self._files.ask_for(file, position, num_bytes)
        self._taken = self._looking_at
