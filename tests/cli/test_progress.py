"""The progress bar on a terminal: what it shows, and that nothing else is ever on its line."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest
from absent_modules import without
from command_line import without_time
from plain_models import save_model

from dist_ckpt_mistral.cli.bar import ProgressBar
from dist_ckpt_mistral.convert.from_hf import from_hf

COLUMNS: Final = 90
#: Percent, bar, bytes and total, time so far and to go, and rate.
BAR: Final = r" *\d+%\|[^|]*\| [\d.]+[kM]?/[\d.]+k \[\d\d:\d\d<\d\d:\d\d, +[\d.]+[kM]?B/s\]"
#: The command line on a slow disk, with a warning in the middle of copying.
SLOW: Final = """
import fcntl, logging, sys, termios, time
fcntl.ioctl(2, termios.TIOCSCTTY, 0)  # where Ctrl-C comes from
from dist_ckpt_mistral.cli import bar, main
from dist_ckpt_mistral.storage.local import SourceFiles, TargetFile
bar._PATIENCE_S = 0.02
written, write, sync, read = [], TargetFile.write, TargetFile.sync, SourceFiles.read_into

def slow_write(self, position, data):
    time.sleep(0.04)
    written.append(position)
    if len(written) == 15:
        logging.getLogger("dist_ckpt_mistral").warning("a warning")
    write(self, position, data)

def slow_sync(self):
    time.sleep(0.5)
    sync(self)

def slow_read(self, file, position, *buffers):
    time.sleep(0.04)
    read(self, file, position, *buffers)

TargetFile.write, TargetFile.sync, SourceFiles.read_into = slow_write, slow_sync, slow_read
sys.exit(main.main(sys.argv[1:]))
"""


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What a command did on a terminal: exit code, the text it sent, and the lines that stay on the screen."""

    code: int
    text: str
    screen: list[str]


def on_terminal(folder: Path, *words: object, key: bytes = b"", after: bytes = b"") -> Shown:
    """Run ``SLOW`` in ``folder``, with both outputs on a terminal; type ``key`` when that has shown ``after``."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
    command = [sys.executable, "-c", SLOW, *map(str, words)]
    with subprocess.Popen(
        command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True, cwd=folder
    ) as process:
        os.close(slave)
        data = b""
        while chunk := _read(master):
            data += chunk
            if key and after in data:
                os.write(master, key)
                key = b""
        os.close(master)
    text = data.decode()
    return Shown(code=process.returncode, text=text, screen=screen(text))


def _read(master: int) -> bytes:
    try:
        return os.read(master, 1 << 16)
    except OSError:  # no process has the terminal open any more
        return b""


def screen(text: str) -> list[str]:
    """The lines that a terminal of ``COLUMNS`` columns shows after ``text``, without blanks at their ends."""
    lines, row, column = [[" "] * COLUMNS], 0, 0
    for character in text:
        if character == "\r":
            column = 0
            continue
        if character == "\n" or column == COLUMNS:
            row, column = row + 1, 0 if column == COLUMNS else column
            lines += [[" "] * COLUMNS] if row == len(lines) else []
        if character != "\n":
            assert character.isprintable(), "this terminal knows no escape sequences"
            lines[row][column] = character
            column += 1
    return ["".join(line).rstrip() for line in lines]


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model in several files."""
    return save_model(tmp_path_factory.mktemp("progress") / "hf", max_shard_size=6000)


def test_phases_of_a_conversion(hf: Path, tmp_path: Path) -> None:
    """Copying, checksums and syncing have a bar each; a warning has its own line; in the end only text is left."""
    shown = on_terminal(tmp_path, "from-hf", hf, "ckpt", "--sha256", "--workers", 1)
    assert shown.code == 0
    assert re.search(f"\rcopy:{BAR}", shown.text)
    assert re.search(f"\rchecksum:{BAR}", shown.text)
    assert re.search(r"\rsync: +0%\|", shown.text)
    warning, result, *rest = shown.screen
    assert (warning, rest[-2:]) == (
        "a warning",
        ["train it with the flags of: dist-ckpt-mistral megatron-args ckpt", ""],
    )
    assert without_time(result) == "wrote 21 tensors (22.3 kB) in 1 file to ckpt"
    drawn = [line for line in re.split(r"[\r\n]+", shown.text) if "%|" in line]
    assert [line for line in drawn if len(line.rstrip()) > COLUMNS - 4] == []
    assert [line for line in drawn if not re.match(r"(copy|checksum|sync): +\d+%\|", line)] == []


def test_phases_of_verify(hf: Path, tmp_path: Path) -> None:
    """Comparing and checking have a bar, too, and leave only their results."""
    from_hf(hf, tmp_path / "ckpt")
    for words, name, last in (((hf,), "compare", "equal: 21 tensors, "), ((), "check", "no damage found: ")):
        shown = on_terminal(tmp_path, "verify", "ckpt", *words, "--workers", 1)
        assert shown.code == 0
        assert re.search(f"\r{name}:{BAR}", shown.text)
        assert not any("%|" in line for line in shown.screen)
        assert shown.screen[-2].startswith(last)
        assert shown.screen[-1] == ""


def test_an_interrupt_leaves_no_bar(hf: Path, tmp_path: Path) -> None:
    """Ctrl-C, which the terminal echoes behind the bar, leaves one clean line."""
    shown = on_terminal(tmp_path, "from-hf", hf, "ckpt", key=b"\x03", after=b"copy:")
    assert shown.code == 130
    assert "^C" in shown.text
    assert [line for line in shown.screen if "^C" in line or "%|" in line] == []
    assert shown.screen[0].startswith("interrupted: Nothing was published.")


@pytest.mark.parametrize(("option", "has_notes"), [("--no-progress", True), ("-q", False)])
def test_options_hide_the_bar(option: str, has_notes: bool, hf: Path, tmp_path: Path) -> None:
    """--no-progress shows no bar; -q no notes either; warnings and results stay."""
    from_hf(hf, tmp_path / "ckpt")
    shown = on_terminal(tmp_path, "to-hf", "ckpt", "out", option)
    assert shown.code == 0
    assert "\r" not in shown.text.replace("\r\n", "")
    assert any(line.startswith("configuration: ") for line in shown.screen) == has_notes
    assert "a warning" in shown.screen
    assert any(line.startswith("wrote 21 tensors ") for line in shown.screen)


def test_without_a_terminal_there_is_no_bar(hf: Path, tmp_path: Path) -> None:
    """Elsewhere stderr has the notes alone, and what draws the bar is not even imported."""
    ((code, _, modules),) = without([], [["from-hf", str(hf), str(tmp_path / "ckpt")]])
    assert code == 0
    assert "tqdm" not in modules


def test_advancing_costs_next_to_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under 2 microseconds of processor time for each call, drawing included."""
    with open(os.devnull, "w") as terminal, monkeypatch.context() as patch:  # noqa: PTH123
        patch.setattr(sys, "stderr", terminal)
        taken = []
        for _ in range(3):
            with ProgressBar() as bar:
                bar.phase("copy", 1 << 40)
                begun_s = time.process_time()
                for _ in range(300_000):
                    bar.advance(1 << 18)
                taken.append(time.process_time() - begun_s)
    assert min(taken) / 300_000 < 2e-6
