"""Whatever call to the operating system goes wrong, and whenever a run is killed: nothing lost, nothing half-done.

How single calls go wrong is in faults.py. Outputs are compared, byte for byte, with those of undisturbed runs.
"""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import pytest
from faults import READING, REMOVING, WRITING, Outcome, Scenario, Seen
from genuine import shards
from plain_models import contents, save_model

import dist_ckpt_mistral as dcm

pytestmark = pytest.mark.slow

COMMANDS: Final = ("from-hf", "to-hf", "reshard", "migrate")
RENAMING: Final = ("rename", "renameat2", "replace")
_FAULTS: Final = Path(__file__).parents[1] / "helpers" / "faults.py"
#: The first two hit every call of a run, with no output there before or an old one; the others are samples.
SCENARIOS: Final[dict[str, dict[str, Any]]] = {
    "killed": {"step": 2},
    "killed, overwriting": {"old": True, "first": 2, "step": 2},
    "killed, overwriting in two steps": {"old": True, "exchange": False, "kinds": [*RENAMING, *REMOVING]},
    "first rank killed": {"ranks": 2, "step": 8},
    "second rank killed": {"old": True, "ranks": 2, "rank": 1, "step": 2},
    "disk full": {"old": True, "step": 6, "error": errno.ENOSPC},
    "disk broken": {"first": 2, "step": 8, "error": errno.EIO},
    "not allowed": {"old": True, "first": 3, "step": 8, "error": errno.EACCES},
    "source broken": {"step": 4, "error": errno.EIO, "kinds": [*READING]},
}
KILLS: Final = [name for name, fields in SCENARIOS.items() if "error" not in fields]

#: By command and scenario.
Outcomes = dict[tuple[str, str], list[Outcome]]


def arguments(command: str, work: Path, output: Path, *, old: bool = False) -> list[str]:
    """A command on the sources in ``work``, and all options that it gets."""
    source, options = {
        "from-hf": ("hf", []),
        "to-hf": ("ckpt", ["--max-file-size", "4000B"]),
        "reshard": ("ckpt", ["--tp", "1"]),
        "migrate": ("zarr", ["--max-file-size", "10000B"]),
    }[command]
    return [command, str(work / source), str(output), *options, *(["--overwrite"] if old else [])]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model in both forms, and what each command makes of it if nothing happens, under the command's name."""
    work = tmp_path_factory.mktemp("faults")
    save_model(work / "hf", max_shard_size=4000, num_hidden_layers=1)
    dcm.from_hf(work / "hf", work / "ckpt", tp=2)
    make_zarr_checkpoint(work / "zarr")
    for command in COMMANDS:
        process(arguments(command, work, work / command))
    assert contents(work / "to-hf") == contents(work / "hf")
    return work


def make_zarr_checkpoint(directory: Path) -> None:
    """A legacy checkpoint: two arrays, one of several chunks, and the objects of a genuine one."""
    for key, dtype, shape, chunks in (("weight", "bfloat16", (2, 64, 32), (1, 32, 32)), ("bias", "<f4", (64,), (64,))):
        described = {"zarr_format": 2, "shape": shape, "chunks": chunks, "dtype": dtype, "order": "C"}
        (directory / key).mkdir(parents=True)
        (directory / key / ".zarray").write_text(json.dumps(described | {"compressor": None, "filters": None}))
        grid = (range(size // step) for size, step in zip(shape, chunks, strict=True))
        for place in itertools.product(*grid):
            content = random.Random(f"{key}{place}").randbytes(math.prod(chunks) * (2 if len(shape) > 1 else 4))  # noqa: S311
            (directory / key / ".".join(map(str, place))).write_bytes(content)
    genuine = shards("dpzero_zarr_0153")
    shutil.copytree(genuine / "rng_state", directory / "rng_state")
    shutil.copy(genuine / "common.pt", directory)
    (directory / "metadata.json").write_text('{"sharded_backend": "zarr"}')


def process(command: list[str]) -> None:
    """Run a command in a process of its own."""
    subprocess.run([sys.executable, "-m", "dist_ckpt_mistral", *command], check=True, capture_output=True, timeout=120)


@pytest.fixture(scope="module")
def outcomes(sources: Path) -> Outcomes:
    """All outcomes of all scenarios."""

    def run(command: str) -> Outcomes:
        scenarios = [asdict(scenario(command, sources, **fields)) for fields in SCENARIOS.values()]
        environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
        script = [sys.executable, str(_FAULTS), json.dumps(scenarios)]
        done = subprocess.run(script, check=True, capture_output=True, text=True, env=environment, timeout=570)
        return {
            (command, name): [
                Outcome(call=each["call"], hit=Seen(**each["hit"]), resumed=Seen(**each["resumed"])) for each in told
            ]
            for name, told in zip(SCENARIOS, json.loads(done.stdout), strict=True)
        }

    with ThreadPoolExecutor(2) as pool:
        return {case: each for found in pool.map(run, COMMANDS) for case, each in found.items()}


def scenario(command: str, sources: Path, *, old: bool = False, **fields: Any) -> Scenario:  # noqa: ANN401  (Scenario's)
    """A scenario of a command, in a directory of its own."""
    work = sources / f"{command}-disturbed"
    line = arguments(command, sources, work / "out", old=old)
    fields = {"kinds": [*WRITING, *REMOVING]} | fields
    return Scenario(command=line, work=str(work), expected=str(sources / command), old=old, **fields)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", SCENARIOS)
def test_a_resumed_run_makes_good(name: str, command: str, outcomes: Outcomes) -> None:
    """After any fault a run with --resume gives the bytes of an undisturbed one, and leaves nothing beside them."""
    assert outcomes[command, name]
    for outcome in outcomes[command, name]:
        assert (outcome.resumed.code, outcome.resumed.state, outcome.resumed.beside) == (0, "complete", []), outcome


@pytest.mark.parametrize("command", COMMANDS)
def test_every_call_is_hit(command: str, outcomes: Outcomes) -> None:
    """Kills leave out no call of a run, to its very end, and there are hundreds of them."""
    alone = outcomes[command, "killed"], outcomes[command, "killed, overwriting"]
    assert [outcome.call for outcome in alone[0]] == list(range(1, 2 * len(alone[0]), 2))
    assert [outcome.call for outcome in alone[1]] == list(range(2, 2 * len(alone[1]) + 1, 2))
    assert all(each[-1].hit.state == "complete" for each in alone)
    assert sum(len(outcomes[each, name]) for each in COMMANDS for name in KILLS) > 300


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", KILLS)
def test_a_kill_leaves_all_or_nothing(name: str, command: str, outcomes: Outcomes) -> None:
    """The output is the old one, or absent if there was none, or complete; the old one is there at every moment.

    Where names cannot be exchanged there is one moment without; then the old one waits to be put back.
    """
    before = "old" if SCENARIOS[name].get("old") else "absent"
    for outcome in outcomes[command, name]:
        hit = outcome.hit
        assert hit.code == -signal.SIGKILL
        assert set(hit.beside) <= {".out.incomplete", ".out.replaced"}
        assert hit.state in {before, "complete"} or ("two steps" in name and ".out.replaced" in hit.beside), outcome
    states = [outcome.hit.state for outcome in outcomes[command, name]]
    assert states.count("absent") == (1 if "two steps" in name else 0) or before == "absent"


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", [name for name in SCENARIOS if name not in KILLS])
def test_an_error_says_what_and_where(name: str, command: str, outcomes: Outcomes, sources: Path) -> None:
    """A run fails in one line that tells reason and file, and publishes nothing; or it could go on, and is complete."""
    before = "old" if SCENARIOS[name].get("old") else "absent"
    reason = os.strerror(SCENARIOS[name]["error"])
    failed = 0
    for outcome in outcomes[command, name]:
        hit = outcome.hit
        errors = [line for line in hit.lines if line.startswith("error: ")]
        if hit.code == 0:
            assert (hit.state, errors) == ("complete", []), outcome
            continue
        assert (hit.code, len(errors), hit.lines[-1]) == (1, 1, errors[0]), outcome
        assert re.search(rf"{sources}/\S+(: | is complete, .*: ){reason}", errors[0]), outcome
        assert hit.state == before or (hit.state == "complete" and "is complete" in errors[0]), outcome
        assert (".out.incomplete" in hit.beside) == ("--resume continues what is kept in" in errors[0]), outcome
        failed += 1
    assert failed > len(outcomes[command, name]) // 3


@pytest.mark.parametrize("command", COMMANDS)
def test_processes_killed_at_any_time(command: str, sources: Path, tmp_path: Path) -> None:
    """Real processes that are killed after random times, each resuming what the one before it left, end as one run."""
    output, moments = tmp_path / "out", random.Random(command)  # noqa: S311  (no secret)
    line = [sys.executable, "-m", "dist_ckpt_mistral", *arguments(command, sources, output), "--resume"]
    begun = time.monotonic()
    subprocess.run(line, check=True, capture_output=True, timeout=120)
    takes = time.monotonic() - begun
    for _ in range(4):
        shutil.rmtree(output, ignore_errors=True)
        with subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as running:
            time.sleep(takes * moments.uniform(0.4, 1))
            running.kill()
        assert not output.exists() or contents(output) == contents(sources / command)
    shutil.rmtree(output, ignore_errors=True)
    subprocess.run(line, check=True, capture_output=True, timeout=120)
    assert contents(output) == contents(sources / command)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
