"""Which processes live, as tests need to know that none is left."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path


def processes_about(folder: Path) -> list[int]:
    """Ids of the living processes with ``folder`` in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has just ended
            if os.fsencode(folder) in path.read_bytes():
                found.append(int(path.parent.name))
    return found


def until(condition: Callable[[], bool], *, seconds: float) -> None:
    """Wait until ``condition`` holds, or fail."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.1)


def until_none_is_left(folder: Path) -> None:
    """Wait until no process is about ``folder``: also a killed one takes a moment to end."""
    until(lambda: not processes_about(folder), seconds=10)
