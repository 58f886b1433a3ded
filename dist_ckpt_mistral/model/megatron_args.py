"""``MistralConfig`` <-> the ``args`` namespace of Megatron-LM's ``pretrain_gpt.py``.

Field names and the set that ``--use-checkpoint-args`` restores: megatron/training/checkpointing.py,
``load_args_from_checkpoint`` (megatron-core 0.16 to 0.19).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Final

from dist_ckpt_mistral.errors import ConfigError, UnsupportedModelError
from dist_ckpt_mistral.model.config import MistralConfig
from dist_ckpt_mistral.model.parallel_layout import padded_vocab_size

_LOG = logging.getLogger(__name__)

#: What every Mistral model has and other architectures may not: field -> value.
_ARCHITECTURE: Final[Mapping[str, Any]] = {
    "normalization": "RMSNorm",
    "swiglu": True,
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "squared_relu": False,
    "apply_layernorm_1p": False,
    "rotary_interleaved": False,
    "rotary_percent": 1.0,
}
#: Settings of other architectures that must be absent, None or false.
_FOREIGN: Final = ("num_experts", "multi_latent_attention", "mtp_num_layers", "hybrid_layer_pattern", "qk_layernorm")

#: Megatron field -> the MistralConfig attribute that it holds unchanged.
_SAME_VALUE: Final[Mapping[str, str]] = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "kv_channels": "head_dim",
    "norm_epsilon": "rms_norm_eps",
    "rotary_base": "rope_theta",
    "max_position_embeddings": "max_position_embeddings",
}
_DTYPE_FLAGS: Final[Mapping[str, str]] = {"bf16": "bfloat16", "fp16": "float16"}


def to_megatron_args(config: MistralConfig, *, dtype: str, tp: int, pp: int) -> dict[str, Any]:
    """The fields that Megatron-LM's ``--use-checkpoint-args`` and Megatron-Bridge read, primitives only.

    ``dtype`` is that of the stored weights; ``tp`` and ``pp`` are the layout that Megatron-LM assumes by default.
    """
    return {
        **{field: getattr(config, name) for field, name in _SAME_VALUE.items()},
        **_ARCHITECTURE,
        "rotary_base": int(config.rope_theta) if float(config.rope_theta).is_integer() else config.rope_theta,
        "seq_length": config.max_position_embeddings,
        "num_query_groups": config.num_key_value_heads,
        "group_query_attention": True,
        "window_size": config.window_size,
        "position_embedding_type": "rope",
        "add_position_embedding": False,
        "use_rotary_position_embeddings": False,
        "apply_query_key_layer_scaling": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "untie_embeddings_and_output_weights": not config.tie_word_embeddings,
        "vocab_size": config.vocab_size,
        "padded_vocab_size": padded_vocab_size(config.vocab_size, tp),
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "virtual_pipeline_model_parallel_size": None,
        "expert_model_parallel_size": 1,
        "num_experts": None,
        "no_save_optim": True,
        "no_save_rng": True,
        "ckpt_format": "torch_dist",
        **{flag: dtype == name for flag, name in _DTYPE_FLAGS.items()},
    }


def from_megatron_args(args: Mapping[str, Any]) -> MistralConfig:
    """The configuration in a checkpoint's own ``args``. What the args leave open is logged as a warning.

    Raises UnsupportedModelError for another architecture, ConfigError when sizes are missing.
    """
    foreign = [f"{name}={args[name]!r}" for name, value in _ARCHITECTURE.items() if args.get(name, value) != value]
    foreign += [f"{name}={args[name]!r}" for name in _FOREIGN if args.get(name)]
    if foreign:
        raise UnsupportedModelError(
            f"the checkpoint's args are not those of a dense Mistral model: {', '.join(foreign)}"
        )
    missing = [name for name in _SAME_VALUE if args.get(name) is None]
    if missing:
        raise ConfigError(
            f"the checkpoint's args lack {', '.join(missing)}. Give the model's config.json with --config."
        )
    sizes = {name: args[field] for field, name in _SAME_VALUE.items()}
    grouped = args.get("group_query_attention", args.get("num_query_groups") is not None)
    return MistralConfig(
        **sizes,
        vocab_size=_vocab_size(args),
        num_key_value_heads=args["num_query_groups"] if grouped else args["num_attention_heads"],
        sliding_window=_sliding_window(args.get("window_size")),
        tie_word_embeddings=not args.get("untie_embeddings_and_output_weights", False),
        dtype=next((dtype for flag, dtype in _DTYPE_FLAGS.items() if args.get(flag)), None),
    )


def _vocab_size(args: Mapping[str, Any]) -> int:
    """``args.vocab_size``, else the padded one: Megatron-LM does not store the true size with most tokenizers."""
    if args.get("vocab_size") is not None:
        # NullTokenizer appends an end-of-document token of its own (megatron tokenizer, 0.16 to 0.19).
        return int(args["vocab_size"]) + (args.get("tokenizer_type") == "NullTokenizer")
    if args.get("padded_vocab_size") is None:
        raise ConfigError("the checkpoint's args do not tell the vocabulary size. Give config.json with --config.")
    _LOG.warning(
        "the checkpoint's args do not tell the vocabulary size before padding: all %s rows are taken. "
        "Give config.json with --config to leave padded rows behind.",
        args["padded_vocab_size"],
    )
    return int(args["padded_vocab_size"])


def _sliding_window(window_size: object) -> int | None:
    """Megatron's (W - 1, 0) as Hugging Face's W; None and (-1, ...) are full attention."""
    if window_size is None:
        return None
    before = window_size[0] if isinstance(window_size, list | tuple) and window_size else None
    if not isinstance(before, int):
        raise ConfigError(f"window_size in the checkpoint's args: expected (before, after), got {window_size!r}")
    return None if before < 0 else before + 1
