"""The input files of a run, and whether they change while it reads them.

Sources may also be objects in a store, whose version says it.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterable
from contextvars import ContextVar, Token
from pathlib import Path
from typing import NamedTuple, Self

from dist_ckpt_mistral.errors import SourceError
from dist_ckpt_mistral.storage.remote_path import RemotePath
from dist_ckpt_mistral.storage.store import Info


class Stamp(NamedTuple):
    """Identifies one state of one file: size, times (ns since 1970), inode and device; of an object, its version.

    ``cp -p``, ``rsync -t`` and ``touch`` set ``mtime_ns`` to any value. ``ctime_ns`` changes only with the file's
    content, name, owner or mode. Another machine may see another ``device``. Some network file systems show another
    ``ctime_ns`` or ``inode`` after a remount.
    """

    num_bytes: int
    mtime_ns: int
    ctime_ns: int
    inode: int
    device: int | None
    version: str | None = None

    @classmethod
    def of_object(cls, info: Info) -> Self:
        """Return the stamp of an object in a store."""
        return cls(info.num_bytes, 0, 0, 0, None, info.version)

    @classmethod
    def of(cls, status: os.stat_result) -> Self:
        """Return the stamp of a file with this status."""
        return cls(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev)

    def is_same(self, other: Stamp) -> bool:
        """Whether both stamps show the same state of the same file. A device of None matches any device."""
        is_same_device = None in {self.device, other.device} or self.device == other.device
        return self[:4] == other[:4] and self.version == other.version and is_same_device

    def looks_like(self, other: Stamp) -> bool:
        """Whether both stamps show the same size, modification time and version."""
        return self[:2] == other[:2] and self.version == other.version


def stamps(paths: Iterable[Path]) -> dict[Path, Stamp]:
    """Return the stamps of the regular files among ``paths``. Missing paths and other kinds of files are left out."""
    stamp_of: dict[Path, Stamp] = {}
    for path in paths:
        if isinstance(path, RemotePath):
            info = path.info()
            if info is not None:
                stamp_of[path] = Stamp.of_object(info)
            continue
        with contextlib.suppress(OSError):
            status = path.stat()
            if stat.S_ISREG(status.st_mode):
                stamp_of[path] = Stamp.of(status)
    return stamp_of


class Sources:
    """The input files of a run, each with its stamp when the run first saw it.

    A ``with`` block records every file that this thread opens to read, and refuses one that has changed. The block may
    be entered again. A ``SourceFiles`` records in the block that was active when it was made, from all its threads.
    ``first`` maps each file to its first stamp; ``opened`` are the files that were opened.
    """

    def __init__(self) -> None:
        """Start without files."""
        self.first: dict[Path, Stamp] = {}
        self.opened: set[Path] = set()
        self._tokens: list[Token[Sources | None]] = []

    def __getstate__(self) -> dict[str, object]:
        """Copy to another process without the devices: another machine may see the same files on another device."""
        first = {path: stamp._replace(device=None) for path, stamp in self.first.items()}
        return {"first": first, "opened": set(self.opened), "_tokens": []}

    def __enter__(self) -> Self:
        """Start to record the files that this thread opens."""
        self._tokens.append(_ACTIVE.set(self))
        return self

    def __exit__(self, *_: object) -> None:
        """Stop recording."""
        _ACTIVE.reset(self._tokens.pop())

    @staticmethod
    def active() -> Sources | None:
        """Return the record of the innermost ``with`` block of this thread, None outside of any."""
        return _ACTIVE.get()

    def look_at(self, paths: Iterable[Path]) -> None:
        """Record the first stamps of the regular files among ``paths``, without opening them."""
        self.first = {**stamps(path for path in paths if path not in self.first), **self.first}

    def note(self, path: Path, stamp: Stamp) -> None:
        """Record an opened file. Raises SourceError if the run has seen another state of it."""
        if not self.first.setdefault(path, stamp).is_same(stamp):
            raise changed(path)
        self.opened.add(path)

    def looks_changed(self) -> bool:
        """Whether any existing file has another size, time or version than at first. Missing files do not count."""
        return any(not self.first[path].looks_like(stamp) for path, stamp in stamps(anew(self.first)).items())


_ACTIVE: ContextVar[Sources | None] = ContextVar("sources", default=None)


def anew(paths: Iterable[Path]) -> list[Path]:
    """Return the same paths; of those in stores nothing has been seen yet, but they share what is seen from now on."""
    folders: dict[Path, Path] = {}
    found: list[Path] = []
    for path in paths:
        if isinstance(path, RemotePath):
            folder = folders.setdefault(path.parent, path.parent.refreshed())
            found.append(folder / path.name)
        else:
            found.append(path)
    return found


def changed(path: Path) -> SourceError:
    """Return the error for a file that changed or vanished during the run."""
    path = anew([path])[0]
    what = "changed" if path.exists() else "vanished"
    return SourceError(f"{path} {what} while it was read. Run the command again when nothing else writes the file.")


def open_to_read(path: Path, sources: Sources | None) -> int:
    """Open a regular file (links are followed), record it in ``sources``, and return its descriptor.

    O_NONBLOCK keeps a named pipe from blocking. Raises SourceError.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL
        raise SourceError(f"cannot open {path}: {getattr(error, 'strerror', None) or error}") from error
    status = os.fstat(descriptor)
    try:
        if not stat.S_ISREG(status.st_mode):
            raise SourceError(f"cannot read {path}: it is not a regular file")  # noqa: TRY301  (closed below)
        if sources is not None:
            sources.note(path, Stamp.of(status))
    except SourceError:
        os.close(descriptor)
        raise
    return descriptor


def require_unchanged(sources: Sources) -> None:
    """Raise SourceError if any opened file has changed or vanished.

    Each file is opened again, because a network file system may answer ``stat`` from its cache.
    """
    objects = [path for path in sources.opened if isinstance(path, RemotePath)]
    now = stamps(anew(objects))
    for path in objects:
        if path not in now or not sources.first[path].is_same(now[path]):
            raise changed(path)
    for file in sources.opened.difference(objects):
        try:
            os.close(open_to_read(file, sources))
        except SourceError as error:
            raise error if file.exists() else changed(file) from None
