"""Ranks as forks of a process that has imported everything: torch and Megatron are imported once, not by each."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path


def run(main: Callable[[Path], None]) -> None:
    """Run ``main`` as every rank of a job, as the command line says: FOLDER WORLD_SIZE. Fail if a rank fails."""
    folder, world_size = Path(sys.argv[1]), int(sys.argv[2])
    ranks = {_fork(main, folder, rank, world_size): rank for rank in range(world_size)}
    while ranks:
        process, status = os.wait()
        if process in ranks and status:
            sys.exit(f"rank {ranks[process]} ended with {os.waitstatus_to_exitcode(status)}")
        ranks.pop(process, None)


def _fork(main: Callable[[Path], None], folder: Path, rank: int, world_size: int) -> int:
    process = os.fork()
    if process:
        return process
    try:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        os.environ |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
        main(folder)
    except BaseException:  # noqa: BLE001  (nothing of the parent's may run here)
        traceback.print_exc()
        os._exit(1)
    os._exit(0)
