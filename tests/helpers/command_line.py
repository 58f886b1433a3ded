"""Runs the command line in this process, as a fresh process would: its exit code and everything it prints."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dist_ckpt_mistral.cli.main import main


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a command did: its exit code, and its lines on standard output and standard error."""

    code: int
    out: list[str]
    err: list[str]


def run(*arguments: object) -> Outcome:
    """Run ``dist-ckpt-mistral`` with the given arguments."""
    out, err = io.StringIO(), io.StringIO()
    code = _run(arguments, out, err)
    return Outcome(code=code, out=out.getvalue().splitlines(), err=err.getvalue().splitlines())


def shown(*arguments: object) -> tuple[int, list[str]]:
    """Run it as on a terminal, where standard output and standard error are one: its exit code and all lines."""
    terminal = io.StringIO()
    code = _run(arguments, terminal, terminal)
    return code, terminal.getvalue().splitlines()


def _run(arguments: Sequence[object], out: io.StringIO, err: io.StringIO) -> int:
    with _fresh_process(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            return main([str(argument) for argument in arguments])
        except SystemExit as stop:  # argparse
            return int(stop.code or 0)


@contextlib.contextmanager
def _fresh_process() -> Iterator[None]:
    """As in a fresh process, where nobody has configured logging; afterwards all is as it was, signal handlers too."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    on_signal = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    root.handlers.clear()
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        for number, handler in on_signal.items():
            signal.signal(number, handler)


def without_time(line: str) -> str:
    """The line in which a conversion says what it wrote, without seconds and rate, which differ from run to run."""
    short, count = re.subn(r" in \d+\.\d+ s \(\d+(\.\d)? [kMG]?B/s\)", "", line)
    assert count == 1, line
    return short


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything under ``folder``: files with their content, directories, and links with None."""
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*")}
    return {name: path.read_bytes() if path.is_file() else None for name, path in sorted(found.items())}


def refusal(folder: Path, *arguments: object) -> str:
    """The one line with which a command refuses: exit code 1, nothing printed, nothing under ``folder`` changed."""
    before = tree(folder)
    outcome = run(*arguments)
    assert (outcome.code, outcome.out) == (1, []), outcome
    assert len(outcome.err) == 1, outcome.err
    assert outcome.err[0].startswith("error: ")
    assert tree(folder) == before
    return outcome.err[0]
