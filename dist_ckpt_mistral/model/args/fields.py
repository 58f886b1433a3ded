"""The table of fields of Megatron-LM's ``args`` namespace that describe a model.

For each field it has all names of it, its default in ``pretrain_gpt.py``, and the flag that sets it. Since 0.16 most of
the parser is made from the fields of ``TransformerConfig``, which renamed two of them. Some fields of
``MLATransformerConfig`` have flags of their own, others have none.

Sources: megatron/training/arguments.py (``validate_args``, ``core_transformer_config_from_args``) and checkpointing.py
(``load_args_from_checkpoint``), Megatron-LM core_v0.12 to 0.19.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from dist_ckpt_mistral.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """One field of the args.

    ``names`` are all names of it, the newest last. ``flag`` is the flag of ``pretrain_gpt.py`` that sets it, None if
    no flag is needed or exists; the flag of a boolean field inverts the default. ``default`` is Megatron-LM's.
    ``group`` is the heading under which ``megatron-args`` shows the flag.
    """

    names: tuple[str, ...]
    flag: str | None = None
    default: Any = None
    group: str = "sizes"

    @property
    def name(self) -> str:
        """The oldest name, which is also that of the flag."""
        return self.names[0]

    def of(self, args: Mapping[str, Any]) -> Any:  # noqa: ANN401  (an args value of any type)
        """The value in ``args``, or the default if the field is missing or None.

        Raises ConfigError if the args have different values under two of its names.
        """
        values = {name: args[name] for name in reversed(self.names) if args.get(name) is not None}
        first, *others = values.values() or (self.default,)
        if any(other != first for other in others):
            raise ConfigError(
                f"the args say {' but '.join(f'{name}={value!r:.200}' for name, value in values.items())}"
            )
        return first


#: Pairs of a field and the one value that a model of the family may have.
Demands: TypeAlias = "tuple[tuple[Field, Any], ...]"


def unmet(demands: Demands, args: Mapping[str, Any]) -> Iterator[str]:
    """Yield ``name=value`` for each value in ``args`` that is another. Absent, None, false, 0 and empty are equal."""
    for field, expected in demands:
        value = field.of(args)
        if value != expected and (expected or value):
            yield f"{field.name}={value!r:.200}"


#: Attribute of MistralConfig -> the field that holds it unchanged.
SAME_VALUE: Final[Mapping[str, Field]] = {
    "num_hidden_layers": Field(names=("num_layers",), flag="--num-layers"),
    "hidden_size": Field(names=("hidden_size",), flag="--hidden-size"),
    "intermediate_size": Field(names=("ffn_hidden_size",), flag="--ffn-hidden-size"),
    "num_attention_heads": Field(names=("num_attention_heads",), flag="--num-attention-heads"),
    "rms_norm_eps": Field(names=("norm_epsilon", "layernorm_epsilon"), flag="--norm-epsilon", group="block"),
    "rope_theta": Field(names=("rotary_base",), flag="--rotary-base", group="rope"),
    "max_position_embeddings": Field(
        names=("max_position_embeddings",), flag="--max-position-embeddings", group="rope"
    ),
}

#: Values that every model of the Mistral family has.
ARCHITECTURE: Final[Demands] = (
    (Field(names=("normalization",), flag="--normalization", default="LayerNorm", group="block"), "RMSNorm"),
    (Field(names=("swiglu",), flag="--swiglu", default=False, group="block"), True),
    (Field(names=("add_bias_linear",), flag="--disable-bias-linear", default=True, group="block"), False),
    (Field(names=("rotary_percent",), flag="--rotary-percent", default=1.0, group="rope"), 1.0),
    (Field(names=("softmax_type",), default="vanilla"), "vanilla"),
    *(
        (Field(names=names, default=False), False)
        for names in (
            ("apply_layernorm_1p", "layernorm_zero_centered_gamma"),
            *(("add_qkv_bias",), ("squared_relu",), ("quick_geglu",), ("openai_gelu",)),
            *(("rotary_interleaved",), ("use_rope_scaling",), ("use_mup",), ("is_hybrid_model",)),
            *(("qk_l2_norm",), ("attention_output_gate",), ("apply_residual_connection_post_layernorm",)),
        )
    ),
    *(
        (Field(names=(name,)), None)
        for name in (
            *("mtp_num_layers", "hybrid_layer_pattern", "hybrid_override_pattern"),
            *("heterogeneous_layers_config_path", "heterogeneous_layers_config_encoded_json"),
            *("experimental_attention_variant", "linear_attention_freq", "no_rope_freq", "softmax_scale"),
            *("rotary_seq_len_interpolation_factor", "activation_func_clamp_value"),
        )
    ),
    (Field(names=("glu_linear_offset",), default=0.0), 0.0),
)

#: Fields whose values are computed from the configuration, by name.
COMPUTED: Final[Mapping[str, Field]] = {
    field.name: field
    for field in (
        Field(names=("group_query_attention",), flag="--group-query-attention", default=False, group="attention"),
        Field(names=("num_query_groups",), flag="--num-query-groups", group="attention"),
        Field(names=("window_size",), flag="--window-size", group="attention"),
        Field(names=("window_attn_skip_freq",), flag="--window-attn-skip-freq", group="attention"),
        Field(names=("kv_channels",), flag="--kv-channels", group="attention"),
        Field(
            names=("multi_latent_attention",), flag="--multi-latent-attention", default=False, group="latent attention"
        ),
        Field(names=("qk_layernorm",), flag="--qk-layernorm", default=False, group="latent attention"),
        Field(names=("rope_type",), flag="--rope-type", group="rope"),
        Field(names=("apply_rope_fusion",), flag="--no-rope-fusion", default=True, group="rope"),
        Field(
            names=("untie_embeddings_and_output_weights",),
            flag="--untie-embeddings-and-output-weights",
            default=False,
            group="vocabulary",
        ),
        Field(names=("seq_length",), flag="--seq-length", group="rope"),
        Field(names=("attention_dropout",), flag="--attention-dropout", default=0.1, group="block"),
        Field(names=("hidden_dropout",), flag="--hidden-dropout", default=0.1, group="block"),
        Field(names=("position_embedding_type",), flag="--position-embedding-type", group="rope"),
        Field(names=("vocab_size",), flag="--vocab-size", group="vocabulary"),
        Field(names=("make_vocab_size_divisible_by",), flag="--make-vocab-size-divisible-by", group="vocabulary"),
        Field(names=("padded_vocab_size",), flag="--padded-vocab-size", group="vocabulary"),
        Field(names=("bf16",), flag="--bf16", default=False, group="dtype"),
        Field(names=("fp16",), flag="--fp16", default=False, group="dtype"),
    )
}

#: YaRN without MLA: attribute of YarnScaling -> field, with the defaults of ``_apply_yarn_config_from_args`` (0.19).
YARN: Final[Mapping[str, Field]] = {
    "factor": Field(names=("rotary_scaling_factor",), flag="--rotary-scaling-factor", default=1.0, group="rope"),
    "original_max_position_embeddings": Field(
        names=("yarn_original_max_position_embeddings",),
        flag="--yarn-original-max-position-embeddings",
        default=4096,
        group="rope",
    ),
    "beta_fast": Field(names=("yarn_beta_fast",), flag="--yarn-beta-fast", default=32.0, group="rope"),
    "beta_slow": Field(names=("yarn_beta_slow",), flag="--yarn-beta-slow", default=1.0, group="rope"),
    "truncate": Field(
        names=("yarn_correction_range_round_to_int",),
        flag="--no-yarn-correction-range-round-to-int",
        default=True,
        group="rope",
    ),
}
MSCALE: Final = Field(names=("mscale",), flag="--mscale", default=1.0, group="rope")
MSCALE_ALL_DIM: Final = Field(names=("mscale_all_dim",), flag="--mscale-all-dim", default=0.0, group="rope")
#: Attribute of LatentAttention -> field.
LATENT: Final[Mapping[str, Field]] = {
    "q_lora_rank": Field(names=("q_lora_rank",), flag="--q-lora-rank", group="latent attention"),
    "kv_lora_rank": Field(names=("kv_lora_rank",), flag="--kv-lora-rank", default=32, group="latent attention"),
    "qk_nope_head_dim": Field(names=("qk_head_dim",), flag="--qk-head-dim", default=128, group="latent attention"),
    "qk_rope_head_dim": Field(
        names=("qk_pos_emb_head_dim",), flag="--qk-pos-emb-head-dim", default=64, group="latent attention"
    ),
    "v_head_dim": Field(names=("v_head_dim",), flag="--v-head-dim", default=128, group="latent attention"),
}
#: YaRN with MLA: attribute of YarnScaling -> field, with the defaults of ``MLATransformerConfig`` (0.16 to 0.19). Three
#: have no flag, but count if the args have them. Megatron always rounds the bounds of the partly stretched range.
LATENT_YARN: Final[Mapping[str, Field]] = {
    "factor": YARN["factor"],
    "original_max_position_embeddings": Field(names=("original_max_position_embeddings",), default=4096),
    "beta_fast": Field(names=("beta_fast",), default=32.0),
    "beta_slow": Field(names=("beta_slow",), default=1.0),
}
#: Only Megatron-Bridge has this field, for Ministral 3 and Mistral 4 (models/ministral3/model_config.py, 0.7).
LLAMA_4_SCALING: Final = Field(names=("llama_4_scaling_beta",), default=0.0)

#: Attribute of Experts -> field, in three tables: fields of all models with experts, fields of some, and the groups
#: that limit the router's choice, which count only if the args have ``moe_router_group_topk``.
EXPERTS: Final[Mapping[str, Field]] = {
    "num_experts": Field(names=("num_experts",), flag="--num-experts", group="experts"),
    "experts_per_token": Field(names=("moe_router_topk",), flag="--moe-router-topk", default=2, group="experts"),
    "intermediate_size": Field(names=("moe_ffn_hidden_size",), flag="--moe-ffn-hidden-size", group="experts"),
}
MORE_OF_EXPERTS: Final[Mapping[str, Field]] = {
    "shared_intermediate_size": Field(
        names=("moe_shared_expert_intermediate_size",),
        flag="--moe-shared-expert-intermediate-size",
        default=0,
        group="experts",
    ),
    "routed_scaling_factor": Field(
        names=("moe_router_topk_scaling_factor",),
        flag="--moe-router-topk-scaling-factor",
        default=1.0,
        group="experts",
    ),
}
GROUPS_OF_EXPERTS: Final[Mapping[str, Field]] = {
    "num_groups": Field(names=("moe_router_num_groups",), flag="--moe-router-num-groups", group="experts"),
    "groups_per_token": Field(names=("moe_router_group_topk",), flag="--moe-router-group-topk", group="experts"),
}
#: Whether the softmax is over all experts: the probabilities of the chosen experts do not add up to 1 then.
PRE_SOFTMAX: Final = Field(
    names=("moe_router_pre_softmax",), flag="--moe-router-pre-softmax", default=False, group="experts"
)
#: Values that all experts of the Mistral family have. How they are computed and balanced is not part of the model.
EXPERTS_ARCHITECTURE: Final[Demands] = (
    (Field(names=("moe_router_score_function",), default="softmax"), "softmax"),
    *(
        (Field(names=(name,), default=False), False)
        for name in ("moe_router_enable_expert_bias", "moe_shared_expert_gate", "moe_apply_probs_on_input")
    ),
    *(
        (Field(names=(name,)), None)
        for name in (
            *("moe_latent_size", "moe_mlp_glu_interleave_size", "moe_shared_expert_glu_interleave_size"),
            "moe_router_topk_limited_devices",
        )
    ),
)
MOE_LAYER_FREQ: Final = Field(names=("moe_layer_freq",), default=1)
LOAD_BALANCING: Final = Field(names=("moe_router_load_balancing_type",), default="aux_loss")

#: Every field that describes the model.
FIELDS: Final = tuple(
    dict.fromkeys(
        (
            *SAME_VALUE.values(),
            *(field for field, _ in ARCHITECTURE),
            *COMPUTED.values(),
            *LATENT.values(),
            *EXPERTS.values(),
            *MORE_OF_EXPERTS.values(),
            *GROUPS_OF_EXPERTS.values(),
            PRE_SOFTMAX,
            *YARN.values(),
            *LATENT_YARN.values(),
            MSCALE,
            MSCALE_ALL_DIM,
        )
    )
)

#: Other fields that Megatron-LM and Megatron-Bridge read from a checkpoint's args, with Megatron-LM's defaults. Bridge
#: fails if one is missing (mlm_compat/arguments.py, mlm_compat/model.py and model_load_save.py of 0.6 and 0.7).
UNCHANGED: Final[Mapping[str, Any]] = {
    "add_position_embedding": True,
    "use_rotary_position_embeddings": False,
    "apply_query_key_layer_scaling": False,
    "virtual_pipeline_model_parallel_size": None,
    "decoder_first_pipeline_num_layers": None,
    "decoder_last_pipeline_num_layers": None,
    "overlap_p2p_comm": False,
    "cp_comm_type": ["p2p"],
    "transformer_impl": "transformer_engine",
    "no_persist_layer_norm": False,
    "bias_swiglu_fusion": True,
    "bias_gelu_fusion": False,
    "fp8_param_gather": False,
    "fp16_lm_cross_entropy": False,
    "init_method_xavier_uniform": False,
    "init_model_with_meta_device": False,
    "moe_grouped_gemm": False,
    "config_logger_dir": "",
    "no_save_optim": True,
    "no_save_rng": True,
    "ckpt_format": "torch_dist",
}
DTYPE_FLAGS: Final[Mapping[str, str]] = {"bf16": "bfloat16", "fp16": "float16"}
