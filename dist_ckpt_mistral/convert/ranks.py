"""The processes that share one job: this one alone, or the ranks that ``torchrun`` started."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Final, TypeVar

from dist_ckpt_mistral import libraries
from dist_ckpt_mistral.arguments import require_whole
from dist_ckpt_mistral.errors import DistCkptMistralError, LayoutError, LostRankError

T = TypeVar("T")

#: A rank waits this long for the slowest: copying a share of a large checkpoint takes as long as it takes.
PATIENCE: Final = timedelta(hours=24)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """This process among the processes of a job.

    Args:
        rank: Number of this process, from 0.
        world_size: Number of processes.
        kind: Name of a process in errors: "rank", or "node" if one rank works for its node.
        exchange: Collective call that gives each process the values of all, in the order of ranks.
    """

    rank: int = 0
    world_size: int = 1
    kind: str = "rank"
    exchange: Callable[[Any], list[Any]] = field(default=lambda value: [value], repr=False)

    def __post_init__(self) -> None:
        """Refuse a rank outside of its job: without a first one nobody would write the output."""
        require_whole("world_size", self.world_size, least=1, meaning="processes")
        require_whole("rank", self.rank, least=0, most=self.world_size - 1, meaning="below world_size")

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that creates, publishes and reports."""
        return self.rank == 0

    def together(self, work: Callable[[], T]) -> list[T]:
        """Run ``work`` on every rank and give every rank all results, in rank order.

        A failure on any rank fails all: the rank's own error where it happened, a DistCkptMistralError that names rank
        and reason on the others; a LostRankError if one of them is gone.
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
                raise DistCkptMistralError(f"{self.kind} {rank} of {self.world_size}: {reason}")
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
    """All ranks that the environment announces (RANK, WORLD_SIZE, MASTER_ADDR ...), else this process alone.

    They exchange over torch's process group: the one that is there, else one over gloo that is made here.
    """
    size = world_size()
    if size == 1 or "RANK" not in os.environ:
        return Ranks()
    return _in_process_group(_number("RANK", least=0), size, kind="rank")


def of_nodes() -> Ranks:
    """The ranks that share a conversion: under torchrun the first of every node (see ``works_here``), else all.

    On one node that is this process alone, which needs no torch. Only a rank that ``works_here`` may call it.
    """
    if not _knows_nodes():
        return from_environment()
    nodes = _number("GROUP_WORLD_SIZE", least=1)
    return Ranks() if nodes == 1 else _in_process_group(_number("GROUP_RANK", least=0), nodes, kind="node")


def works_here() -> bool:
    """Whether this rank takes part in a conversion. Under torchrun only the first rank of every node does.

    On two cores several ranks were no faster than the threads of one, which the interpreter lock limits to some 10 GB/s
    (tools/bench/README.md). torchrun takes the others' early exit with code 0 as success and waits for the first. Other
    launchers may not wait (srun with --wait ends the rest), so with them every rank works.
    """
    return not _knows_nodes() or os.environ["LOCAL_RANK"] == "0"


def _knows_nodes() -> bool:
    return all(name in os.environ for name in ("LOCAL_RANK", "GROUP_RANK", "GROUP_WORLD_SIZE"))  # torchrun's alone


def world_size() -> int:
    """How many ranks the environment announces: 1 without torchrun. Raises LayoutError if that is no such number."""
    return _number("WORLD_SIZE", least=1) if "WORLD_SIZE" in os.environ else 1


def _number(name: str, *, least: int) -> int:
    text = os.environ[name]
    if not (text.isdecimal() and int(text) >= least):
        wanted = f"expected a whole number of at least {least}, as torchrun sets it"
        raise LayoutError(f"the environment variable {name}: {wanted}, got {text!r}. Unset it, or start with torchrun.")
    return int(text)


def _in_process_group(rank: int, world_size: int, *, kind: str) -> Ranks:
    """The ranks of torch's process group. If there is none yet, this process joins it as ``rank`` of ``world_size``."""
    with libraries.needed("a job of several ranks", "torch", extra="megatron"):
        import torch.distributed as dist  # noqa: PLC0415  (one process needs no torch)

    if not dist.is_initialized():
        dist.init_process_group("gloo", rank=rank, world_size=world_size, timeout=PATIENCE)
        leave_at_exit()
    own, count = dist.get_rank(), dist.get_world_size()

    def exchange(value: Any) -> list[Any]:  # noqa: ANN401  (whatever the ranks have to say)
        values: list[Any] = [None] * count
        try:
            dist.all_gather_object(values, value)
        except RuntimeError as error:  # gloo's, of a connection that was closed
            reason = str(error).partition("\n")[0].partition(". ")[0]
            said = f"one has ended ({reason}). What it printed, or torchrun, says why."
            raise LostRankError(f"{kind} {own} of {count} lost the others: {said}") from error
        return values

    return Ranks(rank=own, world_size=count, kind=kind, exchange=exchange)
