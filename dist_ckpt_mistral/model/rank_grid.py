"""How ranks count: Megatron's rank order, on the grid of the dense layers and on that of the experts.

Upstream, the same in megatron-core 0.16 and 0.19: parallel_state.py (``RankGenerator``, ``initialize_model_parallel``).
Both grids have all ranks and the same pipeline stages. The dense one is tp x cp x dp x pp; on the expert one tensor
parallelism is etp, there is no cp, and data parallelism is what remains.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

#: Megatron's default; ``--use-tp-pp-dp-mapping`` is tp-cp-ep-pp-dp.
DEFAULT_ORDER: Final = "tp-cp-ep-dp-pp"
_AXES: Final = tuple(DEFAULT_ORDER.split("-"))


@dataclass(frozen=True, slots=True, kw_only=True)
class RankCoordinates:
    """Where a rank stands: its index on every axis, of the dense grid and of the expert grid.

    ``dp_cp`` is the rank among all copies of the same dense weights: Megatron's data-parallel rank with context
    parallelism. ``etp``, ``ep`` and ``edp`` are expert-tensor, expert and expert-data parallelism.
    """

    tp: int
    cp: int
    dp: int
    pp: int
    dp_cp: int
    etp: int
    ep: int
    edp: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RankGrid:
    """The sizes of all axes: ``dense`` and ``expert`` have the keys tp, cp, ep, dp and pp.

    ``order`` names the axes from the one that counts fastest; axes of size 1 may be left out, except tp: its name is
    part of another axis's in 0.19, which then takes it for given.
    """

    order: str
    dense: Mapping[str, int]
    expert: Mapping[str, int]

    def coordinates(self, rank: int) -> RankCoordinates:
        """Where ``rank`` stands."""
        dense, expert = self._indices(rank, self.dense), self._indices(rank, self.expert)
        dp_cp = 0
        for axis in reversed([axis for axis in self.order.split("-") if axis in ("dp", "cp")]):
            dp_cp = dp_cp * self.dense[axis] + dense[axis]
        own = {axis: dense[axis] for axis in ("tp", "cp", "dp", "pp")}
        return RankCoordinates(**own, dp_cp=dp_cp, etp=expert["tp"], ep=expert["ep"], edp=expert["dp"])

    def _indices(self, rank: int, sizes: Mapping[str, int]) -> dict[str, int]:
        indices = dict.fromkeys(_AXES, 0)
        for axis in self.order.split("-"):
            rank, indices[axis] = divmod(rank, sizes[axis])
        return indices

    def problems(self) -> Iterator[str]:
        """Why Megatron would refuse to count like this."""
        named = self.order.split("-")
        if len(set(named)) != len(named) or not set(named) <= set(_AXES):
            yield f"order must name each of {', '.join(_AXES)} once with - between them, got {self.order!r}"
            return
        needed = [axis for axis in _AXES if axis == "tp" or max(self.dense[axis], self.expert[axis]) > 1]
        if not set(needed) <= set(named):
            yield f"order must name {', '.join(needed)}, got {self.order!r}"
            return
        if self.dense["pp"] == 1:
            return
        strides = [self._stride(sizes) for sizes in (self.dense, self.expert)]
        same_dp = named[-1] == "pp" or self.dense["dp"] == self.expert["dp"]
        if not same_dp or strides[0] != strides[1]:
            yield (
                f"order={self.order!r} would give dense layers and experts other pipeline stages or, without pp last, "
                f"other data parallelism: {dict(self.dense)} against {dict(self.expert)}"
            )

    def _stride(self, sizes: Mapping[str, int]) -> int:
        """The distance between ranks of neighbouring pipeline stages."""
        faster = self.order.split("-")
        return math.prod(sizes[axis] for axis in faster[: faster.index("pp")])
