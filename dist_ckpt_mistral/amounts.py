"""Amounts of bytes, as people read them."""

from __future__ import annotations


def human_bytes(num_bytes: int) -> str:
    """``14.5 GB``: decimal units, as disks and Hugging Face count."""
    size, units = float(num_bytes), ["B", "kB", "MB", "GB", "TB", "PB"]
    while size >= 1000 and len(units) > 1:  # noqa: PLR2004  (decimal units)
        size, units = size / 1000, units[1:]
    return f"{num_bytes} B" if units[0] == "B" else f"{size:.1f} {units[0]}"
