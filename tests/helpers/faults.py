"""Runs a command again and again in forked processes, each time with another call to the operating system going wrong.

``python faults.py SCENARIOS`` (a JSON list, of the fields of ``Scenario``) prints what came of them: a list of outcomes
for each. A process that imports nothing but the package, and has planned, forks and writes in milliseconds: so every
single call can be the one.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import io
import json
import logging
import os
import pathlib
import pickle
import shutil
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, NoReturn

import tqdm
import yaml

from dist_ckpt_mistral.analysis import report, report_table
from dist_ckpt_mistral.cli import main
from dist_ckpt_mistral.convert import from_hf, migrate, reshard, rewrite, to_hf
from dist_ckpt_mistral.convert.output import write_output
from dist_ckpt_mistral.convert.ranks import Ranks
from dist_ckpt_mistral.errors import DistCkptMistralError
from dist_ckpt_mistral.storage import local, staging

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
_WARM: Final = (from_hf, to_hf, migrate, report, report_table, reshard, tqdm, yaml)  # imported before the forks


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """``command`` writes ``work``/out, where nothing is or an ``old`` output, and should give what ``expected`` is.

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
        os.fsync = lambda fd: None  # noqa: ARG005  (what a kill leaves does not depend on it)
        for name in ("ftruncate", "fsync", "mkdir", "rename", "replace", "unlink", "rmdir", "write", *READING, "open"):
            setattr(os, name, self._before(name, getattr(os, name)))
        os.pwrite = functools.partial(self._torn_write, os.pwrite)
        pathlib.Path.open = self._before("open", pathlib.Path.open)  # type: ignore[method-assign]
        real = local.linux_call

        def linux_call(name: str, *argument_types: str) -> Callable[..., int]:
            if name == "renameat2" and not self.exchange:
                return lambda *_: 22  # EINVAL, of a file system that cannot do it
            return self._before(name, real(name, *argument_types), gives_code=True)

        for module in (local, staging):
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


class Driver:
    """Plans a command once, and forks where it begins to write: for every fault, and for every run after one."""

    def __init__(self, scenario: Scenario) -> None:
        """Plan nothing yet."""
        self.scenario, self.work = scenario, Path(scenario.work)
        self.outcomes: list[Outcome] = []
        self.report: Callable[[int], None] | None = None  # of a forked process: how it tells its exit code

    def run(self) -> list[Outcome]:
        """The outcomes of all faults, until a run ends before it comes to the call."""
        self._set_up()
        for module in (from_hf, to_hf, rewrite):
            module.write_output = functools.partial(self._instead, write_output)  # type: ignore[attr-defined]
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                code = main.main([*self.scenario.command, "--workers", "1"])
        except BaseException:
            if self.report is None:
                raise
            traceback.print_exc()
            code = 99
        if self.report is not None:
            self.report(code)
        return self.outcomes

    def _set_up(self) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir()
        if self.scenario.old:
            (self.work / "out").mkdir()
            (self.work / "out" / "precious").write_text("old")

    def _instead(self, write: Callable[..., object], *arguments: Any, **options: Any) -> tuple[()]:  # noqa: ANN401
        """In place of the package's: it is called in forked processes only."""
        call = self.scenario.first
        while True:
            self._set_up()
            fault = Fault(
                number=call, error=self.scenario.error, kinds=self.scenario.kinds, exchange=self.scenario.exchange
            )
            seen, calls = self._fork(lambda ranks: write(*arguments, **options | {"ranks": ranks}), fault)
            if self._is_forked() or (calls is not None and calls < call):
                return ()
            output = replace(options["output"], resume=True, overwrite=self.scenario.old or seen.state == "complete")
            again = options | {"output": output}
            resumed, _ = self._fork(lambda ranks: write(*arguments, **again | {"ranks": ranks}), None)  # noqa: B023
            if self._is_forked():
                return ()
            self.outcomes.append(Outcome(call=call, hit=seen, resumed=resumed))
            call += self.scenario.step

    def _is_forked(self) -> bool:
        return self.report is not None

    def _fork(self, write: Callable[[Ranks], object], fault: Fault | None) -> tuple[Seen, int | None]:
        """Let new processes write: what is there then, and how many calls the fault counted.

        Code and lines are the first rank's, but the code is negative if a rank was killed. Of one that was killed
        nobody knows how many calls there were. Returns in the new processes too, when they have written.
        """
        ends = socket.socketpair()
        read, telling = os.pipe()
        processes = []
        for rank in range(self.scenario.ranks):
            processes.append(os.fork())
            if processes[-1] == 0:
                ends[1 - rank].close()
                mine = fault if rank == self.scenario.rank else None
                self._become(rank, mine, telling)
                alone = self.scenario.ranks == 1
                write(Ranks() if alone else Ranks(rank=rank, world_size=2, exchange=_exchange(ends[rank], rank)))
                return Seen(code=0, lines=[], state="", beside=[]), None
        for end in ends:
            end.close()
        os.close(telling)
        with os.fdopen(read) as told:
            by_rank = {each["rank"]: each for each in map(json.loads, told)}
        codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
        lines = by_rank[0]["lines"] if 0 in by_rank else []
        calls = by_rank[self.scenario.rank]["calls"] if self.scenario.rank in by_rank else None
        return self._seen(codes[0] if min(codes) >= 0 else min(codes), lines), calls

    def _become(self, rank: int, fault: Fault | None, telling: int) -> None:
        """Be a rank: what it prints is caught, its calls may go wrong, and it tells how it went."""
        os.environ["RANK"] = str(rank)
        sys.stdout = sys.stderr = err = io.StringIO()
        logging.getLogger().handlers[0] = logging.StreamHandler(err)
        write = os.write
        if fault is not None:
            fault.install()

        def report(code: int) -> NoReturn:
            calls = fault.calls if fault else 0
            told = {"rank": rank, "lines": err.getvalue().splitlines(), "calls": calls}
            write(telling, json.dumps(told).encode() + b"\n")
            os._exit(code)

        self.report = report

    def _seen(self, code: int, lines: list[str]) -> Seen:
        now = contents(self.work / "out")
        known = {"complete": contents(Path(self.scenario.expected)), "old": {"precious": b"old"}, "absent": {}}
        state = next((name for name, content in known.items() if now == content), "broken")
        beside = sorted(path.name for path in self.work.iterdir() if path.name != "out")
        return Seen(code=code, lines=lines, state=state, beside=beside)


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


if __name__ == "__main__":
    gc.freeze()
    gc.disable()  # it would have every fork copy all memory
    given = json.loads(sys.argv[1])
    sys.stdout.write(json.dumps([[asdict(each) for each in Driver(Scenario(**fields)).run()] for fields in given]))
