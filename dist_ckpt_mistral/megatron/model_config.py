"""A model of the Mistral family in Megatron's words: the ``TransformerConfig`` and arguments of a ``GPTModel``.

What is said here computes what transformers computes: proved by logits, float32, on megatron-core 0.16 and 0.19.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Final

import torch
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from dist_ckpt_mistral.errors import ConfigError, UnsupportedModelError
from dist_ckpt_mistral.model.args.fields import LATENT
from dist_ckpt_mistral.model.args.layers import latent_rope_args, require_routable, window_args
from dist_ckpt_mistral.model.config.mistral_config import MistralConfig
from dist_ckpt_mistral.model.config.parts import Experts, LatentAttention
from dist_ckpt_mistral.model.config.yarn import YarnScaling
from dist_ckpt_mistral.model.layout.layout import ParallelLayout

#: What every Mistral model is. The fusions need Apex or Transformer Engine, or compute in another order.
_ARCHITECTURE: Final[Mapping[str, Any]] = {
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "activation_func": torch.nn.functional.silu,
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "masked_softmax_fusion": False,
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "apply_rope_fusion": False,
    "gradient_accumulation_fusion": False,
    "persist_layer_norm": False,
    "use_cpu_initialization": True,
}


def gpt_model_arguments(config: MistralConfig) -> dict[str, Any]:
    """What GPTModel wants to know besides; latent attention has rotary embeddings of its own."""
    has_yarn = config.yarn is not None and config.latent_attention is None
    return {
        "max_sequence_length": config.max_position_embeddings,
        "position_embedding_type": "yarn" if has_yarn else "rope",
        "rotary_base": config.rope_theta,
        "share_embeddings_and_output_weights": config.tie_word_embeddings,
    }


def transformer_config(
    config: MistralConfig, layout: ParallelLayout, dtype: torch.dtype, settings: Mapping[str, Any]
) -> TransformerConfig:
    """The model, the layout and what the caller wants, in Megatron's words.

    Raises UnsupportedModelError for what Megatron cannot express, ConfigError for unknown ``settings``.
    """
    latent = config.latent_attention
    told = {
        **_ARCHITECTURE,
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "layernorm_epsilon": config.rms_norm_eps,
        **(_grouped_attention(config) if latent is None else _latent_attention(config, latent)),
        **({} if config.experts is None else _experts(config.experts)),
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "fp16": dtype is torch.float16,
        **layout.transformer_config_fields(),
        **settings,
    }
    kind = TransformerConfig if latent is None else MLATransformerConfig
    unknown = sorted(told.keys() - {field.name for field in fields(kind)})
    if unknown:
        raise ConfigError(
            f"the installed megatron-core's {kind.__name__} has no {', '.join(unknown)}. "
            "Leave out what you gave of it, or install a version that has it."
        )
    made = kind(**told)
    if config.yarn is not None and latent is None:
        _add_yarn(made, config.yarn)
    return made


def _grouped_attention(config: MistralConfig) -> dict[str, Any]:
    if config.head_dim % 2:
        raise UnsupportedModelError(f"head_dim={config.head_dim} is odd: Megatron rotates pairs of dimensions.")
    return {
        "num_query_groups": config.num_key_value_heads,
        "kv_channels": config.head_dim,
        **window_args(config),
    }


def _latent_attention(config: MistralConfig, latent: LatentAttention) -> dict[str, Any]:
    if latent.qk_rope_head_dim % 2:
        raise UnsupportedModelError(
            f"qk_rope_head_dim={latent.qk_rope_head_dim} is odd: Megatron rotates pairs of dimensions."
        )
    if latent.q_lora_rank is None:  # mla_qk_norm_config.py, 0.19
        raise UnsupportedModelError("q_lora_rank=None: Megatron then norms what queries are made of.")
    if any(config.window_layers):
        raise UnsupportedModelError(f"sliding_window={config.sliding_window} with latent attention: no model has both.")
    return {
        "multi_latent_attention": True,
        "qk_layernorm": True,
        **{field.name: getattr(latent, attribute) for attribute, field in LATENT.items()},
        "kv_channels": latent.v_head_dim,  # dot_product_attention.py takes the size of a value from here
        "num_query_groups": config.num_attention_heads,
        "rotary_base": config.rope_theta,
        "rotary_scaling_factor": 1.0,  # unless YaRN says another: by default it is not that of plain embeddings
        **{field.name: value for field, value in latent_rope_args(config.yarn)},
    }


def _experts(experts: Experts) -> dict[str, Any]:
    """Experts, with the one way of sending tokens to them that needs no CUDA."""
    require_routable(experts)
    has_groups = experts.groups_per_token != experts.num_groups
    return {
        "num_moe_experts": experts.num_experts,
        "moe_router_topk": experts.experts_per_token,
        "moe_ffn_hidden_size": experts.intermediate_size,
        "moe_shared_expert_intermediate_size": experts.shared_intermediate_size or None,
        "moe_router_pre_softmax": not experts.normalized,
        "moe_router_topk_scaling_factor": experts.routed_scaling_factor,
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "allgather",
        "moe_router_num_groups": experts.num_groups if has_groups else None,
        "moe_router_group_topk": experts.groups_per_token if has_groups else None,
    }


def _add_yarn(made: TransformerConfig, yarn: YarnScaling) -> None:
    """GPTModel reads YaRN from attributes that TransformerConfig does not declare (gpt_model.py, 0.16 to 0.19)."""
    mscale, mscale_all_dim = yarn.megatron_mscales
    made.yarn_rotary_scaling_factor = yarn.factor
    made.yarn_original_max_position_embeddings = yarn.original_max_position_embeddings
    made.yarn_beta_fast = yarn.beta_fast
    made.yarn_beta_slow = yarn.beta_slow
    made.yarn_mscale = mscale
    made.yarn_mscale_all_dim = mscale_all_dim
    made.yarn_correction_range_round_to_int = yarn.truncate
