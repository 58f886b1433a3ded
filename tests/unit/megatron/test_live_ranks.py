"""Ranks that meet before they exchange, in processes of their own: what is said of one that dies."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

pytestmark = [pytest.mark.megatron, pytest.mark.ranks, pytest.mark.slow]

#: Rank and the one that dies, after a first exchange; the process group meets at a store of rank 0.
_PROGRAM: Final = """
import os, sys
from datetime import timedelta
import torch.distributed as dist
from dist_ckpt_mistral.errors import LostRankError
from dist_ckpt_mistral.megatron.live_ranks import LiveRanks

rank, dying, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
port = os.path.join(folder, "port")
if rank == 0:
    store = dist.TCPStore("localhost", 0, 2, is_master=True, wait_for_workers=False)
    with open(port + ".new", "w") as file:
        file.write(str(store.port))
    os.rename(port + ".new", port)
else:
    while not os.path.exists(port):
        pass
    store = dist.TCPStore("localhost", int(open(port).read()), 2, is_master=False)
dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
ranks = LiveRanks(timedelta(seconds=5))
print(ranks.ranks.exchange(rank), flush=True)
if rank == dying:
    os._exit(0)
try:
    ranks.ranks.exchange(rank)
except LostRankError as error:
    print(error, flush=True)
os._exit(0)
"""


@pytest.mark.parametrize(
    ("dying", "told"),
    [(1, "rank 0 of 2 lost the others: rank 1 did not come within 0:00:05"), (0, "rank 1 of 2 lost the others: ")],
)
def test_a_rank_that_dies_ends_the_other(dying: int, told: str, tmp_path: Path) -> None:
    """The other names it when the time is over; where the dead one kept the store, it knows at once."""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", _PROGRAM, str(rank), str(dying), str(tmp_path)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0].splitlines() for process in ranks]
    assert [lines[0] for lines in outputs] == ["[0, 1]"] * 2
    assert outputs[1 - dying][1].startswith(told)
