"""The demo where neither torch nor Megatron is installed: the whole way, and what else could be checked."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from dist_ckpt_mistral import libraries
from dist_ckpt_mistral.cli.main import main


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is installed here, the demo finds nothing beyond the package itself."""
    monkeypatch.setattr(libraries, "_is_installed", lambda _: False)


def test_the_plain_demo_tells_the_whole_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It ends well, leaves all its files, and names what was not checked, with the command that installs it."""
    assert main(["demo", "--keep", str(tmp_path / "kept")]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "the export equals the original." in captured.out
    assert "Not checked with torch, megatron-core, transformers, not installed here." in captured.out
    assert re.search(r"\[demo\]'$", captured.out, re.MULTILINE)
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == [
        *("checkpoint", "export", "original", "resharded")
    ]


def test_the_commands_of_the_demo_do_the_same_by_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each command behind a $ works in the kept directory, and leaves the same files."""
    assert main(["demo", "--keep", str(tmp_path / "kept")]) == 0
    commands = re.findall(r"^ +\$ dist-ckpt-mistral (.*)$", capsys.readouterr().out, re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "original").symlink_to(tmp_path / "kept" / "original")
    assert [_run(command.split()) for command in commands] == [0] * 6
    for folder in ("checkpoint", "resharded", "export"):
        theirs, ours = (sorted(_contents(root / folder).items()) for root in (tmp_path, tmp_path / "kept"))
        assert theirs == ours


def _run(words: Sequence[str]) -> int:
    return main(list(words))


def _contents(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_weights_of_the_demo_are_no_two_alike(tmp_path: Path) -> None:
    """The safetensors library reads them; no tensor equals another, so that none could be swapped unseen."""
    assert main(["demo", "--keep", str(tmp_path / "kept")]) == 0
    files = sorted((tmp_path / "kept" / "original").glob("*.safetensors"))
    tensors = [tensor.tobytes() for file in files for tensor in load_file(file).values()]
    assert (len(files), len(tensors), len(set(tensors))) == (2, 39, 39)


def test_keep_takes_no_directory_with_content(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What lies in the directory of ``--keep`` is never touched."""
    (tmp_path / "mine").write_text("mine")
    assert main(["demo", "--keep", str(tmp_path)]) == 1
    assert "is not an empty directory" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
