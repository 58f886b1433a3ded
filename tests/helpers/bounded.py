"""Runs the command line in a process that the kernel keeps from taking much memory or time.

Each call has a process of its own, a fork of one that has imported what commands import: to import it again takes
longer than what most calls do. As a program, this module is the process that forks.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, Final

from dist_ckpt_mistral.cli.main import main

#: What nobody may need on small input: address space, of which Python and numpy reserve 150 MB, and processor time.
LIMIT_BYTES: Final = 500 << 20
LIMIT_SECONDS: Final = 8

_TIMEOUT_S: Final = 60
#: What commands import when they run, without torch.
_IMPORTED: Final = (
    *("analysis.compare", "analysis.damage", "analysis.report", "cli.after", "cli.bar", "cli.notes"),
    *("convert.from_hf", "convert.migrate", "convert.reshard", "convert.to_hf"),
)


def bounded(*arguments: object, limit_bytes: int = LIMIT_BYTES) -> subprocess.CompletedProcess[str]:
    """``dist-ckpt-mistral`` with these arguments; the kernel ends it where it takes too much."""
    words = [*map(str, arguments)]
    with tempfile.TemporaryDirectory() as name:
        streams = [Path(name, stream) for stream in ("out", "err")]
        code = _ask(_server(), [str(Path.cwd()), *map(str, streams), str(limit_bytes), *words])
        out, err = (stream.read_text(errors="replace") for stream in streams)
    return subprocess.CompletedProcess(words, code, out, err)


def bounded_refusal(*arguments: object) -> str:
    """The one line with which a command refuses: exit code 1, nothing on standard output, no traceback."""
    outcome = bounded(*arguments)
    assert (outcome.returncode, outcome.stdout) == (1, ""), outcome
    assert outcome.stderr.startswith("error: "), outcome.stderr[-3000:]
    assert outcome.stderr.count("\n") == 1
    assert "out of memory" not in outcome.stderr
    return outcome.stderr


@cache
def _server() -> subprocess.Popen[bytes]:
    """The process that forks, started by the first call; it ends with this one."""
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}  # numpy's own threads and buffers, which nobody needs
    command = [sys.executable, __file__]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0}
    server = subprocess.Popen(command, env=environment, start_new_session=True, **pipes)
    atexit.register(server.communicate)
    return server


def _ask(server: subprocess.Popen[bytes], call: list[str]) -> int:
    """The exit code of a call, negative if a signal ended it."""
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(f"{json.dumps(call)}\n".encode())
    ready, _, _ = select.select([server.stdout], [], [], _TIMEOUT_S)
    if not ready:
        os.killpg(server.pid, signal.SIGKILL)  # and the command, which may wait for something for ever
        _server.cache_clear()
        raise subprocess.TimeoutExpired(call, _TIMEOUT_S)
    return int(server.stdout.readline())


def _serve() -> int:
    """Fork for each call, and say its exit code. Returns in the forks only, that of the command, and at the end 0."""
    for name in _IMPORTED:
        importlib.import_module(f"dist_ckpt_mistral.{name}")
    assert "torch" not in sys.modules
    gc.freeze()  # a fork that ends looks for cycles, and would copy all that was imported
    for line in sys.stdin.buffer:
        process = os.fork()
        if not process:
            return _run(*json.loads(line))
        _, status = os.waitpid(process, 0)
        os.write(1, b"%d\n" % os.waitstatus_to_exitcode(status))
    return 0


def _run(place: str, out: str, err: str, limit_bytes: str, *words: str) -> int:
    """Run a command as a process that was started for it would: with its own streams, in a place, and limited."""
    os.chdir(place)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, stream in ((1, out), (2, err)):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT, 0o600), number)
    for kind, limit in ((resource.RLIMIT_AS, int(limit_bytes)), (resource.RLIMIT_CPU, LIMIT_SECONDS)):
        resource.setrlimit(kind, (limit, limit))
    return main(words)


if __name__ == "__main__":
    sys.exit(_serve())
