"""What all tests share: which of them can run here, how long hypothesis may take, and the ranks of multi-rank tests."""

from __future__ import annotations

import ast
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import HealthCheck, settings

from dist_ckpt_mistral.cli.processes import run_ranks

# Small tensors gain nothing from threads, and threads that wait for work take cores from the processes beside them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# How long an example takes depends on who else uses the machine: no deadline.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

#: What only some tests use. The others run with a plain install and the extra ``test-core``.
LIBRARIES: Final = (
    *("torch", "megatron", "transformers", "tokenizers", "mistral_common"),
    *("matplotlib", "peft", "safetensors", "tensorstore"),
)
_ABSENT: Final = frozenset(name for name in LIBRARIES if find_spec(name) is None)
_HELPERS = Path(__file__).with_name("helpers")
_WORKER = _HELPERS / "megatron_ranks.py"
_MEGATRON_LM_WORKER = _HELPERS / "megatron_lm_ranks.py"

#: One launch: (number of ranks, {name of a job: its task and arguments}) -> per rank {name of a job: its result}.
LaunchRanks = Callable[[int, Mapping[str, Mapping[str, Any]]], list[dict[str, Any]]]


def pytest_report_header() -> str:
    """Say what is left out for want of a library."""
    absent = ", ".join(sorted(_ABSENT))
    return f"not installed: {absent}; test modules that import them are left out" if absent else "nothing is left out"


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave out the test modules that import, themselves or through helpers, what is not installed here."""
    is_test = collection_path.suffix == ".py" and collection_path.name.startswith("test_")
    return True if is_test and _imported(collection_path) & _ABSENT else None


@cache
def _imported(module: Path) -> frozenset[str]:
    """Which of LIBRARIES are imported as soon as a module is. The torch half of safetensors needs torch."""
    names = set[str]()
    for node in ast.parse(module.read_bytes()).body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    found = {name.partition(".")[0] for name in names} | ({"torch"} if "safetensors.torch" in names else set())
    helpers = [path for name in found if (path := _HELPERS / f"{name}.py").exists()]
    return frozenset(found & {*LIBRARIES}).union(*map(_imported, helpers))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that use ranks of Megatron say so by their fixtures; where there is no Megatron, its tests are skipped."""
    for item in items:
        if {"launch_ranks", "launch_megatron_lm"} & set(getattr(item, "fixturenames", ())):
            item.add_marker("ranks")
            item.add_marker("megatron")
            item.add_marker("slow")
        if "megatron" in _ABSENT and item.get_closest_marker("megatron"):
            item.add_marker(pytest.mark.skip(reason="megatron-core is not installed"))


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
    megatron takes seconds, though the ranks of a launch do it once: tests share a launch where they can.
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
        run_ranks([[sys.executable, worker, folder, str(world_size)]], folder, timeout_s=570)
        return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(world_size)]

    return launch
