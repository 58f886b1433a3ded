"""Runs that fail at a write of one's choice."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

import dist_ckpt_mistral as dcm
from dist_ckpt_mistral.gather.execute import Effort
from dist_ckpt_mistral.storage.local import TargetFile

ALONE = Effort(workers=1)


def at_write(number: int, act: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Have ``act`` happen before a write, counted from 1; gives the sizes of all writes from now on."""
    write, sizes = TargetFile.write, list[int]()

    def counting(self: TargetFile, position: int, data: memoryview | bytes) -> None:
        sizes.append(len(data))
        if len(sizes) == number:
            act()
        write(self, position, data)

    monkeypatch.setattr(TargetFile, "write", counting)
    return sizes


def full() -> None:
    """Act like a full disk."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def begun(hf: Path, output: Path, monkeypatch: pytest.MonkeyPatch, number: int = 20) -> Path:
    """An import that fails at a late write; what it leaves behind."""
    with monkeypatch.context() as patch:
        at_write(number, full, patch)
        with pytest.raises(dcm.OutputError, match="No space left on device"):
            dcm.from_hf(hf, output, effort=ALONE)
    assert not output.exists()
    return output.parent / f".{output.name}.incomplete"
