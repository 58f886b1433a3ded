"""Where an output grows until it is whole: a hidden sibling that one run holds at a time, published by one rename."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import shutil
from collections.abc import Container
from pathlib import Path
from typing import Final

from dist_ckpt_mistral.errors import OutputError
from dist_ckpt_mistral.storage.local import linux_call
from dist_ckpt_mistral.storage.paths import (
    existing_parent,
    is_absent,
    placed,
    require_replaceable,
    require_writable,
    staging_name,
)

_LOG = logging.getLogger(__name__)
_LOCK_FILE: Final = "lock"
#: Each time another run has just removed the lock. Nobody is so unlucky so often.
_MOST_ATTEMPTS: Final = 100
#: What flock(2) says where a file system has no locks.
_NO_LOCKS: Final = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
#: What renameat2(2) says where the kernel or the file system cannot exchange two names.
_NO_EXCHANGE: Final = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)
_AT_FDCWD: Final = -100  # linux/fcntl.h
_RENAME_EXCHANGE: Final = 2  # linux/fs.h
_BLOCK_BYTES: Final = 512  # of st_blocks, see stat(2)


class Staging:
    """``.NAME.incomplete`` beside an output NAME: there it grows, as ``output``, until a rename publishes it.

    A run holds it by a lock, so that others can tell a living run from a killed one's leftovers. What else lies in it
    is the run's own and never published. It stays after ``release``, for a run that resumes, and is gone after
    ``remove`` and ``publish``.

    Where two names cannot be exchanged, an old output is ``.NAME.replaced`` for a moment. A run that is killed in that
    moment leaves it so; the next one that holds the staging directory puts it back.
    """

    def __init__(self, target: Path) -> None:
        """Touch nothing yet."""
        self.target = placed(target)
        self.path = self.target.parent / staging_name(self.target)
        self.output = self.path / "output"
        self._replaced = self.target.parent / f".{self.target.name}.replaced"
        self._lock: int | None = None
        self.is_published = False

    @property
    def is_held(self) -> bool:
        """Whether this run holds the directory."""
        return self._lock is not None

    def require_room(self, num_bytes: int) -> None:
        """Raise OutputError unless there is room for an output. Nothing is touched.

        What a killed run left takes no room: it is kept, or removed first. Another run may be at work there still.
        """
        free = _bytes_in(self.path) + shutil.disk_usage(existing_parent(self.target)).free
        if free < num_bytes:
            raise OutputError(f"not enough space for {self.target}: {num_bytes} bytes are needed, {free} are free.")

    def require_free(self, *, overwrite: bool, resume: bool) -> None:
        """Raise OutputError where ``hold`` would. Nothing is touched."""
        try:
            with contextlib.suppress(FileNotFoundError):
                descriptor = os.open(self.path / _LOCK_FILE, os.O_RDWR | os.O_CLOEXEC)
                try:
                    self._flock(descriptor, fcntl.LOCK_SH, may_be_held=not resume)
                finally:
                    os.close(descriptor)
            if is_absent(self.target) and os.path.lexists(self._replaced):  # ``hold`` puts it back
                require_replaceable(self.target, self._replaced, overwrite=overwrite)
        except OSError as error:
            raise self._cannot_create(error) from error

    def hold(self, *, overwrite: bool, resume: bool) -> None:
        """Make the directory, or take over what a killed run left, as it is.

        Raises OutputError where another run is writing the output, and where it must not be written. Where locks do not
        exist, only who wants to ``resume`` takes over.
        """
        try:
            attempts = (self._try_lock(resume=resume) for _ in range(_MOST_ATTEMPTS))
            if not any(attempts):
                raise OutputError(f"other runs come and go that write {self.target}. Choose another output.")
            self._put_back()
            require_writable(self.target, overwrite=overwrite)
        except OSError as error:
            with contextlib.suppress(OSError):  # it is not empty, or not there
                self.path.rmdir()
            raise self._cannot_create(error) from error

    def _cannot_create(self, error: OSError) -> OutputError:
        return OutputError(f"cannot create {self.target}: {error.strerror or error}")

    def _try_lock(self, *, resume: bool) -> bool:
        """Take the lock, unless the file was removed before that: then it is another one's already, or nobody's."""
        found = os.path.lexists(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        path = self.path / _LOCK_FILE
        with contextlib.suppress(FileNotFoundError):  # the run that held it has just removed it, or its directory
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                self._flock(descriptor, fcntl.LOCK_EX, may_be_held=found and not resume)
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    self._lock = descriptor
            finally:
                if self._lock is None:
                    os.close(descriptor)
        return self.is_held

    def _flock(self, descriptor: int, kind: int, *, may_be_held: bool) -> None:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(
                f"another run is writing {self.target}. Wait for it, or choose another output."
            ) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            if may_be_held:
                raise OutputError(
                    f"cannot tell whether another run is writing {self.target}: its file system has no locks "
                    f"({error.strerror}). If none is, remove {self.path} or give --resume."
                ) from error

    def _put_back(self) -> None:
        if os.path.lexists(self._replaced):
            if is_absent(self.target):
                self._replaced.rename(self.target)
                _LOG.warning("%s is back: a run that was killed had moved it to %s", self.target, self._replaced)
            else:
                _remove(self._replaced)
                _LOG.warning("removed %s, an old output that a run had replaced before it was killed", self._replaced)

    def clear(self) -> None:
        """Remove all that an earlier run left."""
        left = [path for path in self.path.iterdir() if path.name != _LOCK_FILE]
        if left:
            _LOG.warning("removing %s, which a run that did not end well left behind", self.path)
        for path in left:
            _remove(path)

    def keep(self, names: Container[str]) -> None:
        """Remove all of the output but the files ``names``."""
        for folder, _, files in os.walk(self.output, topdown=False):
            for path in (Path(folder) / file for file in files):
                if str(path.relative_to(self.output)) not in names:
                    path.unlink()
            with contextlib.suppress(OSError):  # it holds files to keep
                Path(folder).rmdir()

    def publish(self, *, overwrite: bool, durable: bool) -> None:
        """Give ``output`` its name, on the disk before that if ``durable``, and remove all else.

        With ``overwrite`` there is an output at every moment, the old or the new one, where the file system can do
        that. Without, what has appeared meanwhile stays as it is, and OSError is raised.
        """
        if durable:
            _sync_tree(self.output)
        if overwrite and os.path.lexists(self.target):
            self._exchange()
        else:
            self.output.rename(self.target)
        self.is_published = True
        try:
            if durable:
                _sync(self.target.parent)
        except OSError as error:
            raise OutputError(f"{self.target} is complete, but may not be on the disk: {error.strerror}") from error
        finally:
            _try_remove(self._replaced)
            self.remove()

    def _exchange(self) -> None:
        """Let the old output and the new one change names."""
        renameat2 = linux_call("renameat2", "c_int", "c_char_p", "c_int", "c_char_p", "c_uint")
        names = os.fsencode(self.output), os.fsencode(self.target)
        code = renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE)
        if code in _NO_EXCHANGE:
            self._replace_in_two_steps()
        elif code:
            raise OSError(code, os.strerror(code), str(self.target))

    def _replace_in_two_steps(self) -> None:
        self.target.rename(self._replaced)
        try:
            self.output.rename(self.target)
        except OSError:
            self._replaced.rename(self.target)
            raise

    def release(self) -> None:
        """Leave the directory as it is, to whoever comes next."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def remove(self) -> None:
        """Remove the directory, with an old output in it that was replaced. What cannot be removed is named."""
        for path in self.path.iterdir():
            if path.name != _LOCK_FILE:
                _try_remove(path)
        _try_remove(self.path / _LOCK_FILE)  # last: until then nobody else comes in
        self.release()
        with contextlib.suppress(OSError):  # another run has come in, or something could not be removed
            self.path.rmdir()


def _try_remove(path: Path) -> None:
    try:
        if os.path.lexists(path):
            _remove(path)
    except OSError as error:
        _LOG.warning("cannot remove %s: %s", error.filename or path, error.strerror)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _sync_tree(root: Path) -> None:
    """Files before the directories that name them."""
    for folder, _, names in os.walk(root, topdown=False):
        for name in (*names, "."):
            _sync(Path(folder) / name)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _bytes_in(directory: Path) -> int:
    """The space that the files under ``directory`` take on the disk; what vanishes meanwhile takes none."""
    found = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                found += os.lstat(os.path.join(folder, name)).st_blocks * _BLOCK_BYTES  # noqa: PTH118
    return found
