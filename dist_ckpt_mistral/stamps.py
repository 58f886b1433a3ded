"""Whether the files that a run reads stay what they were when it began."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterable, Mapping
from contextvars import ContextVar, Token
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from dist_ckpt_mistral.errors import FormatError


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
    entered again. The threads of a gather share the ``storage.SourceFiles`` that this thread made.
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
