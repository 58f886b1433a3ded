"""Files: reading at positions, writing at positions, small ones whole; and what becomes of them meanwhile."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import re
import resource
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Protocol, Self, TypeVar

from dist_ckpt_mistral.errors import FormatError, OutputError
from dist_ckpt_mistral.stamps import Sources, Stamp, changed

T = TypeVar("T")

_BLOCK_BYTES: Final = 1 << 20
#: More than any index, configuration or tracker has: what is larger is not read whole.
SMALL_BYTES: Final = 64 << 20
#: How a pointer begins (git-lfs 3.7, docs/spec.md).
_LFS_POINTER: Final = b"version https://git-lfs.github.com/spec/v1"
#: How mountinfo spells blanks and backslashes.
_OCTAL: Final = re.compile(rb"\\([0-7]{3})")
_SYNC_FILE_RANGE_WRITE: Final = 2  # linux/fs.h
#: At most three such groups of files are open at once (two sources and a target), and then some others.
_SHARE_OF_DESCRIPTORS: Final = 4


def read_bytes(path: Path, *, most_bytes: int | None = SMALL_BYTES) -> bytes:
    """The whole content of a small file. Raises FormatError where it is no file, or larger than ``most_bytes``."""
    with SourceFiles([path]) as files:
        size_bytes = files.size_bytes(0)
        if most_bytes is not None and size_bytes > most_bytes:
            raise FormatError(f"{path} is too large: expected at most {most_bytes} bytes, got {size_bytes}")
        return files.read(0, 0, size_bytes)


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file is what a clone has where Git LFS did not fetch the file itself."""
    with SourceFiles([path]) as files:
        return files.read(0, 0, min(files.size_bytes(0), len(_LFS_POINTER))) == _LFS_POINTER


def _open_to_read(path: Path, sources: Sources | None) -> int:
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
            os.close(_open_to_read(path, sources))
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


def write_bytes(path: Path, data: bytes) -> None:
    """Write a small file, which must not exist. ``publish`` makes it durable."""
    with path.open("xb") as file:
        file.write(data)


def write_link(path: Path, sibling: str) -> None:
    """Make ``path`` a link to ``sibling`` beside it, in place of an old one. Raises OSError if it cannot be."""
    path.unlink(missing_ok=True)
    path.symlink_to(sibling)


def write_whole(path: Path, data: bytes) -> None:
    """Write a small file whole or not at all: under another name beside it, then renamed; an old one is replaced.

    What is no regular file, such as a pipe, is written to as it is. Raises OutputError.
    """
    try:
        if path.exists() and not path.is_file():
            path.write_bytes(data)
            return
        target = path.resolve()  # a link stays one
        staging = target.parent / f".{target.name}.incomplete-{os.getpid()}-{os.urandom(4).hex()}"
        try:
            write_bytes(staging, data)
            staging.replace(target)
        finally:
            staging.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error


def copy_file(source: Path, target: Path) -> None:
    """Copy a file of any size, content only, in blocks. The target must not exist."""
    with target.open("xb") as file:
        file.writelines(_blocks(source))


def total_bytes(paths: Sequence[Path]) -> int:
    """How much space the content of files takes. Raises FormatError where one of them cannot be opened to be read."""
    with SourceFiles(paths) as files:
        return sum(map(files.size_bytes, range(len(paths))))


def _blocks(path: Path) -> Iterator[bytes]:
    try:
        with open(_open_to_read(path, Sources.active()), "rb") as file:
            before = Stamp.of(os.fstat(file.fileno()))
            while block := file.read(_BLOCK_BYTES):
                yield block
            if Stamp.of(os.fstat(file.fileno())) != before:
                raise changed(path)
    except OSError as error:
        raise FormatError(f"cannot read {path}: {error.strerror or error}") from error


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
            descriptor = _Descriptor(_open_to_read(self._paths[file], self._sources))
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

    def __init__(self, path: Path, num_bytes: int | None = None, *, kept: bool = False) -> None:
        """Create ``path`` with ``num_bytes`` reserved, or join in writing an existing one.

        A file to create must not exist, unless what it holds is to be ``kept``, as far as it fits.
        """
        self.path = path
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
        """Have the kernel begin to write bytes to the disk, without waiting: a later ``sync`` has less to wait for."""
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
