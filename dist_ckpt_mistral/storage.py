"""Files: reading at positions, writing at positions, small ones whole; and what becomes of them meanwhile."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import resource
import secrets
import stat
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Protocol, Self

from dist_ckpt_mistral.errors import FormatError, OutputError
from dist_ckpt_mistral.stamps import Stamp, changed

_BLOCK_BYTES: Final = 1 << 20
#: More than any index, configuration or tracker has: what is larger is not read whole.
SMALL_BYTES: Final = 64 << 20
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


def _open_to_read(path: Path) -> int:
    """A descriptor of a regular file, wherever links lead. Nobody may wait for the other end of a pipe."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL
        raise FormatError(f"cannot open {path}: {getattr(error, 'strerror', None) or error}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise FormatError(f"cannot read {path}: it is no regular file")
    return descriptor


def write_bytes(path: Path, data: bytes) -> None:
    """Write a small file, which must not exist. ``publish`` makes it durable."""
    with path.open("xb") as file:
        file.write(data)


def write_whole(path: Path, data: bytes) -> None:
    """Write a small file whole or not at all: under another name beside it, then renamed; an old one is replaced.

    What is no regular file, such as a pipe, is written to as it is. Raises OutputError.
    """
    try:
        if path.exists() and not path.is_file():
            path.write_bytes(data)
            return
        target = path.resolve()  # a link stays one
        staging = target.parent / f".{target.name}.incomplete-{os.getpid()}-{secrets.token_hex(4)}"
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


def total_bytes(paths: Iterable[Path]) -> int:
    """How much space the content of files takes."""
    return sum(path.stat().st_size for path in paths)


def _blocks(path: Path) -> Iterator[bytes]:
    try:
        with open(_open_to_read(path), "rb") as file:
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


class SourceFiles:
    """Files to read at positions from several threads. Opened on first use, closed together.

    Where there are more than may be open at once, each thread has but the one open that it reads.
    """

    def __init__(self, paths: Sequence[Path], derived: Sequence[DerivedFile] = ()) -> None:
        """Remember them; file ``i`` of the other methods is ``paths[i]``, and ``derived`` are counted on from there."""
        self._paths = tuple(paths)
        self._derived = dict(enumerate(derived, len(self._paths)))
        self._descriptors: dict[int, int] = {}
        self._lock = threading.Lock()
        self._stay_open = allow_open_files(len(self._paths))
        self._of_thread: dict[int, tuple[int, int]] = {}

    def __enter__(self) -> Self:
        """Nothing is opened yet."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close all files."""
        for descriptor in (*self._descriptors.values(), *(each for _, each in self._of_thread.values())):
            os.close(descriptor)
        self._descriptors.clear()
        self._of_thread.clear()

    def _descriptor(self, file: int) -> int:
        descriptor = self._descriptors.get(file)
        if descriptor is not None:
            return descriptor
        if not self._stay_open:
            return self._alone(file)
        with self._lock:
            if file not in self._descriptors:
                self._descriptors[file] = _open_to_read(self._paths[file])
            return self._descriptors[file]

    def _alone(self, file: int) -> int:
        """A descriptor that only this thread uses, and until it asks for another file."""
        thread = threading.get_ident()
        known, descriptor = self._of_thread.get(thread, (-1, -1))
        if known == file:
            return descriptor
        if self._of_thread.pop(thread, None) is not None:
            os.close(descriptor)
        descriptor = _open_to_read(self._paths[file])
        self._of_thread[thread] = file, descriptor
        return descriptor

    def size_bytes(self, file: int) -> int:
        """Size of a file."""
        return os.fstat(self._descriptor(file)).st_size

    def _preadv(self, file: int, buffers: Sequence[memoryview], position: int) -> int:
        try:
            return os.preadv(self._descriptor(file), buffers, position)
        except OSError as error:
            raise FormatError(f"cannot read {self._paths[file]}: {error.strerror}") from error

    def read_into(self, file: int, position: int, buffers: Sequence[memoryview]) -> None:
        """Fill ``buffers`` one after the other from ``position`` on. Raises FormatError if there are too few bytes."""
        if file in self._derived:
            for buffer in buffers:
                self._derived[file].read_into(self, position, buffer)
                position += len(buffer)
            return
        wanted = sum(map(len, buffers))
        done = self._preadv(file, buffers, position)
        while done < wanted:  # a short read: go on behind what came
            step = self._preadv(file, _behind(buffers, done), position + done)
            if step == 0:
                path, size = self._paths[file], self.size_bytes(file)
                raise FormatError(
                    f"{path} is truncated: expected at least {position + wanted} bytes, got {size}. "
                    "Copy the file again from where it came from."
                )
            done += step

    def read(self, file: int, position: int, num_bytes: int) -> bytes:
        """``num_bytes`` bytes from ``position`` on."""
        try:
            data = os.pread(self._descriptor(file), num_bytes, position)
        except OSError as error:
            raise FormatError(f"cannot read {self._paths[file]}: {error.strerror}") from error
        if len(data) == num_bytes:
            return data
        buffer = bytearray(num_bytes)  # a short read, or an end
        self.read_into(file, position, [memoryview(buffer)])
        return bytes(buffer)


def _behind(buffers: Sequence[memoryview], done: int) -> list[memoryview]:
    """What is left of ``buffers`` behind the first ``done`` bytes."""
    rest: list[memoryview] = []
    for buffer in buffers:
        if done >= len(buffer):
            done -= len(buffer)
        else:
            rest.append(buffer[done:])
            done = 0
    return rest


def allow_open_files(count: int) -> bool:
    """Raise the soft limit of open files to the hard one where ``count`` are much of it: others are open besides.

    Whether that many may be open now.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and count > soft // _SHARE_OF_DESCRIPTORS:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        return hard == resource.RLIM_INFINITY or count <= hard // _SHARE_OF_DESCRIPTORS
    return True


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
        with self._named_errors():
            while view:
                step = os.pwrite(self._descriptor, view, position)
                if step == 0:
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
                view, position = view[step:], position + step

    def read(self, position: int, num_bytes: int) -> bytes:
        """What stands at ``position``: ``num_bytes`` bytes, or as many as there are."""
        with self._named_errors():
            return os.pread(self._descriptor, num_bytes, position)

    def start_writeback(self, position: int, num_bytes: int) -> None:
        """Have the kernel begin to write bytes to the disk, without waiting: a later ``sync`` has less to wait for."""
        sync_file_range = linux_call("sync_file_range", "c_int", "c_int64", "c_int64", "c_uint")
        sync_file_range(self._descriptor, position, num_bytes, _SYNC_FILE_RANGE_WRITE)  # a hint: may fail

    def sync(self) -> None:
        """Make the content durable."""
        with self._named_errors():
            os.fsync(self._descriptor)

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Errors of calls that know but the descriptor, with the name of the file."""
        try:
            yield
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
