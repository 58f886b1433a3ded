"""Sources that change behind a run's back, with the size and the time that they had: nothing torn is published."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest
from command_line import run
from failing_writes import ALONE, at_write, begun, full
from plain_models import contents, save_model

import dist_ckpt_mistral as dcm

VICTIM: Final = "model-00001-of-00004.safetensors"
LAST: Final = "model-00004-of-00004.safetensors"


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    """A small model in four files."""
    return save_model(tmp_path / "hf", max_shard_size=6000)


def other_of(victim: Path) -> Path:
    """Another file with the size and the time of ``victim``, and the same header: other values of its tensors."""
    content, status = bytearray(victim.read_bytes()), victim.stat()
    for at in range(8 + int.from_bytes(content[:8], "little"), len(content), 2):
        content[at] ^= 1
    other = victim.parent.parent / "other"
    other.write_bytes(content)
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    return other


def copied(victim: Path, other: Path) -> None:
    """``cp -p`` writes into the old file."""
    subprocess.run(["cp", "-p", other, victim], check=True)


def renamed(victim: Path, other: Path) -> None:
    """``rsync -t``, ``tar`` and ``mv`` put a new file in its place."""
    other.replace(victim)


def edited(victim: Path, other: Path) -> None:
    """An editor that puts the time back."""
    status = victim.stat()
    victim.write_bytes(other.read_bytes())
    os.utime(victim, ns=(status.st_atime_ns, status.st_mtime_ns))


WAYS: Final = (copied, renamed, edited)
Way = Callable[[Path, Path], None]


def import_of(hf: Path, output: Path) -> dict[str, bytes]:
    """What an undisturbed import of ``hf``, as it is now, gives."""
    dcm.from_hf(hf, output)
    return contents(output)


def looks(path: Path) -> tuple[int, int]:
    """Size and time of change."""
    return path.stat().st_size, path.stat().st_mtime_ns


@pytest.mark.parametrize("victim", [VICTIM, LAST, "config.json"])
@pytest.mark.parametrize("way", WAYS)
def test_within_a_run(way: Way, victim: str, hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that changes after or before it is copied fails the run by its name; --resume then takes the new one."""
    before, other = looks(hf / victim), other_of(hf / victim)
    if victim == "config.json":
        other.write_bytes((hf / victim).read_bytes())
        os.utime(other, ns=(0, before[1]))
    with monkeypatch.context() as patch:
        at_write(15, lambda: way(hf / victim, other), patch)
        outcome = run("from-hf", hf, tmp_path / "out", "--workers", 1)
    assert looks(hf / victim) == before
    assert outcome.code == 1
    assert outcome.err[-1].startswith(f"error: {hf / victim} changed while it was read.")
    assert not (tmp_path / "out").exists()
    assert "--resume continues" in outcome.err[-1]
    assert run("from-hf", hf, tmp_path / "out", "--resume").code == 0
    assert contents(tmp_path / "out") == import_of(hf, tmp_path / "again")


@pytest.mark.parametrize("victim", [VICTIM, LAST])
@pytest.mark.parametrize("way", WAYS)
def test_between_two_runs(way: Way, victim: str, hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run keeps nothing that it copied from a file that has changed since, and all that it copied else."""
    begun(hf, tmp_path / "out", monkeypatch)
    before = looks(hf / victim)
    way(hf / victim, other_of(hf / victim))
    assert looks(hf / victim) == before
    sizes = at_write(0, full, monkeypatch)
    outcome = run("from-hf", hf, tmp_path / "out", "--resume", "--workers", 1)
    assert outcome.code == 0
    assert "those of the sources, which may have changed" in outcome.err[0]
    resumed, sizes[:] = sum(sizes), []
    assert contents(tmp_path / "out") == import_of(hf, tmp_path / "again")
    assert resumed < sum(sizes) - 2000


def test_a_run_that_is_killed_after_the_change(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a file that changed while a run copied it, the next one keeps what it copied after that, and only that."""
    at_write(18, lambda: edited(hf / LAST, other_of(hf / LAST)), monkeypatch)
    begun(hf, tmp_path / "out", monkeypatch, 22)
    dcm.from_hf(hf, tmp_path / "out", output=dcm.Output(resume=True), effort=ALONE)
    assert contents(tmp_path / "out") == import_of(hf, tmp_path / "again")


@pytest.mark.parametrize("what", ["copied", "seen from another machine"])
def test_the_same_bytes_elsewhere(what: str, hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of other inodes, times of status and devices, but of the same bytes, are read, and nothing is written."""
    staging = begun(hf, tmp_path / "out", monkeypatch)
    if what == "copied":
        hf.rename(tmp_path / "old")
        subprocess.run(["cp", "-a", tmp_path / "old", hf], check=True)
    else:
        noted = json.loads((staging / "fingerprint.json").read_bytes())
        noted["stamps"] = {path: [*stamp[:-1], stamp[-1] + 1] for path, stamp in noted["stamps"].items()}
        (staging / "fingerprint.json").write_text(json.dumps(noted))
    sizes = at_write(0, full, monkeypatch)
    dcm.from_hf(hf, tmp_path / "out", output=dcm.Output(resume=True), effort=ALONE)
    resumed, sizes[:] = sum(sizes), []
    assert contents(tmp_path / "out") == import_of(hf, tmp_path / "again")
    assert resumed < sum(sizes) - 5000


def test_a_link_that_leads_elsewhere_for_a_moment(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What counts is the file that was read, and not what its name leads to at the end."""
    other = other_of(hf / LAST)
    link = hf / LAST
    link.rename(tmp_path / "first")

    def lead_to(target: Path) -> None:
        (tmp_path / "new").symlink_to(target)
        (tmp_path / "new").replace(link)

    lead_to(tmp_path / "first")
    at_write(2, lambda: lead_to(other), monkeypatch)
    at_write(26, lambda: lead_to(tmp_path / "first"), monkeypatch)
    with pytest.raises(dcm.SourceError, match=f"{link} changed while it was read"):
        dcm.from_hf(hf, tmp_path / "out", effort=ALONE)


def test_an_export_while_training_goes_on(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A root's latest iteration is chosen once: that a later one is saved meanwhile changes nothing."""
    dcm.from_hf(hf, tmp_path / "ckpt", iteration=5)

    def save_another() -> None:
        shutil.copytree(tmp_path / "ckpt" / "iter_0000005", tmp_path / "ckpt" / "iter_0000006")
        (tmp_path / "ckpt" / "latest_checkpointed_iteration.txt").write_text("6")

    at_write(3, save_another, monkeypatch)
    assert run("to-hf", tmp_path / "ckpt", tmp_path / "back", "--workers", 1).code == 0
    assert contents(tmp_path / "back") == contents(hf)
    assert (tmp_path / "ckpt" / "iter_0000006").exists()


@pytest.mark.parametrize("command", ["to-hf", "reshard"])
@pytest.mark.parametrize("way", WAYS)
def test_a_checkpoint_that_changes(
    way: Way, command: str, hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data files and metadata of a checkpoint count like the files of a model."""
    dcm.from_hf(hf, tmp_path / "ckpt")
    for name in ("__0_0.distcp", ".metadata", "common.pt", "hf/config.json"):
        victim = tmp_path / "ckpt" / "release" / name
        shutil.copy2(victim, tmp_path / "other")
        monkeypatch.undo()
        at_write(2, lambda victim=victim: way(victim, tmp_path / "other"), monkeypatch)  # type: ignore[misc]
        outcome = run(command, tmp_path / "ckpt", tmp_path / "out", "--workers", 1)
        assert (outcome.code, (tmp_path / "out").exists()) == (1, False)
        assert outcome.err[-1].startswith(f"error: {victim} changed while it was read.")
