"""What is read of the processor."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dist_ckpt_mistral.gather.bands import best_band_bytes
from dist_ckpt_mistral.storage import processor

KIB = 1 << 10


@pytest.mark.parametrize(
    ("size", "band_bytes"),
    [("256K", 128 * KIB), ("512K", 256 * KIB), ("1024K", 512 * KIB), ("1280K", 512 * KIB), ("4096K", 512 * KIB)],
)
def test_bands_follow_the_cache(size: str, band_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A band takes half of the L2 cache of a core of this process, at most 512 KiB."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {5, 7})
    for number, (level, told) in enumerate((("1", "32K"), ("2", size), ("3", "32768K"))):
        folder = tmp_path / "sys/devices/system/cpu/cpu5/cache" / f"index{number}"
        folder.mkdir(parents=True)
        (folder / "level").write_text(f"{level}\n")
        (folder / "size").write_text(f"{told}\n")
    monkeypatch.setattr(processor, "Path", lambda path: tmp_path / str(path).lstrip("/"))
    best_band_bytes.cache_clear()
    try:
        assert best_band_bytes() == band_bytes
    finally:
        best_band_bytes.cache_clear()


@pytest.mark.parametrize("told", [None, "", "much"])
def test_a_system_that_does_not_tell(told: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where sysfs is absent, empty or says something else, a usual size is taken."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    folder = tmp_path / "sys/devices/system/cpu/cpu0/cache/index2"
    folder.mkdir(parents=True)
    if told is not None:
        (folder / "level").write_text("2")
        (folder / "size").write_text(told)
    monkeypatch.setattr(processor, "Path", lambda path: tmp_path / str(path).lstrip("/"))
    assert processor.l2_cache_bytes(unknown=77) == 77
