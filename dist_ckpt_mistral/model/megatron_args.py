"""``MistralConfig`` <-> the ``args`` namespace of Megatron-LM's ``pretrain_gpt.py``: one table for both directions.

The table also says with which flag ``pretrain_gpt.py`` is told each field, and what an absent field counts as: its
default there. Sources: megatron/training/arguments.py (``validate_args``, ``core_transformer_config_from_args``) and
checkpointing.py (``load_args_from_checkpoint``), Megatron-LM core_v0.12 to 0.19. Since 0.16 most of the parser is made
from the fields of ``TransformerConfig``, which renamed two of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from dist_ckpt_mistral.dtypes import TorchDtype
from dist_ckpt_mistral.errors import ConfigError, UnsupportedModelError
from dist_ckpt_mistral.model.checks import is_positive_int
from dist_ckpt_mistral.model.config import MistralConfig
from dist_ckpt_mistral.model.megatron_vocabulary import vocab_size_of
from dist_ckpt_mistral.model.parallel_layout import VOCABULARY_MULTIPLE, padded_vocab_size
from dist_ckpt_mistral.model.yarn import YarnScaling


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """One field of the args: the names it has had, newest last, its default there, and the flag that sets it.

    ``flag`` is None where none is needed or none exists. For a field that is true or false, the flag turns the default
    over. ``group`` is the heading under which the flag is shown.
    """

    names: tuple[str, ...]
    flag: str | None = None
    default: Any = None
    group: str = "sizes"

    @property
    def name(self) -> str:
        """The name to call it by: the oldest, which is that of the flag."""
        return self.names[0]

    def of(self, args: Mapping[str, Any]) -> Any:  # noqa: ANN401  (whatever the args hold)
        """The value in ``args``; the default where the args are older than the field, or do not say."""
        return next((args[name] for name in reversed(self.names) if args.get(name) is not None), self.default)


#: Fields that hold an attribute of MistralConfig unchanged.
_SAME_VALUE: Final[Mapping[str, Field]] = {
    "num_hidden_layers": Field(names=("num_layers",), flag="--num-layers"),
    "hidden_size": Field(names=("hidden_size",), flag="--hidden-size"),
    "intermediate_size": Field(names=("ffn_hidden_size",), flag="--ffn-hidden-size"),
    "num_attention_heads": Field(names=("num_attention_heads",), flag="--num-attention-heads"),
    "head_dim": Field(names=("kv_channels",), flag="--kv-channels", group="attention"),
    "rms_norm_eps": Field(names=("norm_epsilon", "layernorm_epsilon"), flag="--norm-epsilon", group="block"),
    "rope_theta": Field(names=("rotary_base",), flag="--rotary-base", group="rope"),
    "max_position_embeddings": Field(
        names=("max_position_embeddings",), flag="--max-position-embeddings", group="rope"
    ),
}

#: What makes a model a dense Mistral, with the value that it must have.
_ARCHITECTURE: Final[tuple[tuple[Field, Any], ...]] = (
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
            *(("qk_layernorm",), ("qk_l2_norm",), ("attention_output_gate",), ("multi_latent_attention",)),
            ("apply_residual_connection_post_layernorm",),
        )
    ),
    *(
        (Field(names=(name,)), None)
        for name in (
            *("num_experts", "mtp_num_layers", "hybrid_layer_pattern", "hybrid_override_pattern"),
            *("heterogeneous_layers_config_path", "heterogeneous_layers_config_encoded_json"),
            *("experimental_attention_variant", "linear_attention_freq", "no_rope_freq", "softmax_scale"),
            *("rotary_seq_len_interpolation_factor", "glu_linear_offset", "activation_func_clamp_value"),
        )
    ),
)

#: Fields that are computed, by name.
_COMPUTED: Final[Mapping[str, Field]] = {
    field.name: field
    for field in (
        Field(names=("group_query_attention",), flag="--group-query-attention", default=False, group="attention"),
        Field(names=("num_query_groups",), flag="--num-query-groups", group="attention"),
        Field(names=("window_size",), flag="--window-size", group="attention"),
        Field(names=("window_attn_skip_freq",)),
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

#: YaRN outside of MLA: attribute of YarnScaling -> field, with the defaults of ``_apply_yarn_config_from_args`` (0.19).
_YARN: Final[Mapping[str, Field]] = {
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
_MSCALE: Final = Field(names=("mscale",), flag="--mscale", default=1.0, group="rope")
_MSCALE_ALL_DIM: Final = Field(names=("mscale_all_dim",), flag="--mscale-all-dim", default=0.0, group="rope")

#: Every field that describes the model.
FIELDS: Final = (
    *_SAME_VALUE.values(),
    *(field for field, _ in _ARCHITECTURE),
    *_COMPUTED.values(),
    *_YARN.values(),
    _MSCALE,
    _MSCALE_ALL_DIM,
)

#: What else Megatron-LM and Megatron-Bridge read from a checkpoint's args, Bridge without asking whether it is there
#: (mlm_compat/arguments.py, mlm_compat/model.py and model_load_save.py of 0.6 and 0.7). Megatron-LM's own defaults.
_UNCHANGED: Final[Mapping[str, Any]] = {
    "add_position_embedding": True,
    "use_rotary_position_embeddings": False,
    "apply_query_key_layer_scaling": False,
    "virtual_pipeline_model_parallel_size": None,
    "expert_model_parallel_size": 1,
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
_DTYPE_FLAGS: Final[Mapping[str, str]] = {"bf16": "bfloat16", "fp16": "float16"}
#: Far more than any model has. Sizes of a hostile checkpoint must not make a table that fills the memory.
_MAX_LAYERS: Final = 100_000


def to_megatron_args(config: MistralConfig, *, dtype: str, tp: int, pp: int) -> dict[str, Any]:
    """The fields that Megatron-LM's ``--use-checkpoint-args`` and Megatron-Bridge read; plain values and one dtype.

    ``dtype`` is that of the stored weights; ``tp`` and ``pp`` are the layout that Megatron-LM assumes by default.
    """
    described: list[tuple[Field, Any]] = [
        *((field, getattr(config, attribute)) for attribute, field in _SAME_VALUE.items()),
        *_ARCHITECTURE,
        *((_COMPUTED[name], value) for name, value in _computed(config, dtype, tp).items()),
        *_yarn_args(config.yarn),
    ]
    args = {name: value for field, value in described for name in field.names}
    if float(config.rope_theta).is_integer():
        args["rotary_base"] = int(config.rope_theta)  # what --rotary-base gives
    return {
        **args,
        **_UNCHANGED,
        "params_dtype": TorchDtype(dtype),
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
    }


def _computed(config: MistralConfig, dtype: str, tp: int) -> dict[str, Any]:
    return {
        "group_query_attention": True,
        "num_query_groups": config.num_key_value_heads,
        "window_size": config.window_size,
        "window_attn_skip_freq": None,
        "untie_embeddings_and_output_weights": not config.tie_word_embeddings,
        "seq_length": config.max_position_embeddings,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "position_embedding_type": "rope" if config.yarn is None else "yarn",
        "vocab_size": config.vocab_size,
        "make_vocab_size_divisible_by": VOCABULARY_MULTIPLE,
        "padded_vocab_size": padded_vocab_size(config.vocab_size, tp),
        **{flag: dtype == name for flag, name in _DTYPE_FLAGS.items()},
    }


def _yarn_args(yarn: YarnScaling | None) -> list[tuple[Field, Any]]:
    """The YaRN fields. Megatron-LM's mscales of 1 and 0 give what transformers does without any."""
    if yarn is None:
        return []
    mscale, mscale_all_dim = yarn.megatron_mscales
    scales = zip((_MSCALE, _MSCALE_ALL_DIM), (mscale, mscale_all_dim), strict=True)
    return [
        *((field, getattr(yarn, attribute)) for attribute, field in _YARN.items()),
        *((field, field.default if value is None else value) for field, value in scales),
    ]


def from_megatron_args(args: Mapping[str, Any], where: str = "the checkpoint's args") -> MistralConfig:
    """The configuration in a checkpoint's own ``args``. What the args leave open is logged as a warning.

    Raises UnsupportedModelError for another architecture, ConfigError when sizes are missing or do not fit.
    """
    position = _COMPUTED["position_embedding_type"].of(args)
    missing = [field.name for field in _SAME_VALUE.values() if field.of(args) is None]
    missing += ["position_embedding_type"] if position is None else []
    if missing:
        raise ConfigError(f"{where} lack {', '.join(missing)}. Give the model's config.json with --config.")
    _refuse_other_architectures(args, where)
    sizes = {attribute: field.of(args) for attribute, field in _SAME_VALUE.items()}
    if is_positive_int(sizes["num_hidden_layers"]) and sizes["num_hidden_layers"] > _MAX_LAYERS:
        raise ConfigError(f"{where} say num_layers={sizes['num_hidden_layers']}: expected at most {_MAX_LAYERS}")
    return MistralConfig(
        **sizes,
        vocab_size=vocab_size_of(args, where),
        num_key_value_heads=_num_query_groups(args),
        sliding_window=_sliding_window(args, where),
        tie_word_embeddings=not _COMPUTED["untie_embeddings_and_output_weights"].of(args),
        yarn=_yarn(args) if position == "yarn" else None,
        dtype=next((dtype for flag, dtype in _DTYPE_FLAGS.items() if args.get(flag)), None),
    )


def _refuse_other_architectures(args: Mapping[str, Any], where: str) -> None:
    foreign = [
        f"{field.name}={found!r}"
        for field, value in _ARCHITECTURE
        if (found := field.of(args)) != value and (value or found)
    ]
    position = args["position_embedding_type"]
    foreign += [f"position_embedding_type={position!r}"] if position not in ("rope", "yarn") else []
    if foreign:
        raise UnsupportedModelError(f"{where} are not those of a dense Mistral model: {', '.join(foreign)}")


def _num_query_groups(args: Mapping[str, Any]) -> Any:  # noqa: ANN401  (whatever it is, MistralConfig checks it)
    """Without ``group_query_attention`` every head has its own keys, whatever ``num_query_groups`` says."""
    groups = args.get("num_query_groups")
    grouped = args.get("group_query_attention", groups is not None)
    return groups if grouped else args["num_attention_heads"]


def _sliding_window(args: Mapping[str, Any], where: str) -> int | None:
    """Megatron's (W - 1, 0) as Hugging Face's W; None and (-1, ...) are full attention.

    The parser makes a tuple of ``--window-size 4095,0``; a file may hold a list, or the text.
    """
    given: Any = args.get("window_size")
    if given is None:
        return None
    window = given.strip("()[] ").split(",") if isinstance(given, str) else given
    try:
        before, after = (int(size) for size in window)
    except (TypeError, ValueError):
        raise ConfigError(f"window_size in {where}: expected (before, after), got {given!r}") from None
    if before < 0:
        return None
    if after > 0:
        raise UnsupportedModelError(f"window_size {given!r} in {where}: Mistral models see nothing after a token.")
    skip = args.get("window_attn_skip_freq")
    if skip is not None and not (isinstance(skip, list | tuple) and all(layer == 1 for layer in skip)):
        raise UnsupportedModelError(
            f"window_attn_skip_freq {skip!r} in {where}: all layers of a Mistral model have the window, or none."
        )
    return before + 1


def _yarn(args: Mapping[str, Any]) -> YarnScaling:
    """YaRN as Megatron computes it. What transformers has no mscales for, an ``attention_factor`` says."""
    values = {attribute: field.of(args) for attribute, field in _YARN.items()}
    mscale, mscale_all_dim = _MSCALE.of(args), _MSCALE_ALL_DIM.of(args)
    plain = YarnScaling(**values)
    if (mscale, mscale_all_dim) == (_MSCALE.default, _MSCALE_ALL_DIM.default):
        return plain
    if mscale and mscale_all_dim:
        return YarnScaling(**values, mscale=mscale, mscale_all_dim=mscale_all_dim)
    stretched = 0.1 * math.log(plain.factor)
    return YarnScaling(**values, attention_factor=(stretched * mscale + 1) / (stretched * mscale_all_dim + 1))
