"""The ``TransformerConfig`` and the ``GPTModel`` arguments of a model of the Mistral family.

A GPTModel with these values computes what transformers computes. Tests compare the logits of both in float32, with
megatron-core 0.16 and 0.19.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Final

import torch
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from dist_ckpt_mistral.errors import ConfigError, UnsupportedModelError
from dist_ckpt_mistral.model.args.megatron_args import to_megatron_args
from dist_ckpt_mistral.model.config.mistral_config import MistralConfig
from dist_ckpt_mistral.model.config.yarn import YarnScaling
from dist_ckpt_mistral.model.layout.layout import ParallelLayout

#: Values of every model. The fusions need Apex or Transformer Engine, or compute in another order.
_CONSTANT: Final[Mapping[str, Any]] = {
    "gated_linear_unit": True,
    "activation_func": torch.nn.functional.silu,
    "masked_softmax_fusion": False,
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "apply_rope_fusion": False,
    "gradient_accumulation_fusion": False,
    "persist_layer_norm": False,
    "use_cpu_initialization": True,
}
#: Values of every model with experts: this dispatcher is the only one that needs no CUDA.
_CONSTANT_WITH_EXPERTS: Final[Mapping[str, Any]] = {
    "moe_router_load_balancing_type": "none",
    "moe_token_dispatcher_type": "allgather",
}
#: Names that Megatron-LM's args and TransformerConfig give to the same value. Dense models have none of experts.
_SAME_NAMES: Final = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "layernorm_epsilon", "normalization"),
    *("num_attention_heads", "num_query_groups", "kv_channels", "window_size", "window_attn_skip_freq"),
    *("add_bias_linear", "add_qkv_bias", "hidden_dropout", "attention_dropout"),
    *("moe_router_topk", "moe_router_pre_softmax", "moe_router_topk_scaling_factor"),
    *("moe_router_num_groups", "moe_router_group_topk"),
    *("moe_ffn_hidden_size", "moe_shared_expert_intermediate_size"),
)
#: The same for MLATransformerConfig. Models without YaRN have none of the last line.
_SAME_NAMES_OF_LATENT: Final = (
    *("multi_latent_attention", "qk_layernorm", "q_lora_rank", "kv_lora_rank"),
    *("qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim", "rope_type"),
    *("original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
)
#: Fields that the model, the layout or the dtype decides: these names but for what training chooses, and others.
_DECIDED: Final = {*_SAME_NAMES, *_SAME_NAMES_OF_LATENT} - {"hidden_dropout", "attention_dropout"} | {
    *("num_moe_experts", "gated_linear_unit", "activation_func", "rotary_interleaved", "params_dtype"),
    *("tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size"),
    *("context_parallel_size", "expert_model_parallel_size", "expert_tensor_parallel_size"),
    *("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage", "pipeline_model_parallel_layout"),
    *("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split"),
}


def gpt_model_arguments(config: MistralConfig) -> dict[str, Any]:
    """The arguments of ``GPTModel`` that describe the model. Latent attention makes its own rotary embeddings."""
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
    """The TransformerConfig of ``config`` in ``layout``; the fields in ``settings`` replace others.

    Raises UnsupportedModelError for a model that Megatron cannot express, ConfigError for ``settings`` that are unknown
    or say something else than ``config`` or ``layout``.
    """
    _require_expressible(config)
    args = to_megatron_args(config, dtype=str(dtype).removeprefix("torch."), tp=1, pp=1)
    latent, experts = config.latent_attention, config.experts
    values: dict[str, Any] = {
        **_CONSTANT,
        **{name: args[name] for name in _SAME_NAMES if name in args},
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "fp16": dtype is torch.float16,
    }
    if latent is not None:
        values |= {name: args[name] for name in _SAME_NAMES_OF_LATENT if name in args}
        values["rotary_base"] = config.rope_theta
        values["rotary_scaling_factor"] = 1.0 if config.yarn is None else config.yarn.factor  # Megatron's default is 40
    if experts is not None:
        values |= {"num_moe_experts": experts.num_experts, **_CONSTANT_WITH_EXPERTS}
        if experts.groups_per_token == experts.num_groups:  # groups do not limit the choice
            values |= {"moe_router_num_groups": None, "moe_router_group_topk": None}
    values |= layout.transformer_config_fields()
    kind = TransformerConfig if latent is None else MLATransformerConfig
    defaults = {field.name: field.default for field in fields(kind)}
    unknown = sorted((values.keys() | settings.keys()) - defaults.keys())
    if unknown:
        raise ConfigError(
            f"the installed megatron-core's {kind.__name__} has no {', '.join(unknown)}. "
            "Leave out what you gave of it, or install a version that has it."
        )
    _require_no_other_model(settings, defaults | values)
    made = kind(**{**values, **settings})
    if config.yarn is not None and latent is None:
        _add_yarn(made, config.yarn)
    return made


def _require_no_other_model(settings: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Raise ConfigError for ``settings`` that differ from ``values`` in what the model, layout or dtype decides."""
    differing = [
        f"{name}={settings[name]!r:.60} where it is {values[name]!r:.60}"
        for name in sorted(_DECIDED & settings.keys())
        if settings[name] != values[name]
    ]
    if differing:
        raise ConfigError(
            f"transformer_config would make another model or layout: {', '.join(differing)}. "
            "Give a configuration, a layout or a dtype with these values instead."
        )


def _require_expressible(config: MistralConfig) -> None:
    """Raise UnsupportedModelError for attention that a GPTModel computes differently, or not at all."""
    latent = config.latent_attention
    name, rotated = "head_dim", config.head_dim
    if latent is not None:
        name, rotated = "qk_rope_head_dim", latent.qk_rope_head_dim
    if rotated % 2:
        raise UnsupportedModelError(f"{name}={rotated} is odd: Megatron rotates pairs of dimensions.")
    if latent is None:
        return
    if latent.q_lora_rank is None:  # mla_qk_norm_config.py, 0.19
        raise UnsupportedModelError("q_lora_rank=None: Megatron then puts a norm before the query projection.")
    if any(config.window_layers):
        raise UnsupportedModelError(f"sliding_window={config.sliding_window} with latent attention: no model has both.")


def _add_yarn(made: TransformerConfig, yarn: YarnScaling) -> None:
    """Set the attributes from which GPTModel reads YaRN. TransformerConfig has no such fields (0.16 to 0.19)."""
    mscale, mscale_all_dim = yarn.megatron_mscales
    made.yarn_rotary_scaling_factor = yarn.factor
    made.yarn_original_max_position_embeddings = yarn.original_max_position_embeddings
    made.yarn_beta_fast = yarn.beta_fast
    made.yarn_beta_slow = yarn.beta_slow
    made.yarn_mscale = mscale
    made.yarn_mscale_all_dim = mscale_all_dim
    made.yarn_correction_range_round_to_int = yarn.truncate
