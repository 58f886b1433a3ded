"""Whether files are still what they were: by their sizes and the times of their last change."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple, Self, TypeAlias

from dist_ckpt_mistral.errors import FormatError


class Stamp(NamedTuple):
    """What a file was like when it was looked at: its size, and the time of its last change (ns since 1970)."""

    num_bytes: int
    mtime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> Self:
        """The stamp of a file that has this status."""
        return cls(status.st_size, status.st_mtime_ns)


Stamps: TypeAlias = Mapping[Path, Stamp]


def stamps(paths: Iterable[Path]) -> dict[Path, Stamp]:
    """The stamps of those of ``paths`` that are files. What is absent or something else is left out."""
    found = {}
    for path in paths:
        with contextlib.suppress(OSError):
            status = path.stat()
            if stat.S_ISREG(status.st_mode):
                found[path] = Stamp.of(status)
    return found


def require_unchanged(before: Stamps) -> None:
    """Raise FormatError unless all files are what they were."""
    now = stamps(before)
    for path, stamp in before.items():
        if now.get(path) != stamp:
            raise changed(path)


def changed(path: Path) -> FormatError:
    """The error that says so."""
    what = "changed" if path.exists() else "vanished"
    return FormatError(f"{path} {what} while it was read. Start again when nobody touches it.")
