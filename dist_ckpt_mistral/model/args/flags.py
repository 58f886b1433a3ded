"""The flags of Megatron-LM's ``pretrain_gpt.py`` for a model and a layout, from the table of args fields.

The flags are those of Megatron-LM core_v0.16 to 0.19 (megatron/training/arguments.py). YaRN without MLA has flags from
0.19 on; with MLA only some of its values have flags.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any, Final

from dist_ckpt_mistral.errors import ConfigError, LayoutError
from dist_ckpt_mistral.model.args.fields import FIELDS, LATENT_YARN, Field
from dist_ckpt_mistral.model.args.megatron_args import to_megatron_args
from dist_ckpt_mistral.model.config.mistral_config import MistralConfig
from dist_ckpt_mistral.model.layout.layout import DEFAULT_ORDER, ParallelLayout
from dist_ckpt_mistral.model.layout.vocabulary import VOCABULARY_MULTIPLE, padded_vocab_size

_LOG = logging.getLogger(__name__)

#: Name in ``ParallelLayout.transformer_config_fields`` -> field of the args.
_LAYOUT: Final[Mapping[str, Field]] = {
    "tensor_model_parallel_size": Field(names=("tensor_model_parallel_size",), flag="--tensor-model-parallel-size"),
    "pipeline_model_parallel_size": Field(
        names=("pipeline_model_parallel_size",), flag="--pipeline-model-parallel-size"
    ),
    "context_parallel_size": Field(names=("context_parallel_size",), flag="--context-parallel-size", default=1),
    "expert_model_parallel_size": Field(
        names=("expert_model_parallel_size",), flag="--expert-model-parallel-size", default=1
    ),
    "expert_tensor_parallel_size": Field(names=("expert_tensor_parallel_size",), flag="--expert-tensor-parallel-size"),
    "virtual_pipeline_model_parallel_size": Field(
        names=("num_virtual_stages_per_pipeline_rank",), flag="--num-virtual-stages-per-pipeline-rank", default=1
    ),
    "num_layers_in_first_pipeline_stage": Field(
        names=("decoder_first_pipeline_num_layers",), flag="--decoder-first-pipeline-num-layers"
    ),
    "num_layers_in_last_pipeline_stage": Field(
        names=("decoder_last_pipeline_num_layers",), flag="--decoder-last-pipeline-num-layers"
    ),
    "account_for_embedding_in_pipeline_split": Field(
        names=("account_for_embedding_in_pipeline_split",),
        flag="--account-for-embedding-in-pipeline-split",
        default=False,
    ),
    "account_for_loss_in_pipeline_split": Field(
        names=("account_for_loss_in_pipeline_split",), flag="--account-for-loss-in-pipeline-split", default=False
    ),
    "pipeline_model_parallel_layout": Field(
        names=("pipeline_model_parallel_layout",), flag="--pipeline-model-parallel-layout"
    ),
    "sequence_parallel": Field(names=("sequence_parallel",), flag="--sequence-parallel", default=False),
    "use_tp_pp_dp_mapping": Field(names=("use_tp_pp_dp_mapping",), flag="--use-tp-pp-dp-mapping", default=False),
}
_LAYOUT_GROUP: Final = "parallelism"
#: Epsilon of the norms of latents in transformers, in every model (modeling_mistral4.py, 5.23).
_LATENT_EPSILON: Final = 1e-6
#: Megatron-LM's only other rank order (megatron/training/initialize.py).
_PIPELINE_BEFORE_DATA: Final = "tp-cp-ep-pp-dp"


def pretrain_flags(
    config: MistralConfig, *, dtype: str, layout: ParallelLayout, vocab_rows: int | None = None
) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """The args that differ from Megatron-LM's defaults, and the flags that set them, by group.

    ``dtype`` is the dtype of the weights. ``vocab_rows`` is the padded vocabulary size of an existing checkpoint, which
    is kept if ``tp`` divides it. Raises LayoutError for a layout that Megatron refuses, ConfigError for a value without
    a flag.
    """
    layout.check(config)
    if not float(config.rope_theta).is_integer():
        raise ConfigError(
            f"rope_theta={config.rope_theta} has no flag: Megatron-LM's --rotary-base takes whole numbers. "
            "Start from a checkpoint that from-hf wrote with --use-checkpoint-args, which restores it."
        )
    args = to_megatron_args(config, dtype=dtype, tp=layout.tp, pp=layout.pp)
    args |= _padding(config.vocab_size, layout.tp, vocab_rows)
    for warning in _inexpressible(config, args):
        _LOG.warning("%s", warning)
    values: dict[str, Any] = {}
    groups: dict[str, list[str]] = {}
    described = [(field, field.group, args.get(field.name)) for field in FIELDS]
    parts = {
        **layout.transformer_config_fields(),
        "sequence_parallel": config.experts is not None and layout.tp > 1,  # MoELayer trains with both or neither
        "use_tp_pp_dp_mapping": _pipeline_before_data(layout),
    }
    if "pipeline_model_parallel_layout" in parts:
        parts.pop("virtual_pipeline_model_parallel_size", None)  # validate_args computes it and refuses the flag
    described += [(_LAYOUT[name], _LAYOUT_GROUP, value) for name, value in parts.items()]
    for field, group, value in described:
        if field.flag is not None and value is not None and value != field.default:
            values[field.name] = value
            groups.setdefault(group, []).extend([field.flag, *_spelled(value)])
    return values, groups


def _inexpressible(config: MistralConfig, args: Mapping[str, Any]) -> Iterator[str]:
    """Yield a warning for each value that no flag sets: how to set it, or how the trained model differs."""
    if config.llama_4_scaling_beta is not None:
        yarn = config.yarn
        exact = "its original context" if yarn is None else f"{yarn.original_max_position_embeddings} tokens"
        yield (
            f"Megatron-LM does not scale queries by position (llama_4_scaling_beta={config.llama_4_scaling_beta}): "
            f"up to {exact} the model is exact, because the scale is 1 there; beyond that its results differ."
        )
    others = [field for field in LATENT_YARN.values() if field.flag is None]
    values = [(field, args.get(field.name, field.default)) for field in others]
    without_flag = [f"{field.name}={value}, not {field.default}" for field, value in values if value != field.default]
    if without_flag:
        yield (
            f"Megatron-LM has no flag for {'; '.join(without_flag)}: set it in the args, between parsing them and "
            "building the model."
        )
    latent = config.latent_attention
    if latent is not None and latent.q_lora_rank is None:
        yield (
            "without q_lora_rank, megatron-core 0.19 puts a norm before linear_q_proj or refuses to build it: "
            "train this model with an older one."
        )
    if latent is not None and config.rms_norm_eps != _LATENT_EPSILON:
        yield (
            f"Megatron-LM normalizes latents with norm_epsilon={config.rms_norm_eps}, transformers with "
            f"{_LATENT_EPSILON}: results differ slightly."
        )


def _spelled(value: Any) -> Iterator[str]:  # noqa: ANN401  (an args value of any type)
    """The argument of a flag; flags of booleans have none."""
    if isinstance(value, tuple):
        yield ",".join(map(str, value))
    elif isinstance(value, list):
        yield f"[{','.join(map(str, value))}]"
    elif not isinstance(value, bool):
        yield str(value)


def _pipeline_before_data(layout: ParallelLayout) -> bool:
    """Whether the rank order needs ``--use-tp-pp-dp-mapping``. Raises LayoutError for one that Megatron-LM lacks."""
    if layout.order not in (DEFAULT_ORDER, _PIPELINE_BEFORE_DATA):
        raise LayoutError(
            f"order={layout.order!r} has no flag: Megatron-LM knows {DEFAULT_ORDER!r} and {_PIPELINE_BEFORE_DATA!r}"
        )
    return layout.order == _PIPELINE_BEFORE_DATA


def _padding(vocab_size: int, tp: int, vocab_rows: int | None) -> dict[str, Any]:
    """The padded vocabulary size, and the divisor with which Megatron-LM computes the same from the true size."""
    padded = padded_vocab_size(vocab_size, tp)
    if vocab_rows is None or vocab_rows <= vocab_size or vocab_rows == padded or vocab_rows % tp:
        return {"padded_vocab_size": padded, "make_vocab_size_divisible_by": VOCABULARY_MULTIPLE}
    return {"padded_vocab_size": vocab_rows, "make_vocab_size_divisible_by": vocab_rows // tp}
