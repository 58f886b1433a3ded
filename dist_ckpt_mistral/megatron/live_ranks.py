"""The ranks of a live model: they meet before every exchange, so that a rank that stays away is named and none hangs.

They meet at the key-value store of torch's process group, which works beside every backend. NCCL would end the process
of a rank that waits too long, and gloo would not say for whom it waits.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Final

import torch.distributed as dist
from torch.distributed import distributed_c10d

from dist_ckpt_mistral.convert.ranks import ALONE, Ranks
from dist_ckpt_mistral.errors import LostRankError
from dist_ckpt_mistral.messages import listed

#: Every rank counts the same calls, so that the keys of two calls differ.
_CALLS: Final = itertools.count()
_PURPOSE: Final = "purpose"
_ARRIVED: Final = "arrived"
_GO_ON: Final = "go on"
_GIVEN_UP: Final = "given up"


@dataclass(slots=True)
class LiveRanks:
    """All ranks of torch's process group, for one collective call; this process alone if there is none.

    A rank waits for the slowest at most ``timeout``.
    """

    timeout: timedelta
    rank: int = field(init=False, default=0)
    world_size: int = field(init=False, default=1)
    _call: int = field(init=False, default_factory=_CALLS.__next__)
    _meetings: Iterator[int] = field(init=False, default_factory=itertools.count)
    _last: Any = field(init=False, default=None)  # a store

    def __post_init__(self) -> None:
        """Find this rank."""
        if dist.is_initialized():
            self.rank, self.world_size = dist.get_rank(), dist.get_world_size()

    @property
    def ranks(self) -> Ranks:
        """The same ranks for code that knows no process group."""
        if self.world_size == 1:
            return ALONE
        return Ranks(rank=self.rank, world_size=self.world_size, exchange=self._exchange)

    def _exchange(self, value: Any) -> list[Any]:  # noqa: ANN401  (whatever the ranks have to say)
        values: list[Any] = [None] * self.world_size
        self.meet("exchange")
        with self.exchanging():
            dist.all_gather_object(values, value)
        return values

    def meet(self, purpose: str) -> None:
        """Wait until all ranks are here. Raises LostRankError, which names the absent ones.

        A rank that fails may be on its way to the next exchange while the others are at this one: then all raise.
        """
        if self.world_size == 1:
            return
        store = self._next_store()
        with self.exchanging():
            store.set(str(self.rank), "")
            if (common := store.compare_set(_PURPOSE, "", purpose).decode()) != purpose:
                self._give_up(store, f"rank {self.rank} is at {purpose!r}, another at {common!r}")
            if store.add(_ARRIVED, 1) == self.world_size:
                store.set(_GO_ON, "")
            try:
                store.wait([_GO_ON], self.timeout)
            except dist.DistError:
                absent = [str(rank) for rank in range(self.world_size) if not store.check([str(rank)])]
                if absent:
                    which = f"rank{'s' if len(absent) > 1 else ''} {listed(absent)}"
                    self._give_up(store, f"{which} did not come within {self.timeout}")
            given_up = store.get(_GIVEN_UP).decode() if store.check([_GIVEN_UP]) else None
            if given_up is None and self._last is not None:  # all have left the last meeting
                for key in (str(self.rank), *((_PURPOSE, _ARRIVED, _GO_ON) if self.rank == 0 else ())):
                    self._last.delete_key(key)
        if given_up is not None:
            raise self._lost(given_up)
        self._last = store

    def leave(self) -> None:
        """Stay away from the next meeting, and let the others know at once."""
        if self.world_size > 1:
            with contextlib.suppress(RuntimeError):  # then the others find out by themselves
                self._give_up(self._next_store(), f"rank {self.rank} has stopped before the last tensor")

    def _next_store(self) -> Any:  # noqa: ANN401  (a store)
        """A store of its own for the next meeting. torch has no public way to the store of the process group."""
        name = f"dist_ckpt_mistral/{self._call}/{next(self._meetings)}"
        return dist.PrefixStore(name, distributed_c10d._get_default_store())  # type: ignore[attr-defined]  # noqa: SLF001

    @staticmethod
    def _give_up(store: Any, why: str) -> None:  # noqa: ANN401
        store.set(_GIVEN_UP, why)
        store.set(_GO_ON, "")

    @contextlib.contextmanager
    def exchanging(self) -> Iterator[None]:
        """Within the block an error of torch's process group becomes a LostRankError."""
        try:
            yield
        except RuntimeError as error:
            reason = str(error).partition("\n")[0].partition(". ")[0]
            raise self._lost(f"one has ended ({reason})") from error

    def _lost(self, why: str) -> LostRankError:
        return LostRankError(
            f"rank {self.rank} of {self.world_size} lost the others: {why}. What that rank printed, or torchrun, says "
            "why. All ranks must make the same call and take all tensors."
        )
