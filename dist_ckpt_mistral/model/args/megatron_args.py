"""Translate between a ``MistralConfig`` and the ``args`` namespace of Megatron-LM's ``pretrain_gpt.py``."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Final

from dist_ckpt_mistral.errors import ConfigError, UnsupportedModelError
from dist_ckpt_mistral.gather.dtypes import TorchDtype
from dist_ckpt_mistral.model.args.fields import (
    ARCHITECTURE,
    COMPUTED,
    DTYPE_FLAGS,
    FIELDS,
    SAME_VALUE,
    UNCHANGED,
    Field,
    unmet,
)
from dist_ckpt_mistral.model.args.hybrid import as_gpt_args
from dist_ckpt_mistral.model.args.layers import (
    attention_args,
    attention_of,
    expert_args,
    experts_of,
    latent_attention_of,
    unmet_by_attention,
    unmet_by_experts,
)
from dist_ckpt_mistral.model.config.agreement import Disagreement, disagreements
from dist_ckpt_mistral.model.config.families import WITH_LAYER_TYPES
from dist_ckpt_mistral.model.config.mistral_config import MistralConfig
from dist_ckpt_mistral.model.config.parts import MAX_LAYERS, is_positive_int
from dist_ckpt_mistral.model.layout.vocabulary import VOCABULARY_MULTIPLE, padded_vocab_size

_LOG = logging.getLogger(__name__)
#: Tokenizers whose vocabulary is just ``args.vocab_size`` tokens. Up to 0.17 each adds an end-of-document token; from
#: 0.18 on that token is one of them, and the field below places it (core/tokenizers/text/libraries/null_tokenizer.py).
_WITHOUT_VOCABULARY: Final = ("NullTokenizer", "NullMultimodalTokenizer")
_END_OF_DOCUMENT: Final = "null_tokenizer_eod_id"
#: Fields that every model has: None means the same as a missing field.
_NEVER_NONE: Final = frozenset(
    name
    for field in (*SAME_VALUE.values(), COMPUTED["kv_channels"], COMPUTED["position_embedding_type"])
    for name in field.names
)
#: Fields of a MistralConfig that only models of some families have.
_ONLY_OF: Final[Mapping[str, tuple[str, ...]]] = {
    "layer_types": WITH_LAYER_TYPES,
    "llama_4_scaling_beta": ("ministral3", "mistral4"),
}


def to_megatron_args(config: MistralConfig, *, dtype: str, tp: int, pp: int, ep: int = 1) -> dict[str, Any]:
    """The args that Megatron-LM's ``--use-checkpoint-args`` and Megatron-Bridge read: plain values and one dtype.

    ``dtype`` is the dtype of the stored weights; ``tp``, ``pp`` and ``ep`` are the layout that Megatron-LM assumes by
    default. Raises UnsupportedModelError for a model that Megatron cannot compute with any args.
    """
    described: list[tuple[Field, Any]] = [
        *((field, getattr(config, attribute)) for attribute, field in SAME_VALUE.items()),
        *ARCHITECTURE,
        *((COMPUTED[name], value) for name, value in _computed(config, dtype, tp).items()),
        *attention_args(config),
        *expert_args(config.experts),
    ]
    args = {name: value for field, value in described for name in field.names}
    if float(config.rope_theta).is_integer():
        args["rotary_base"] = int(config.rope_theta)  # what --rotary-base gives
    return {
        **args,
        **UNCHANGED,
        "params_dtype": TorchDtype(dtype),
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "expert_model_parallel_size": ep,
    }


def _computed(config: MistralConfig, dtype: str, tp: int) -> dict[str, Any]:
    """The values of those ``COMPUTED`` fields that do not belong to attention or experts."""
    return {
        "untie_embeddings_and_output_weights": not config.tie_word_embeddings,
        "seq_length": config.max_position_embeddings,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "vocab_size": config.vocab_size,
        "make_vocab_size_divisible_by": VOCABULARY_MULTIPLE,
        "padded_vocab_size": padded_vocab_size(config.vocab_size, tp),
        **{flag: dtype == name for flag, name in DTYPE_FLAGS.items()},
    }


def from_megatron_args(args: Mapping[str, Any], where: str = "the checkpoint's args") -> MistralConfig:
    """The configuration in a checkpoint's ``args``. Logs a warning for each value that the args do not determine.

    Raises UnsupportedModelError for another architecture, ConfigError when sizes are missing or do not fit.
    """
    args = as_gpt_args(args)
    config = _parsed(args, where, vocab_size_of(args, where))
    if config.model_type == "mistral4" and config.llama_4_scaling_beta is None:
        _LOG.warning(
            "%s do not tell llama_4_scaling_beta, which Megatron does not have: 0 is used. "
            "Give config.json with --config for a model that has it.",
            where,
        )
    return config


def args_disagreements(config: MistralConfig, args: Mapping[str, Any], where: str) -> list[Disagreement]:
    """Every value that a configuration and a checkpoint's ``args`` give differently.

    Values that the args lack are taken from ``config``. Both sides are compared as args, so that only values that args
    can express count. Raises UnsupportedModelError if the args are those of another architecture or Megatron cannot
    express ``config``, ConfigError if the args have values that do not fit.
    """
    args = as_gpt_args(args)
    expected = to_megatron_args(config, dtype=config.dtype or "bfloat16", tp=1, pp=1)
    first, second = (_parsed(values, where, config.vocab_size) for values in (expected, _completed(args, expected)))
    differences = disagreements(first, second)
    rows = other_vocab_size(args, config.vocab_size, where)
    if rows is not None:
        differences.append(Disagreement(name="vocab_size", first=config.vocab_size, second=rows, of_weights=True))
    return differences


def _completed(args: Mapping[str, Any], expected: Mapping[str, Any]) -> dict[str, Any]:
    """``args`` with the values of ``expected`` for every field that they have under no name."""
    present = {name: value for name, value in args.items() if value is not None or name not in _NEVER_NONE}
    not_missing = {name for field in FIELDS if not present.keys().isdisjoint(field.names) for name in field.names}
    return {name: value for name, value in expected.items() if name not in not_missing} | present


def _parsed(args: Mapping[str, Any], where: str, vocab_size: int) -> MistralConfig:
    """The configuration in ``args`` with this vocabulary size. Raises as ``from_megatron_args``."""
    fields = _config_fields(args, where)
    model_type = _model_type(fields)
    _refuse_other_architectures(args, fields, model_type, where)
    return MistralConfig(
        **fields,
        model_type=model_type,
        vocab_size=vocab_size,
        tie_word_embeddings=not COMPUTED["untie_embeddings_and_output_weights"].of(args),
        dtype=next((dtype for flag, dtype in DTYPE_FLAGS.items() if args.get(flag)), None),
    )


def _config_fields(args: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields of a MistralConfig except model_type, vocab_size, ties and dtype. MistralConfig checks the values."""
    latent = latent_attention_of(args)
    required = [*SAME_VALUE.values(), COMPUTED["position_embedding_type"]]
    required += [COMPUTED["kv_channels"]] if latent is None else []
    missing = [field.name for field in required if field.of(args) is None]
    if missing:
        raise ConfigError(f"{where} lack {', '.join(missing)}. Give the model's config.json with --config.")
    sizes = {attribute: field.of(args) for attribute, field in SAME_VALUE.items()}
    num_layers = sizes["num_hidden_layers"]
    if is_positive_int(num_layers) and num_layers > MAX_LAYERS:  # before anything is computed for each layer
        raise ConfigError(f"{where} say num_layers={num_layers}: expected at most {MAX_LAYERS}")
    experts = experts_of(args, packed=latent is not None)
    if experts is not None and latent is None:
        sizes["intermediate_size"] = experts.intermediate_size
    return {**sizes, **attention_of(args, num_layers, where), "experts": experts}


def _model_type(fields: Mapping[str, Any]) -> str:
    """The family to which a model with these fields belongs, if it belongs to one."""
    if fields["latent_attention"] is not None:
        return "mistral4"
    if fields["experts"] is not None:
        return "mixtral"
    if fields["layer_types"] is not None:
        return "ministral"
    return "mistral" if fields["llama_4_scaling_beta"] is None else "ministral3"


def _refuse_other_architectures(
    args: Mapping[str, Any], fields: Mapping[str, Any], model_type: str, where: str
) -> None:
    """Raise UnsupportedModelError with all settings that no model of the family has."""
    experts, is_latent = fields["experts"], fields["latent_attention"] is not None
    foreign = [*unmet(ARCHITECTURE, args), *unmet_by_attention(args)]
    if experts is not None:
        foreign += unmet_by_experts(args, experts, latent=is_latent)
    elif is_latent:
        foreign.append("multi_latent_attention=True without num_experts")
    foreign += [
        f"{name}={fields[name]!r:.200} in a model that is otherwise {model_type}"
        for name, families in _ONLY_OF.items()
        if fields[name] is not None and model_type not in families
    ]
    if foreign:
        raise UnsupportedModelError(f"{where} do not describe a model of the Mistral family: {', '.join(foreign)}")


def vocab_size_of(args: Mapping[str, Any], where: str) -> int:
    """The true vocabulary size if the args have it, else the padded one, with a warning.

    ``args.vocab_size`` is the user's value: it counts only if it pads to the ``padded_vocab_size`` of the args. Raises
    ConfigError if the args have neither.
    """
    given, padded = _sizes(args, where)
    if given is not None and args.get("tokenizer_type") in _WITHOUT_VOCABULARY:
        return _null_vocab_size(given, padded, args, where)
    if given is not None and (padded is None or _pads_to(given, padded, args)):
        return given
    if padded is None:
        raise ConfigError(f"{where} do not tell the vocabulary size. Give config.json with --config.")
    _LOG.warning(
        "%s do not tell the vocabulary size before padding: all %s rows are taken. "
        "Give config.json with --config to drop the padded rows.",
        where,
        padded,
    )
    return padded


def other_vocab_size(args: Mapping[str, Any], vocab_size: int, where: str) -> int | None:
    """The vocabulary size in the args if it contradicts ``vocab_size``, else None.

    Args with only the padded size agree with every size that Megatron-LM pads to it. With a NullTokenizer the size may
    or may not include the end-of-document token.
    """
    given, padded = _sizes(args, where)
    if given is not None and args.get("tokenizer_type") in _WITHOUT_VOCABULARY:
        return None if vocab_size in (given, given + 1) else given
    if given is not None and (padded is None or _pads_to(given, padded, args)):
        return None if vocab_size == given else given
    return None if padded is None or _pads_to(vocab_size, padded, args) else padded


def is_padding(rows: int, vocab_size: int, args: Mapping[str, Any], *, most_tp: int) -> bool:
    """Whether a vocabulary of ``vocab_size`` may be stored in ``rows`` rows.

    It may if the settings in ``args`` (which may be empty) pad it to ``rows``, or Megatron's defaults at a tensor
    parallelism of up to ``most_tp``.
    """
    multiples = [_multiple(args), *(VOCABULARY_MULTIPLE * tp for tp in range(1, most_tp + 1))]
    return rows == vocab_size or any(rows % n == 0 and 0 < rows - vocab_size < n for n in multiples)


def _sizes(args: Mapping[str, Any], where: str) -> tuple[int | None, int | None]:
    """``vocab_size`` and ``padded_vocab_size`` of the args. Raises ConfigError where one is not a size."""
    given, padded = args.get("vocab_size"), args.get("padded_vocab_size")
    for name, size in (("vocab_size", given), ("padded_vocab_size", padded)):
        if size is not None and not is_positive_int(size):
            raise ConfigError(f"{name} in {where}: expected a positive integer, got {size!r}")
    return given, padded


def _null_vocab_size(given: int, padded: int | None, args: Mapping[str, Any], where: str) -> int:
    """The vocabulary size with a NullTokenizer whose ``args.vocab_size`` is ``given``.

    Scripts still count as up to 0.17, and Megatron-LM takes the padded size from a checkpoint in any case. One row too
    many only pads, one too few loses a token. So the larger size is taken unless the user placed the token.
    """
    if args.get(_END_OF_DOCUMENT) is not None or (padded is not None and given >= padded):
        return given
    if _END_OF_DOCUMENT in args:
        _LOG.warning(
            "%s name a NullTokenizer of %s tokens, which may or may not include the end-of-document token: %s rows are "
            "taken. "
            "Give config.json with --config for another number.",
            where,
            given,
            given + 1,
        )
    return given + 1


def _pads_to(size: int, padded: int, args: Mapping[str, Any]) -> bool:
    """Whether Megatron-LM pads ``size`` to ``padded`` (``vocab_size_with_padding``, all versions)."""
    return size <= padded < size + _multiple(args)


def _multiple(args: Mapping[str, Any]) -> int:
    """The number to a multiple of which Megatron-LM pads a vocabulary."""
    divisor, tp = args.get("make_vocab_size_divisible_by"), args.get("tensor_model_parallel_size")
    return (divisor if is_positive_int(divisor) else VOCABULARY_MULTIPLE) * (tp if is_positive_int(tp) else 1)
