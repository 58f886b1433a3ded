"""The ranks of one job as processes of this machine, on its CPU, of which nothing is left when the job is over."""

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

#: Gloo between processes of one machine, one thread each: there are more ranks than cores.
_ENVIRONMENT: Final = {
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # Megatron insists on it
    "CUDA_VISIBLE_DEVICES": "",
    "GLOO_SOCKET_IFNAME": "lo",
    "MASTER_ADDR": "127.0.0.1",
    "OMP_NUM_THREADS": "1",
    "PYTHONWARNINGS": "ignore",
    "TORCHELASTIC_USE_AGENT_STORE": "False",  # the ranks' own store, also where we run under torchrun ourselves
}
#: How much of a failed rank's log an error shows, in characters.
_LOG_TAIL: Final = 4000


def run_ranks(commands: Sequence[Sequence[str | Path]], folder: Path, *, timeout_s: float) -> None:
    """Run one process for each command, as the ranks of one job, and wait until all have ended well.

    They get the environment variables of torchrun by which ranks find each other (RANK, WORLD_SIZE, LOCAL_RANK,
    LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT); what they print goes to ``folder``/rankN.log. Whether this returns or
    raises, neither they nor processes that they started are left.

    Raises DistCkptMistralError with the end of its log when a rank fails, or is not done after ``timeout_s`` seconds.
    """
    count = str(len(commands))
    ranks: list[subprocess.Popen[bytes]] = []
    with _reserved_port() as port:
        job = (
            _own_environment()
            | _ENVIRONMENT
            | {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": str(port)}
        )
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
            for each in ranks:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(each.pid, signal.SIGKILL)  # the rank, and writers that Megatron spawned and left behind
                each.wait()


def _own_environment() -> dict[str, str]:
    """This process's environment without what Megatron chose for a model built here: each rank chooses for itself.

    NVTE_FLASH_ATTN and the like (models/common/language_module/language_module.py, 0.16 to 0.19).
    """
    return {name: value for name, value in os.environ.items() if not name.startswith("NVTE_")}


def _wait(ranks: Sequence[subprocess.Popen[bytes]], folder: Path, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while any(codes := [each.poll() for each in ranks]) or None in codes:
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
    """Within the block the system gives this port to nobody else, though the first rank takes seconds to listen on it.

    A socket that is bound and does not listen keeps it. SO_REUSEADDR, which torch's store sets too, lets the rank in.
    """
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        port: int = held.getsockname()[1]
        yield port
