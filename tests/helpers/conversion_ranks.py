"""The program of ranks that share a conversion, forked from one process that has imported torch.

A job is ``{"task": name of a function here, **arguments}``, in FOLDER/job.json; what a rank says is in rankN.log.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final
from unittest import mock

import torch.distributed as dist
from forked_ranks import serve

import dist_ckpt_mistral as dcm
from dist_ckpt_mistral.cli.main import main
from dist_ckpt_mistral.convert import output as writing
from dist_ckpt_mistral.convert.ranks import from_environment
from dist_ckpt_mistral.gather.execute import execute


def import_on_two_nodes(hf: str, out: str) -> None:
    """``from-hf`` on two ranks each of two nodes; ranks that copy say how many copies they make."""
    rank = int(os.environ["RANK"])
    os.environ |= {"LOCAL_RANK": str(rank % 2), "GROUP_RANK": str(rank // 2), "GROUP_WORLD_SIZE": "2"}

    def shared(*plan: Any, numbers: Any, **options: Any) -> Any:  # noqa: ANN401  (of any call)
        print("copies", len(numbers))  # noqa: T201  (into the log)
        return execute(*plan, numbers=numbers, **options)

    with mock.patch.object(writing, "execute", shared):
        code = main(["from-hf", hf, out, "--tp", "2", "--pp", "2", "-q"])
    assert code == 0


def import_with_a_kill(hf: str, out: str, victim: int) -> None:
    """``from-hf`` on all ranks, one of which is killed as it begins to copy; another prints the exit code."""
    if process := os.fork():  # the kill of a rank itself would end the job
        os.waitpid(process, 0)
        return

    def copying(*plan: Any, **options: Any) -> Any:  # noqa: ANN401  (of any call)
        if int(os.environ["RANK"]) == victim:
            os.kill(os.getpid(), signal.SIGKILL)
        return execute(*plan, **options)

    with mock.patch.object(writing, "execute", copying):
        print(main(["from-hf", hf, out]))  # noqa: T201  (into the log)


def import_in_a_running_job(hf: str, out: str) -> None:
    """An import over the process group that a job on one node has already, whose size all ranks then tell."""
    os.environ |= {"GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1"}
    dist.init_process_group("gloo")
    group, ranks = id(dist.group.WORLD), from_environment()
    done = dcm.from_hf(hf, out, tp=2, ranks=ranks)
    assert (ranks.world_size, id(dist.group.WORLD)) == (2, group), ranks
    print(ranks.exchange(done.num_bytes))  # noqa: T201  (into the log)
    dist.destroy_process_group()


_TASKS: Final[dict[str, Callable[..., None]]] = {
    task.__name__: task for task in (import_on_two_nodes, import_with_a_kill, import_in_a_running_job)
}


def work(folder: Path) -> None:
    """Be a rank."""
    log = os.open(folder / f"rank{os.environ['RANK']}.log", os.O_WRONLY | os.O_CREAT, 0o644)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(log, stream.fileno())
    job = json.loads((folder / "job.json").read_bytes())
    _TASKS[job.pop("task")](**job)


if __name__ == "__main__":
    serve(work)
