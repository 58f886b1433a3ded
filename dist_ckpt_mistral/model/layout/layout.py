"""``ParallelLayout``: the ranks of a layout and their coordinates. ``local_tensors`` says which tensors they hold.

It is not under ``megatron/``, because an import cuts its chunks without Megatron.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, Final

from dist_ckpt_mistral.errors import LayoutError
from dist_ckpt_mistral.model.config.mistral_config import MistralConfig
from dist_ckpt_mistral.model.config.parts import is_positive_int
from dist_ckpt_mistral.model.layout.pipeline import PipelineLayout, parse_pipeline_layout

#: Megatron-LM's ``--make-vocab-size-divisible-by``.
VOCABULARY_MULTIPLE: Final = 128
#: More than any machine has: what lists all ranks must come to an end.
_MAX_RANKS: Final = 1 << 20
_TOO_MANY: Final = f"a layout may have {_MAX_RANKS} ranks at most"
#: Megatron's default; ``--use-tp-pp-dp-mapping`` is tp-cp-ep-pp-dp.
DEFAULT_ORDER: Final = "tp-cp-ep-dp-pp"
_AXES: Final = tuple(DEFAULT_ORDER.split("-"))


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelLayout(PipelineLayout):
    """A parallel layout of ranks. ``PipelineLayout`` tells of ``pp``, ``vpp`` and uneven stages.

    ``tp`` is tensor, ``cp`` context, ``dp`` data, ``ep`` expert and ``etp`` expert-tensor parallelism (None: ``tp``).
    Ranks that differ in ``cp`` hold the same weights, as do those that differ in ``dp``. Experts use the same ranks:
    ``ep`` and ``etp`` do not add any, and what they leave is expert-data parallelism. ``dp`` is by default the smallest
    that experts allow, 1 without them. ``order`` is Megatron's rank order, from the axis that counts fastest.

    Raises LayoutError with all the reasons for which no model could be laid out like this.
    """

    tp: int = 1
    cp: int = 1
    dp: int = None  # type: ignore[assignment]  # always an int: __post_init__ replaces None
    ep: int = 1
    etp: int | None = None
    order: str = DEFAULT_ORDER

    def __post_init__(self) -> None:
        """Refuse what no model could be laid out with; fill in what follows from the other fields."""
        counts = {name: getattr(self, name) for name in ("tp", "pp", "cp", "dp", "ep", "etp")}
        problems = [
            f"{name}: {_TOO_MANY}, got {n}" if isinstance(n, int) and n > 1 else f"{name} must be at least 1, got {n!r}"
            for name, n in counts.items()
            if n is not None and not is_positive_int(n)
        ]
        if is_positive_int(self.pp):
            problems += self.contradictions()
        if not problems:
            object.__setattr__(self, "vpp", self._chunks_per_stage())
            expert_ranks = (self.etp or self.tp) * self.ep
            fewest_dp = expert_ranks // math.gcd(expert_ranks, self.tp * self.cp)
            object.__setattr__(self, "dp", fewest_dp if counts["dp"] is None else self.dp)
            problems += self._rank_problems(fewest_dp)
        if problems:
            raise LayoutError("; ".join(problems))

    def __repr__(self) -> str:
        """Only what is not the default."""
        defaults = {"dp": 1}
        given = [
            f"{field.name}={value!r}"
            for field in sorted(fields(self), key=lambda field: field.name != "tp")
            if (value := getattr(self, field.name)) != defaults.get(field.name, field.default)
        ]
        return f"ParallelLayout({', '.join(given)})"

    def _chunks_per_stage(self) -> int | None:
        """``vpp`` as Megatron sees it: a layout string sets it, and one chunk per stage is no interleaving."""
        chunks = self.vpp or 1
        if self.pipeline_model_parallel_layout is not None:
            chunks = len(parse_pipeline_layout(self.pipeline_model_parallel_layout)) // self.pp
        return chunks if chunks > 1 else None

    def _rank_problems(self, fewest_dp: int) -> list[str]:
        if self.world_size > _MAX_RANKS:
            return [f"{_TOO_MANY}, got {self.world_size}"]
        expert_ranks = (self.etp or self.tp) * self.ep * self.pp
        if self.world_size % expert_ranks:
            sizes = f"{self.world_size} ranks (tp x cp x dp x pp), {expert_ranks} for an expert (etp x ep x pp)"
            return [f"{sizes}: dp must be a multiple of {fewest_dp}, got {self.dp}"]
        return list(self._grid.problems())

    @property
    def _grid(self) -> RankGrid:
        etp = self.etp or self.tp
        return RankGrid(
            order=self.order,
            dense={"tp": self.tp, "cp": self.cp, "ep": 1, "dp": self.dp, "pp": self.pp},
            expert={"tp": etp, "cp": 1, "ep": self.ep, "dp": self.expert_dp, "pp": self.pp},
        )

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.tp * self.cp * self.dp * self.pp

    @property
    def expert_dp(self) -> int:
        """Number of ranks that hold the same part of an expert."""
        return self.world_size // ((self.etp or self.tp) * self.ep * self.pp)

    def transformer_config_fields(self) -> dict[str, Any]:
        """The keyword arguments of Megatron's ``TransformerConfig`` that describe this layout; only what is set.

        ``dp`` and ``order`` are not the model's but those of ``parallel_state.initialize_model_parallel``.
        """
        return {
            "tensor_model_parallel_size": self.tp,
            "context_parallel_size": self.cp,
            "expert_model_parallel_size": self.ep,
            **({} if self.etp is None else {"expert_tensor_parallel_size": self.etp}),
            **self.pipeline_fields(),
        }

    @property
    def text(self) -> str:
        """``tp=4, pp=2``: what is not the default; empty for one rank."""
        return str(self).removeprefix("ParallelLayout(").removesuffix(")")

    def check(self, config: MistralConfig) -> None:
        """Raise LayoutError with Megatron's reasons if it would refuse this layout for this model."""
        problems = [
            f"{name}={size} is not divisible by {axis}={ways}"
            for name, size, axis, ways in self._divisions(config)
            if size % ways
        ]
        if config.latent_attention is None:
            problems += self._group_problems(config)
        problems += self.misfits(config.num_hidden_layers)
        if self.ep > 1 and config.experts is None:
            problems.append(f"ep={self.ep} needs experts, and a dense model has none")
        if problems:
            raise LayoutError(
                f"Megatron cannot lay out this model with {self.text or 'one rank'}: " + "; ".join(problems)
            )

    def _divisions(self, config: MistralConfig) -> Iterator[tuple[str, int, str, int]]:
        """(size, its value, axis, number of equal parts) of everything that ranks share evenly."""
        experts, latent = config.experts, config.latent_attention
        yield "num_attention_heads", config.num_attention_heads, "tp", self.tp
        if experts is None:
            yield "intermediate_size", config.intermediate_size, "tp", self.tp
        else:
            yield "num_experts", experts.num_experts, "ep", self.ep
            yield "the experts' intermediate_size", experts.intermediate_size, "etp", self.etp or self.tp
            yield "the shared experts' intermediate_size", experts.shared_intermediate_size, "tp", self.tp
        if latent is not None:
            yield "q_lora_rank", latent.q_lora_rank or 0, "tp", self.tp
            yield "kv_lora_rank + qk_rope_head_dim", latent.kv_lora_rank + latent.qk_rope_head_dim, "tp", self.tp

    def _group_problems(self, config: MistralConfig) -> Iterator[str]:
        groups = config.num_key_value_heads
        if groups % self.tp and self.tp % groups:
            yield f"num_key_value_heads (num_query_groups)={groups} is not divisible by tp={self.tp}, nor tp by it"
        elif (rows := (config.num_attention_heads + 2 * groups) * config.head_dim) % self.tp:
            yield f"the {rows} rows of query, key and value are not divisible by tp={self.tp}"

    def coordinates(self, rank: int) -> RankCoordinates:
        """Where ``rank`` stands, counted in ``order``."""
        if not 0 <= rank < self.world_size:
            raise LayoutError(f"rank {rank} is outside a layout of {self.world_size} ranks")
        return self._grid.coordinates(rank)

    def peers(self, rank: int, axis: str) -> list[int]:
        """The ranks that differ from ``rank`` on one axis alone, itself among them: Megatron's group of that name.

        ``axis`` is tp, cp, dp or pp; or ep or etp, on the grid of the experts.
        """
        axes = ("etp", "ep", "edp", "pp") if axis in ("ep", "etp") else ("tp", "cp", "dp", "pp")
        others = operator.attrgetter(*(each for each in axes if each != axis))
        own = others(self.coordinates(rank))
        return [each for each in range(self.world_size) if others(self.coordinates(each)) == own]


def padded_vocab_size(vocab_size: int, tp: int) -> int:
    """Megatron-LM's padded vocabulary: the next multiple of 128 x tp (``--make-vocab-size-divisible-by`` 128)."""
    multiple = VOCABULARY_MULTIPLE * tp
    return -(-vocab_size // multiple) * multiple


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
