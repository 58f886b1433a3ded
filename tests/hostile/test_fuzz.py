"""Spoiled input of every kind: each command does what it should or says in one line why not, soon and in little memory.

A run has a fixed number of examples, the same each time. ``FUZZ_EXAMPLES=100000 pytest tests/hostile/test_fuzz.py``
looks for new ones.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from command_line import Outcome, run
from genuine import folder, shards
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from mutations import PLACES, misplace, restore, spoiled
from plain_models import save_model

from dist_ckpt_mistral.convert.from_hf import from_hf

pytestmark = pytest.mark.slow

EXAMPLES: Final = int(os.environ.get("FUZZ_EXAMPLES", "0"))
LIMIT_SECONDS: Final = 5
LIMIT_BYTES: Final = 300 << 20
#: The content of a file that is none of the tool's business.
SECRET: Final = b"none of your business"
#: The genuine checkpoint of arrays in folders.
ARRAYS: Final = "zarr_ckpt"
#: What takes no time to be found out is left out of the commands that each example runs.
COMMANDS: Final = {
    "hf": ("inspect", "from-hf", "megatron-args"),
    "ckpt": ("inspect", "to-hf", "plan", "megatron-args"),
    "zarr": ("inspect", "to-hf", "migrate"),
}


def fuzzed(examples: int) -> settings:
    """So many examples, always the same ones; or as many new ones as were asked for."""
    return settings(
        max_examples=EXAMPLES or examples,
        derandomize=not EXAMPLES,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small inputs of every kind, by name; the command line takes ``NAME/it``, and ``--config NAME/config.json``."""
    where = tmp_path_factory.mktemp("inputs")
    save_model(where / "hf one" / "it")
    save_model(where / "hf many" / "it", max_shard_size=4000)
    from_hf(where / "hf many" / "it", where / "ckpt own" / "it", tp=2, pp=2)
    shutil.copytree(shards(ARRAYS), where / f"zarr {ARRAYS}" / "it")
    shutil.copy(folder(ARRAYS) / "config.json", where / f"zarr {ARRAYS}")
    for case in ("td_0161", "common_0192", "mlm_0161", "opt_plain_0161"):
        shutil.copytree(folder(case) / "checkpoint", where / f"ckpt {case}" / "it")
        if case != "mlm_0161":
            shutil.copy(folder(case) / "config.json", where / f"ckpt {case}")
    shutil.copytree(folder("bridge_0062") / "checkpoint", where / "ckpt bridge" / "it")
    (where / "elsewhere").mkdir()
    (where / "elsewhere" / "secret").write_bytes(SECRET)
    return where


class TooLong(BaseException):
    """A command took more processor time than anything small may."""


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Little more memory than there is now, and little time."""

    def stop(*_: object) -> None:
        raise TooLong(f"more than {LIMIT_SECONDS} s")

    told = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    used = int(told["VmData"].split()[0]) << 10
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    before = signal.signal(signal.SIGPROF, stop)
    resource.setrlimit(resource.RLIMIT_DATA, (used + LIMIT_BYTES, hard))
    signal.setitimer(signal.ITIMER_PROF, LIMIT_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
        signal.signal(signal.SIGPROF, before)


def names(where: Path) -> list[tuple[str, int, int]]:
    """Everything under ``where`` but the output: names, sizes and times of change."""
    found = []
    with os.scandir(where) as entries:
        for entry in entries:
            if entry.name == "out":
                continue
            state = entry.stat(follow_symlinks=False)
            found.append((entry.path, state.st_size, state.st_mtime_ns))
            if entry.is_dir(follow_symlinks=False):
                found += names(Path(entry.path))
    return sorted(found)


def require_sound(outcome: Outcome, command: str) -> None:
    """Done, or refused in one line; ``inspect`` may show what it found, and its problems."""
    assert outcome.code in (0, 1), outcome
    errors = [line for line in outcome.err if line.startswith("error: ")]
    if outcome.code == 1 and not (command == "inspect" and outcome.out):
        assert len(errors) == 1, outcome
        assert outcome.out == [], outcome
    else:
        assert errors == [], outcome
    assert all(line.isprintable() for line in (*outcome.out, *outcome.err)), outcome
    assert not any("out of memory" in line for line in outcome.err), outcome


def run_all(where: Path, name: str) -> None:
    """Run every command on a spoiled input, as a stranger's."""
    before = names(where)
    config = where / name / "config.json"
    for command in COMMANDS[name.partition(" ")[0]]:
        outputs = [where / "out"] if command in ("from-hf", "to-hf", "migrate") else []
        given_config = ["--config", config] if config.exists() and command not in ("from-hf", "migrate") else []
        effort = ["--workers", 1, "--no-sync"] if outputs else []
        start = time.process_time()
        with bounded():
            outcome = run(command, where / name / "it", *outputs, *effort, *given_config)
        assert time.process_time() - start < LIMIT_SECONDS
        require_sound(outcome, command)
        assert (where / "out").exists() == (outcome.code == 0 and outputs != [])
        shutil.rmtree(where / ".out.incomplete", ignore_errors=True)  # what a failed run has copied
        assert names(where) == before
        assert not any(SECRET in path.read_bytes() for path in (where / "out").rglob("*") if path.is_file())
        shutil.rmtree(where / "out", ignore_errors=True)


def files_of(where: Path, name: str) -> list[Path]:
    """The files of an input, its configuration among them."""
    return sorted(path for path in (where / name).rglob("*") if path.is_file())


NAMES: Final = (
    "hf one",
    "hf many",
    "ckpt own",
    "ckpt td_0161",
    "ckpt common_0192",
    "ckpt mlm_0161",
    "ckpt opt_plain_0161",
)
INPUTS: Final = (*NAMES, "ckpt bridge", f"zarr {ARRAYS}")


@pytest.mark.parametrize("name", INPUTS)
@fuzzed(40)
@given(data=st.data())
def test_spoiled_files(name: str, data: st.DataObject, inputs: Path) -> None:
    """Whatever is wrong inside one file."""
    path = data.draw(st.sampled_from(files_of(inputs, name)))
    content = path.read_bytes()
    try:
        path.write_bytes(data.draw(spoiled(path)))
        run_all(inputs, name)
    finally:
        restore(path, content)


@pytest.mark.parametrize("name", INPUTS)
@fuzzed(12)
@given(data=st.data())
def test_spoiled_directories(name: str, data: st.DataObject, inputs: Path) -> None:
    """Pipes, devices, links and directories where files should be, and files that are another's."""
    path = data.draw(st.sampled_from(files_of(inputs, name)))
    content = path.read_bytes()
    try:
        if data.draw(st.booleans()):
            misplace(path, data.draw(st.sampled_from(PLACES)), inputs / "elsewhere" / "secret")
        else:
            path.write_bytes(
                data.draw(st.sampled_from(files_of(inputs, data.draw(st.sampled_from(INPUTS))))).read_bytes()
            )
        run_all(inputs, name)
    finally:
        restore(path, content)


#: Names of chunks, some of which no grid has, and of what else may lie beside them.
CHUNK_NAMES: Final = ("0", "0.0", "0.0.0", "1.0.1", "9.9.9", "00.0", "0.0.", "1" * 200, ".zattrs", "shard_0_4.pt")


@fuzzed(60)
@given(data=st.data())
def test_spoiled_arrays(data: st.DataObject, inputs: Path) -> None:
    """Arrays that say something else of themselves, among files that are renamed, doubled or gone."""
    name = f"zarr {ARRAYS}"
    array = data.draw(st.sampled_from(sorted((inputs / name / "it").glob("*/.zarray")))).parent
    shutil.copytree(array, inputs / "kept")
    try:
        described = array / ".zarray"
        if data.draw(st.booleans()):
            described.write_bytes(data.draw(spoiled(described)))
        for _ in range(data.draw(st.integers(0, 3))):
            path = data.draw(st.sampled_from(sorted(array.iterdir())))
            to = array / data.draw(st.sampled_from(CHUNK_NAMES))
            if data.draw(st.booleans()) and to != path:
                shutil.copyfile(path, to)
            else:
                path.replace(to)
        run_all(inputs, name)
    finally:
        shutil.rmtree(array)
        shutil.move(inputs / "kept", array)
