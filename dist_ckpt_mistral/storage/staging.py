"""The staging directory of an output: a hidden sibling, locked by one run at a time and published by one rename."""

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
#: Attempts to lock. One fails only if another run removes the lock file at the same moment.
_MAX_ATTEMPTS: Final = 100
#: Errors of flock(2) on a file system without locks.
_NO_LOCKS: Final = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
#: Errors of renameat2(2) if the kernel or the file system cannot exchange two names.
_NO_EXCHANGE: Final = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)
_AT_FDCWD: Final = -100  # linux/fcntl.h
_RENAME_EXCHANGE: Final = 2  # linux/fs.h
_BLOCK_BYTES: Final = 512  # of st_blocks, see stat(2)


class Staging:
    """The directory ``.NAME.incomplete`` beside an output NAME. Its subdirectory ``output`` becomes the output.

    A run locks it, so that other runs can tell a running one from the leftovers of a killed one. Other files in it
    belong to the run and are never published. The directory stays after ``release``, for a run that resumes, and is
    removed by ``remove`` and ``publish``.

    If the file system cannot exchange two names, an old output is called ``.NAME.replaced`` for a moment. If the run is
    killed in that moment, the next run that locks the staging directory restores the old output.
    """

    def __init__(self, target: Path) -> None:
        """Change nothing yet."""
        self.target = placed(target)
        self.path = self.target.parent / staging_name(self.target)
        self.output = self.path / "output"
        self._replaced = self.target.parent / f".{self.target.name}.replaced"
        self._lock: int | None = None
        self.is_published = False

    @property
    def is_held(self) -> bool:
        """Whether this run has locked the directory."""
        return self._lock is not None

    def require_room(self, num_bytes: int) -> None:
        """Raise OutputError if the disk has less space than ``num_bytes``. Changes nothing.

        Leftovers of a killed run count as free space, because they are reused or removed first.
        """
        free = _bytes_in(self.path) + shutil.disk_usage(existing_parent(self.target)).free
        if free < num_bytes:
            raise OutputError(f"not enough space for {self.target}: {num_bytes} bytes are needed, {free} are free.")

    def require_free(self, *, overwrite: bool, resume: bool) -> None:
        """Raise OutputError if ``hold`` would. Changes nothing."""
        try:
            with contextlib.suppress(FileNotFoundError):
                descriptor = os.open(self.path / _LOCK_FILE, os.O_RDWR | os.O_CLOEXEC)
                try:
                    self._flock(descriptor, fcntl.LOCK_SH, may_be_held=not resume)
                finally:
                    os.close(descriptor)
            if is_absent(self.target) and os.path.lexists(self._replaced):  # ``hold`` would restore it
                require_replaceable(self.target, self._replaced, overwrite=overwrite)
        except OSError as error:
            raise self._cannot_create(error) from error

    def hold(self, *, overwrite: bool, resume: bool) -> None:
        """Create and lock the directory, or take over the leftovers of a killed run unchanged.

        On a file system without locks, leftovers are taken over only with ``resume``. Raises OutputError if another run
        is writing the output, or ``require_writable`` refuses it.
        """
        try:
            attempts = (self._try_lock(resume=resume) for _ in range(_MAX_ATTEMPTS))
            if not any(attempts):
                raise OutputError(
                    f"cannot lock {self.target}: other runs that write it keep starting and ending. "
                    "Choose another output."
                )
            self._restore_replaced()
            require_writable(self.target, overwrite=overwrite)
        except OSError as error:
            with contextlib.suppress(OSError):  # it is not empty, or it does not exist
                self.path.rmdir()
            raise self._cannot_create(error) from error

    def _cannot_create(self, error: OSError) -> OutputError:
        return OutputError(f"cannot create {self.target}: {error.strerror or error}")

    def _try_lock(self, *, resume: bool) -> bool:
        """Lock the lock file. Returns False if another run removed it, or its directory, at the same moment."""
        existed = os.path.lexists(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        path = self.path / _LOCK_FILE
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                self._flock(descriptor, fcntl.LOCK_EX, may_be_held=existed and not resume)
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    self._lock = descriptor
            finally:
                if self._lock is None:
                    os.close(descriptor)
        return self.is_held

    def _flock(self, descriptor: int, kind: int, *, may_be_held: bool) -> None:
        """Lock a file without waiting for another run.

        Raises OutputError if another run holds the lock, or ``may_be_held`` on a file system without locks.
        """
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

    def _restore_replaced(self) -> None:
        """Restore the old output that a killed run had renamed, or remove it if the new one was published."""
        if os.path.lexists(self._replaced):
            if is_absent(self.target):
                self._replaced.rename(self.target)
                _LOG.warning("restored %s: a killed run had moved it to %s", self.target, self._replaced)
            else:
                _remove(self._replaced)
                _LOG.warning("removed %s, an old output that a killed run had already replaced", self._replaced)

    def clear(self) -> None:
        """Remove the leftovers of an earlier run."""
        leftovers = [path for path in self.path.iterdir() if path.name != _LOCK_FILE]
        if leftovers:
            _LOG.warning("removing %s, which an unfinished run left behind", self.path)
        for path in leftovers:
            _remove(path)

    def keep(self, names: Container[str]) -> None:
        """Remove all files of the output except ``names``, which are relative paths, and empty directories."""
        for folder, _, files in os.walk(self.output, topdown=False):
            for path in (Path(folder) / file for file in files):
                if str(path.relative_to(self.output)) not in names:
                    path.unlink()
            with contextlib.suppress(OSError):  # it contains files to keep
                Path(folder).rmdir()

    def publish(self, *, overwrite: bool, durable: bool) -> None:
        """Rename ``output`` to its final name and remove the staging directory.

        With ``overwrite``, an old output is replaced, atomically if the file system can exchange two names; without,
        an output that has appeared meanwhile is an OSError. With ``durable``, the output is on the disk before and
        after the rename; OutputError is raised if only the latter failed.
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
        """Exchange the names of the old output and the new one, or rename both if that is not supported."""
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
        """Unlock the directory and keep its content for the next run."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def remove(self) -> None:
        """Remove the directory, with a replaced output in it, and unlock it. Logs paths that cannot be removed."""
        for path in self.path.iterdir():
            if path.name != _LOCK_FILE:
                _try_remove(path)
        _try_remove(self.path / _LOCK_FILE)  # last, because another run may lock the directory from then on
        self.release()
        with contextlib.suppress(OSError):  # another run uses it already, or some path could not be removed
            self.path.rmdir()


def _try_remove(path: Path) -> None:
    """Remove a file or directory if it exists; log a warning if that fails."""
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
    """Flush all files to the disk, each before the directories above it."""
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
    """Return the disk space of all files under ``directory`` in bytes. Files that vanish meanwhile count 0."""
    num_blocks = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                num_blocks += os.lstat(os.path.join(folder, name)).st_blocks  # noqa: PTH118
    return num_blocks * _BLOCK_BYTES
