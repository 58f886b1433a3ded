"""What all tests share: which of them can run here, how long hypothesis may take, and the ranks of multi-rank tests."""

from __future__ import annotations

import ast
import json
import os
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import pytest
from forked_ranks import RankServer
from hypothesis import HealthCheck, settings

from dist_ckpt_mistral.storage.remote_path import forget_stores

#: The fixtures of tests that spoil their input.
pytest_plugins = ("spoilable",)

# Small tensors gain nothing from threads, and threads that wait for work take cores from the processes beside them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A job in the background may ignore Ctrl-C, and so would all that it starts; tests of interrupts send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# How long an example takes depends on who else uses the machine: no deadline.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

#: What only some tests use. The others run with a plain install and the extra ``test-core``.
LIBRARIES: Final = (
    *("torch", "megatron", "transformers", "tokenizers", "mistral_common"),
    *("matplotlib", "peft", "safetensors", "tensorstore", "zarr"),
)
_ABSENT: Final = frozenset(name for name in LIBRARIES if find_spec(name) is None)
_HELPERS = Path(__file__).with_name("helpers")
_WORKER = _HELPERS / "megatron_ranks.py"
_MEGATRON_LM_WORKER = _HELPERS / "megatron_lm_ranks.py"
_BRIDGE_WORKER = _HELPERS / "bridge_ranks.py"

#: One launch: (number of ranks, {name of a job: its task and arguments}) -> per rank {name of a job: its result}.
LaunchRanks = Callable[[int, Mapping[str, Mapping[str, Any]]], list[dict[str, Any]]]


def pytest_report_header() -> str:
    """Say what is left out for want of a library."""
    absent = ", ".join(sorted(_ABSENT))
    return f"not installed: {absent}; test modules that import them are left out" if absent else "nothing is left out"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of a run over several environments, one after the other: what one has shown, another need not repeat."""
    group = parser.getgroup("environments")
    group.addoption("--passed-to", type=Path, metavar="FILE", help="write the names of the tests that passed to FILE")
    help_text = "leave out the tests in FILE, written where torch is absent, but for modules that ask what is installed"
    group.addoption("--shown-by", type=Path, metavar="FILE", help=help_text)


def pytest_configure(config: pytest.Config) -> None:
    """Collect what passes, if asked to; and let files start in the order of the workers' collection."""
    if not hasattr(config, "workerinput"):
        _leave_nothing_behind(config)
        if config.getoption("--passed-to"):
            config.pluginmanager.register(_Passed(config.getoption("--passed-to")))
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False  # xdist's own order: files of many tests first, though they are quick


def _leave_nothing_behind(config: pytest.Config) -> None:
    """Give this session, its workers and all that they start one directory for temporary files, removed at the end.

    Logs of servers, sockets of multiprocessing, and what a killed process could not remove are there. pytest's own
    directories stay where they were, so that one can look at what a failed test left. The name is short: the path of a
    Unix socket has 107 bytes. Tests that give up the rights of root come here, too.
    """
    outside = tempfile.gettempdir()
    place = Path(tempfile.mkdtemp(prefix="t-"))
    place.chmod(0o755)
    config.add_cleanup(lambda: shutil.rmtree(place, ignore_errors=True))
    patch = pytest.MonkeyPatch()
    patch.setattr(tempfile, "tempdir", str(place))
    patch.setenv("TMPDIR", str(place))
    patch.setenv("PYTEST_DEBUG_TEMPROOT", os.environ.get("PYTEST_DEBUG_TEMPROOT", outside))
    config.add_cleanup(patch.undo)


class _Passed:
    """Writes the names of the tests that passed, once all are done.

    What passes where torch, Megatron and transformers are absent uses none of them, whatever it imports elsewhere.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._names: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take up a test that passed."""
        if report.when == "call" and report.passed:
            self._names.append(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        """Write the file."""
        self._file.write_text(json.dumps(sorted(self._names)))


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


@cache
def _asks_what_is_installed(module: Path) -> bool:
    """Whether a test module may pass in one way with a library, and in another without: by its text."""
    return any(word in module.read_text() for word in ("find_spec", "ImportError", "ModuleNotFoundError"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the tests that use ranks, skip those of an absent Megatron, leave out what was shown elsewhere.

    Several workers start with the files that have slow tests, so that none is left with one of them at the end.
    """
    for item in items:
        if {"launch_ranks", "launch_megatron_lm", "launch_bridge"} & set(getattr(item, "fixturenames", ())):
            item.add_marker("ranks")
            item.add_marker("megatron")
            item.add_marker("slow")
        if "megatron" in _ABSENT and item.get_closest_marker("megatron"):
            item.add_marker(pytest.mark.skip(reason="megatron-core is not installed"))
    shown = config.getoption("--shown-by")
    if shown is not None:
        passed = set(json.loads(shown.read_text()))
        left_out = [item for item in items if item.nodeid in passed and not _asks_what_is_installed(item.path)]
        config.hook.pytest_deselected(items=left_out)
        gone = {*map(id, left_out)}
        items[:] = [item for item in items if id(item) not in gone]
    if hasattr(config, "workerinput"):
        weights = Counter(item.path for item in items if item.get_closest_marker("slow"))
        launches = {item.path for item in items if item.get_closest_marker("ranks")}
        items.sort(key=lambda item: (item.path not in launches, -min(weights[item.path], 1)))


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


@pytest.fixture(scope="session", autouse=True)
def _plain_files() -> None:
    """Megatron 0.16 opens files through multistorageclient, 0.19 only with --enable-msc: here neither does.

    Unpickling a checkpoint's metadata through it is a million small reads, each of which is measured and reported.
    The ranks of ``demo`` leave it as it is.
    """
    if msc := sys.modules.get("megatron.core.msc_utils"):
        msc.MultiStorageClientFeature.disable()


@pytest.fixture
def empty_stores() -> Iterator[None]:
    """Nothing is in the stores in memory, before a test and after it."""
    forget_stores()
    yield
    forget_stores()


@pytest.fixture(scope="session")
def launch_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LaunchRanks]:
    """Run jobs, one after another, on gloo ranks of megatron_ranks.py.

    A job is ``{"task": name of a function there, **arguments}``, all of JSON types, and so is its result. All launches
    of a session fork their ranks from one process, which imports megatron once. Tests still share a launch where they
    can: to build models and groups takes seconds.
    """
    yield from _launcher(_WORKER, tmp_path_factory)


@pytest.fixture(scope="session")
def launch_megatron_lm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LaunchRanks]:
    """The same on ranks of megatron_lm_ranks.py, which run Megatron-LM's own training code."""
    yield from _launcher(_MEGATRON_LM_WORKER, tmp_path_factory)


@pytest.fixture(scope="session")
def launch_bridge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LaunchRanks]:
    """The same on ranks of bridge_ranks.py, which run Megatron-Bridge. Skips where that is not installed.

    Bridge 0.6.2 wants transformers up to 5.12, omegaconf, hydra-core, accelerate, einops, and megatron-core 0.19 or
    newer. It is not among the requirements of the tests: its dependencies contradict them.
    """
    pytest.importorskip("megatron.core", reason="megatron-core is not installed")
    if find_spec("megatron.bridge") is None:
        pytest.skip("Megatron-Bridge pins older versions of what is tested here")
    yield from _launcher(_BRIDGE_WORKER, tmp_path_factory)


def _launcher(worker: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LaunchRanks]:
    server = RankServer(worker)

    def launch(world_size: int, jobs: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
        folder = tmp_path_factory.mktemp("ranks")
        (folder / "jobs.json").write_text(json.dumps(jobs))
        server.launch(folder, world_size)
        return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(world_size)]

    yield launch
    server.close()
