"""Several ranks share a conversion: the same bytes as one process, or nothing at all."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hf_models import contents, random_model, saved

import dist_ckpt_mistral as dcm
from dist_ckpt_mistral import storage
from dist_ckpt_mistral.gather.executor import Effort
from dist_ckpt_mistral.rank_processes import run_ranks
from dist_ckpt_mistral.ranks import Ranks


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real model in several files."""
    return saved(random_model(), tmp_path_factory.mktemp("ranks") / "hf", max_shard_size=6_000)


def on_ranks(world_size: int, work: Callable[[Ranks], object]) -> list[BaseException | None]:
    """Run ``work`` as every rank of a job, in threads; what each of them raised."""
    barrier = threading.Barrier(world_size)
    values: list[Any] = [None] * world_size

    def exchange(rank: int, value: object) -> list[Any]:
        values[rank] = value
        barrier.wait(30)
        everything = list(values)
        barrier.wait(30)
        return everything

    def run(rank: int) -> BaseException | None:
        try:
            work(Ranks(rank=rank, world_size=world_size, exchange=lambda value: exchange(rank, value)))
        except dcm.DistCkptMistralError as error:
            return error
        return None

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(run, range(world_size)))


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


def test_a_refusal_on_one_rank_keeps_the_others_from_starting(hf: Path, tmp_path: Path) -> None:
    """If one rank cannot even open the source, no rank waits for it and nothing is written."""
    sources = [hf, tmp_path / "absent"]
    failures = on_ranks(2, lambda ranks: dcm.from_hf(sources[ranks.rank], tmp_path / "out", ranks=ranks))
    assert all("absent" in str(failure) for failure in failures)
    assert list(tmp_path.iterdir()) == []


def test_ranks_leave_before_python_ends(tmp_path: Path) -> None:
    """The process group that a rank joined is ended at exit, before the interpreter shuts down."""
    code = """
import atexit, torch.distributed as dist
atexit.register(lambda: print("joined" if dist.is_initialized() else "left"))  # handlers run last in, first out
from dist_ckpt_mistral.ranks import from_environment
print(from_environment().exchange(dist.get_rank()))
"""
    run_ranks([[sys.executable, "-c", code]] * 2, tmp_path, timeout_s=120)
    assert [(tmp_path / f"rank{rank}.log").read_text().splitlines()[-2:] for rank in (0, 1)] == [["[0, 1]", "left"]] * 2


def test_torchrun(hf: Path, tmp_path: Path) -> None:
    """``torchrun -m dist_ckpt_mistral`` splits the work over real processes, prints once, and publishes once."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "dist_ckpt_mistral"]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [*torchrun, "from-hf", str(hf), str(tmp_path / "many"), "--tp", "2"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["wrote"]
    dcm.from_hf(hf, tmp_path / "one", tp=2)
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
    again = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, timeout=120)
    assert again.returncode != 0
    assert again.stderr.count("error: ") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["many", "one"]
