"""``--resume``: what is kept, what is checked, what is refused; and that one run at a time writes an output."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
import threading
from pathlib import Path

import pytest
from command_line import refusal, run, tree
from failing_writes import ALONE, at_write, begun, full
from plain_models import contents, save_model

import dist_ckpt_mistral as dcm
from dist_ckpt_mistral.convert import journal
from dist_ckpt_mistral.storage import local
from dist_ckpt_mistral.storage.staging import Staging


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    """A small model in several files."""
    return save_model(tmp_path / "hf", max_shard_size=6000)


@pytest.fixture
def expected(hf: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an import gives to which nothing happens."""
    output = tmp_path_factory.mktemp("expected") / "out"
    dcm.from_hf(hf, output)
    return contents(output)


def test_what_was_copied_is_not_copied_again(
    hf: Path, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed run writes the tensors that are missing, what stands around tensors, and no other."""
    begun(hf, tmp_path / "out", monkeypatch)
    sizes = at_write(0, full, monkeypatch)
    dcm.from_hf(hf, tmp_path / "out", output=dcm.Output(resume=True), effort=ALONE)
    resumed, sizes[:] = sum(sizes), []
    dcm.from_hf(hf, tmp_path / "again", effort=ALONE)
    assert contents(tmp_path / "out") == contents(tmp_path / "again") == expected
    assert resumed < sum(sizes) - 5000


def test_what_is_kept_is_checked(
    hf: Path, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes that are no longer what was noted are copied again; so are those whose note is torn or lost."""
    staging = begun(hf, tmp_path / "out", monkeypatch)
    shard = staging / "output" / "release" / "__0_0.distcp"
    content = bytearray(shard.read_bytes())
    for at in range(0, len(content), 1000):
        content[at] ^= 1
    shard.write_bytes(content)
    notes = staging / "copied-0"
    notes.write_bytes(notes.read_bytes()[:-3] + b"\n\xff\xfe torn")
    (staging / "output" / "config.json").write_text("half-written")
    dcm.from_hf(hf, tmp_path / "out", output=dcm.Output(resume=True))
    assert contents(tmp_path / "out") == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "out"]


def test_nothing_to_resume(hf: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    """With --resume and nothing to go on with, a run just starts."""
    assert run("from-hf", hf, tmp_path / "out", "--resume").code == 0
    assert contents(tmp_path / "out") == expected


def test_without_resume_a_leftover_is_named_and_removed(
    hf: Path, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that does not resume says what it removes, and is none the worse for it."""
    staging = begun(hf, tmp_path / "out", monkeypatch)
    outcome = run("from-hf", hf, tmp_path / "out")
    assert (outcome.code, outcome.err) == (0, [f"removing {staging}, which an unfinished run left behind"])
    assert contents(tmp_path / "out") == expected
    assert not staging.exists()


def test_another_source_or_option_is_refused(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has changed since is named: an option, a file, the version. Nothing is touched: undone, the run goes on."""
    begun(hf, tmp_path / "out", monkeypatch)
    line = refusal(tmp_path, "from-hf", hf, tmp_path / "out", "--resume", "--dtype", "float32")
    assert '--dtype was null, is "float32"' in line
    line = refusal(tmp_path, "from-hf", hf, tmp_path / "out", "--resume", "--iteration", 3)
    assert "--iteration was null, is 3" in line
    with monkeypatch.context() as patch:
        patch.setattr(journal, "__version__", "99")
        line = refusal(tmp_path, "from-hf", hf, tmp_path / "out", "--resume")
    assert "version of dist-ckpt-mistral was" in line
    for name in ("config.json", "model-00001-of-00004.safetensors"):
        status = (hf / name).stat()
        os.utime(hf / name, ns=(0, status.st_mtime_ns + 1))
        assert f"{hf / name} was {status.st_size} bytes of" in refusal(
            tmp_path, "from-hf", hf, tmp_path / "out", "--resume"
        )
        os.utime(hf / name, ns=(0, status.st_mtime_ns))
    assert run("from-hf", hf, tmp_path / "out", "--resume").code == 0


@pytest.mark.parametrize("what", ["changed", "vanished"])
def test_a_source_that_changes_meanwhile(what: str, hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A source that is written to or removed while it is read fails the run by its name, and is never half-taken."""
    victim = hf / "model-00001-of-00004.safetensors"
    act = victim.unlink if what == "vanished" else lambda: os.utime(victim, ns=(0, 0))
    at_write(15, act, monkeypatch)
    outcome = run("from-hf", hf, tmp_path / "out", "--workers", 1)
    assert outcome.code == 1
    assert outcome.err[-1].startswith(f"error: {victim} {what} while it was read.")
    assert ("--resume continues" in outcome.err[-1]) == (what == "vanished")
    assert (tmp_path / ".out.incomplete").exists() == (what == "vanished")
    assert not (tmp_path / "out").exists()


def test_two_runs_onto_one_output(
    hf: Path, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one run writes another one is refused, resuming or not, and disturbs nothing."""
    lines: list[str] = []

    def meanwhile() -> None:
        before = tree(tmp_path)
        for more in ((), ("--resume",), ("--overwrite",)):
            lines.extend(run("from-hf", hf, tmp_path / "out", *more).err)
        assert tree(tmp_path) == before

    at_write(8, meanwhile, monkeypatch)
    dcm.from_hf(hf, tmp_path / "out", effort=ALONE)
    assert lines == [f"error: another run is writing {tmp_path / 'out'}. Wait for it, or choose another output."] * 3
    assert contents(tmp_path / "out") == expected


def test_many_runs_at_once(hf: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    """Of runs that start together one wins and the others say why not, round after round."""
    for number in range(10):
        output, barrier, said = tmp_path / f"out{number}", threading.Barrier(4), list[str]()

        def attempt(output: Path = output, barrier: threading.Barrier = barrier, said: list[str] = said) -> None:
            barrier.wait()
            try:
                dcm.from_hf(hf, output)
            except dcm.OutputError as error:
                said.append(str(error))

        threads = [threading.Thread(target=attempt) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(said) == 3
        assert all("another run is writing" in line or "exists" in line for line in said)
        assert contents(output) == expected
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_an_output_that_appears_meanwhile_stays(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What somebody else puts at the output's place while a run writes is not replaced without --overwrite."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "precious").write_text("theirs")
    at_write(15, lambda: (tmp_path / "other").rename(tmp_path / "out"), monkeypatch)
    with pytest.raises(dcm.OutputError, match="Directory not empty") as caught:
        dcm.from_hf(hf, tmp_path / "out")
    assert "--resume continues" in caught.value.__notes__[-1]
    assert contents(tmp_path / "out") == {"precious": b"theirs"}


@pytest.mark.parametrize("is_there", [True, False])
def test_an_old_output_that_was_moved_aside(
    is_there: bool, hf: Path, expected: dict[str, bytes], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where a kill left the old output aside it comes back, or goes if a complete one is there; either is told."""
    if is_there:
        dcm.from_hf(hf, tmp_path / "out")
    (tmp_path / ".out.replaced").mkdir()
    (tmp_path / ".out.replaced" / "precious").write_text("old")
    with caplog.at_level(logging.WARNING), pytest.raises(dcm.OutputError, match="exists"):
        Staging(tmp_path / "out").hold(overwrite=False, resume=False)
    assert contents(tmp_path / "out") == (expected if is_there else {"precious": b"old"})
    assert not (tmp_path / ".out.replaced").exists()
    assert ("removed" if is_there else "restored") in caplog.text


def test_a_file_system_without_locks(
    hf: Path, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs work there too; but whether a leftover is one, only the user can say, by --resume or by removing it."""
    monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, "No locks available")))
    staging = begun(hf, tmp_path / "out", monkeypatch)
    line = refusal(tmp_path, "from-hf", hf, tmp_path / "out")
    assert f"remove {staging} or give --resume" in line
    dcm.from_hf(hf, tmp_path / "out", output=dcm.Output(resume=True))
    assert contents(tmp_path / "out") == expected
    assert not staging.exists()


def test_space_is_counted_whole(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small files count, for each copy that an import makes; so does, for a run that resumes, what is there already."""
    (hf / "tokenizer.json").write_bytes(bytes(1 << 20))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1 << 20))
    assert "1048576 are free" in refusal(tmp_path, "from-hf", hf, tmp_path / "out")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    dcm.from_hf(hf, tmp_path / "ckpt")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1 << 20))
    assert "1048576 are free" in run("reshard", tmp_path / "ckpt", tmp_path / "out", "--tp", 2).err[-1]
    assert not (tmp_path / ".out.incomplete").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    (hf / "tokenizer.json").write_bytes(bytes((1 << 20) - 8000))
    begun(hf, tmp_path / "out", monkeypatch, 12)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=(2 << 20) - 7000))
    assert run("from-hf", hf, tmp_path / "out", "--resume").code == 0


def test_a_write_that_writes_nothing_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that takes no bytes and reports no error does not hang the run."""
    monkeypatch.setattr(os, "pwrite", lambda *_: 0)
    target = local.TargetFile(tmp_path / "file", 10)
    with pytest.raises(OSError, match="Input/output error"):
        target.write(0, b"content")
    target.close()
