"""Several ranks share a conversion: the same bytes as one process, or nothing at all."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import torch
import torch.distributed as dist
from forked_ranks import RankServer
from hf_models import random_model, saved
from plain_models import contents
from rank_threads import on_ranks
from safetensors.torch import load_file, save_file

import dist_ckpt_mistral as dcm
from dist_ckpt_mistral.cli.processes import run_ranks
from dist_ckpt_mistral.convert.ranks import Ranks, of_nodes, works_here
from dist_ckpt_mistral.formats import places
from dist_ckpt_mistral.formats.kinds import Kind, Place
from dist_ckpt_mistral.gather.execute import Effort
from dist_ckpt_mistral.storage import local


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real model in several files."""
    return saved(random_model(), tmp_path_factory.mktemp("ranks") / "hf", max_shard_size=6_000)


#: One job: the number of ranks, the folder of their logs, and a task of conversion_ranks.py with its arguments.
Launch = Callable[..., None]


@pytest.fixture(scope="module")
def launch() -> Iterator[Launch]:
    """Run a job on ranks forked from one process, which imports torch once for all jobs."""
    server = RankServer(Path(__file__).parents[2] / "helpers" / "conversion_ranks.py")

    def run(count: int, folder: Path, task: str, **arguments: Path | int) -> None:
        (folder / "job.json").write_text(json.dumps({"task": task} | arguments, default=str))
        server.launch(folder, count)

    yield run
    server.close()


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
        out, output = tmp_path / "out", dcm.Output(resume=resume)
        failures = on_ranks(
            3,
            lambda ranks: dcm.from_hf(tmp_path / "hf", out, **options, output=output, ranks=ranks),  # noqa: B023
        )
        assert all("lm_head.weight: 3 become infinite; model.embed_tokens.weight: 3" in str(each) for each in failures)
        assert not out.exists()
    resumed = dcm.Output(resume=True)
    losses = dcm.from_hf(tmp_path / "hf", tmp_path / "out", **options, allow_lossy=True, output=resumed).losses
    assert [(loss.tensors, loss.overflowed) for loss in losses] == [
        (("lm_head.weight",), 3),
        (("model.embed_tokens.weight",), 3),
    ]


def test_a_rank_that_fails_fails_all(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write error on one rank reaches every rank, says which one it was, and publishes nothing; then resume."""
    original, victim = local.TargetFile.write, threading.local()

    def failing(self: local.TargetFile, position: int, data: memoryview | bytes) -> None:
        if getattr(victim, "chosen", False):
            raise OSError(5, os.strerror(5))
        original(self, position, data)

    monkeypatch.setattr(local.TargetFile, "write", failing)

    def work(ranks: Ranks) -> None:
        victim.chosen = ranks.rank == 2
        dcm.from_hf(hf, tmp_path / "out", tp=2, effort=Effort(workers=1), ranks=ranks)

    failures = on_ranks(3, work)
    assert "Input/output error" in str(failures[2])
    assert all("rank 2 of 3" in str(failure) for failure in failures[:2])
    assert [path.name for path in tmp_path.iterdir()] == [".out.incomplete"]
    assert "--resume continues" in failures[0].__notes__[-1]  # type: ignore[union-attr]
    monkeypatch.undo()
    assert (
        on_ranks(2, lambda ranks: dcm.from_hf(hf, tmp_path / "out", tp=2, output=dcm.Output(resume=True), ranks=ranks))
        == [None] * 2
    )
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

    def locate_and_save(path: str | Path, *wanted: Kind) -> Place:
        with lock:
            found = locate(path, *wanted)
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
def test_one_rank_of_a_node_needs_no_torch(hf: Path, tmp_path: Path) -> None:
    """Where torch cannot even be imported, the first of two ranks imports, exports and reshards; the other leaves."""
    commands = [
        ["from-hf", str(hf), str(tmp_path / "checkpoint"), "--tp", "2"],
        ["to-hf", str(tmp_path / "checkpoint"), str(tmp_path / "back")],
        ["reshard", str(tmp_path / "checkpoint"), str(tmp_path / "resharded"), "--pp", "2"],
    ]
    code = f"""
import os, sys
os.environ |= {{"GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1"}}  # as torchrun says it on one node
sys.modules["torch"] = None
from dist_ckpt_mistral.cli.main import main
failed = any(main(command) for command in {commands})
sys.exit(failed or (os.environ["RANK"] == "1") == ("numpy" in sys.modules))
"""
    run_ranks([[sys.executable, "-c", code]] * 2, tmp_path, timeout_s=60)
    assert (tmp_path / "rank1.log").read_text() == ""
    dcm.from_hf(hf, tmp_path / "one", tp=2)
    assert contents(tmp_path / "checkpoint") == contents(tmp_path / "one")
    assert contents(tmp_path / "back") == contents(hf)
    assert dcm.compare(tmp_path / "resharded", hf).is_equal


@pytest.mark.ranks
def test_one_rank_of_every_node_works(hf: Path, tmp_path: Path, launch: Launch) -> None:
    """Of two ranks each on two nodes, the first ones share an import and publish once; one of them speaks."""
    launch(4, tmp_path, "import_on_two_nodes", hf=hf, out=tmp_path / "out")
    dcm.from_hf(hf, tmp_path / "one", tp=2, pp=2)
    assert contents(tmp_path / "out") == contents(tmp_path / "one")
    said = [(tmp_path / f"rank{rank}.log").read_text().splitlines() for rank in range(4)]
    assert [[line.split()[0] for line in lines] for lines in said] == [["copies", "wrote"], [], ["copies"], []]
    assert all(int(said[rank][0].split()[1]) > 0 for rank in (0, 2))


@pytest.mark.parametrize(("victim", "speaker"), [(0, 1), (1, 0)])
@pytest.mark.ranks
def test_a_rank_that_is_killed_fails_the_others(
    hf: Path, tmp_path: Path, victim: int, speaker: int, launch: Launch
) -> None:
    """A rank is killed while it copies: one that is left says so in one line, and nothing is published."""
    launch(2, tmp_path, "import_with_a_kill", hf=hf, out=tmp_path / "out", victim=victim)
    said, code = (tmp_path / f"rank{speaker}.log").read_text().splitlines()
    assert said.startswith(f"error: rank {speaker} of 2 lost the others: one has ended (")
    assert code == "1"
    assert not (tmp_path / "out").exists()


#: What torchrun tells the second rank of the second node.
_TOLD: Final = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "GROUP_RANK": "1", "GROUP_WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("changes", "works", "joined"),
    [
        ({}, False, None),
        ({"LOCAL_RANK": "0", "RANK": "2"}, True, (1, 2)),
        ({"LOCAL_RANK": "0", "RANK": "0", "GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1"}, True, ()),
        ({"GROUP_RANK": ""}, True, (3, 4)),
        ({"LOCAL_RANK": ""}, True, (3, 4)),
    ],
    ids=["leaves", "node", "only node", "no nodes", "no local ranks"],
)
def test_who_shares_a_conversion(
    changes: dict[str, str], works: bool, joined: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One rank a node where torchrun tells of nodes; with another launcher, all ranks."""
    for name in _TOLD:
        monkeypatch.delenv(name, raising=False)
    for name, value in (_TOLD | changes).items():
        if value:
            monkeypatch.setenv(name, value)
    assert works_here() == works
    found: list[tuple[int, ...]] = []
    monkeypatch.setattr(dist, "init_process_group", lambda _, **told: found.append((told["rank"], told["world_size"])))
    monkeypatch.setattr(dist, "get_rank", lambda: found[0][0])
    monkeypatch.setattr(dist, "get_world_size", lambda: found[0][1])
    monkeypatch.setattr("dist_ckpt_mistral.convert.ranks.leave_at_exit", lambda: None)
    if works:
        ranks = of_nodes()
        assert (ranks.rank, ranks.world_size) == (joined or (0, 1))
        assert found == ([joined] if joined else [])


@pytest.mark.ranks
def test_all_ranks_of_a_running_job_take_part(hf: Path, tmp_path: Path, launch: Launch) -> None:
    """Where a job has its process group already, all its ranks share a conversion over it, on one node too."""
    launch(2, tmp_path, "import_in_a_running_job", hf=hf, out=tmp_path / "out")
    done = dcm.from_hf(hf, tmp_path / "one", tp=2)
    assert contents(tmp_path / "out") == contents(tmp_path / "one")
    said = [(tmp_path / f"rank{rank}.log").read_text().splitlines()[-1] for rank in (0, 1)]
    assert said == [str([done.num_bytes] * 2)] * 2


@pytest.mark.ranks
def test_ranks_leave_before_python_ends(tmp_path: Path) -> None:
    """The process group that a rank joined is ended at exit, before the interpreter shuts down."""
    code = """
import atexit, torch.distributed as dist
atexit.register(lambda: print("joined" if dist.is_initialized() else "left"))  # handlers run last in, first out
from dist_ckpt_mistral.convert.ranks import from_environment
print(from_environment().exchange(dist.get_rank()))
"""
    run_ranks([[sys.executable, "-c", code]] * 2, tmp_path, timeout_s=120)
    assert [(tmp_path / f"rank{rank}.log").read_text().splitlines()[-2:] for rank in (0, 1)] == [["[0, 1]", "left"]] * 2


@pytest.mark.ranks
def test_torchrun(hf: Path, tmp_path: Path) -> None:
    """``torchrun -m dist_ckpt_mistral``: the first rank works without torch, prints and publishes; the other leaves."""
    dcm.from_hf(hf, tmp_path / "checkpoint", tp=2)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command = ["-m", "dist_ckpt_mistral", "to-hf", "-q", str(tmp_path / "checkpoint"), str(tmp_path / "out")]

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
    assert sorted("numpy" in names for names in imported) == [False, True]
    again = launch()
    assert again.returncode != 0
    assert again.stderr.count("error: ") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "logs", "out"]
