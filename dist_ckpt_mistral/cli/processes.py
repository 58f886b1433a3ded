"""Run the ranks of one job as processes on this machine's CPU, and leave no process behind."""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final, NoReturn

from dist_ckpt_mistral.errors import DistCkptMistralError

#: Gloo between processes of one machine; one thread each, because there are more ranks than cores.
_ENVIRONMENT: Final = {
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # Megatron requires it
    "CUDA_VISIBLE_DEVICES": "",
    "GLOO_SOCKET_IFNAME": "lo",
    "MASTER_ADDR": "127.0.0.1",
    "OMP_NUM_THREADS": "1",
    "PYTHONWARNINGS": "ignore",
    "TORCHELASTIC_USE_AGENT_STORE": "False",  # rank 0 makes the store, even if this process runs under torchrun
}
#: Characters that an error shows of a failed rank's log.
_LOG_TAIL: Final = 4000
#: The option of prctl(2) that sets the signal which a process gets when its parent dies.
_PR_SET_PDEATHSIG: Final = 1


def run_ranks(commands: Sequence[Sequence[str | Path]], folder: Path, *, timeout_s: float) -> None:
    """Run one process for each command, as the ranks of one job, and wait until all have succeeded.

    The processes get torchrun's environment variables (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR,
    MASTER_PORT). Their output goes to ``folder``/rankN.log. When this function returns or raises, the processes and
    their children are gone.

    Raises DistCkptMistralError, with the end of the rank's log, if a rank fails or still runs after ``timeout_s``
    seconds.
    """
    count = str(len(commands))
    ranks: list[subprocess.Popen[bytes]] = []
    with reserved_port() as port:
        job = job_environment() | {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": str(port)}
        try:
            for rank, command in enumerate(commands):
                environment = job | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                with _log(folder, rank).open("wb") as log:
                    ranks.append(
                        subprocess.Popen(  # noqa: S603  (commands of the caller, no shell)
                            command, env=environment, stdout=log, stderr=log, start_new_session=True
                        )
                    )
            _wait(ranks, folder, timeout_s)
        finally:
            for process in ranks:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # the rank, and writers that Megatron started and left
                process.wait()


def run_forked_ranks(
    module: str,
    arguments: Sequence[str | Path],
    count: int,
    folder: Path,
    *,
    imports: Sequence[str] = (),
    timeout_s: float,
) -> None:
    """Run ``main()`` of a module as the ``count`` ranks of one job, and wait until all have succeeded.

    The ranks are forks of one process that has imported the module and ``imports``, so that torch and Megatron are
    imported once and not by each. They find what this process finds on its ``sys.path``, ``arguments`` in ``sys.argv``,
    and torchrun's environment variables as those of ``run_ranks`` do. The output of all goes to ``folder``/ranks.log.
    When this function returns or raises, or when this process is killed, the ranks and their children are gone.

    Raises DistCkptMistralError, with the end of the log, if a rank fails or still runs after ``timeout_s`` seconds.
    """
    command = [sys.executable, "-m", __name__, str(os.getpid()), ",".join((module, *imports)), *arguments]
    sizes = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "PYTHONPATH": os.pathsep.join(sys.path)}
    log = folder / "ranks.log"
    with reserved_port() as port, log.open("wb") as output:
        environment = job_environment() | sizes | {"MASTER_PORT": str(port)}
        process = subprocess.Popen(  # noqa: S603  (no shell)
            command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
        try:
            code = process.wait(timeout_s)
            what = f"ended with {code}"
        except subprocess.TimeoutExpired:
            code, what = None, f"were not done after {timeout_s:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if code != 0:
        raise DistCkptMistralError(f"the ranks {what}: {log.read_text(errors='replace')[-_LOG_TAIL:]}")


def fork_ranks(main: Callable[[], None], count: int) -> NoReturn:
    """Run ``main`` as every rank of a job, in a fork of this process each; then end this process.

    No other thread may run: in a fork there is only the one that forks. If a rank fails, this says which and how, and
    ends with 1 at once. Whoever started this process ends its process group then.
    """
    ranks = {_fork(main, rank): rank for rank in range(count)}
    while ranks:
        process, status = os.wait()
        if process in ranks and status:
            os.write(2, f"rank {ranks[process]} ended with {os.waitstatus_to_exitcode(status)}\n".encode())
            os._exit(1)
        ranks.pop(process, None)
    os._exit(0)


def _fork(main: Callable[[], None], rank: int) -> int:
    parent = os.getpid()
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _end_with(parent, signal.SIGKILL)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        main()
        code = 0
    except BaseException:  # noqa: BLE001  (nothing of the parent's may run here)
        traceback.print_exc()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)  # an ordinary exit would wait for processes that Megatron started to write


def _serve(parent: int, modules: Sequence[str]) -> NoReturn:
    """The process that ``run_forked_ranks`` starts: import the modules, and run the first one as every rank."""
    signal.signal(signal.SIGTERM, lambda *_: os.killpg(0, signal.SIGKILL))  # all ranks, and what they started
    _end_with(parent, signal.SIGTERM)
    # A rank that saves with Megatron spawns a process for the results of its writers (strategies/filesystem_async.py,
    # 0.16 to 0.19), which imports the program of its parent again, if it knows of one.
    main = sys.modules["__main__"]
    main.__spec__ = None
    del main.__file__
    imported = [importlib.import_module(name) for name in modules]
    gc.freeze()  # Megatron collects garbage at each save and load, and would look at all that was imported each time
    fork_ranks(imported[0].main, int(os.environ["WORLD_SIZE"]))


def _end_with(parent: int, number: int) -> None:
    """Have this process get the signal ``number`` when its parent dies."""
    import ctypes

    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        raise SystemExit("the parent process has ended")


def job_environment() -> dict[str, str]:
    """The environment that the ranks of a job share, but for its size and port.

    Without NVTE_FLASH_ATTN and the like, which Megatron sets when this process builds a model: each rank sets its own
    (models/common/language_module/language_module.py, 0.16 to 0.19).
    """
    return {name: value for name, value in os.environ.items() if not name.startswith("NVTE_")} | _ENVIRONMENT


def _wait(ranks: Sequence[subprocess.Popen[bytes]], folder: Path, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while any(codes := [process.poll() for process in ranks]) or None in codes:
        failed = next((rank for rank, code in enumerate(codes) if code), None)
        if failed is None and time.monotonic() > deadline:
            failed = codes.index(None)
        if failed is not None:
            what = f"ended with {codes[failed]}" if codes[failed] else f"was not done after {timeout_s:.0f} s"
            log = _log(folder, failed).read_text(errors="replace")
            raise DistCkptMistralError(f"rank {failed} {what} (all: {codes}): {log[-_LOG_TAIL:]}")
        time.sleep(0.1)


def _log(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}.log"


@contextlib.contextmanager
def reserved_port() -> Iterator[int]:
    """Reserve a free port for rank 0, which needs seconds until it listens on it.

    A socket that is bound but does not listen keeps the port from other processes. SO_REUSEADDR, which torch's store
    sets too, lets rank 0 bind it nevertheless.
    """
    with socket.socket() as reservation:
        reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reservation.bind(("127.0.0.1", 0))
        port: int = reservation.getsockname()[1]
        yield port


if __name__ == "__main__":
    _serve(int(sys.argv.pop(1)), sys.argv.pop(1).split(","))
