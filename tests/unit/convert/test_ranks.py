"""Several ranks share a conversion: the same bytes as one process, or nothing at all."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hf_models import random_model, saved
from plain_models import contents
from rank_threads import on_ranks
from safetensors.torch import load_file, save_file

import dist_ckpt_mistral as dcm
from dist_ckpt_mistral import storage
from dist_ckpt_mistral.formats import places
from dist_ckpt_mistral.gather.executor import Effort
from dist_ckpt_mistral.rank_processes import run_ranks
from dist_ckpt_mistral.ranks import Ranks, from_environment


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real model in several files."""
    return saved(random_model(), tmp_path_factory.mktemp("ranks") / "hf", max_shard_size=6_000)


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_ranks_write_what_one_process_writes(hf: Path, tmp_path: Path, world_size: int) -> None:
    """Import and export on any number of ranks give the files of one process, byte for byte."""
    dcm.from_hf(hf, tmp_path / "one", tp=2, pp=2)
    failures = on_ranks(world_size, lambda ranks: dcm.from_hf(hf, tmp_path / "many", tp=2, pp=2, ranks=ranks))
    assert failures == [None] * world_size
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
    failures = on_ranks(world_size, lambda ranks: dcm.to_hf(tmp_path / "many", tmp_path / "back", ranks=ranks))
    assert failures == [None] * world_size
    assert contents(tmp_path / "back") == contents(hf)


def test_what_ranks_lose_is_counted_together(hf: Path, tmp_path: Path) -> None:
    """Values that a conversion destroys on any rank are refused on all, by name; a resumed job counts them too."""
    shutil.copytree(hf, tmp_path / "hf")
    for file in (tmp_path / "hf").glob("model-*"):
        tensors = load_file(file)
        for name in tensors.keys() & {"model.embed_tokens.weight", "lm_head.weight"}:
            tensors[name][0, :3] = 1e20
        save_file(tensors, file, metadata={"format": "pt"})
    options: dict[str, Any] = {"tp": 2, "pp": 2, "dtype": "float16"}
    for resume in (False, True):
        out = tmp_path / "out"
        failures = on_ranks(3, lambda ranks: dcm.from_hf(tmp_path / "hf", out, **options, resume=resume, ranks=ranks))  # noqa: B023
        assert all("lm_head.weight: 3 become infinite; model.embed_tokens.weight: 3" in str(each) for each in failures)
        assert not out.exists()
    losses = dcm.from_hf(tmp_path / "hf", tmp_path / "out", **options, allow_lossy=True, resume=True).losses
    assert [(loss.tensors, loss.overflowed) for loss in losses] == [
        (("lm_head.weight",), 3),
        (("model.embed_tokens.weight",), 3),
    ]


def test_a_rank_that_fails_fails_all(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write error on one rank reaches every rank, says which one it was, and publishes nothing; then resume."""
    original, victim = storage.TargetFile.write, threading.local()

    def failing(self: storage.TargetFile, position: int, data: memoryview | bytes) -> None:
        if getattr(victim, "chosen", False):
            raise OSError(5, os.strerror(5))
        original(self, position, data)

    monkeypatch.setattr(storage.TargetFile, "write", failing)

    def work(ranks: Ranks) -> None:
        victim.chosen = ranks.rank == 2
        dcm.from_hf(hf, tmp_path / "out", tp=2, effort=Effort(workers=1), ranks=ranks)

    failures = on_ranks(3, work)
    assert "Input/output error" in str(failures[2])
    assert all("rank 2 of 3" in str(failure) for failure in failures[:2])
    assert [path.name for path in tmp_path.iterdir()] == [".out.incomplete"]
    assert "--resume continues" in failures[0].__notes__[-1]  # type: ignore[union-attr]
    monkeypatch.undo()
    assert on_ranks(2, lambda ranks: dcm.from_hf(hf, tmp_path / "out", tp=2, resume=True, ranks=ranks)) == [None] * 2
    dcm.from_hf(hf, tmp_path / "one", tp=2)
    assert contents(tmp_path / "out") == contents(tmp_path / "one")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "out"]


@pytest.mark.parametrize("command", ["to_hf", "reshard"])
def test_ranks_read_one_iteration(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where training saves another iteration while the ranks start, all of them read the one that was the latest."""
    root, expected = tmp_path / "ckpt", {}
    commands: dict[str, Callable[..., object]] = {
        "to_hf": dcm.to_hf,
        "reshard": lambda source, out, **ranks: dcm.reshard(source, out, dcm.ParallelLayout(tp=2), **ranks),
    }
    run = commands[command]
    for iteration in (5, 6):
        model = random_model()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(iteration)
        dcm.from_hf(saved(model, tmp_path / f"hf{iteration}"), tmp_path / f"from{iteration}", iteration=iteration)
        shutil.copytree(tmp_path / f"from{iteration}", root, dirs_exist_ok=True)
        run(root, tmp_path / f"expected{iteration}")
        expected[iteration] = contents(tmp_path / f"expected{iteration}")
    tracker, lock = root / "latest_checkpointed_iteration.txt", threading.Lock()
    tracker.write_text("5")
    locate = places.locate

    def locate_and_save(path: str | Path, *kinds: places.Kind) -> places.Place:
        with lock:
            found = locate(path, *kinds)
            if Path(path) == root:
                tracker.write_text("6")
        return found

    monkeypatch.setattr(places, "locate", locate_and_save)
    assert on_ranks(2, lambda ranks: run(root, tmp_path / "out", ranks=ranks)) == [None, None]
    assert contents(tmp_path / "out") == expected[5]


def test_a_refusal_on_one_rank_keeps_the_others_from_starting(hf: Path, tmp_path: Path) -> None:
    """If one rank cannot even open the source, no rank waits for it and nothing is written."""
    sources = [hf, tmp_path / "absent"]
    failures = on_ranks(2, lambda ranks: dcm.from_hf(sources[ranks.rank], tmp_path / "out", ranks=ranks))
    assert all("absent" in str(failure) for failure in failures)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.ranks
def test_ranks_of_one_machine_need_no_torch(hf: Path, tmp_path: Path) -> None:
    """Where torch cannot even be imported, two processes import, export and reshard, and meet once for all of it."""
    commands = [
        ["from-hf", str(hf), str(tmp_path / "checkpoint"), "--tp", "2"],
        ["to-hf", str(tmp_path / "checkpoint"), str(tmp_path / "back")],
        ["reshard", str(tmp_path / "checkpoint"), str(tmp_path / "resharded"), "--pp", "2"],
    ]
    code = f"""
import sys
sys.modules["torch"] = None
from dist_ckpt_mistral.cli import main
sys.exit(any(main(command) for command in {commands}))
"""
    run_ranks([[sys.executable, "-c", code]] * 2, tmp_path, timeout_s=60)
    dcm.from_hf(hf, tmp_path / "one", tp=2)
    assert contents(tmp_path / "checkpoint") == contents(tmp_path / "one")
    assert contents(tmp_path / "back") == contents(hf)
    assert dcm.compare(tmp_path / "resharded", hf).is_equal


@pytest.mark.parametrize(("victim", "speaker"), [(0, 1), (1, 0)])
@pytest.mark.ranks
def test_a_rank_that_is_killed_fails_the_others(hf: Path, tmp_path: Path, victim: int, speaker: int) -> None:
    """A rank is killed while it copies: one that is left says so in one line, and nothing is published."""
    code = f"""
import os, signal, sys
from dist_ckpt_mistral import writing
from dist_ckpt_mistral.cli import main
if os.environ["RANK"] == "{victim}":
    writing.execute = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
print(main(["from-hf", {str(hf)!r}, {str(tmp_path / "out")!r}]))
"""
    run_ranks([["sh", "-c", '"$0" -c "$1" || true', sys.executable, code]] * 2, tmp_path, timeout_s=60)
    said, code = (tmp_path / f"rank{speaker}.log").read_text().splitlines()
    assert said.startswith(f"error: rank {victim} ")
    assert code == "1"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("missing", ["LOCAL_WORLD_SIZE", "MASTER_PORT"])
def test_ranks_of_several_machines_use_gloo(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that may be elsewhere, or have no place to meet at, join torch's process group."""
    named = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in named.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(missing)
    joined: list[str] = []
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **_: joined.append(backend))
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr("dist_ckpt_mistral.ranks.leave_at_exit", lambda: None)
    assert (from_environment().rank, joined) == (1, ["gloo"])


@pytest.mark.ranks
def test_ranks_leave_before_python_ends(tmp_path: Path) -> None:
    """The process group that a rank joined is ended at exit, before the interpreter shuts down."""
    code = """
import atexit, os, torch.distributed as dist
atexit.register(lambda: print("joined" if dist.is_initialized() else "left"))  # handlers run last in, first out
del os.environ["LOCAL_WORLD_SIZE"]  # the ranks may be on several machines
from dist_ckpt_mistral.ranks import from_environment
print(from_environment().exchange(dist.get_rank()))
"""
    run_ranks([[sys.executable, "-c", code]] * 2, tmp_path, timeout_s=120)
    assert [(tmp_path / f"rank{rank}.log").read_text().splitlines()[-2:] for rank in (0, 1)] == [["[0, 1]", "left"]] * 2


@pytest.mark.ranks
def test_torchrun(hf: Path, tmp_path: Path) -> None:
    """``torchrun -m dist_ckpt_mistral`` splits the work over processes without torch, prints once, publishes once."""
    dcm.from_hf(hf, tmp_path / "checkpoint", tp=2)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command = ["-m", "dist_ckpt_mistral", "to-hf", str(tmp_path / "checkpoint"), str(tmp_path / "out")]

    def launch(*options: str, **settings: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} | settings
        arguments = [*torchrun, *options, *command]
        return subprocess.run(arguments, check=False, capture_output=True, text=True, env=environment, timeout=120)

    done = launch("--redirects", "2", "--log-dir", str(tmp_path / "logs"), PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["wrote"]
    assert contents(tmp_path / "out") == contents(hf)
    logs = [path.read_text() for path in (tmp_path / "logs").rglob("stderr.log")]
    imported = [{line.rpartition("|")[2].strip() for line in log.splitlines()} for log in logs]
    assert ["torch" in names for names in imported] == [False, False]
    assert all("dist_ckpt_mistral.local_ranks" in names for names in imported)
    again = launch()
    assert again.returncode != 0
    assert again.stderr.count("error: ") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "logs", "out"]
