"""Standard streams that are closed, full, or read by nobody: no traceback, the right exit code, and a whole output."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

import pytest
from genuine import folder
from plain_models import contents, save_model
from safetensors.numpy import load_file, save_file

from dist_ckpt_mistral.convert.from_hf import from_hf

TOOL: Final = f"{sys.executable} -m dist_ckpt_mistral"
#: A pipe whose reader is gone before anything is written: the exit code is that of the command in front of it.
NO_READER: Final = "| exec 0<&-; exit ${PIPESTATUS[0]}"
REDIRECTIONS: Final = [">&-", "2>&-", "<&- >&- 2>&-", "2>/dev/full", NO_READER, f"2>&1 {NO_READER}"]


def bash(command: str, where: Path) -> subprocess.CompletedProcess[str]:
    """Run a command line of bash in ``where``; no process of it prints a traceback."""
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, cwd=where, timeout=120)
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    return done


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its checkpoint, another model, and an export of the checkpoint."""
    where = tmp_path_factory.mktemp("streams")
    from_hf(save_model(where / "hf"), where / "ckpt")
    save_model(where / "other")
    tensors = load_file(where / "other" / "model.safetensors")
    tensors["model.norm.weight"] = -tensors["model.norm.weight"]
    save_file(tensors, where / "other" / "model.safetensors", metadata={"format": "pt"})
    assert bash(f"{TOOL} to-hf ckpt expected", where).returncode == 0
    return where


@pytest.mark.parametrize("redirection", REDIRECTIONS)
def test_conversions_publish(redirection: str, places: Path, tmp_path: Path) -> None:
    """Whatever becomes of what it prints, a conversion writes the same files and exits with 0."""
    done = bash(f"{TOOL} to-hf ckpt {tmp_path / 'out'} {redirection}", places)
    assert done.returncode == 0
    assert contents(tmp_path / "out") == contents(places / "expected")
    assert [*tmp_path.iterdir()] == [tmp_path / "out"]


@pytest.mark.parametrize("redirection", REDIRECTIONS)
@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("verify hf other --json", 3),
        ("inspect ckpt", 0),
        ("inspect hf/config.json", 1),
        ("no-such-command", 2),
        ("inspect --help", 0),
    ],
)
def test_exit_codes(command: str, code: int, redirection: str, places: Path) -> None:
    """The exit code is that of the answer, whether anybody can read the answer or not."""
    assert bash(f"{TOOL} {command} {redirection}", places).returncode == code


@pytest.mark.parametrize(
    "command", ["verify hf ckpt", "inspect ckpt", "inspect ckpt --json", "plan ckpt", "--help", "to-hf ckpt full"]
)
def test_a_full_disk(command: str, places: Path) -> None:
    """A result that cannot be written is an error, which says what is lost."""
    done = bash(f"{TOOL} {command} >/dev/full", places)
    assert done.returncode == 1
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: cannot write to standard output: No space left on device.")
    if command.startswith("to-hf"):
        assert "Lost output: wrote 21 tensors" in line
        assert contents(places / "full") == contents(places / "expected")


def test_a_reader_who_has_seen_enough(places: Path) -> None:
    """``head`` takes the first line; the command ends with its own exit code and says nothing about it."""
    done = bash(f"{TOOL} verify hf other | head -1; exit ${{PIPESTATUS[0]}}", places)
    assert (done.returncode, done.stderr) == (3, "")
    assert done.stdout.startswith("model.norm.weight: ")


def test_no_file_gets_the_number_of_a_closed_stream(places: Path, tmp_path: Path) -> None:
    """What native code or a child process writes to descriptors 1 and 2 ends up in no file."""
    script = (
        "import os, subprocess, sys\n"
        "from dist_ckpt_mistral.cli import main as cli; from dist_ckpt_mistral.storage import local\n"
        "opened = local.TargetFile.__init__\n"
        "def opening(self, *arguments, **options):\n"
        "    opened(self, *arguments, **options)\n"
        "    for number in (1, 2): os.write(number, b'stray' * 1000)\n"
        "    subprocess.run(['sh', '-c', 'echo stray; echo stray >&2'], check=True)\n"
        "local.TargetFile.__init__ = opening; sys.exit(cli.main(sys.argv[1:]))"
    )
    (places / "stray.py").write_text(script)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} stray.py to-hf ckpt {tmp_path / 'out'} <&- >&- 2>&-"],
        check=False, cwd=places, env=environment, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0
    assert contents(tmp_path / "out") == contents(places / "expected")


def test_a_locale_without_the_letters(places: Path) -> None:
    """Letters that the terminal's encoding lacks are escaped, and are no error."""
    save_model(places / "größe")
    done = bash(f"PYTHONIOENCODING=ascii {TOOL} inspect größe", places)
    assert done.returncode == 0
    assert "gr\\xf6\\xdfe" in done.stdout.splitlines()[0]


@pytest.mark.parametrize(
    ("command", "advice"),
    [("inspect", "Run it where more memory is allowed."), ("verify", "Lower --workers or --memory.")],
)
def test_advice_that_the_command_can_follow(command: str, advice: str, places: Path) -> None:
    """Out of memory, only a command that has options for it is told to use them."""
    script = (
        "import sys; from dist_ckpt_mistral.cli import main as cli\n"
        "from dist_ckpt_mistral.analysis import damage, report\n"
        "def fail(*_, **__): raise MemoryError\n"
        "report.inspect = damage.check = fail; sys.exit(cli.main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, command, folder("td_0161")], capture_output=True, text=True, check=False,
        cwd=places, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, f"error: out of memory. {advice}\n")


@pytest.mark.parametrize("wait_s", [0.02, 0.05, 0.1, 0.2, 0.4])
def test_interrupts_at_any_time(wait_s: float, places: Path) -> None:
    """From its first line on, also while it imports, the program ends with 130 and one line, or is done before that."""
    script = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from dist_ckpt_mistral.__main__ import run; print('started', flush=True); sys.exit(run())"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, "verify", "hf", "ckpt"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=places,
    )  # fmt: skip
    with process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(wait_s)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    codes = (130, -signal.SIGINT)  # a shell says 130 of both; Python ends by the signal where it was evaluating text
    is_interrupted = process.returncode in codes and (out, err) == ("", "interrupted: Nothing was published.\n")
    # Done: what it had to say is out. A signal may still meet Python while it ends.
    is_done = process.returncode in (0, -signal.SIGINT) and out.startswith("equal: ") and err == ""
    assert is_interrupted or is_done, (process.returncode, out, err)


def test_interrupts_are_ignored_where_the_shell_says_so(places: Path, tmp_path: Path) -> None:
    """A process that ignores interrupts, as one in the background of a script does, is not interrupted."""
    script = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "from dist_ckpt_mistral.storage import local; write = local.TargetFile.write\n"
        "def writing(*arguments): os.kill(os.getpid(), signal.SIGINT); write(*arguments)\n"
        "local.TargetFile.write = writing\n"
        "from dist_ckpt_mistral.__main__ import run; sys.exit(run())"
    )
    subprocess.run(
        [sys.executable, "-c", script, "to-hf", "ckpt", tmp_path / "out"], check=True, cwd=places, timeout=60
    )
    assert contents(tmp_path / "out") == contents(places / "expected")
