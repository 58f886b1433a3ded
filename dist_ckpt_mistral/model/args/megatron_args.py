"""``MistralConfig`` <-> the ``args`` namespace of Megatron-LM's ``pretrain_gpt.py``, by the table of its fields."""

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
from dist_ckpt_mistral.model.layout.layout import VOCABULARY_MULTIPLE, padded_vocab_size

_LOG = logging.getLogger(__name__)
#: Tokenizers that have no vocabulary but ``args.vocab_size``. Up to 0.17 each adds an end-of-document token to it; from
#: 0.18 on, which brought the field, the token is one of them (core/tokenizers/text/libraries/null_tokenizer.py).
_WITHOUT_VOCABULARY: Final = ("NullTokenizer", "NullMultimodalTokenizer")
_END_OF_DOCUMENT: Final = "null_tokenizer_eod_id"


def to_megatron_args(config: MistralConfig, *, dtype: str, tp: int, pp: int, ep: int = 1) -> dict[str, Any]:
    """The fields that Megatron-LM's ``--use-checkpoint-args`` and Megatron-Bridge read; plain values and one dtype.

    ``dtype`` is that of the stored weights; ``tp``, ``pp`` and ``ep`` are the layout that Megatron-LM assumes by
    default. Raises UnsupportedModelError where Megatron would compute something else, whatever it is told.
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
    """The configuration in a checkpoint's own ``args``. What the args leave open is logged as a warning.

    Raises UnsupportedModelError for another architecture, ConfigError when sizes are missing or do not fit.
    """
    config = _parsed(args, where, vocab_size_of(args, where))
    if config.model_type == "mistral4" and config.llama_4_scaling_beta is None:
        _LOG.warning(
            "%s do not tell llama_4_scaling_beta, which Megatron has not: it is taken for 0. "
            "Give config.json with --config for a model that has it.",
            where,
        )
    return config


def args_disagreements(config: MistralConfig, args: Mapping[str, Any], where: str) -> list[Disagreement]:
    """Every value that a configuration and a checkpoint's ``args`` give differently.

    What the args leave open is taken from ``config``. Both are compared in the form in which the args say them, so that
    only what they can say counts. Raises UnsupportedModelError where the args are those of another architecture, or
    Megatron cannot express ``config``; ConfigError where the args hold values that do not fit.
    """
    expected = to_megatron_args(config, dtype=config.dtype or "bfloat16", tp=1, pp=1)
    same, other = (_parsed(each, where, config.vocab_size) for each in (expected, _completed(args, expected)))
    found = disagreements(same, other)
    rows = other_vocab_size(args, config.vocab_size, where)
    if rows is not None:
        found.append(Disagreement(name="vocab_size", first=config.vocab_size, second=rows, of_weights=True))
    return found


def _completed(args: Mapping[str, Any], expected: Mapping[str, Any]) -> dict[str, Any]:
    """``args`` with the values of ``expected`` for every field that they give under none of its names."""
    given = {name: value for name, value in args.items() if value is not None or name not in _NEVER_NONE}
    elsewhere = {name for field in FIELDS if not given.keys().isdisjoint(field.names) for name in field.names}
    return {name: value for name, value in expected.items() if name not in elsewhere} | given


#: Fields of which None says nothing: no model is without them.
_NEVER_NONE: Final = frozenset(
    name
    for field in (*SAME_VALUE.values(), COMPUTED["kv_channels"], COMPUTED["position_embedding_type"])
    for name in field.names
)


def _parsed(args: Mapping[str, Any], where: str, vocab_size: int) -> MistralConfig:
    found = _found(args, where)
    model_type = _model_type(found)
    _refuse_other_architectures(args, found, model_type, where)
    return MistralConfig(
        **found,
        model_type=model_type,
        vocab_size=vocab_size,
        tie_word_embeddings=not COMPUTED["untie_embeddings_and_output_weights"].of(args),
        dtype=next((dtype for flag, dtype in DTYPE_FLAGS.items() if args.get(flag)), None),
    )


def _found(args: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields of a MistralConfig that say what the model is made of; they are yet to be checked."""
    latent = latent_attention_of(args)
    required = [*SAME_VALUE.values(), COMPUTED["position_embedding_type"]]
    required += [COMPUTED["kv_channels"]] if latent is None else []
    missing = [field.name for field in required if field.of(args) is None]
    if missing:
        raise ConfigError(f"{where} lack {', '.join(missing)}. Give the model's config.json with --config.")
    sizes = {attribute: field.of(args) for attribute, field in SAME_VALUE.items()}
    num_layers = sizes["num_hidden_layers"]
    if is_positive_int(num_layers) and num_layers > MAX_LAYERS:  # before anything is made for each of them
        raise ConfigError(f"{where} say num_layers={num_layers}: expected at most {MAX_LAYERS}")
    experts = experts_of(args, packed=latent is not None)
    if experts is not None and latent is None:
        sizes["intermediate_size"] = experts.intermediate_size
    return {**sizes, **attention_of(args, num_layers, where), "experts": experts}


#: Fields of a MistralConfig that only models of some families have.
_ONLY_OF: Final[Mapping[str, tuple[str, ...]]] = {
    "layer_types": WITH_LAYER_TYPES,
    "llama_4_scaling_beta": ("ministral3", "mistral4"),
}


def _model_type(found: Mapping[str, Any]) -> str:
    """The family of a model with these fields, if it is of one at all."""
    if found["latent_attention"] is not None:
        return "mistral4"
    if found["experts"] is not None:
        return "mixtral"
    if found["layer_types"] is not None:
        return "ministral"
    return "mistral" if found["llama_4_scaling_beta"] is None else "ministral3"


def _refuse_other_architectures(args: Mapping[str, Any], found: Mapping[str, Any], model_type: str, where: str) -> None:
    experts, is_latent = found["experts"], found["latent_attention"] is not None
    foreign = [*unmet(ARCHITECTURE, args), *unmet_by_attention(args)]
    if experts is not None:
        foreign += unmet_by_experts(args, experts, latent=is_latent)
    elif is_latent:
        foreign.append("multi_latent_attention=True without num_experts")
    foreign += [
        f"{field}={found[field]!r:.200} in a model that is otherwise {model_type}"
        for field, families in _ONLY_OF.items()
        if found[field] is not None and model_type not in families
    ]
    if foreign:
        raise UnsupportedModelError(f"{where} are those of no model of the Mistral family: {', '.join(foreign)}")


def vocab_size_of(args: Mapping[str, Any], where: str) -> int:
    """The true vocabulary size if the args tell it, else the padded one, with a warning.

    ``args.vocab_size`` is what the user typed: it counts where it pads to the ``padded_vocab_size`` of the args.
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
        "Give config.json with --config to leave padded rows behind.",
        where,
        padded,
    )
    return padded


def other_vocab_size(args: Mapping[str, Any], vocab_size: int, where: str) -> int | None:
    """The vocabulary size that the args tell, if it cannot be ``vocab_size``; None where it can.

    Args that tell only the padded size allow every size that Megatron-LM pads to it. A NullTokenizer may or may not
    have counted its end-of-document token.
    """
    given, padded = _sizes(args, where)
    if given is not None and args.get("tokenizer_type") in _WITHOUT_VOCABULARY:
        return None if vocab_size in (given, given + 1) else given
    if given is not None and (padded is None or _pads_to(given, padded, args)):
        return None if vocab_size == given else given
    return None if padded is None or _pads_to(vocab_size, padded, args) else padded


def is_padding(rows: int, vocab_size: int, args: Mapping[str, Any], *, most_tp: int) -> bool:
    """Whether a vocabulary of ``vocab_size`` may be stored in ``rows`` rows.

    That is so where ``args``, which may be empty, pad it to them, or where Megatron's default does at a tensor
    parallelism of up to ``most_tp``.
    """
    multiples = [_multiple(args), *(VOCABULARY_MULTIPLE * tp for tp in range(1, most_tp + 1))]
    return rows == vocab_size or any(rows % each == 0 and 0 < rows - vocab_size < each for each in multiples)


def _sizes(args: Mapping[str, Any], where: str) -> tuple[int | None, int | None]:
    """``vocab_size`` and ``padded_vocab_size`` of the args. Raises ConfigError where one is not a size."""
    given, padded = args.get("vocab_size"), args.get("padded_vocab_size")
    for name, size in (("vocab_size", given), ("padded_vocab_size", padded)):
        if size is not None and not is_positive_int(size):
            raise ConfigError(f"{name} in {where}: expected a positive integer, got {size!r}")
    return given, padded


def _null_vocab_size(given: int, padded: int | None, args: Mapping[str, Any], where: str) -> int:
    """The size that a NullTokenizer stands for.

    Scripts go on counting as up to 0.17, and Megatron-LM takes the padded size from a checkpoint whatever they say. One
    row too many only pads, one too few loses a token: unless the user placed the token, the larger size is taken.
    """
    if args.get(_END_OF_DOCUMENT) is not None or (padded is not None and given >= padded):
        return given
    if _END_OF_DOCUMENT in args:
        _LOG.warning(
            "%s name a NullTokenizer of %s tokens, with or without one for the end of a document: %s rows are taken. "
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
    """What Megatron-LM pads a vocabulary to a multiple of."""
    factors = (args.get("make_vocab_size_divisible_by"), args.get("tensor_model_parallel_size"))
    multiple, tp = (each if is_positive_int(each) else None for each in factors)
    return (multiple or VOCABULARY_MULTIPLE) * (tp or 1)
