"""The command line as a user meets it: what it answers, what it leaves alone, and how it ends."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import torch
from command_line import Outcome, refusal, run, tree, without_time
from genuine import folder, shards
from hf_models import random_model, saved
from plain_models import contents

from dist_ckpt_mistral.cli.main import main
from dist_ckpt_mistral.convert import migrate
from dist_ckpt_mistral.convert.from_hf import from_hf
from dist_ckpt_mistral.errors import FormatError
from dist_ckpt_mistral.messages import human_bytes


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (("tohf", "a", "b"), "Did you mean to-hf?"),
        (("to-hf", "a", "b", "--memroy=3"), "unrecognized arguments: --memroy=3. Did you mean --memory?"),
        (("to-hf", "a", "b", "--foo"), "unrecognized arguments: --foo"),
        (("to-hf", "a", "b", "--dtype", "bfloat61"), "Did you mean bfloat16?"),
        (("to-hf", "a", "b", "--max-file-size", "5"), "expected a size with its unit, such as 5GB or 5B, got '5'"),
    ],
)
def test_a_slip_is_answered_with_what_was_meant(
    words: tuple[str, ...], answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Unknown commands, options and values get the nearest one there is, and the usage of their command."""
    with pytest.raises(SystemExit) as ended:
        main(words)
    usage, *_, last = capsys.readouterr().err.splitlines()
    assert (ended.value.code, last[-len(answer) :]) == (2, answer)
    assert ("to-hf" in usage) == (words[0] == "to-hf")


def test_common_options_may_stand_first(capsys: pytest.CaptureFixture[str]) -> None:
    """``--debug`` and ``-q`` work before the command as behind it, and -V shows the version."""
    for words in (("--debug", "-q", "inspect", "nowhere"), ("inspect", "nowhere", "-q", "--debug")):
        with pytest.raises(FormatError, match="there is no such directory"):
            main(words)
    with pytest.raises(SystemExit):
        main(["-V"])
    assert capsys.readouterr().out.startswith("dist-ckpt-mistral ")


def test_a_dry_run_writes_nothing_and_tells_everything(tmp_path: Path) -> None:
    """--dry-run leaves the disk alone and tells the very files and sizes that the real run then writes."""
    case = shutil.copytree(folder("td_0192"), tmp_path / "case")
    before = tree(tmp_path)
    arguments = ("to-hf", case / "checkpoint", tmp_path / "hf", "--config", case, "--max-file-size", "100kB")
    dry = run(*arguments, "--dry-run")
    assert dry.code == 0
    assert tree(tmp_path) == before
    wet = run(*arguments)
    assert wet.code == 0
    assert dry.out[0] == without_time(wet.out[0]).replace("wrote", "would write")
    assert without_time(wet.out[0]) == (
        f"wrote 39 tensors (410.4 kB) in 5 files to {tmp_path / 'hf'}; "
        "17 stored entries are not weights and stayed behind; "
        "dropped embedding.word_embeddings.weight[250:256], output_layer.weight[250:256]: rows that pad the vocabulary"
    )
    written = {path.name: path.stat().st_size for path in (tmp_path / "hf").glob("*.safetensors")}
    assert dry.out[1:] == [f"  {name}  {human_bytes(size)}" for name, size in sorted(written.items())]
    assert json.loads("\n".join(run(*arguments[:2], tmp_path / "new", *arguments[3:], "--dry-run", "--json").out))[
        "files"
    ] == dict(sorted(written.items()))
    (tmp_path / "hf" / "precious").touch()
    assert "exists" in refusal(tmp_path, *arguments, "--dry-run")
    assert run(*arguments, "--dry-run", "--overwrite").code == 0
    assert (tmp_path / "hf" / "precious").exists()


@pytest.mark.parametrize(
    ("size", "num_bytes"),
    [
        ("4000B", 4000),
        ("4kB", 4000),
        ("4KiB", 4096),
        ("4.5 k", 4500),
        ("0.0045MB", 4500),
        ("1TiB", 1 << 40),
    ],
)
def test_sizes_are_told_in_any_unit(size: str, num_bytes: int, tmp_path: Path) -> None:
    """Decimal and binary units, with and without B: files are cut as transformers cuts them at so many bytes."""
    from_hf(saved(random_model(torch.float32), tmp_path / "original"), tmp_path / "ckpt")
    arguments = ("to-hf", tmp_path / "ckpt", tmp_path / "hf", "--dtype", "bfloat16", "--max-file-size", size)
    assert run(*arguments, "--workers", 3, "--memory", "1MiB", "--no-sync").code == 0
    expected = saved(random_model(), tmp_path / "expected", max_shard_size=num_bytes)
    assert contents(tmp_path / "hf") == contents(expected)


def test_what_the_operating_system_refuses_is_told_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Path and reason, not Python's numbers; what was added on the way is a sentence of its own."""
    line = run("inspect", "x" * 300).err[-1]
    assert re.fullmatch(r"error: cannot use x{300}\S*: File name too long", line)

    def fail(*_: object, **__: object) -> None:
        error = FormatError("cannot open it: Permission denied")
        error.add_note("Nothing was published.")
        raise error

    monkeypatch.setattr(migrate, "migrate", fail)
    line = run("migrate", tmp_path, tmp_path / "new").err[-1]
    assert line == "error: cannot open it: Permission denied. Nothing was published."


def test_urls_are_not_taken_for_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A URL of another kind than stores' is refused, rather than written into a new directory called ``ftp:``."""
    monkeypatch.chdir(tmp_path)
    zarr = shards("zarr_ckpt")
    for command in (("migrate", zarr), ("to-hf", zarr, "--config", folder("zarr_ckpt"))):
        outcome = run(*command[:2], "ftp://host/out", *command[2:])
        assert outcome.code == 1
        assert "the output ftp://host/out is a URL of a kind that cannot be written" in outcome.err[-1]
    assert [*tmp_path.iterdir()] == []
    (tmp_path / "ftp:").mkdir()
    assert run("migrate", zarr, "ftp:/out").code == 0


def test_the_version_is_told() -> None:
    """--version is the one that pyproject.toml finds in the code, and that of the package where it is installed."""
    root = Path(__file__).parents[2]
    source = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["hatch"]["version"]
    (version,) = re.findall(source["pattern"], (root / source["path"]).read_text())
    assert run("--version") == Outcome(code=0, out=[f"dist-ckpt-mistral {version}"], err=[])
    with contextlib.suppress(metadata.PackageNotFoundError):
        assert metadata.version("dist-ckpt-mistral") == version


@pytest.mark.parametrize("command", [["inspect"], ["plan"], ["verify", "ckpt"], ["megatron-args"]])
def test_one_rank_speaks(command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under torchrun the first rank alone answers, and its lines end without blanks; the others are silent."""
    monkeypatch.chdir(tmp_path)
    from_hf(saved(random_model(), tmp_path / "hf"), tmp_path / "ckpt")
    first = run(*command, "ckpt")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    second = run(*command, "ckpt")
    assert (first.code, second) == (0, Outcome(code=0, out=[], err=[]))
    assert first.out
    assert [line for line in first.out if line != line.rstrip()] == []


def test_notes_go_to_stderr_and_results_to_stdout(tmp_path: Path) -> None:
    """Which configuration was used, and that no tokenizer came along, are notes; with -q one sentence is all."""
    outcome = run("to-hf", folder("td_0161") / "checkpoint", tmp_path / "hf", "--config", folder("td_0161"))
    assert outcome.err == [
        f"configuration: the given configuration {folder('td_0161') / 'config.json'}",
        "no tokenizer came with the checkpoint: give a Hugging Face directory with --config to add one",
    ]
    assert without_time(outcome.out[0]).startswith(f"wrote 39 tensors (410.4 kB) in 1 file to {tmp_path / 'hf'}; ")
    outcome = run("from-hf", tmp_path / "hf", tmp_path / "ckpt", "--iteration", 3, "-q")
    assert (outcome.code, outcome.err) == (0, [])
    assert [*map(without_time, outcome.out)] == [f"wrote 39 tensors (410.4 kB) in 1 file to {tmp_path / 'ckpt'}"]


def test_a_process_ends_with_the_exit_code(tmp_path: Path) -> None:
    """``python -m dist_ckpt_mistral`` hands on the exit code; stderr is one line, without a traceback."""
    done = subprocess.run(
        [sys.executable, "-m", "dist_ckpt_mistral", "inspect", tmp_path / "none"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: {tmp_path / 'none'} is not ")
    assert done.stderr.endswith(": there is no such directory. Check the name.\n")
    assert done.stderr.count("\n") == 1


def test_more_files_than_may_be_open(tmp_path: Path) -> None:
    """Many small files are written under a limit of open files that can be raised, and read under one that cannot."""
    original = saved(random_model(num_hidden_layers=64), tmp_path / "original")
    script = (
        "import resource, sys; from dist_ckpt_mistral.cli.main import main; "
        "resource.setrlimit(resource.RLIMIT_NOFILE, (48, int(sys.argv[1]))); "
        "sys.exit(main(sys.argv[2:]))"
    )
    ckpt, back = tmp_path / "ckpt", tmp_path / "back"
    commands: list[list[str | Path]] = [
        ["1000", "from-hf", original, ckpt, "--tp", "2", "--pp", "64"],
        ["48", "to-hf", ckpt, back],
        ["48", "verify", ckpt, ckpt],
    ]
    for arguments in commands:
        subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, check=True, timeout=120)
    assert len(list((ckpt / "release").glob("*.distcp"))) == 128
    assert contents(back) == contents(original)


#: Exports, but stops for ever at the fifth write. Shells have what they run in the background ignore interrupts.
STALLED = """
import signal, sys, time
from dist_ckpt_mistral.cli import main as cli; from dist_ckpt_mistral.storage import local
signal.signal(signal.SIGINT, signal.default_int_handler)
write, calls = local.TargetFile.write, []
def stalling(*arguments):
    calls.append(arguments)
    if len(calls) == 5:
        print("stalled", flush=True)
        for _ in range(600):  # a signal that comes just before one sleep is noticed after it
            time.sleep(0.1)
    write(*arguments)
local.TargetFile.write = stalling
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_process_that_is_stopped_can_be_resumed(number: signal.Signals, tmp_path: Path) -> None:
    """Terminated or interrupted in the middle of writing, it says how to go on and exits with 130; that works."""
    case = shutil.copytree(folder("td_0161"), tmp_path / "case")
    before = tree(tmp_path)
    paths: list[str | Path] = [case / "checkpoint", tmp_path / "hf", "--config", case]
    process = subprocess.Popen(
        [sys.executable, "-c", STALLED, "to-hf", *paths, "--workers", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "stalled\n"
        assert len(tree(tmp_path)) > len(before)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    kept = f"--resume continues what is kept in {tmp_path / '.hf.incomplete'}."
    assert err.splitlines()[-1] == f"interrupted: Nothing was published. {kept}"
    assert {name: each for name, each in tree(tmp_path).items() if not name.startswith(".hf")} == before
    assert run("to-hf", *paths, "--resume").code == 0
    assert run("to-hf", *paths[:1], tmp_path / "expected", *paths[2:]).code == 0
    assert contents(tmp_path / "hf") == contents(tmp_path / "expected")
    assert not (tmp_path / ".hf.incomplete").exists()
