"""What lies where an output would go is kept, and an output appears whole or not at all."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from command_line import refusal, run
from plain_models import contents

from dist_ckpt_mistral.storage import local

if TYPE_CHECKING:
    import pytest


def both_ways(hf: Path, ckpt: Path) -> list[tuple[str, Path]]:
    """The two commands that write, with their input."""
    return [("from-hf", hf), ("to-hf", ckpt)]


def test_existing_outputs_are_kept(hf: Path, ckpt: Path, tmp_path: Path) -> None:
    """A directory with content, a file or a broken link in the way stays unless asked; an empty directory is used."""
    for command, source in both_ways(hf, ckpt):
        output = tmp_path / command
        output.mkdir()
        (output / "precious").write_text("old")
        line = refusal(tmp_path, command, source, output)
        assert f"the output {output} exists. Choose another name or give --overwrite." in line
        assert run(command, source, output, "--overwrite").code == 0
        assert not (output / "precious").exists()
        shutil.rmtree(output)
        output.mkdir()
        assert run(command, source, output).code == 0
        for obstacle in (tmp_path / "file", tmp_path / "link"):
            if obstacle.name == "file":
                obstacle.write_text("old")
            else:
                obstacle.symlink_to("nowhere")
            assert "exists" in refusal(tmp_path, command, source, obstacle)
            obstacle.unlink()
    assert contents(tmp_path / "to-hf") == contents(hf)


def test_a_training_is_never_replaced(hf: Path, ckpt: Path, tmp_path: Path) -> None:
    """A root with several iterations is refused, also with --overwrite; an import replaces only another import."""
    for command, source in both_ways(hf, ckpt):
        output = tmp_path / command
        for step in ("iter_0000010", "iter_0000020"):
            (output / step).mkdir(parents=True)
        line = refusal(tmp_path, command, source, output, "--overwrite")
        assert "holds 2 checkpoints (iter_0000010 to iter_0000020), which --overwrite would all remove" in line
        (output / "iter_0000020").rmdir()
        if command == "from-hf":
            assert "holds iter_0000010, which an import" in refusal(tmp_path, command, source, output, "--overwrite")
            (output / "iter_0000010").rename(output / "release")
        assert run(command, source, output, "--overwrite").code == 0


def test_an_old_output_survives_a_failing_run(hf: Path, ckpt: Path, tmp_path: Path) -> None:
    """With --overwrite, what was there stays as it was until the new one is complete, here: for ever."""
    (hf / "model.safetensors").write_bytes((hf / "model.safetensors").read_bytes()[:-1])
    (ckpt / "release" / "__3_0.distcp").unlink()
    for command, source in both_ways(hf, ckpt):
        output = tmp_path / command
        output.mkdir()
        (output / "precious").write_text("old")
        refusal(tmp_path, command, source, output, "--overwrite")
        assert contents(output) == {"precious": b"old"}


def test_outputs_in_inputs(hf: Path, ckpt: Path, tmp_path: Path) -> None:
    """An output that is the input, lies in it or around it is refused, also with --overwrite and through a link."""
    (tmp_path / "link").symlink_to(tmp_path)
    for command, source in both_ways(hf, ckpt):
        for output in (source, source / "out", source.parent, tmp_path / "link" / source.name / "a" / "b"):
            line = refusal(tmp_path, command, source, output, "--overwrite")
            assert f"the output {output} and the input {source} must lie apart" in line
            line = refusal(tmp_path, command, source, output)
            assert "must lie apart" in line or (output.exists() and "exists" in line)


def test_an_output_appears_whole(ckpt: Path, hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While data is written there is no output yet, and what makes it readable is written after all data."""
    seen = []
    write = local.TargetFile.write

    def spy(target: local.TargetFile, position: int, data: memoryview | bytes) -> None:
        seen.append((tmp_path / "out").exists())
        names = {path.name for path in target.path.parent.iterdir()}
        assert names.isdisjoint({".metadata", "model.safetensors.index.json", "latest_checkpointed_iteration.txt"})
        write(target, position, data)

    monkeypatch.setattr(local.TargetFile, "write", spy)
    for command, source in both_ways(hf, ckpt):
        assert run(command, source, tmp_path / "out").code == 0
        shutil.rmtree(tmp_path / "out")
    assert len(seen) > 20
    assert not any(seen)


def test_too_little_space(ckpt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is too small is refused before the first byte."""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    outcome = run("to-hf", ckpt, tmp_path / "out")
    assert outcome.code == 1
    assert "bytes are needed, 1000 are free" in outcome.err[-1]
    assert not (tmp_path / "out").exists()
