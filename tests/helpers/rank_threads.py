"""Ranks of a job as threads of this process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import dist_ckpt_mistral as dcm
from dist_ckpt_mistral.convert.ranks import Ranks


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
