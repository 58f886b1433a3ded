"""What conftest.py gives a run: it leaves out what another has shown without torch, and no temporary file is left."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).parents[1] / "conftest.py"

TESTS = """
import pytest

def test_passes(): pass

def test_fails(): assert False

def test_skips(): pytest.skip("no torch")

@pytest.mark.parametrize("number", [1, 2])
def test_each(number): pass
"""
ASKS = """
from importlib.util import find_spec

def test_asks(): assert find_spec("torch") or True
"""
#: Leaves files as servers and killed processes do.
LEAVES = """
import os, subprocess, sys, tempfile
from pathlib import Path
import pytest

@pytest.mark.parametrize("number", [1, 2])
def test_leaves(number, tmp_path):
    left = Path(tempfile.mkdtemp(prefix="pymp-"), "listener-0123456789")
    left.touch()
    code = "import tempfile; print(tempfile.mkstemp()[1])"
    told = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True).stdout
    assert Path(told.strip()).parent == left.parents[1] and left.parents[1] not in tmp_path.parents
    assert left.parents[1].stat().st_mode & 0o777 == 0o755
    (tmp_path / "kept").touch()
    assert number == 1
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of small tests under this project's conftest.py."""
    shutil.copy(CONFTEST, tmp_path / "conftest.py")
    (tmp_path / "test_core.py").write_text(TESTS)
    (tmp_path / "test_asks.py").write_text(ASKS)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    return tmp_path


def pytest_in(folder: Path, *options: str, **variables: str) -> list[str]:
    """What pytest says of the tests in a folder. Without zarr's plugin, which imports zarr in each process."""
    path = os.pathsep.join([str(CONFTEST.with_name("helpers")), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "xdist", *options]
    environment = os.environ | {"PYTHONPATH": path, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"} | variables
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, check=False)
    return done.stdout.decode().splitlines()


@pytest.mark.parametrize("workers", [(), ("-n", "2", "--dist", "loadfile")])
def test_what_passed_is_left_out(workers: tuple[str, ...], folder: Path) -> None:
    """What failed or was skipped runs again, and so does a module that asks what is installed."""
    pytest_in(folder, "--passed-to=passed", *workers)
    assert json.loads((folder / "passed").read_text()) == [
        "test_asks.py::test_asks",
        "test_core.py::test_each[1]",
        "test_core.py::test_each[2]",
        "test_core.py::test_passes",
    ]
    told = pytest_in(folder, "--shown-by=passed", "-rA", *workers)
    outcomes = [line for line in told if line.startswith(("PASSED", "FAILED", "SKIPPED"))]
    assert [outcome.partition(" - ")[0] for outcome in outcomes] == [
        "PASSED test_asks.py::test_asks",
        "SKIPPED [1] test_core.py:8: no torch",
        "FAILED test_core.py::test_fails",
    ]


@pytest.mark.parametrize("workers", [(), ("-n", "2")])
def test_only_what_pytest_keeps_is_left(
    workers: tuple[str, ...], folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Temporary files of tests and of what they start are gone, in each worker; those of a failed test are there."""
    (folder / "test_core.py").write_text(LEAVES)
    temporary = tmp_path_factory.mktemp("t")
    monkeypatch.delenv("PYTEST_DEBUG_TEMPROOT")
    told = pytest_in(folder, *workers, TMPDIR=str(temporary))
    assert told[-1].startswith("1 failed, 2 passed"), told
    assert [path.name.partition("-")[0] for path in temporary.iterdir()] == ["pytest"]
    assert len([*temporary.rglob("kept")]) == 2
