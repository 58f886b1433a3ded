"""Runs a command again and again in forked processes, each time with another call to the operating system going wrong.

``python faults.py SCENARIO`` (JSON, the fields of ``Scenario``) prints what came of each fault as one JSON object. A
process that imports nothing but the package forks in milliseconds, so every single call can be the one.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import io
import json
import os
import pathlib
import pickle
import shutil
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

import tqdm

from dist_ckpt_mistral import cli, commands, convert, report, resharding, staging, storage
from dist_ckpt_mistral.commands import from_hf, reshard, to_hf
from dist_ckpt_mistral.errors import DistCkptMistralError
from dist_ckpt_mistral.ranks import Ranks

#: In place of an error number: the process is killed.
KILL: Final = 0
#: Calls that change something, and calls that read the sources.
WRITING: Final = (
    "open",
    "ftruncate",
    "fallocate",
    "mkdir",
    "pwrite",
    "write",
    "fsync",
    "rename",
    "replace",
    "renameat2",
)
REMOVING: Final = ("unlink", "rmdir")
READING: Final = ("preadv", "pread")
#: What is written in two steps: tensors, and not what stands around them.
_MUCH_BYTES: Final = 900
_WARM: Final = (commands, convert, report, resharding, tqdm)  # imported before the forks


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """``command`` writes ``work``/out, where there is nothing or an ``old`` output, and should give what ``expected`` is.

    Faults are the calls ``first``, ``first + step`` ... of rank ``rank`` of ``ranks``; of ``kinds`` only. ``error`` is
    what they report, or KILL.
    """

    command: list[str]
    work: str
    expected: str
    old: bool
    kinds: list[str]
    error: int = KILL
    first: int = 1
    step: int = 1
    ranks: int = 1
    rank: int = 0
    exchange: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What is there after a run, and what it said.

    ``code`` is negative if a process was killed; ``state`` of the output is absent, old, complete or broken; ``beside``
    are the names beside it.
    """

    code: int
    lines: list[str]
    state: str
    beside: list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of one fault: of the run that it hit, and of a run with ``--resume`` after it."""

    call: int
    hit: Seen
    resumed: Seen


@dataclass(slots=True, kw_only=True)
class Fault:
    """Lets call ``number`` of this process go wrong; ``kinds`` are the calls that count."""

    number: int
    error: int
    kinds: list[str]
    exchange: bool
    calls: int = 0

    def install(self) -> None:
        """Stand before the calls of Python, and before those that the package makes itself."""
        os.fsync = lambda _: None  # what a kill leaves does not depend on it
        for name in ("ftruncate", "fsync", "mkdir", "rename", "replace", "unlink", "rmdir", "write", *READING, "open"):
            setattr(os, name, self._before(name, getattr(os, name)))
        os.pwrite = functools.partial(self._torn_write, os.pwrite)
        pathlib.Path.open = self._before("open", pathlib.Path.open)  # type: ignore[method-assign]
        real = storage.linux_call

        def linux_call(name: str, *argument_types: str) -> Callable[..., int]:
            if name == "renameat2" and not self.exchange:
                return lambda *_: 22  # EINVAL, of a file system that cannot do it
            return self._before(name, real(name, *argument_types), gives_code=True)

        for module in (storage, staging):
            module.linux_call = linux_call  # type: ignore[attr-defined]

    def _before(self, name: str, call: Callable[..., Any], *, gives_code: bool = False) -> Callable[..., Any]:
        """The same call, which may go wrong before it has done anything."""

        def wrapper(*arguments: Any, **options: Any) -> Any:  # noqa: ANN401  (of any call)
            if "site-packages" in str(arguments[0]) or not self._strikes(name):
                return call(*arguments, **options)
            if gives_code:
                return self.error
            raise OSError(self.error, os.strerror(self.error))

        return wrapper

    def _torn_write(self, call: Callable[..., int], descriptor: int, data: memoryview, position: int) -> int:
        """Write much as one half and then the other, unless something goes wrong before or in between."""
        done, half = 0, len(data) // 2 if len(data) >= _MUCH_BYTES else len(data)
        for part in filter(None, (data[:half], data[half:])):
            if self._strikes("pwrite"):
                if done:
                    return done
                raise OSError(self.error, os.strerror(self.error))
            done += call(descriptor, part, position + done)
        return done

    def _strikes(self, name: str) -> bool:
        if name not in self.kinds:
            return False
        self.calls += 1
        if self.calls == self.number and self.error == KILL:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.calls == self.number


def contents(folder: Path) -> dict[str, bytes | None]:
    """Everything under ``folder``, hidden or not."""
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*")}
    return {name: path.read_bytes() if path.is_file() else None for name, path in found.items()}


def outcomes(scenario: Scenario) -> Iterator[Outcome]:
    """One for every fault, until a run ends before it comes to the call."""
    work, call = Path(scenario.work), scenario.first
    while True:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        if scenario.old:
            (work / "out").mkdir()
            (work / "out" / "precious").write_text("old")
        fault = Fault(number=call, error=scenario.error, kinds=scenario.kinds, exchange=scenario.exchange)
        code, lines, calls = run(scenario, fault, [])
        if calls is not None and calls < call:
            return
        hit = _seen(scenario, code, lines)
        code, lines, _ = run(
            scenario, None, ["--resume", "--no-sync", *(["--overwrite"] if hit.state == "complete" else [])]
        )
        yield Outcome(call=call, hit=hit, resumed=_seen(scenario, code, lines))
        call += scenario.step


def _seen(scenario: Scenario, code: int, lines: list[str]) -> Seen:
    work = Path(scenario.work)
    now = contents(work / "out")
    known = {"complete": contents(Path(scenario.expected)), "old": {"precious": b"old"}, "absent": {}}
    state = next((name for name, content in known.items() if now == content), "broken")
    beside = sorted(path.name for path in work.iterdir() if path.name != "out")
    return Seen(code=code, lines=lines, state=state, beside=beside)


def run(scenario: Scenario, fault: Fault | None, more: list[str]) -> tuple[int, list[str], int | None]:
    """Run the command on its ranks: exit code, lines on stderr, and how many calls the fault counted.

    Code and lines are the first rank's, but the code is negative if a rank was killed. Of one that was killed nobody
    knows how many calls there were.
    """
    ends = socket.socketpair()
    read, write = os.pipe()
    processes = []
    for rank in range(scenario.ranks):
        process = os.fork()
        if process == 0:
            ends[1 - rank].close()
            ranks = Ranks(rank=rank, world_size=2, exchange=_exchange(ends[rank], rank))
            mine = fault if rank == scenario.rank else None
            _run_rank(scenario, ranks if scenario.ranks > 1 else Ranks(), mine, more, write)
        processes.append(process)
    for end in ends:
        end.close()
    os.close(write)
    with os.fdopen(read) as told:
        by_rank = {telling["rank"]: telling for telling in map(json.loads, told)}
    codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
    lines = by_rank[0]["lines"] if 0 in by_rank else []
    calls = by_rank[scenario.rank]["calls"] if scenario.rank in by_rank else None
    return codes[0] if min(codes) >= 0 else min(codes), lines, calls


def _exchange(end: socket.socket, rank: int) -> Callable[[Any], list[Any]]:
    """What gloo does between two ranks."""
    incoming = end.makefile("rb")

    def exchange(value: object) -> list[Any]:
        try:
            end.sendall(pickle.dumps(value))
            other = pickle.load(incoming)  # noqa: S301  (our own)
        except (OSError, EOFError) as error:
            raise DistCkptMistralError("the other rank has ended") from error
        return [value, other] if rank == 0 else [other, value]

    return exchange


def _run_rank(scenario: Scenario, ranks: Ranks, fault: Fault | None, more: list[str], telling: int) -> NoReturn:
    """Be one rank, tell how it went, and end."""
    os.environ["RANK"] = str(ranks.rank)
    for command in (from_hf, to_hf, reshard):
        command.from_environment = lambda: ranks  # type: ignore[attr-defined]
    write, err = os.write, io.StringIO()
    if fault is not None:
        fault.install()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
        try:
            code = cli.main([*scenario.command, "--workers", "1", *more])
        except BaseException:  # noqa: BLE001  (it is shown)
            code = 99
            traceback.print_exc()
    told = {"rank": ranks.rank, "lines": err.getvalue().splitlines(), "calls": fault.calls if fault else 0}
    write(telling, json.dumps(told).encode() + b"\n")
    os._exit(code)


if __name__ == "__main__":
    gc.freeze()
    gc.disable()  # it would have every fork copy all memory
    for outcome in outcomes(Scenario(**json.loads(sys.argv[1]))):
        sys.stdout.write(json.dumps(asdict(outcome)) + "\n")
