"""Starts the ranks of multi-rank tests, and sees to it that nothing of them outlives the test."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# How long an example takes depends on who else uses the machine: no deadline.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

_WORKER = Path(__file__).with_name("megatron_ranks.py")
_MEGATRON_LM_WORKER = Path(__file__).with_name("megatron_lm_ranks.py")

#: One launch: (number of ranks, {name of a job: its task and arguments}) -> per rank {name of a job: its result}.
LaunchRanks = Callable[[int, Mapping[str, Mapping[str, Any]]], list[dict[str, Any]]]


@pytest.fixture(scope="session")
def launch_ranks(tmp_path_factory: pytest.TempPathFactory) -> LaunchRanks:
    """Run jobs, one after another, on gloo ranks of megatron_ranks.py.

    A job is ``{"task": name of a function there, **arguments}``, all of JSON types, and so is its result. Importing
    megatron four times takes ten seconds and more, so tests share a launch where they can.
    """

    def launch(world_size: int, jobs: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
        return _launch(world_size, jobs, tmp_path_factory.mktemp("ranks"))

    return launch


@pytest.fixture(scope="session")
def launch_megatron_lm(tmp_path_factory: pytest.TempPathFactory) -> LaunchRanks:
    """The same on ranks of megatron_lm_ranks.py, which run Megatron-LM's own training code."""

    def launch(world_size: int, jobs: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
        return _launch(world_size, jobs, tmp_path_factory.mktemp("ranks"), worker=_MEGATRON_LM_WORKER)

    return launch


def _launch(
    world_size: int,
    jobs: Mapping[str, Mapping[str, Any]],
    folder: Path,
    *,
    worker: Path = _WORKER,
    timeout_s: float = 570,
) -> list[dict[str, Any]]:
    (folder / "jobs.json").write_text(json.dumps(jobs))
    environment = os.environ | {
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "GLOO_SOCKET_IFNAME": "lo",
        "CUDA_VISIBLE_DEVICES": "",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # megatron.training insists
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }
    ranks = []
    try:
        for rank in range(world_size):
            with (folder / f"rank{rank}.log").open("wb") as log:
                ranks.append(
                    subprocess.Popen(
                        [sys.executable, worker, folder],
                        env=environment | {"RANK": str(rank)},
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )
        _wait(ranks, folder, timeout_s)
    finally:
        for each in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(each.pid, signal.SIGKILL)  # the rank, and writers that Megatron spawned and left behind
            each.wait()
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(world_size)]


def _wait(ranks: list[subprocess.Popen[bytes]], folder: Path, timeout_s: float) -> None:
    """Wait for all ranks; as soon as one fails, or time is up, fail with what it had to say."""
    deadline = time.monotonic() + timeout_s
    while (codes := [each.poll() for each in ranks]) != [0] * len(ranks):
        failed = next((rank for rank, code in enumerate(codes) if code), None)
        if failed is None and time.monotonic() > deadline:
            failed = codes.index(None)
        if failed is not None:
            log = (folder / f"rank{failed}.log").read_text(errors="replace")
            pytest.fail(f"rank {failed} ended with {codes[failed]} (all: {codes}):\n{log[-4000:]}", pytrace=False)
        time.sleep(0.2)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
