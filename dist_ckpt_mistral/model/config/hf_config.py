"""Read a Hugging Face config.json into the fields of a ``MistralConfig``, and write one from them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any, Final

from dist_ckpt_mistral.errors import ConfigError, UnsupportedModelError
from dist_ckpt_mistral.model.config.families import (
    COMMON_DEFAULTS,
    COMMON_FIXED,
    FAMILIES,
    LATENT_SIZES,
    MULTIMODAL,
    VISION_DEFAULTS,
    VISION_TYPE,
    Family,
    Raw,
    require_language_model,
    require_supported,
)
from dist_ckpt_mistral.model.config.parts import LatentAttention, Vision, is_positive_int
from dist_ckpt_mistral.model.config.yarn import rope_parameters, yarn_of

_LOG = logging.getLogger(__name__)

REQUIRED_SIZES: Final = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
_TIED: Final = "tie_word_embeddings"


def language_model(raw: Raw, where: str) -> dict[str, Any]:
    """The part of a config.json that describes the language model: all of it, or a multimodal model's text_config.

    The outer dtype of a multimodal model counts before the inner one. For its ties see ``tie_is_open``.
    """
    if require_supported(raw, where) != MULTIMODAL:
        return dict(raw)
    text = raw.get("text_config")
    if not isinstance(text, Mapping):
        raise ConfigError(f"{where} has no text_config. Check that it is the model's own config.json.")
    outer, inner = raw.get(_TIED), text.get(_TIED)
    tied = inner if inner is not None and (outer is None or outer is True) else outer
    outermost = {"dtype": _dtype(raw) or _dtype(text), **({} if tied is None else {_TIED: tied})}
    merged = {"model_type": "mistral", **text, **outermost}
    if require_supported(merged, f"text_config of {where}") == MULTIMODAL:
        raise UnsupportedModelError(f"text_config of {where} describes a multimodal model again")
    return merged


def tie_is_open(raw: Raw) -> bool:
    """Whether the stored tensors decide if embeddings are tied, because config.json does not.

    transformers goes by the outer value of a multimodal config.json, by default true, and unties if the files hold
    another head (5.24, modeling_utils.py, ``tie_weights``). It writes an outer ``true`` beside every text_config
    (configuration_mistral3.py), so an outer value decides only if it is ``false``.
    """
    text = raw.get("text_config") if raw.get("model_type") == MULTIMODAL else None
    return isinstance(text, Mapping) and raw.get(_TIED) is not False and text.get(_TIED) is not True


def with_tie(raw: Raw, *, tied: bool) -> dict[str, Any]:
    """The config.json of a multimodal model with the same ``tie_word_embeddings`` on both levels."""
    return {**raw, _TIED: tied, "text_config": {**raw["text_config"], _TIED: tied}}


def config_fields(raw: Raw, where: str) -> dict[str, Any]:
    """The fields of a ``MistralConfig`` from a config.json, by name. ``MistralConfig`` checks the values.

    Raises ConfigError when sizes are missing or do not fit, UnsupportedModelError for another architecture.
    """
    described = language_model(raw, where)
    require_language_model(raw, where)
    family = FAMILIES[described["model_type"]]
    renamed = {usual: described.get(name) for name, usual in family.renamed.items()}
    text = described | {usual: value for usual, value in renamed.items() if value is not None}
    missing = [name for name in (*REQUIRED_SIZES, *family.required) if text.get(name) is None]
    if missing:
        raise ConfigError(f"{where} lacks {', '.join(missing)}. Check that it is the model's own config.json.")
    _refuse_what_megatron_lacks(text, family, where)
    values = {**COMMON_DEFAULTS, **family.defaults, **text}
    if text.get("rope_parameters") is None:
        values["rope_parameters"] = family.defaults.get("rope_parameters")
    if values["num_key_value_heads"] is None:
        values["num_key_value_heads"] = values["num_attention_heads"]
    latent = LatentAttention(**{name: values[name] for name in LATENT_SIZES}) if family.has_latent_attention else None
    rotated = 1.0 if latent is None else latent.qk_rope_head_dim / latent.qk_head_dim
    rope = rope_parameters(values, partial_rotary_factor=rotated)
    for warning in _deviations({"auto_map": raw.get("auto_map"), **described}, rope, family):
        _LOG.warning("%s: %s", where, warning)
    beta = rope.get("llama_4_scaling_beta") if _scales_queries(family) else None
    return {
        **{name: values[name] for name in (*REQUIRED_SIZES, "num_key_value_heads", "rms_norm_eps")},
        "model_type": text["model_type"],
        "head_dim": _head_dim(values, latent),
        "rope_theta": rope.get("rope_theta", values["rope_theta"]),
        "max_position_embeddings": values["max_position_embeddings"],
        "sliding_window": None if "sliding_window" in family.ignored else values.get("sliding_window"),
        "layer_types": None if "layer_types" in family.ignored else _layer_types(text),
        "tie_word_embeddings": values["tie_word_embeddings"],
        "yarn": yarn_of(values, rope, values["max_position_embeddings"]),
        "llama_4_scaling_beta": None if beta == 0 else beta,
        "experts": None if family.experts is None else family.experts(values),
        "latent_attention": latent,
        "vision": _vision(raw, where) if raw["model_type"] == MULTIMODAL else None,
        "dtype": _dtype(text),
        "hf_config": dict(raw),
    }


def _vision(raw: Raw, where: str) -> Vision:
    """The sizes of a multimodal model's vision tower and projector."""
    vision = raw.get("vision_config")
    if not isinstance(vision, Mapping):
        raise ConfigError(f"{where} has no vision_config. Check that it is the model's own config.json.")
    if vision.get("model_type", VISION_TYPE) != VISION_TYPE:
        raise UnsupportedModelError(
            f"model_type {vision['model_type']!r} in vision_config of {where}: expected {VISION_TYPE!r}."
        )
    layers = raw.get("vision_feature_layer", -1)
    return Vision(
        **{name: vision.get(name, default) for name, default in VISION_DEFAULTS.items()},
        merged_patches=raw.get("spatial_merge_size", 2),
        feature_layers=len(layers) if isinstance(layers, list) else 1,
        projector_bias=raw.get("multimodal_projector_bias", False),
    )


def _refuse_what_megatron_lacks(text: Raw, family: Family, where: str) -> None:
    """Raise UnsupportedModelError for a value that Megatron's layers cannot express."""
    for name, value in {**COMMON_FIXED, **family.fixed}.items():
        if text.get(name, value) not in (value, None):
            raise UnsupportedModelError(f"{name}={text[name]!r} in {where} is not supported: expected {value!r}.")


def _scales_queries(family: Family) -> bool:
    """Whether the family scales queries by position: transformers has default rope_parameters for those that do."""
    return "rope_parameters" in family.defaults


def _deviations(text: Raw, rope: Raw, family: Family) -> Iterator[str]:
    """Yield a warning for each value that is ignored, as in transformers, or read in another way than there.

    ``rope`` are the rope_parameters in effect. See configuration_utils.py and modeling_rope_utils.py of 5.24.
    """
    model_type = text["model_type"]
    if text.get("auto_map"):
        yield f"auto_map names code of its own, which is not run: the model is read as {family.architecture}"
    if "sliding_window" not in {**family.defaults, **text}:
        yield (
            "sliding_window is missing and read as null, full attention, where transformers takes 4096. "
            "Say null or a number in config.json"
        )
    ignored = {name: text.get(name) for name in family.ignored}
    if not _scales_queries(family):
        ignored["llama_4_scaling_beta"] = rope.get("llama_4_scaling_beta")
    yield from (
        f"{name} is ignored, as transformers does for model_type {model_type!r}: got {value!r:.200}"
        for name, value in ignored.items()
        if value is not None
    )
    original, inside = (
        "original_max_position_embeddings",
        "rope_scaling" if text.get("rope_scaling") else "rope_parameters",
    )
    twice = [
        *((name, text.get(name), usual, text.get(usual)) for name, usual in family.renamed.items()),
        ("dtype", text.get("dtype"), "torch_dtype", text.get("torch_dtype")),
        ("rope_scaling", text.get("rope_scaling") or None, "rope_parameters", text.get("rope_parameters") or None),
        (f"rope_theta of {inside}", rope.get("rope_theta"), "rope_theta", text.get("rope_theta")),
        (original, text.get(original), f"{original} of {inside}", rope.get(original)),
    ]
    yield from (
        f"{other} is ignored beside {name}, as transformers 5 does: got {ignored_value!r:.200} beside {value!r:.200}"
        for name, value, other, ignored_value in twice
        if None not in (value, ignored_value) and value != ignored_value
    )


def _layer_types(text: Raw) -> Any:  # noqa: ANN401  (MistralConfig checks it)
    types = text.get("layer_types")
    return tuple(types) if isinstance(types, list) else types


def _head_dim(values: Raw, latent: LatentAttention | None) -> Any:  # noqa: ANN401  (MistralConfig checks it)
    """The dimensions of a query or key head. Raises ConfigError where the sizes do not give one."""
    if latent is not None:
        if values.get("head_dim") not in (None, latent.qk_head_dim):
            raise ConfigError(
                f"head_dim: expected {latent.qk_head_dim} (qk_nope_head_dim + qk_rope_head_dim), "
                f"got {values['head_dim']!r}"
            )
        return latent.qk_head_dim
    if values.get("head_dim") is not None:
        return values["head_dim"]
    hidden, heads = values["hidden_size"], values["num_attention_heads"]
    if not (is_positive_int(hidden) and is_positive_int(heads)):
        return 1  # MistralConfig reports the sizes themselves
    if hidden % heads:
        raise ConfigError(
            f"hidden_size={hidden} is not a multiple of num_attention_heads={heads} and there is no head_dim"
        )
    return hidden // heads


def _dtype(raw: Raw) -> str | None:
    """The torch name of the dtype. transformers 5 renamed ``torch_dtype`` to ``dtype`` and still reads the old name."""
    dtype = raw.get("torch_dtype") if raw.get("dtype") is None else raw["dtype"]
    return dtype.removeprefix("torch.") if isinstance(dtype, str) else dtype


#: Fields of a MistralConfig with the same name in config.json, in transformers' order.
_SAME: Final = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps"),
    "sliding_window",  # null is written too: transformers takes 4096 for a missing key
    "tie_word_embeddings",
)


def config_json(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json that transformers 4 and 5 both read, from the fields of a MistralConfig by name."""
    family = FAMILIES[fields["model_type"]]
    return {
        "architectures": [family.architecture],
        "model_type": fields["model_type"],
        **{name: fields[name] for name in _SAME},
        "hidden_act": "silu",
        **_rope(fields, family),
        **({} if fields["layer_types"] is None else {"layer_types": list(fields["layer_types"])}),
        **({} if fields["experts"] is None else family.expert_keys(fields["experts"])),
        **({} if fields["latent_attention"] is None else asdict(fields["latent_attention"])),
        "torch_dtype": fields["dtype"],
    }


def _rope(fields: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """The keys for rotary embeddings: those of transformers 5 for families that transformers 4 lacks."""
    scaling = {} if fields["yarn"] is None else fields["yarn"].to_hf()
    if "rope_parameters" not in family.defaults:
        return {"rope_theta": fields["rope_theta"], **({"rope_scaling": scaling} if scaling else {})}
    # transformers scales the queries of these families in any case: 0 means by 1.
    position = {
        "original_max_position_embeddings": fields["max_position_embeddings"],
        "llama_4_scaling_beta": fields["llama_4_scaling_beta"] or 0.0,
    }
    return {"rope_parameters": {"rope_type": "default", **position, **scaling, "rope_theta": fields["rope_theta"]}}
