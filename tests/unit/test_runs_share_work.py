"""What one run of the tests has shown without torch, the next leaves out: the options of conftest.py that do it."""

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


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of small tests under this project's conftest.py."""
    shutil.copy(CONFTEST, tmp_path / "conftest.py")
    (tmp_path / "test_core.py").write_text(TESTS)
    (tmp_path / "test_asks.py").write_text(ASKS)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    return tmp_path


def pytest_in(folder: Path, *options: str) -> list[str]:
    """What pytest says of the tests in a folder."""
    path = os.pathsep.join([str(CONFTEST.with_name("helpers")), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options]
    done = subprocess.run(command, cwd=folder, env=os.environ | {"PYTHONPATH": path}, capture_output=True, check=False)
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
