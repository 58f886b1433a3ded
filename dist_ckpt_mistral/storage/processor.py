"""What Linux tells of the processor."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def l2_cache_bytes(unknown: int) -> int:
    """Return the size of the L2 cache of a core of this process, from sysfs; ``unknown`` if that does not tell it."""
    with contextlib.suppress(OSError, ValueError):
        for cache in Path(f"/sys/devices/system/cpu/cpu{min(os.sched_getaffinity(0))}/cache").glob("index*"):
            if (cache / "level").read_text().strip() == "2":
                return int((cache / "size").read_text().strip().removesuffix("K")) << 10
    return unknown
