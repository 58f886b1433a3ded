"""``ParallelLayout``: the ranks of a layout and their coordinates. ``local_tensors`` says which tensors they hold.

It imports no Megatron: an import cuts its chunks where Megatron is not installed.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, Final

from dist_ckpt_mistral.arguments import wrong_types
from dist_ckpt_mistral.errors import LayoutError
from dist_ckpt_mistral.model.config.mistral_config import MistralConfig
from dist_ckpt_mistral.model.config.parts import is_positive_int
from dist_ckpt_mistral.model.layout.pipeline import PipelineLayout, parse_pipeline_layout

#: Most ranks of a layout, more than any machine has, so that a list of all ranks fits in memory.
_MAX_RANKS: Final = 1 << 20
_TOO_MANY: Final = f"a layout may have {_MAX_RANKS} ranks at most"
_NO_COUNT: Final = "must be a whole number of at least 1"
#: Megatron's default rank order; ``--use-tp-pp-dp-mapping`` is tp-cp-ep-pp-dp.
DEFAULT_ORDER: Final = "tp-cp-ep-dp-pp"
_AXES: Final = tuple(DEFAULT_ORDER.split("-"))
#: Fields whose command-line option is Megatron-LM's, of another name.
_MEGATRON_OPTIONS: Final = {
    "num_layers_in_first_pipeline_stage": "decoder-first-pipeline-num-layers",
    "num_layers_in_last_pipeline_stage": "decoder-last-pipeline-num-layers",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelLayout(PipelineLayout):
    """A parallel layout of ``tp * cp * dp * pp`` ranks, with Megatron's names.

    Experts use the same ranks: ``ep`` and ``etp`` add none, and the remaining factor is expert-data parallelism. Ranks
    that differ only in ``cp`` or ``dp`` hold the same dense weights. Every pipeline stage has the same number of layers
    unless one of these gives other numbers: ``pp_layers``, the two ``num_layers_in_*``, the two ``account_for_*``, or
    ``pipeline_model_parallel_layout``.

    Args:
        pp: Pipeline parallelism: stages that share the layers.
        vpp: Model chunks per stage in the interleaved schedule; None for one. A layout string sets it.
        pp_layers: Number of layers of each stage.
        num_layers_in_first_pipeline_stage: Number of layers of the first stage; the other stages share the rest.
        num_layers_in_last_pipeline_stage: Number of layers of the last stage; the other stages share the rest.
        account_for_embedding_in_pipeline_split: Whether the embedding counts as a layer of the first stage.
        account_for_loss_in_pipeline_split: Whether the loss counts as a layer of the last stage.
        pipeline_model_parallel_layout: Megatron's layout string, such as ``Et*3|(tt|)*2tL``: embedding, layers, loss,
            and ``|`` between stages.
        tp: Tensor parallelism: ranks that share each dense weight.
        cp: Context parallelism: ranks that share the tokens of a sequence.
        dp: Data parallelism: ranks with the same weights and other data. The default is the least that experts allow.
        ep: Expert parallelism: ranks that share the experts of a layer.
        etp: Expert-tensor parallelism: ranks that share each expert weight; None for ``tp``.
        order: Megatron's rank order: the axes, fastest first.

    Raises:
        LayoutError: The layout fits no model. The message lists all reasons.

    Example:
        >>> layout = ParallelLayout(tp=4, pp=2, dp=2)
        >>> layout.world_size
        16
        >>> layout.coordinates(5).dp
        1
    """

    tp: int = 1
    cp: int = 1
    dp: int = None  # type: ignore[assignment]  # always an int: __post_init__ replaces None
    ep: int = 1
    etp: int | None = None
    order: str = DEFAULT_ORDER

    def __post_init__(self) -> None:
        """Refuse a layout that fits no model; set ``vpp`` and ``dp`` if they follow from the other fields."""
        pp_layers: object = self.pp_layers
        if isinstance(pp_layers, list):
            object.__setattr__(self, "pp_layers", tuple(pp_layers))
        counts = {name: getattr(self, name) for name in ("tp", "pp", "cp", "dp", "ep", "etp")}
        problems = [
            f"{name}: {_TOO_MANY}, got {n}" if isinstance(n, int) and n > 1 else f"{name} {_NO_COUNT}, got {n!r}"
            for name, n in counts.items()
            if not (is_positive_int(n) or (n is None and name in {"dp", "etp"}))
        ]
        others = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in counts}
        problems += wrong_types(ParallelLayout, others)
        if not problems:
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
        """The fields that are not the default."""
        return f"ParallelLayout({', '.join(f'{name}={value!r}' for name, value in self._set_fields())})"

    def _set_fields(self) -> Iterator[tuple[str, Any]]:
        """Yield (name, value) of the fields that are not the default."""
        defaults = {"dp": 1}
        for field in sorted(fields(self), key=lambda field: field.name != "tp"):
            value = getattr(self, field.name)
            if value != defaults.get(field.name, field.default):
                yield field.name, value

    def _chunks_per_stage(self) -> int | None:
        """``vpp`` as Megatron sees it: a layout string sets it, and one chunk per stage is no interleaving."""
        chunks = self.vpp or 1
        if self.pipeline_model_parallel_layout is not None:
            chunks = len(parse_pipeline_layout(self.pipeline_model_parallel_layout)) // self.pp
        return chunks if chunks > 1 else None

    def _rank_problems(self, fewest_dp: int) -> list[str]:
        """Why the number or order of ranks is impossible; ``fewest_dp`` is the least ``dp`` that experts allow."""
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
        """The keyword arguments of Megatron's ``TransformerConfig`` for this layout, without those that are not set.

        ``dp`` and ``order`` are arguments of ``parallel_state.initialize_model_parallel`` instead.
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
        """The fields that are not the default, such as ``tp=4, pp=2``; empty for one rank."""
        return str(self).removeprefix("ParallelLayout(").removesuffix(")")

    @property
    def options(self) -> tuple[str, ...]:
        """The words that give this layout on the command line, such as ``("--tp", "4", "--pp", "2")``."""
        words: list[str] = []
        for name, value in self._set_fields():
            words.append(f"--{_MEGATRON_OPTIONS.get(name, name.replace('_', '-'))}")
            if value is not True:
                words.append(",".join(map(str, value)) if isinstance(value, tuple) else str(value))
        return tuple(words)

    def check(self, config: MistralConfig) -> None:
        """Check that Megatron accepts this layout for a model.

        Args:
            config: The configuration of the model.

        Raises:
            LayoutError: Megatron would refuse it, or build a part of the model. The message lists all reasons.
        """
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
                f"Megatron cannot lay out this model with {self.text or 'one rank'}: {'; '.join(problems)}. "
                "Choose a layout that fits."
            )

    def _divisions(self, config: MistralConfig) -> Iterator[tuple[str, int, str, int]]:
        """Yield (name, size, axis, number of equal parts) of each size that ranks share evenly."""
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
        """Yield the reason why ``tp`` cannot share the rows of query, key and value, if there is one."""
        groups = config.num_key_value_heads
        if groups % self.tp and self.tp % groups:
            yield f"num_key_value_heads (num_query_groups)={groups} is not divisible by tp={self.tp}, nor tp by it"
        elif (rows := (config.num_attention_heads + 2 * groups) * config.head_dim) % self.tp:
            yield f"the {rows} rows of query, key and value are not divisible by tp={self.tp}"

    def coordinates(self, rank: int) -> RankCoordinates:
        """The index of a rank on every axis. Raises LayoutError for a rank outside of 0 to ``world_size - 1``."""
        if not 0 <= rank < self.world_size:
            raise LayoutError(f"rank {rank} is outside a layout of {self.world_size} ranks")
        return self._grid.coordinates(rank)

    def peers(self, rank: int, axis: str) -> list[int]:
        """``rank`` and the ranks that differ from it only on one axis, ascending: Megatron's group of that name.

        ``axis`` is tp, cp, dp or pp, or ep or etp on the grid of the experts.
        """
        axes = ("etp", "ep", "edp", "pp") if axis in ("ep", "etp") else ("tp", "cp", "dp", "pp")
        other_axes = operator.attrgetter(*(name for name in axes if name != axis))
        shared = other_axes(self.coordinates(rank))
        return [peer for peer in range(self.world_size) if other_axes(self.coordinates(peer)) == shared]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankCoordinates:
    """The index of a rank on every axis of the dense grid and of the expert grid.

    Args:
        tp: Tensor-parallel rank.
        cp: Context-parallel rank.
        dp: Data-parallel rank.
        pp: Pipeline stage.
        dp_cp: Rank among all with the same dense weights: Megatron's data-parallel rank with context parallelism.
        etp: Expert-tensor-parallel rank.
        ep: Expert-parallel rank.
        edp: Expert-data-parallel rank.
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

    ``order`` names the axes, fastest first. Axes of size 1 may be left out, except tp: megatron-core 0.19 finds its
    name inside that of another axis and so takes it as given.
    """

    order: str
    dense: Mapping[str, int]
    expert: Mapping[str, int]

    def coordinates(self, rank: int) -> RankCoordinates:
        """The index of a rank on every axis."""
        dense, expert = self._indices(rank, self.dense), self._indices(rank, self.expert)
        dp_cp = 0
        for axis in reversed([axis for axis in self.order.split("-") if axis in ("dp", "cp")]):
            dp_cp = dp_cp * self.dense[axis] + dense[axis]
        of_dense = {axis: dense[axis] for axis in ("tp", "cp", "dp", "pp")}
        return RankCoordinates(**of_dense, dp_cp=dp_cp, etp=expert["tp"], ep=expert["ep"], edp=expert["dp"])

    def _indices(self, rank: int, sizes: Mapping[str, int]) -> dict[str, int]:
        """The index of a rank on each axis of a grid with these sizes."""
        indices = dict.fromkeys(_AXES, 0)
        for axis in self.order.split("-"):
            rank, indices[axis] = divmod(rank, sizes[axis])
        return indices

    def problems(self) -> Iterator[str]:
        """Yield the reason why Megatron would refuse this order, if there is one."""
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
                f"order={self.order!r} would give dense layers and experts different pipeline stages or, without pp "
                f"last, different data parallelism: {dict(self.dense)} against {dict(self.expert)}"
            )

    def _stride(self, sizes: Mapping[str, int]) -> int:
        """The distance between ranks of neighbouring pipeline stages."""
        faster = self.order.split("-")
        return math.prod(sizes[axis] for axis in faster[: faster.index("pp")])
