"""Ranks as forks of a process that has imported everything: torch and Megatron are imported once, not by each.

A program with ``serve(main)`` at its end is such a process. It reads launches from its standard input and runs them one
after the other, each in a process group of its own. ``RankServer`` starts it and talks to it.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final

from dist_ckpt_mistral.cli.processes import fork_ranks, job_environment, reserved_port

#: Seconds that a launch may take, the imports of the first one included, on a busy machine.
_TIMEOUT_S: Final = 570
_LOG_TAIL: Final = 4000


class RankServer:
    """A process that has imported what ``worker`` imports, and forks ranks that run it. Started by the first launch."""

    def __init__(self, worker: Path) -> None:
        """Prepare a server for the program ``worker``."""
        self._worker = worker
        self._process: subprocess.Popen[bytes] | None = None
        self._replies = b""

    def launch(self, folder: Path, world_size: int) -> None:
        """Run a job of ``world_size`` ranks, whose log is FOLDER/ranks.log. Fails if a rank fails or takes too long.

        When this returns or raises, the ranks and their children are gone.
        """
        server = self._process or self._start(folder)
        assert server.stdin is not None
        job = {"folder": str(folder), "world_size": world_size}
        server.stdin.write(f"{json.dumps(job)}\n".encode())
        server.stdin.flush()
        group = self._reply(server, folder)
        try:
            code = self._reply(server, folder)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)  # the ranks, and writers that Megatron started and left
        assert code == 0, f"ended with {code}: {_tail(folder / 'ranks.log')}"

    def _start(self, folder: Path) -> subprocess.Popen[bytes]:
        """Start the server, whose own log is FOLDER/server.log."""
        with (folder / "server.log").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, self._worker],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=job_environment(),
                start_new_session=True,
            )
        return self._process

    def _reply(self, server: subprocess.Popen[bytes], folder: Path) -> int:
        """The next number that the server says."""
        assert server.stdout is not None
        while b"\n" not in self._replies:
            ready, _, _ = select.select([server.stdout], [], [], _TIMEOUT_S)
            assert ready, f"not done after {_TIMEOUT_S} s: {_tail(folder / 'ranks.log')}"
            said = os.read(server.stdout.fileno(), 1 << 12)
            assert said, f"{self._worker.name} ended: {_tail(folder / 'server.log')}"
            self._replies += said
        line, _, self._replies = self._replies.partition(b"\n")
        return int(line)

    def close(self) -> None:
        """End the server."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-_LOG_TAIL:] if log.exists() else ""


def serve(main: Callable[[Path], None]) -> None:
    """Read launches until standard input ends. For each, say its process group at once, and in the end its exit code.

    No thread may run here: only the thread that forks is there in a fork.
    """
    # A rank that saves spawns a process for the results of Megatron's writers (strategies/filesystem_async.py, 0.16 to
    # 0.19). It would run this program's imports again, for seconds and for nothing, if it knew where the program is.
    del sys.modules["__main__"].__file__
    gc.freeze()  # Megatron collects garbage at each save and load, and would look at all that was imported each time
    for line in sys.stdin:
        job = json.loads(line)
        launch = os.fork()
        if not launch:
            os.setsid()
            _run_ranks(main, Path(job["folder"]), job["world_size"])
        os.write(1, b"%d\n" % launch)
        _, status = os.waitpid(launch, 0)
        os.write(1, b"%d\n" % os.waitstatus_to_exitcode(status))


def _run_ranks(main: Callable[[Path], None], folder: Path, world_size: int) -> None:
    """Run ``main`` as every rank of a job, then end this process, with 1 if a rank failed."""
    log = os.open(folder / "ranks.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    with reserved_port() as port:
        os.environ |= {"MASTER_PORT": str(port), "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
        fork_ranks(partial(main, folder), world_size)
