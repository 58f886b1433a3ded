"""The only place where tensor names stand: every tensor of a Mistral model, in both worlds.

Row orders, axes and keys: shared by the local and the Transformer Engine spec of megatron-core 0.12 to 0.19
(transformer/attention.py, transformer/mlp.py, models/gpt/gpt_model.py); Hugging Face names: transformers 4.34 to 5.23,
models/mistral. A Megatron key is written here with ``{layer}`` in it; ``KeyStyle`` says how a checkpoint spells it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Final

from dist_ckpt_mistral.model.config import MistralConfig
from dist_ckpt_mistral.model.row_blocks import RowBlocks

_LAYER: Final = "{layer}."


class Place(Enum):
    """Which pipeline stage holds a tensor."""

    EMBEDDING = "first stage"
    LAYER = "the stage of its layer"
    OUTPUT = "last stage"


class KeyStyle(Enum):
    """How a checkpoint spells the keys of layers (megatron-core transformer/transformer_block.py).

    STACKED has one tensor with a leading layer axis, PER_LAYER (``non_homogeneous_layers``) a tensor per layer,
    SINGLETON (``singleton_local_shards``) also splits ``linear_fc1`` into ``weight_w`` (gate) and ``weight_v`` (up).
    """

    STACKED = "stacked"
    PER_LAYER = "per layer"
    SINGLETON = "singleton"


class ParamState(Enum):
    """A tensor that training keeps for every parameter, of its shape and, behind a prefix, under its key.

    A value is what Megatron's model-space formats call the state: ``fp32_param`` in ``plain`` (Float16Optimizer) and
    ``fully_sharded_model_space`` (distributed optimizer, to 0.14), ``param`` in ``fully_reshardable`` (0.15 and newer);
    mcore optimizer/optimizer.py and distrib_optimizer.py. WEIGHTS are the parameters themselves, without a prefix.
    """

    WEIGHTS = ()
    MASTER = ("fp32_param", "param")
    EXP_AVG = ("exp_avg",)
    EXP_AVG_SQ = ("exp_avg_sq",)


@dataclass(frozen=True, slots=True, kw_only=True)
class HfPart:
    """One Hugging Face tensor and the Megatron rows that hold it. ``hf_name`` may contain ``{layer}``."""

    hf_name: str
    rows: RowBlocks


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRule:
    """One Megatron tensor: its key, its shape in one layer, its tensor-parallel axis, and what it holds.

    ``shape`` is in elements, without layer axis and without vocabulary padding. ``tp_axis`` is None for tensors that
    every tensor-parallel rank holds whole. ``glu_halves`` is 2 where rows are [gate; up] and each half is cut on its
    own. ``module_name`` is the tensor's name in the state dict of a GPTModel with the local layer spec; ``other_keys``
    are keys that other layer specs use. ``hf_aliases`` are Hugging Face names of the same values in some files.
    """

    mcore_key: str
    shape: tuple[int, ...]
    place: Place
    parts: tuple[HfPart, ...]
    tp_axis: int | None = None
    glu_halves: int = 1
    padded_vocabulary: bool = False
    module_name: str = ""
    other_keys: tuple[str, ...] = ()
    hf_aliases: tuple[str, ...] = ()

    @property
    def keys(self) -> tuple[str, ...]:
        """All keys under which a checkpoint may hold this tensor, the one that this package writes first."""
        return (self.mcore_key, *self.other_keys)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredRows:
    """Where one layer's rows ``[first_row, first_row + rows)`` lie in a checkpoint of some key style.

    ``index`` are the leading coordinates (the layer, or nothing) and ``global_shape`` the shape of the stored tensor.
    """

    mcore_key: str
    index: tuple[int, ...]
    first_row: int
    rows: int
    global_shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class HfTensor:
    """One Hugging Face tensor of the model: name, shape in elements, and the Megatron rows that hold it."""

    hf_name: str
    shape: tuple[int, ...]
    rule: TensorRule
    layer: int | None
    rows: RowBlocks
    is_alias: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorTable:
    """All tensors of one model. Rules stand in the order in which transformers lists the model's state dict."""

    num_layers: int
    rules: tuple[TensorRule, ...]

    def layers_of(self, rule: TensorRule) -> tuple[int | None, ...]:
        """The layers that have this tensor; ``(None,)`` for tensors outside the layers."""
        return tuple(range(self.num_layers)) if rule.place is Place.LAYER else (None,)

    def hf_tensors(self) -> dict[str, HfTensor]:
        """Every Hugging Face tensor by name, in state-dict order: embedding, layers, norm, head; then aliases."""
        tensors = [*self._walk(Place.EMBEDDING), *self._walk(Place.LAYER), *self._walk(Place.OUTPUT)]
        tensors.sort(key=lambda tensor: tensor.is_alias)
        return {tensor.hf_name: tensor for tensor in tensors}

    def _walk(self, place: Place) -> Iterator[HfTensor]:
        rules = [rule for rule in self.rules if rule.place is place]
        for layer in range(self.num_layers) if place is Place.LAYER else (None,):
            for rule in rules:
                for part in rule.parts:
                    for hf_name in (part.hf_name, *rule.hf_aliases):
                        yield HfTensor(
                            hf_name=hf_name.format(layer=layer),
                            shape=(part.rows.hf_rows, *rule.shape[1:]),
                            rule=rule,
                            layer=layer,
                            rows=part.rows,
                            is_alias=hf_name != part.hf_name,
                        )

    def stored(self, rule: TensorRule, layer: int | None, style: KeyStyle, key: str = "") -> tuple[StoredRows, ...]:
        """Where the tensor of ``layer`` lies in a checkpoint of ``style``; ``key`` picks one of ``rule.keys``."""
        key = key or rule.mcore_key
        if layer is None or style is KeyStyle.STACKED:
            index = () if layer is None else (layer,)
            lead = () if layer is None else (self.num_layers,)
            return (
                StoredRows(
                    mcore_key=key.replace(_LAYER, ""),
                    index=index,
                    first_row=0,
                    rows=rule.shape[0],
                    global_shape=(*lead, *rule.shape),
                ),
            )
        suffixes = ("_w", "_v") if style is KeyStyle.SINGLETON and rule.glu_halves > 1 else ("",)
        rows = rule.shape[0] // len(suffixes)
        return tuple(
            StoredRows(
                mcore_key=key.format(layer=layer) + suffix,
                index=(),
                first_row=half * rows,
                rows=rows,
                global_shape=(rows, *rule.shape[1:]),
            )
            for half, suffix in enumerate(suffixes)
        )


def tensor_table(config: MistralConfig) -> TensorTable:
    """The tensor table of a model."""
    rules = (*_embedding(config), *_layer(config), *_output(config))
    return TensorTable(num_layers=config.num_hidden_layers, rules=rules)


def _whole(hf_name: str, rows: int) -> tuple[HfPart, ...]:
    return (HfPart(hf_name=hf_name, rows=RowBlocks.identity(rows)),)


def _embedding(config: MistralConfig) -> tuple[TensorRule, ...]:
    key = "embedding.word_embeddings.weight"
    return (
        TensorRule(
            mcore_key=key,
            shape=(config.vocab_size, config.hidden_size),
            place=Place.EMBEDDING,
            parts=_whole("model.embed_tokens.weight", config.vocab_size),
            tp_axis=0,
            padded_vocabulary=True,
            module_name=key,
            hf_aliases=("lm_head.weight",) if config.tie_word_embeddings else (),
        ),
    )


def _layer(config: MistralConfig) -> tuple[TensorRule, ...]:
    here, there = "decoder.layers.{layer}.", "model.layers.{layer}."
    hidden, ffn, dim = config.hidden_size, config.intermediate_size, config.head_dim
    groups, queries = config.num_key_value_heads, config.queries_per_group
    group_rows = (queries + 2) * dim  # one group: its query heads, then one key head, then one value head

    def qkv(head: int, heads: int) -> RowBlocks:
        return RowBlocks(count=groups, stride=group_rows, offset=head * dim, length=heads * dim)

    def half(first_row: int) -> RowBlocks:
        return RowBlocks(count=1, stride=2 * ffn, offset=first_row, length=ffn)

    return (
        TensorRule(
            mcore_key=here + "self_attention.linear_qkv.weight",
            shape=(groups * group_rows, hidden),
            place=Place.LAYER,
            parts=(
                HfPart(hf_name=there + "self_attn.q_proj.weight", rows=qkv(0, queries)),
                HfPart(hf_name=there + "self_attn.k_proj.weight", rows=qkv(queries, 1)),
                HfPart(hf_name=there + "self_attn.v_proj.weight", rows=qkv(queries + 1, 1)),
            ),
            tp_axis=0,
            module_name=here + "self_attention.linear_qkv.weight",
        ),
        TensorRule(
            mcore_key=here + "self_attention.linear_proj.weight",
            shape=(hidden, config.num_attention_heads * dim),
            place=Place.LAYER,
            parts=_whole(there + "self_attn.o_proj.weight", hidden),
            tp_axis=1,
            module_name=here + "self_attention.linear_proj.weight",
        ),
        TensorRule(
            mcore_key=here + "mlp.linear_fc1.weight",
            shape=(2 * ffn, hidden),
            place=Place.LAYER,
            parts=(
                HfPart(hf_name=there + "mlp.gate_proj.weight", rows=half(0)),
                HfPart(hf_name=there + "mlp.up_proj.weight", rows=half(ffn)),
            ),
            tp_axis=0,
            glu_halves=2,
            module_name=here + "mlp.linear_fc1.weight",
        ),
        TensorRule(
            mcore_key=here + "mlp.linear_fc2.weight",
            shape=(hidden, ffn),
            place=Place.LAYER,
            parts=_whole(there + "mlp.down_proj.weight", hidden),
            tp_axis=1,
            module_name=here + "mlp.linear_fc2.weight",
        ),
        TensorRule(
            mcore_key=here + "self_attention.linear_qkv.layer_norm_weight",
            shape=(hidden,),
            place=Place.LAYER,
            parts=_whole(there + "input_layernorm.weight", hidden),
            module_name=here + "input_layernorm.weight",
            other_keys=(here + "input_layernorm.weight",),
        ),
        TensorRule(
            mcore_key=here + "mlp.linear_fc1.layer_norm_weight",
            shape=(hidden,),
            place=Place.LAYER,
            parts=_whole(there + "post_attention_layernorm.weight", hidden),
            module_name=here + "pre_mlp_layernorm.weight",
            other_keys=(here + "pre_mlp_layernorm.weight",),
        ),
    )


def _output(config: MistralConfig) -> tuple[TensorRule, ...]:
    norm = TensorRule(
        mcore_key="decoder.final_layernorm.weight",
        shape=(config.hidden_size,),
        place=Place.OUTPUT,
        parts=_whole("model.norm.weight", config.hidden_size),
        module_name="decoder.final_layernorm.weight",
    )
    if config.tie_word_embeddings:
        return (norm,)
    head = TensorRule(
        mcore_key="output_layer.weight",
        shape=(config.vocab_size, config.hidden_size),
        place=Place.OUTPUT,
        parts=_whole("lm_head.weight", config.vocab_size),
        tp_axis=0,
        padded_vocabulary=True,
        module_name="output_layer.weight",
    )
    return (norm, head)


#: What to call tensors of layers: the first pattern that the key matches says it.
_KINDS: Final = (
    (re.compile(r".*norm"), "norms"),
    (re.compile(r".*\bself_attention\."), "attention"),
    (re.compile(r".*\bexperts\."), "experts"),
    (re.compile(r".*\bmlp\."), "MLP"),
)


def kind_of(rule: TensorRule, state: ParamState = ParamState.WEIGHTS) -> str:
    """What a tensor is, for people: embedding, attention, MLP, experts, norms, output layer or optimizer state."""
    if state is not ParamState.WEIGHTS:
        return "optimizer state"
    if rule.place is Place.EMBEDDING:
        return "embedding"
    return next((kind for pattern, kind in _KINDS if pattern.match(rule.mcore_key)), "output layer")


#: Modules whose ``_extra_state`` objects megatron-core looks for, by layer spec: those of the local spec first, then
#: what Transformer Engine adds (``core_attention`` until 0.14 only). A model raises if one of its own is missing.
LOCAL_EXTRA_STATES: Final = (
    "decoder.layers.{layer}.self_attention.linear_proj._extra_state",
    "decoder.layers.{layer}.self_attention.linear_qkv._extra_state",
    "decoder.layers.{layer}.mlp.linear_fc1._extra_state",
    "decoder.layers.{layer}.mlp.linear_fc2._extra_state",
)
TE_EXTRA_STATES: Final = (
    "decoder.layers.{layer}.self_attention.core_attention._extra_state",
    "decoder.final_layernorm._extra_state",
)

#: The name under which a last pipeline stage holds its copy of tied embeddings.
TIED_OUTPUT_NAME: Final = "output_layer.weight"

#: Prefixes that other writers put before every model key (NeMo 2: ``module.``; wrapped models: ``model.``).
_PREFIX_ANCHOR: Final = "embedding.word_embeddings.weight"

#: What stands before a model key to make it that of a state (several optimizers may count themselves before that).
_STATE_PREFIX: Final = "optimizer.state.{state}."
_OPTIMIZER: Final = re.compile(r"(chained_\d+\.)?optimizer\.")
_STATE_KEY: Final = re.compile(r"(?:chained_\d+\.)?optimizer\.state\.(\w+)\.(.+)")
#: Optimizer state as flat buffers, whose layout only the run knows that made them: pattern of the key -> the format.
_FLAT_STATES: Final = (
    (re.compile(r"(chained_\d+\.)?optimizer\.distributed\.dp_group_idx_\d+\.gbuf_idx_"), "dp_reshardable"),
    (
        re.compile(r"(chained_\d+\.)?optimizer\.distributed\.dp_group_idx_\d+\.param_state($|/)"),
        "dp_zero_gather_scatter",
    ),
)

#: How every reason begins for which an export leaves out what the optimizer keeps.
OPTIMIZER_STATE: Final = "optimizer state"
#: Stored entries that are not weights: pattern of the key -> why an export leaves it out.
_NOT_WEIGHTS: Final = (
    *((pattern, f"{OPTIMIZER_STATE} in flat buffers ({name})") for pattern, name in _FLAT_STATES),
    (_OPTIMIZER, OPTIMIZER_STATE),
    (re.compile(r"(.*[./])?_extra_state($|/|\d)"), "Transformer Engine extra state"),
    (re.compile(r"rng_state($|/|\.)"), "random number generator state"),
    (re.compile(r"common_state($|/)"), "common state, read on its own"),
    (re.compile(r"(opt_param_scheduler|rerun_state_machine|iteration|checkpoint_version)\w*($|/|\.)"), "trainer state"),
)
_HF_NOT_WEIGHTS: Final = ((re.compile(r"(.*\.)?rotary_emb\.inv_freq$"), "recomputed from rope_theta by every reader"),)


def model_prefix(mcore_keys: Iterable[str]) -> str:
    """What stands before every model key, such as ``module.``; empty in what Megatron-LM writes."""
    found = sorted(
        {
            key.removesuffix(_PREFIX_ANCHOR)
            for key in mcore_keys
            if key.endswith(_PREFIX_ANCHOR) and not why_ignored(key)
        },
        key=len,
    )
    return found[0] if found else ""


def state_key(mcore_key: str, name: str) -> str:
    """The key of the state that Megatron calls ``name``, of the parameter ``mcore_key``."""
    return _STATE_PREFIX.format(state=name) + mcore_key


def split_state_key(stored_key: str) -> tuple[str, str] | None:
    """(what Megatron calls the state, the parameter's own key) of a stored tensor; None if it is no such state."""
    match = _STATE_KEY.fullmatch(stored_key)
    return (match[1], match[2]) if match else None


def flat_state(stored_key: str) -> str | None:
    """The format of a stored entry that is optimizer state in flat buffers, such as ``dp_reshardable``; else None."""
    return next((name for pattern, name in _FLAT_STATES if pattern.match(stored_key)), None)


def is_optimizer_state(stored_key: str) -> bool:
    """Whether a stored entry, tensor or object, belongs to an optimizer."""
    return _OPTIMIZER.match(stored_key) is not None


def why_ignored(mcore_key: str, prefix: str = "") -> str | None:
    """Why a stored Megatron entry is not a weight, or None if it might be one; ``prefix`` may stand before its key."""
    keys = (mcore_key, mcore_key.removeprefix(prefix))
    return next((reason for pattern, reason in _NOT_WEIGHTS if any(map(pattern.match, keys))), None)


def why_hf_ignored(hf_name: str) -> str | None:
    """Why a tensor of a Hugging Face file is not a weight, or None if it might be one."""
    return next((reason for pattern, reason in _HF_NOT_WEIGHTS if pattern.match(hf_name)), None)
