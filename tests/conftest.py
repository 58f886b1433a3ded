"""What all tests share: how long hypothesis may take, and the ranks of multi-rank tests."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from dist_ckpt_mistral.rank_processes import run_ranks

# How long an example takes depends on who else uses the machine: no deadline.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

_HELPERS = Path(__file__).with_name("helpers")
_WORKER = _HELPERS / "megatron_ranks.py"
_MEGATRON_LM_WORKER = _HELPERS / "megatron_lm_ranks.py"

#: One launch: (number of ranks, {name of a job: its task and arguments}) -> per rank {name of a job: its result}.
LaunchRanks = Callable[[int, Mapping[str, Mapping[str, Any]]], list[dict[str, Any]]]


@pytest.fixture(scope="module", autouse=True)
def _take_down() -> Iterator[None]:
    """What commands of a module set up of Megatron in this process is taken down again."""
    yield
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_initialized():
        parallel_state = sys.modules.get("megatron.core.parallel_state")
        if parallel_state is not None:
            parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


@pytest.fixture(scope="session")
def launch_ranks(tmp_path_factory: pytest.TempPathFactory) -> LaunchRanks:
    """Run jobs, one after another, on gloo ranks of megatron_ranks.py.

    A job is ``{"task": name of a function there, **arguments}``, all of JSON types, and so is its result. Importing
    megatron four times takes ten seconds and more, so tests share a launch where they can.
    """
    return _launcher(_WORKER, tmp_path_factory)


@pytest.fixture(scope="session")
def launch_megatron_lm(tmp_path_factory: pytest.TempPathFactory) -> LaunchRanks:
    """The same on ranks of megatron_lm_ranks.py, which run Megatron-LM's own training code."""
    return _launcher(_MEGATRON_LM_WORKER, tmp_path_factory)


def _launcher(worker: Path, tmp_path_factory: pytest.TempPathFactory) -> LaunchRanks:
    def launch(world_size: int, jobs: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
        folder = tmp_path_factory.mktemp("ranks")
        (folder / "jobs.json").write_text(json.dumps(jobs))
        run_ranks([[sys.executable, worker, folder]] * world_size, folder, timeout_s=570)
        return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(world_size)]

    return launch
