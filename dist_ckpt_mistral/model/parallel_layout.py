"""``ParallelLayout``: which boxes of which tensors a rank holds. Pure arithmetic, no Megatron import.

It stands beside the table and not under ``megatron/`` because an import must cut its chunks where Megatron is absent.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from dist_ckpt_mistral.errors import LayoutError
from dist_ckpt_mistral.model.config import MistralConfig
from dist_ckpt_mistral.model.tensor_table import TIED_OUTPUT_NAME, KeyStyle, Place, StoredRows, TensorRule, TensorTable

#: Megatron-LM's ``--make-vocab-size-divisible-by``.
VOCABULARY_MULTIPLE: Final = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class RankCoordinates:
    """Where a rank stands: its index on every axis of the layout."""

    tp: int
    dp: int
    pp: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelChunk:
    """One virtual pipeline stage of one rank: global layer numbers and whether it embeds or ends the model."""

    layers: tuple[int, ...]
    is_first: bool
    is_last: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldBox:
    """One box of a stored tensor. All tuples are in elements and have the axes of the stored tensor.

    ``fragments`` counts the boxes along each axis.
    """

    mcore_key: str
    global_shape: tuple[int, ...]
    global_offset: tuple[int, ...]
    shape: tuple[int, ...]
    fragments: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldTensor:
    """One local tensor of one rank. ``boxes`` are its rows in order: one box, or gate and up of ``linear_fc1``.

    ``local_shape`` is in elements; ``prepended_axes`` counts the leading axes that only the stored tensor has.
    ``replica_id`` is Megatron's (copy of the stage, tensor-parallel rank, data-parallel rank); the copy of all zeros is
    the one that is saved.
    """

    rule: TensorRule
    layer: int | None
    module_name: str
    local_shape: tuple[int, ...]
    prepended_axes: int
    boxes: tuple[HeldBox, ...]
    replica_id: tuple[int, int, int]

    @property
    def is_main_replica(self) -> bool:
        """Whether this is the copy that is saved."""
        return not any(self.replica_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelLayout:
    """A parallel layout of ranks, in Megatron's default rank order (tp, then dp, then pp counts slowest).

    ``pp_layers`` gives the layer count of every pipeline stage where they differ; ``vpp`` is the number of model chunks
    per stage of the interleaved schedule.
    """

    tp: int = 1
    pp: int = 1
    vpp: int | None = None
    cp: int = 1
    dp: int = 1
    ep: int = 1
    etp: int | None = None
    pp_layers: tuple[int, ...] | None = None
    num_layers_in_first_pipeline_stage: int | None = None
    num_layers_in_last_pipeline_stage: int | None = None
    account_for_embedding_in_pipeline_split: bool = False
    account_for_loss_in_pipeline_split: bool = False
    pipeline_model_parallel_layout: str | None = None

    def __post_init__(self) -> None:
        """Refuse what no model could be laid out with."""
        counts = {"tp": self.tp, "pp": self.pp, "dp": self.dp, "ep": self.ep}
        problems = [f"{name} must be at least 1, got {count}" for name, count in counts.items() if count < 1]
        if self.vpp is not None and (self.vpp < 1 or (self.vpp > 1 and self.pp == 1)):
            problems.append(f"vpp={self.vpp} needs at least two pipeline stages, got pp={self.pp}")
        if self.pp_layers is not None and (self.vpp or 1) > 1:
            problems.append("pp_layers and vpp cannot be combined")
        if self.pp_layers is not None and (len(self.pp_layers) != self.pp or min(self.pp_layers, default=0) < 0):
            problems.append(f"pp_layers must give one layer count for each of {self.pp} stages, got {self.pp_layers}")
        if problems:
            raise LayoutError("; ".join(problems))

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.tp * self.dp * self.pp

    def transformer_config_fields(self) -> dict[str, Any]:
        """The keyword arguments of Megatron's ``TransformerConfig`` that describe this layout; only what is set.

        Megatron has no ``pp_layers``: they become the equivalent ``pipeline_model_parallel_layout``.
        """
        layout = self.pipeline_model_parallel_layout
        if self.pp_layers is not None:
            layout = "E" + "|".join("t" * layers for layers in self.pp_layers) + "L"
        fields = {
            "virtual_pipeline_model_parallel_size": self.vpp,
            "expert_tensor_parallel_size": self.etp,
            "num_layers_in_first_pipeline_stage": self.num_layers_in_first_pipeline_stage,
            "num_layers_in_last_pipeline_stage": self.num_layers_in_last_pipeline_stage,
            "account_for_embedding_in_pipeline_split": self.account_for_embedding_in_pipeline_split or None,
            "account_for_loss_in_pipeline_split": self.account_for_loss_in_pipeline_split or None,
            "pipeline_model_parallel_layout": layout,
        }
        return {
            "tensor_model_parallel_size": self.tp,
            "pipeline_model_parallel_size": self.pp,
            "context_parallel_size": self.cp,
            "expert_model_parallel_size": self.ep,
            **{name: value for name, value in fields.items() if value is not None},
        }

    def check(self, config: MistralConfig) -> None:
        """Raise LayoutError with Megatron's reasons if it would refuse this layout for this model."""
        problems = [
            f"{name}={size} is not divisible by tp={self.tp}"
            for name, size in (
                ("num_attention_heads", config.num_attention_heads),
                ("num_key_value_heads (num_query_groups)", config.num_key_value_heads),
                ("intermediate_size", config.intermediate_size),
            )
            if size % self.tp
        ]
        stages = self.pp * (self.vpp or 1)
        if self.pp_layers is None and config.num_hidden_layers % stages:
            problems.append(
                f"num_hidden_layers={config.num_hidden_layers} is not divisible by {stages} pipeline stages"
            )
        if self.pp_layers is not None and sum(self.pp_layers) != config.num_hidden_layers:
            problems.append(f"pp_layers={self.pp_layers} do not add up to num_hidden_layers={config.num_hidden_layers}")
        if self.ep > 1:
            problems.append(f"ep={self.ep} needs experts, and a dense model has none")
        if problems:
            raise LayoutError(f"Megatron cannot lay out this model with {self}: " + "; ".join(problems))

    def coordinates(self, rank: int) -> RankCoordinates:
        """Where ``rank`` stands, in Megatron's default order tp-cp-ep-dp-pp."""
        if not 0 <= rank < self.world_size:
            raise LayoutError(f"rank {rank} is outside a layout of {self.world_size} ranks")
        rest, tp = divmod(rank, self.tp)
        pp, dp = divmod(rest, self.dp)
        return RankCoordinates(tp=tp, dp=dp, pp=pp)

    def model_chunks(self, num_layers: int, pp_rank: int) -> tuple[ModelChunk, ...]:
        """The model chunks of a pipeline stage: one, or ``vpp`` of them."""
        chunks = self.vpp or 1
        if self.pp_layers is not None:
            first = sum(self.pp_layers[:pp_rank])
            ranges = [range(first, first + self.pp_layers[pp_rank])]
        else:
            size = num_layers // (self.pp * chunks)
            starts = [(chunk * self.pp + pp_rank) * size for chunk in range(chunks)]
            ranges = [range(start, start + size) for start in starts]
        return tuple(
            ModelChunk(
                layers=tuple(layers),
                is_first=pp_rank == 0 and chunk == 0,
                is_last=pp_rank == self.pp - 1 and chunk == chunks - 1,
            )
            for chunk, layers in enumerate(ranges)
        )

    def held_tensors(
        self,
        table: TensorTable,
        chunk: ModelChunk,
        at: RankCoordinates,
        *,
        style: KeyStyle = KeyStyle.STACKED,
        vocab_rows: int | None = None,
    ) -> Iterator[HeldTensor]:
        """Yield what one rank holds of one model chunk, in the order of the table.

        ``vocab_rows`` is the padded vocabulary size, by default what Megatron-LM pads to. Sizes must have passed
        ``check``.
        """
        for rule in table.rules:
            rows = _rows(rule, self.tp, vocab_rows)
            for layer, name in _held_layers(rule, chunk):
                copy = (0, 0 if rule.tp_axis is not None else at.tp, at.dp)
                yield self._held(table, rule, rows, layer, name, at.tp, style, copy)
            if rule.hf_aliases and chunk.is_last and not chunk.is_first:
                # Tied embeddings: the last stage describes its copy of the first stage's (language_module.py, 0.12+).
                yield self._held(table, rule, rows, None, TIED_OUTPUT_NAME, at.tp, style, (1, 0, at.dp))

    def _held(
        self,
        table: TensorTable,
        rule: TensorRule,
        rows: int,
        layer: int | None,
        module_name: str,
        tp_rank: int,
        style: KeyStyle,
        replica_id: tuple[int, int, int],
    ) -> HeldTensor:
        shape = [rows, *rule.shape[1:]]
        if rule.tp_axis is not None:
            shape[rule.tp_axis] //= self.tp
        halves = rule.glu_halves
        boxes = tuple(
            self._box(rule, rows, half, stored, tp_rank)
            for stored in table.stored(rule, layer, style)
            for half in range(
                stored.first_row * halves // rule.shape[0], (stored.first_row + stored.rows) * halves // rule.shape[0]
            )
        )
        return HeldTensor(
            rule=rule,
            layer=layer,
            module_name=module_name,
            local_shape=tuple(shape),
            prepended_axes=len(boxes[0].global_shape) - len(shape),
            boxes=boxes,
            replica_id=replica_id,
        )

    def _box(self, rule: TensorRule, rows: int, half: int, stored: StoredRows, tp_rank: int) -> HeldBox:
        """The part of ``stored`` that ``tp_rank`` holds of one half (of the only one, for most tensors)."""
        global_rows = rows if rule.padded_vocabulary else stored.rows
        half_rows = rows // rule.glu_halves
        shape, offset = [half_rows, *rule.shape[1:]], [half * half_rows - stored.first_row, *(0,) * len(rule.shape[1:])]
        fragments = [global_rows // half_rows, *(1,) * len(rule.shape[1:])]
        if rule.tp_axis is not None:
            shape[rule.tp_axis] //= self.tp
            offset[rule.tp_axis] += tp_rank * shape[rule.tp_axis]
            fragments[rule.tp_axis] *= self.tp
        lead = stored.global_shape[: len(stored.index)]
        return HeldBox(
            mcore_key=stored.mcore_key,
            global_shape=(*lead, global_rows, *rule.shape[1:]),
            global_offset=(*stored.index, *offset),
            shape=(*(1,) * len(lead), *shape),
            fragments=(*lead, *fragments),
        )


def padded_vocab_size(vocab_size: int, tp: int) -> int:
    """Megatron-LM's padded vocabulary: the next multiple of 128 x tp (``--make-vocab-size-divisible-by`` 128)."""
    multiple = VOCABULARY_MULTIPLE * tp
    return -(-vocab_size // multiple) * multiple


def _rows(rule: TensorRule, tp: int, vocab_rows: int | None) -> int:
    """Rows of one layer's tensor, with vocabulary padding where it applies."""
    if not rule.padded_vocabulary:
        return rule.shape[0]
    rows = padded_vocab_size(rule.shape[0], tp) if vocab_rows is None else vocab_rows
    if rows < rule.shape[0] or rows % tp:
        raise LayoutError(f"padded vocabulary size {rows} must be a multiple of tp={tp}, at least {rule.shape[0]}")
    return rows


def _held_layers(rule: TensorRule, chunk: ModelChunk) -> list[tuple[int | None, str]]:
    """(global layer, name in the local module) of every tensor of ``rule`` in ``chunk``."""
    if rule.place is Place.LAYER:
        return [(layer, rule.module_name.format(layer=local)) for local, layer in enumerate(chunk.layers)]
    held = chunk.is_first if rule.place is Place.EMBEDDING else chunk.is_last
    return [(None, rule.module_name)] if held else []
