"""The tensors of a Mistral language model: one row a tensor, with every name written out.

A row has the Megatron key, each Hugging Face tensor with its names in Mistral AI's own files ("consolidated"), and the
fields that ``tensor_row`` explains. ``{layer}`` and ``{expert}`` count from 0 in the whole model. A checkpoint that
stacks layers and experts leaves ``{layer}.`` and ``{expert}.`` out of its keys (see ``KeyStyle``). The Hugging Face
files of a language model without vision leave out ``language_model.``.

Sources: megatron-core 0.12 to 0.19, models/gpt/gpt_layer_specs.py and the file that each function names; transformers
4.34 to 5.24, models/mistral, mixtral and mistral4; mistral-inference, and what transformers' convert_mistral*_to_hf.py
read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from dist_ckpt_mistral.model.config.mistral_config import MistralConfig
from dist_ckpt_mistral.model.config.parts import Experts, LatentAttention
from dist_ckpt_mistral.model.table.rules import COLUMNS, ROWS, RowBlocks, Stage, TensorRule, tensor_row
from dist_ckpt_mistral.model.table.vision import LANGUAGE_PREFIX

#: The key of the token embeddings, which every checkpoint has.
EMBEDDING_KEY: Final = "embedding.word_embeddings.weight"

#: Other prefixes of names that transformers 5.24 reads in a language model (core_model_loading.py), and the prefix in
#: this table: ``MistralModel`` saves without ``model.``, and one ``model.`` too many is dropped.
OTHER_TEXT_NAMES: Final = (
    (re.compile(r"^(model\.){0,2}(?=(embed_tokens|layers|norm)\.)"), "model."),
    (re.compile(r"^model\.(?=lm_head\.)"), ""),
)
#: The same for Mixtral's experts (conversion_mapping.py): transformers renames the block, and then packs the experts
#: that have their own tensors.
OTHER_EXPERT_NAMES: Final = (
    (re.compile(r"\.mlp\.(?=gate\.|experts\.\d+\.)"), ".block_sparse_moe."),
    (re.compile(r"\.block_sparse_moe\.(?=experts\.(gate_up_proj|down_proj)$)"), ".mlp."),
)

#: The name of the embeddings' copy in the last pipeline stage of a tied model, in models before megatron-core's.
LEGACY_TIED_HEAD: Final = "word_embeddings_for_head.weight"


def language_rules(config: MistralConfig) -> tuple[TensorRule, ...]:
    """The tensors of the language model, in the order of transformers: embedding, layers, final norm, head."""
    latent, experts = config.latent_attention, config.experts
    rules = (
        _embedding(config),
        *(_grouped_query_attention(config) if latent is None else _latent_attention(config, latent)),
        _attention_output(config),
        *(_mlp(config) if experts is None else _experts(config, experts)),
        *_layer_norms(config),
        *_output(config),
    )
    return rules if config.vision is not None else tuple(map(_of_language_alone, rules))


def _of_language_alone(rule: TensorRule) -> TensorRule:
    """The rule in a model without vision."""
    parts, other_parts = (
        tuple(replace(part, hf_name=part.hf_name.removeprefix(LANGUAGE_PREFIX)) for part in parts)
        for parts in (rule.parts, rule.other_parts)
    )
    return replace(rule, parts=parts, other_parts=other_parts)


def _embedding(config: MistralConfig) -> TensorRule:
    """models/gpt/gpt_model.py. Some files and checkpoints of a tied model also have the head, or only the head."""
    tied = config.tie_word_embeddings
    return tensor_row(
        EMBEDDING_KEY,
        ("language_model.model.embed_tokens.weight", "tok_embeddings.weight"),
        other_hf=("language_model.lm_head.weight", "tok_embeddings.weight") if tied else (),
        other_keys=("output_layer.weight",) if tied else (),
        legacy_names=("language_model.embedding.word_embeddings.weight",),
        shape=(config.vocab_size, config.hidden_size),
        padded_vocabulary=True,
        tp_axis=ROWS,
        stage=Stage.EMBEDDING,
    )


def _grouped_query_attention(config: MistralConfig) -> Iterator[TensorRule]:
    """transformer/attention.py: the rows are, group by group, its query heads, its key head and its value head."""
    groups, queries, head_dim = config.num_key_value_heads, config.queries_per_group, config.head_dim
    group_rows = (queries + 2) * head_dim
    yield tensor_row(
        "decoder.layers.{layer}.self_attention.linear_qkv.weight",
        ("language_model.model.layers.{layer}.self_attn.q_proj.weight", "layers.{layer}.attention.wq.weight"),
        ("language_model.model.layers.{layer}.self_attn.k_proj.weight", "layers.{layer}.attention.wk.weight"),
        ("language_model.model.layers.{layer}.self_attn.v_proj.weight", "layers.{layer}.attention.wv.weight"),
        rows=(
            RowBlocks(count=groups, stride=group_rows, offset=0, length=queries * head_dim),
            RowBlocks(count=groups, stride=group_rows, offset=queries * head_dim, length=head_dim),
            RowBlocks(count=groups, stride=group_rows, offset=(queries + 1) * head_dim, length=head_dim),
        ),
        rotated_rows=(head_dim, head_dim, 0),
        extra_state="decoder.layers.{layer}.self_attention.linear_qkv._extra_state",
        legacy_names=("language_model.encoder.layers.{layer}.self_attention.query_key_value.weight",),
        shape=(config.num_hidden_layers, groups * group_rows, config.hidden_size),
        tp_axis=ROWS,
    )


def _latent_attention(config: MistralConfig, latent: LatentAttention) -> Iterator[TensorRule]:
    """transformer/multi_latent_attention.py. No rows are reordered (proved by logits).

    Every rank has the whole down-projections of Transformer Engine. Its up-projections include the norm before them.
    """
    layers, heads, hidden_size = config.num_hidden_layers, config.num_attention_heads, config.hidden_size
    if latent.q_lora_rank is None:
        yield tensor_row(
            "decoder.layers.{layer}.self_attention.linear_q_proj.weight",
            ("language_model.model.layers.{layer}.self_attn.q_proj.weight", "layers.{layer}.attention.wq.weight"),
            extra_state="decoder.layers.{layer}.self_attention.linear_q_proj._extra_state",
            shape=(layers, heads * latent.qk_head_dim, hidden_size),
            tp_axis=ROWS,
        )
    else:
        yield tensor_row(
            "decoder.layers.{layer}.self_attention.linear_q_down_proj.weight",
            ("language_model.model.layers.{layer}.self_attn.q_a_proj.weight", "layers.{layer}.attention.wq_a.weight"),
            extra_state="decoder.layers.{layer}.self_attention.linear_q_down_proj._extra_state",
            shape=(layers, latent.q_lora_rank, hidden_size),
            local_tp_axis=ROWS,
        )
        yield tensor_row(
            "decoder.layers.{layer}.self_attention.linear_q_up_proj.layer_norm_weight",
            (
                "language_model.model.layers.{layer}.self_attn.q_a_layernorm.weight",
                "layers.{layer}.attention.q_a_norm.weight",
            ),
            local_key="decoder.layers.{layer}.self_attention.q_layernorm.weight",
            shape=(layers, latent.q_lora_rank),
        )
        yield tensor_row(
            "decoder.layers.{layer}.self_attention.linear_q_up_proj.weight",
            ("language_model.model.layers.{layer}.self_attn.q_b_proj.weight", "layers.{layer}.attention.wq_b.weight"),
            extra_state="decoder.layers.{layer}.self_attention.linear_q_up_proj._extra_state",
            shape=(layers, heads * latent.qk_head_dim, latent.q_lora_rank),
            tp_axis=ROWS,
        )
    yield tensor_row(
        "decoder.layers.{layer}.self_attention.linear_kv_down_proj.weight",
        (
            "language_model.model.layers.{layer}.self_attn.kv_a_proj_with_mqa.weight",
            "layers.{layer}.attention.wkv_a_with_mqa.weight",
        ),
        extra_state="decoder.layers.{layer}.self_attention.linear_kv_down_proj._extra_state",
        shape=(layers, latent.kv_lora_rank + latent.qk_rope_head_dim, hidden_size),
        local_tp_axis=ROWS,
    )
    yield tensor_row(
        "decoder.layers.{layer}.self_attention.linear_kv_up_proj.layer_norm_weight",
        (
            "language_model.model.layers.{layer}.self_attn.kv_a_layernorm.weight",
            "layers.{layer}.attention.kv_a_norm.weight",
        ),
        local_key="decoder.layers.{layer}.self_attention.kv_layernorm.weight",
        shape=(layers, latent.kv_lora_rank),
    )
    yield tensor_row(
        "decoder.layers.{layer}.self_attention.linear_kv_up_proj.weight",
        ("language_model.model.layers.{layer}.self_attn.kv_b_proj.weight", "layers.{layer}.attention.wkv_b.weight"),
        extra_state="decoder.layers.{layer}.self_attention.linear_kv_up_proj._extra_state",
        shape=(layers, heads * (latent.qk_nope_head_dim + latent.v_head_dim), latent.kv_lora_rank),
        tp_axis=ROWS,
    )


def _attention_output(config: MistralConfig) -> TensorRule:
    """transformer/attention.py, for both kinds of attention."""
    head_dim = config.head_dim if config.latent_attention is None else config.latent_attention.v_head_dim
    return tensor_row(
        "decoder.layers.{layer}.self_attention.linear_proj.weight",
        ("language_model.model.layers.{layer}.self_attn.o_proj.weight", "layers.{layer}.attention.wo.weight"),
        extra_state="decoder.layers.{layer}.self_attention.linear_proj._extra_state",
        legacy_names=("language_model.encoder.layers.{layer}.self_attention.dense.weight",),
        shape=(config.num_hidden_layers, config.hidden_size, config.num_attention_heads * head_dim),
        tp_axis=COLUMNS,
    )


def _mlp(config: MistralConfig) -> Iterator[TensorRule]:
    """transformer/mlp.py: the rows of ``linear_fc1`` are [gate; up]."""
    layers, hidden_size, intermediate_size = config.num_hidden_layers, config.hidden_size, config.intermediate_size
    yield tensor_row(
        "decoder.layers.{layer}.mlp.linear_fc1.weight",
        ("language_model.model.layers.{layer}.mlp.gate_proj.weight", "layers.{layer}.feed_forward.w1.weight"),
        ("language_model.model.layers.{layer}.mlp.up_proj.weight", "layers.{layer}.feed_forward.w3.weight"),
        extra_state="decoder.layers.{layer}.mlp.linear_fc1._extra_state",
        legacy_names=("language_model.encoder.layers.{layer}.mlp.dense_h_to_4h.weight",),
        shape=(layers, 2 * intermediate_size, hidden_size),
        glu_halves=2,
        tp_axis=ROWS,
    )
    yield tensor_row(
        "decoder.layers.{layer}.mlp.linear_fc2.weight",
        ("language_model.model.layers.{layer}.mlp.down_proj.weight", "layers.{layer}.feed_forward.w2.weight"),
        extra_state="decoder.layers.{layer}.mlp.linear_fc2._extra_state",
        legacy_names=("language_model.encoder.layers.{layer}.mlp.dense_4h_to_h.weight",),
        shape=(layers, hidden_size, intermediate_size),
        tp_axis=COLUMNS,
    )


def _experts(config: MistralConfig, experts: Experts) -> Iterator[TensorRule]:
    """transformer/moe: experts.py, router.py, shared_experts.py.

    In Hugging Face files each expert of Mixtral has its own tensors, and all experts of a layer of Mistral 4 share one
    (``packed``). In memory, transformers 5 packs Mixtral's experts too, and some files hold what was in memory.
    """
    layers, hidden_size, intermediate_size = config.num_hidden_layers, config.hidden_size, experts.intermediate_size
    packed = experts.packed
    if packed:
        w1 = "layers.{layer}.experts.{expert}.w1.weight"
        w2 = "layers.{layer}.experts.{expert}.w2.weight"
        w3 = "layers.{layer}.experts.{expert}.w3.weight"
        router = ("language_model.model.layers.{layer}.mlp.gate.weight", "layers.{layer}.gate.weight")
    else:
        w1 = "layers.{layer}.feed_forward.experts.{expert}.w1.weight"
        w2 = "layers.{layer}.feed_forward.experts.{expert}.w2.weight"
        w3 = "layers.{layer}.feed_forward.experts.{expert}.w3.weight"
        router = (
            "language_model.model.layers.{layer}.block_sparse_moe.gate.weight",
            "layers.{layer}.feed_forward.gate.weight",
        )
    single_fc1 = (
        ("language_model.model.layers.{layer}.block_sparse_moe.experts.{expert}.w1.weight", w1),
        ("language_model.model.layers.{layer}.block_sparse_moe.experts.{expert}.w3.weight", w3),
    )
    single_fc2 = ("language_model.model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight", w2)
    packed_fc1 = ("language_model.model.layers.{layer}.mlp.experts.gate_up_proj", w1, w3)
    packed_fc2 = ("language_model.model.layers.{layer}.mlp.experts.down_proj", w2)
    yield tensor_row(
        "decoder.layers.{layer}.mlp.experts.experts.{expert}.linear_fc1.weight",
        *((packed_fc1,) if packed else single_fc1),
        other_hf=() if packed else packed_fc1,
        te_name="decoder.layers.{layer}.mlp.experts.linear_fc1.weight{expert}",
        local_name="decoder.layers.{layer}.mlp.experts.local_experts.{expert}.linear_fc1.weight",
        extra_state="decoder.layers.{layer}.mlp.experts.experts.{expert}.linear_fc1._extra_state",
        te_extra_state_name="decoder.layers.{layer}.mlp.experts.linear_fc1._extra_state{nth_expert}",
        local_extra_state_name="decoder.layers.{layer}.mlp.experts.local_experts.{expert}.linear_fc1._extra_state",
        shape=(layers, experts.num_experts, 2 * intermediate_size, hidden_size),
        glu_halves=2,
        tp_axis=ROWS,
    )
    yield tensor_row(
        "decoder.layers.{layer}.mlp.experts.experts.{expert}.linear_fc2.weight",
        packed_fc2 if packed else single_fc2,
        other_hf=() if packed else packed_fc2,
        te_name="decoder.layers.{layer}.mlp.experts.linear_fc2.weight{expert}",
        local_name="decoder.layers.{layer}.mlp.experts.local_experts.{expert}.linear_fc2.weight",
        extra_state="decoder.layers.{layer}.mlp.experts.experts.{expert}.linear_fc2._extra_state",
        te_extra_state_name="decoder.layers.{layer}.mlp.experts.linear_fc2._extra_state{nth_expert}",
        local_extra_state_name="decoder.layers.{layer}.mlp.experts.local_experts.{expert}.linear_fc2._extra_state",
        shape=(layers, experts.num_experts, hidden_size, intermediate_size),
        tp_axis=COLUMNS,
    )
    yield tensor_row(
        "decoder.layers.{layer}.mlp.router.weight", router, shape=(layers, experts.num_experts, hidden_size)
    )
    if shared_size := experts.shared_intermediate_size:
        yield tensor_row(
            "decoder.layers.{layer}.mlp.shared_experts.linear_fc1.weight",
            (
                "language_model.model.layers.{layer}.mlp.shared_experts.gate_proj.weight",
                "layers.{layer}.shared_experts.w1.weight",
            ),
            (
                "language_model.model.layers.{layer}.mlp.shared_experts.up_proj.weight",
                "layers.{layer}.shared_experts.w3.weight",
            ),
            extra_state="decoder.layers.{layer}.mlp.shared_experts.linear_fc1._extra_state",
            shape=(layers, 2 * shared_size, hidden_size),
            glu_halves=2,
            tp_axis=ROWS,
        )
        yield tensor_row(
            "decoder.layers.{layer}.mlp.shared_experts.linear_fc2.weight",
            (
                "language_model.model.layers.{layer}.mlp.shared_experts.down_proj.weight",
                "layers.{layer}.shared_experts.w2.weight",
            ),
            extra_state="decoder.layers.{layer}.mlp.shared_experts.linear_fc2._extra_state",
            shape=(layers, hidden_size, shared_size),
            tp_axis=COLUMNS,
        )


def _layer_norms(config: MistralConfig) -> Iterator[TensorRule]:
    """models/gpt/gpt_layer_specs.py: Transformer Engine fuses a norm into the linear module behind it, if there is one.

    The local spec keeps the norm apart, but saves it under the same key (sharded_state_dict_keys_map).
    """
    shape = (config.num_hidden_layers, config.hidden_size)
    before_attention = (
        "language_model.model.layers.{layer}.input_layernorm.weight",
        "layers.{layer}.attention_norm.weight",
    )
    if config.latent_attention is None:
        yield tensor_row(
            "decoder.layers.{layer}.self_attention.linear_qkv.layer_norm_weight",
            before_attention,
            local_name="decoder.layers.{layer}.input_layernorm.weight",
            other_keys=("decoder.layers.{layer}.input_layernorm.weight",),
            legacy_names=(
                "language_model.encoder.layers.{layer}.input_norm.weight",
                "language_model.encoder.layers.{layer}.input_layernorm.weight",
            ),
            shape=shape,
        )
    else:
        yield tensor_row(
            "decoder.layers.{layer}.input_layernorm.weight",
            before_attention,
            te_extra_state="decoder.layers.{layer}.input_layernorm._extra_state",
            shape=shape,
        )
    before_mlp = (
        "language_model.model.layers.{layer}.post_attention_layernorm.weight",
        "layers.{layer}.ffn_norm.weight",
    )
    if config.experts is None:
        yield tensor_row(
            "decoder.layers.{layer}.mlp.linear_fc1.layer_norm_weight",
            before_mlp,
            local_name="decoder.layers.{layer}.pre_mlp_layernorm.weight",
            other_keys=("decoder.layers.{layer}.pre_mlp_layernorm.weight",),
            legacy_names=(
                "language_model.encoder.layers.{layer}.post_attention_norm.weight",
                "language_model.encoder.layers.{layer}.post_attention_layernorm.weight",
            ),
            shape=shape,
        )
    else:
        # Without latent attention the local spec saves the norm as if a dense MLP came behind it.
        as_fused = "decoder.layers.{layer}.mlp.linear_fc1.layer_norm_weight"
        yield tensor_row(
            "decoder.layers.{layer}.pre_mlp_layernorm.weight",
            before_mlp,
            local_key=as_fused if config.latent_attention is None else "",
            local_name="decoder.layers.{layer}.pre_mlp_layernorm.weight",
            te_extra_state="decoder.layers.{layer}.pre_mlp_layernorm._extra_state",
            shape=shape,
        )


def _output(config: MistralConfig) -> Iterator[TensorRule]:
    """The final norm and the head: transformer/transformer_block.py and models/gpt/gpt_model.py."""
    yield tensor_row(
        "decoder.final_layernorm.weight",
        ("language_model.model.norm.weight", "norm.weight"),
        te_extra_state="decoder.final_layernorm._extra_state",
        legacy_names=("language_model.encoder.final_norm.weight", "language_model.encoder.final_layernorm.weight"),
        shape=(config.hidden_size,),
        stage=Stage.OUTPUT,
    )
    if not config.tie_word_embeddings:
        yield tensor_row(
            "output_layer.weight",
            ("language_model.lm_head.weight", "output.weight"),
            legacy_names=("language_model.output_layer.weight",),
            shape=(config.vocab_size, config.hidden_size),
            padded_vocabulary=True,
            tp_axis=ROWS,
            stage=Stage.OUTPUT,
        )
