"""The processes that share one job: this one alone, or the ranks that ``torchrun`` started."""

from __future__ import annotations

import atexit
import functools
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Final, TypeVar

from dist_ckpt_mistral.errors import DistCkptMistralError, LayoutError

T = TypeVar("T")

#: A rank waits this long for the slowest: copying a share of a large checkpoint takes as long as it takes.
PATIENCE: Final = timedelta(hours=24)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """This process among the processes of a job. ``exchange`` gives every rank the values of all, in rank order."""

    rank: int = 0
    world_size: int = 1
    exchange: Callable[[Any], list[Any]] = field(default=lambda value: [value], repr=False)

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that creates, publishes and reports."""
        return self.rank == 0

    def together(self, work: Callable[[], T]) -> list[T]:
        """Run ``work`` on every rank and give every rank all results, in rank order.

        A failure on any rank fails all: the rank's own error where it happened, a DistCkptMistralError that names rank
        and reason on the others.
        """
        own: Exception | None = None
        outcome: tuple[Any, str | None]
        try:
            outcome = (work(), None)
        except Exception as error:  # noqa: BLE001  (whatever it is, the others are waiting to hear of it)
            own, outcome = error, (None, str(error) or repr(error))
        outcomes = self.exchange(outcome)
        if own is not None:
            raise own
        for rank, (_, reason) in enumerate(outcomes):
            if reason is not None:
                raise DistCkptMistralError(f"rank {rank} of {self.world_size}: {reason}")
        return [result for result, _ in outcomes]

    def each(self, work: Callable[[], T]) -> T:
        """Run ``work`` on every rank and give each its own result; a failure on any rank fails all."""
        results: list[T] = []
        self.together(lambda: results.append(work()))
        return results[0]

    def on_first(self, work: Callable[[], T]) -> T:
        """Run ``work`` on the first rank alone and give all ranks its result, or its failure."""
        result: T = self.together(lambda: work() if self.is_first else None)[0]  # type: ignore[assignment]  # of rank 0
        return result


#: A job of this process only.
ALONE: Final = Ranks()


def leave_at_exit() -> None:
    """End the process group that was joined before Python itself ends: torch's threads may abort the process else.

    Seen with torch 2.14: "terminate called without an active exception", after all work was done.
    """
    import torch.distributed as dist  # noqa: PLC0415  (one process needs no torch)

    def leave() -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    atexit.register(leave)


def from_environment() -> Ranks:
    """The ranks that ``torchrun`` announces in the environment (RANK, WORLD_SIZE, MASTER_ADDR ...), else this process.

    Where torch's process group is there already, or some ranks are on other machines, they exchange over that group
    (gloo, if it is made here). Ranks of one machine need no torch, which takes seconds to import.
    """
    size = world_size()
    if size == 1 or "RANK" not in os.environ:
        return Ranks()
    one_machine = os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"] and "MASTER_PORT" in os.environ
    if one_machine and not _has_process_group():
        return _on_one_machine(_number("RANK", least=0), size)
    return _in_process_group()


def world_size() -> int:
    """How many ranks the environment announces: 1 without torchrun. Raises LayoutError if that is no such number."""
    return _number("WORLD_SIZE", least=1) if "WORLD_SIZE" in os.environ else 1


def _number(name: str, *, least: int) -> int:
    text = os.environ[name]
    if not (text.isdecimal() and int(text) >= least):
        wanted = f"expected a whole number of at least {least}, as torchrun sets it"
        raise LayoutError(f"the environment variable {name}: {wanted}, got {text!r}. Unset it, or start with torchrun.")
    return int(text)


def _has_process_group() -> bool:
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and bool(distributed.is_initialized())


@functools.cache
def _on_one_machine(rank: int, world_size: int) -> Ranks:
    """The ranks of this machine, which meet once and then stay connected."""
    from dist_ckpt_mistral.convert import local_ranks  # noqa: PLC0415  (one process needs no sockets)

    return Ranks(rank=rank, world_size=world_size, exchange=local_ranks.join(rank, world_size))


def _in_process_group() -> Ranks:
    """The ranks of torch's process group."""
    import torch.distributed as dist  # noqa: PLC0415  (one process needs no torch)

    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=PATIENCE)
        leave_at_exit()
    world_size = dist.get_world_size()

    def exchange(value: Any) -> list[Any]:  # noqa: ANN401  (whatever the ranks have to say)
        values: list[Any] = [None] * world_size
        try:
            dist.all_gather_object(values, value)
        except RuntimeError as error:  # gloo's, of a connection that was closed
            reason = str(error).partition("\n")[0]
            raise DistCkptMistralError(
                f"rank {dist.get_rank()} lost the other ranks: one has ended ({reason})."
            ) from error
        return values

    return Ranks(rank=dist.get_rank(), world_size=world_size, exchange=exchange)
