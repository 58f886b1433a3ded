"""Heads of archives that must come from a disk are asked for together, and found as ever."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from genuine import GENUINE, shards

from dist_ckpt_mistral.formats.stored_checkpoint import open_stored
from dist_ckpt_mistral.storage import local
from dist_ckpt_mistral.storage.local import ReadAhead, SourceFiles

BYTES = 10


def refuse(*_: object) -> int:
    """What preadv does where nothing is in memory, or with flags that a file system does not know."""
    raise BlockingIOError


def test_places_that_are_not_in_memory_are_asked_for_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each once, in their order, a bounded number ahead of what is read; what is in memory is never asked for."""
    (tmp_path / "file").write_bytes(os.urandom(100_000))
    places = [(0, position) for position in range(0, 90_000, 100)]
    asked: list[int] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _descriptor, position, *_: asked.append(position))
    with SourceFiles([tmp_path / "file"]) as files:
        warm = ReadAhead(files, places)
        expected = [warm.read(*place, BYTES) for place in places]
        assert expected == [files.read(*place, BYTES) for place in places]
        assert asked == []
        monkeypatch.setattr(os, "preadv", refuse)
        cold = ReadAhead(files, places)
        for number, place in enumerate(places):
            assert cold.read(*place, BYTES) == expected[number]
            ahead = asked[number:]
            assert ahead[:1] == [place[1]]
            assert len(ahead) <= 256
        assert asked == [position for _, position in places]


def test_asking_resumes_where_reading_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind places that were in memory, and behind the last place: more reads than places are no matter."""
    (tmp_path / "file").write_bytes(os.urandom(1000))
    asked: list[int] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _descriptor, position, *_: asked.append(position))
    monkeypatch.setattr(local, "_TRUSTED", 3)
    with SourceFiles([tmp_path / "file"]) as files:
        reader = ReadAhead(files, [(0, position) for position in range(8)])
        assert [reader.read(0, position, BYTES) for position in range(3)]
        monkeypatch.setattr(os, "preadv", refuse)
        assert [reader.read(0, position, BYTES) for position in range(3, 20)]
    assert asked == [3, 4, 5, 6, 7]


@pytest.mark.parametrize("case", ["td_0161", "opt_fsms_0140"])
def test_a_cold_checkpoint_is_located_alike(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the heads come from, and where the kernel takes no hints, all data begin where they did."""
    assert case in GENUINE
    checkpoint = open_stored(shards(case))
    expected = checkpoint.index(checkpoint.tensors)
    monkeypatch.setattr(os, "preadv", refuse)
    monkeypatch.setattr(os, "posix_fadvise", refuse)
    found = checkpoint.index(checkpoint.tensors)
    for name, tensor in expected.tensors.items():
        assert np.array_equal(found.tensors[name].positions, tensor.positions)
