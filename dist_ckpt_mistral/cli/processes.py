"""Run the ranks of one job as processes on this machine's CPU, and leave no process behind."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

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
    with _reserved_port() as port:
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
def _reserved_port() -> Iterator[int]:
    """Reserve a free port for rank 0, which needs seconds until it listens on it.

    A socket that is bound but does not listen keeps the port from other processes. SO_REUSEADDR, which torch's store
    sets too, lets rank 0 bind it nevertheless.
    """
    with socket.socket() as reservation:
        reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reservation.bind(("127.0.0.1", 0))
        port: int = reservation.getsockname()[1]
        yield port
