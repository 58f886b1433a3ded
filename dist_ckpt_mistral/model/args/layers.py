"""Translate between a ``MistralConfig`` and Megatron-LM's args for attention, rotary embeddings and experts."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final, TypeAlias

from dist_ckpt_mistral.errors import ConfigError, UnsupportedModelError
from dist_ckpt_mistral.model.args.fields import (
    COMPUTED,
    EXPERTS,
    EXPERTS_ARCHITECTURE,
    GROUPS_OF_EXPERTS,
    LATENT,
    LATENT_YARN,
    LLAMA_4_SCALING,
    LOAD_BALANCING,
    MOE_LAYER_FREQ,
    MORE_OF_EXPERTS,
    MSCALE,
    MSCALE_ALL_DIM,
    PRE_SOFTMAX,
    SAME_VALUE,
    YARN,
    Field,
    unmet,
)
from dist_ckpt_mistral.model.config.mistral_config import FULL, SLIDING, MistralConfig
from dist_ckpt_mistral.model.config.parts import Experts, LatentAttention, is_positive_int, is_positive_number
from dist_ckpt_mistral.model.config.yarn import YarnScaling

Args: TypeAlias = Mapping[str, Any]
Described: TypeAlias = "list[tuple[Field, Any]]"

_WINDOW: Final = re.compile(r"\(?\s*(-?\d{1,9})\s*,\s*(-?\d{1,9})\s*,?\s*\)?")
#: Load balancing types whose router does not choose by the highest probability (mcore moe/router.py, 0.16 to 0.19).
_OTHER_ROUTING: Final = ("sinkhorn", "quantile_balancing")
#: Number of best experts by which transformers rates a group (Mistral4TopkRouter).
_RATED_BY: Final = 2


def attention_args(config: MistralConfig) -> Described:
    """Fields and values for attention. Raises UnsupportedModelError for scales that Megatron cannot express."""
    latent = config.latent_attention
    computed = {
        "multi_latent_attention": latent is not None,
        "qk_layernorm": latent is not None,
        "group_query_attention": latent is None,
        "num_query_groups": config.num_key_value_heads if latent is None else None,
        # Megatron's own attention takes the size of a value from here (dot_product_attention.py, 0.16 to 0.19).
        "kv_channels": config.head_dim if latent is None else latent.v_head_dim,
        "position_embedding_type": "rope" if latent is not None or config.yarn is None else "yarn",
        **window_args(config),
    }
    return [
        *((COMPUTED[name], value) for name, value in computed.items()),
        *_latent_args(latent),
        *(_yarn_args(config.yarn) if latent is None else latent_rope_args(config.yarn)),
        *([(LLAMA_4_SCALING, config.llama_4_scaling_beta)] if config.llama_4_scaling_beta else []),
    ]


def _latent_args(latent: LatentAttention | None) -> Described:
    """The sizes of latent attention. slime reads ``q_lora_rank`` for every model; None is Megatron-LM's default."""
    if latent is None:
        return [(LATENT["q_lora_rank"], None)]
    return [(field, getattr(latent, attribute)) for attribute, field in LATENT.items()]


def window_args(config: MistralConfig) -> dict[str, Any]:
    """The fields for windows. ``window_attn_skip_freq`` has 1 for a layer with the window, 0 for one without."""
    layers = config.window_layers
    return {
        "window_size": config.window_size if any(layers) else None,
        "window_attn_skip_freq": None if all(layers) or not any(layers) else list(map(int, layers)),
    }


def _yarn_args(yarn: YarnScaling | None) -> Described:
    """The YaRN fields. Megatron-LM's mscales of 1 and 0 have the same effect as none in transformers."""
    if yarn is None:
        return []
    scales = zip((MSCALE, MSCALE_ALL_DIM), yarn.megatron_mscales, strict=True)
    return [
        *((field, getattr(yarn, attribute)) for attribute, field in YARN.items()),
        *((field, field.default if value is None else value) for field, value in scales),
    ]


def latent_rope_args(yarn: YarnScaling | None) -> Described:
    """The fields of rotary embeddings with latent attention (``MLATransformerConfig``).

    YaRN is the default, and the only rope_type that Transformer Engine fuses. Raises UnsupportedModelError for YaRN
    without ``truncate``.
    """
    if yarn is None:
        return [(COMPUTED["rope_type"], "rope"), (COMPUTED["apply_rope_fusion"], False)]
    if not yarn.truncate:
        raise UnsupportedModelError("truncate=False: Megatron's YaRN of latent attention always truncates.")
    return [
        (COMPUTED["rope_type"], "yarn"),
        *((field, getattr(yarn, attribute)) for attribute, field in LATENT_YARN.items()),
        *zip((MSCALE, MSCALE_ALL_DIM), yarn.latent_mscales, strict=True),
    ]


def attention_of(args: Args, num_layers: object, where: str) -> dict[str, Any]:
    """The fields of a MistralConfig for attention, by name. ``MistralConfig`` checks the values."""
    latent = latent_attention_of(args)
    sliding_window, layer_types = _windows(args, num_layers, where)
    has_yarn = COMPUTED["position_embedding_type"].of(args) == "yarn"
    return {
        "latent_attention": latent,
        "num_key_value_heads": args["num_attention_heads"] if latent else _num_query_groups(args),
        "head_dim": latent.qk_head_dim if latent else COMPUTED["kv_channels"].of(args),
        "sliding_window": sliding_window,
        "layer_types": layer_types,
        "yarn": _latent_yarn(args) if latent else _yarn(args, YARN) if has_yarn else None,
        "llama_4_scaling_beta": LLAMA_4_SCALING.of(args) or None,
    }


def latent_attention_of(args: Args) -> LatentAttention | None:
    """The sizes of latent attention; None without it. Raises ConfigError where they do not fit."""
    if not COMPUTED["multi_latent_attention"].of(args):
        return None
    return LatentAttention(**{attribute: field.of(args) for attribute, field in LATENT.items()})


def unmet_by_attention(args: Args) -> Iterator[str]:
    """Yield the settings of attention that no model of the family has, as ``name=value``."""
    latent, normed, position, rope_type, window = (
        COMPUTED[name].of(args)
        for name in ("multi_latent_attention", "qk_layernorm", "position_embedding_type", "rope_type", "window_size")
    )
    if position not in (("rope",) if latent else ("rope", "yarn")):
        yield f"position_embedding_type={position!r:.200}"
    if bool(normed) != bool(latent):
        yield f"qk_layernorm={normed!r:.200} with multi_latent_attention={latent!r:.200}"
    if latent and rope_type not in (None, "rope", "yarn"):
        yield f"rope_type={rope_type!r:.200}"
    if latent and window is not None:
        yield f"window_size={window!r:.200} with multi_latent_attention"


def _num_query_groups(args: Args) -> Any:  # noqa: ANN401  (MistralConfig checks it)
    """The number of key heads. Without ``group_query_attention`` it is ``num_attention_heads``."""
    groups = args.get("num_query_groups")
    grouped = args.get("group_query_attention", groups is not None)
    return groups if grouped else args["num_attention_heads"]


def _windows(args: Args, num_layers: object, where: str) -> tuple[int | None, tuple[str, ...] | None]:
    """``sliding_window`` and ``layer_types``; the latter is None if all layers are alike.

    With a number n in ``window_attn_skip_freq`` every nth layer has full attention, with a list each layer with a 0
    (``is_layer_window_attention``, 0.16 to 0.19). Raises ConfigError for anything else.
    """
    window, skip = _window(args, where), COMPUTED["window_attn_skip_freq"].of(args)
    if window is None or skip is None or not is_positive_int(num_layers):
        return window, None
    if is_positive_int(skip):
        slides = [number % skip != 0 for number in range(1, num_layers + 1)]
    elif isinstance(skip, list | tuple) and len(skip) == num_layers and all(layer in (0, 1) for layer in skip):
        slides = [layer == 1 for layer in skip]
    else:
        raise ConfigError(
            f"window_attn_skip_freq in {where}: expected a number of layers, or 0 or 1 for each of {num_layers}, "
            f"got {skip!r:.200}"
        )
    if all(slides) or not any(slides):
        return (window if all(slides) else None), None
    return window, tuple(SLIDING if has_window else FULL for has_window in slides)


def _window(args: Args, where: str) -> int | None:
    """Hugging Face's W for Megatron's (W - 1, 0); None for None and (-1, ...), which are full attention.

    The parser makes a tuple of ``--window-size 4095,0``; a file may have a list or the text. Raises ConfigError for
    anything else, UnsupportedModelError for a window after the token.
    """
    value = COMPUTED["window_size"].of(args)
    if value is None:
        return None
    text = _WINDOW.fullmatch(value) if isinstance(value, str) else None
    window = tuple(int(size) for size in text.groups()) if text else value
    if not (isinstance(window, list | tuple) and [type(size) for size in window] == [int, int]):
        raise ConfigError(f"window_size in {where}: expected (before, after), got {value!r:.200}")
    before: int = window[0]
    after: int = window[1]
    if before < 0:
        return None
    if after > 0:
        raise UnsupportedModelError(
            f"window_size {value!r} in {where}: Mistral models have no attention to later tokens."
        )
    return before + 1


def _latent_yarn(args: Args) -> YarnScaling:
    """The YaRN scaling of latent attention.

    transformers (5.23) rotates a part of a head only with YaRN. So YaRN with a factor of 1 replaces rope_type "rope".
    """
    if COMPUTED["rope_type"].of(args) == "rope":
        original = SAME_VALUE["max_position_embeddings"].of(args)
        return YarnScaling(factor=1.0, original_max_position_embeddings=original)
    return _yarn(args, LATENT_YARN)


def _yarn(args: Args, fields: Mapping[str, Field]) -> YarnScaling:
    """The YaRN scaling that Megatron computes.

    An ``attention_factor`` expresses mscales that transformers cannot have. One mscale without the other has no effect,
    as in ``_yarn_get_concentration_factor`` (0.16 to 0.19). Raises ConfigError for values that do not fit.
    """
    values = {attribute: field.of(args) for attribute, field in fields.items()}
    without_mscales, mscales = YarnScaling(**values), (args.get(MSCALE.name), args.get(MSCALE_ALL_DIM.name))
    if None in mscales or mscales == (MSCALE.default, MSCALE_ALL_DIM.default):
        return without_mscales
    if not all(isinstance(mscale, int | float) for mscale in mscales):
        raise ConfigError(f"mscale and mscale_all_dim must be numbers, got {mscales!r:.200}")
    if all(map(is_positive_number, mscales)):
        return YarnScaling(**values, mscale=mscales[0], mscale_all_dim=mscales[1])
    above, below = (0.1 * mscale * math.log(without_mscales.factor) + 1 for mscale in mscales if mscale is not None)
    return YarnScaling(**values, mscale_all_dim=mscales[1] or None, attention_factor=above / below)


def expert_args(experts: Experts | None) -> list[tuple[Field, Any]]:
    """Fields and values that describe experts. Raises UnsupportedModelError as ``require_routable``."""
    if experts is None:
        return [(EXPERTS["num_experts"], None)]
    require_routable(experts)
    more = [(field, getattr(experts, attribute)) for attribute, field in MORE_OF_EXPERTS.items()]
    return [
        *((field, getattr(experts, attribute)) for attribute, field in EXPERTS.items()),
        *((field, None if value == field.default else value) for field, value in more),
        *(
            (field, getattr(experts, attribute) if experts.num_groups > 1 else None)
            for attribute, field in GROUPS_OF_EXPERTS.items()
        ),
        (PRE_SOFTMAX, not experts.normalized),
        *EXPERTS_ARCHITECTURE,
        (MOE_LAYER_FREQ, MOE_LAYER_FREQ.default),
    ]


def require_routable(experts: Experts) -> None:
    """Raise UnsupportedModelError if Megatron's router would choose or weigh experts otherwise than transformers."""
    if experts.experts_per_token == 1 and experts.normalized:
        raise UnsupportedModelError(
            "one expert per token with a probability of 1: Megatron's router needs moe_router_pre_softmax then, "
            "which computes another model (mcore TransformerConfig, 0.16 to 0.19)."
        )
    groups = _other_groups(experts)
    if groups:
        raise UnsupportedModelError(
            f"{groups}: Megatron's router chooses groups in the same way only if normalized=False and "
            f"experts_per_token // groups_per_token is {_RATED_BY}."
        )


def _other_groups(experts: Experts) -> str | None:
    """The groups, in words, if Megatron would choose other groups than transformers; else None.

    Megatron rates a group by its best ``experts_per_token // groups_per_token`` experts, and does so before the softmax
    if ``normalized`` (``group_limited_topk`` in transformer/moe/moe_utils.py, 0.16 to 0.19).
    """
    rated_by = experts.experts_per_token // experts.groups_per_token
    if experts.groups_per_token == experts.num_groups or (not experts.normalized and rated_by == _RATED_BY):
        return None
    return (
        f"groups_per_token={experts.groups_per_token} of num_groups={experts.num_groups} for "
        f"experts_per_token={experts.experts_per_token} with normalized={experts.normalized}"
    )


def experts_of(args: Mapping[str, Any], *, packed: bool) -> Experts | None:
    """The experts of the model; None without experts. ``packed`` is the field of ``Experts``.

    Raises ConfigError where their sizes do not fit.
    """
    if not EXPERTS["num_experts"].of(args):
        return None
    values = {attribute: field.of(args) for attribute, field in EXPERTS.items()}
    if values["intermediate_size"] is None:
        values["intermediate_size"] = SAME_VALUE["intermediate_size"].of(args)
    values |= {attribute: field.of(args) or field.default for attribute, field in MORE_OF_EXPERTS.items()}
    if GROUPS_OF_EXPERTS["groups_per_token"].of(args):
        values |= {attribute: field.of(args) for attribute, field in GROUPS_OF_EXPERTS.items()}
    return Experts(**values, normalized=not PRE_SOFTMAX.of(args), packed=packed)


def unmet_by_experts(args: Mapping[str, Any], experts: Experts, *, latent: bool) -> Iterator[str]:
    """Yield the settings of experts that no model of the family has; ``latent`` is whether attention is latent."""
    yield from unmet(EXPERTS_ARCHITECTURE, args)
    frequency, balancing = MOE_LAYER_FREQ.of(args), LOAD_BALANCING.of(args)
    if any(layer != 1 for layer in (frequency if isinstance(frequency, list | tuple) else [frequency])):
        yield f"moe_layer_freq={frequency!r:.200}"
    if any(kind in _OTHER_ROUTING for kind in (balancing if isinstance(balancing, list | tuple) else [balancing])):
        yield f"moe_router_load_balancing_type={balancing!r:.200}"
    if not latent:
        demands = ((PRE_SOFTMAX, False), *((field, field.default) for field in MORE_OF_EXPERTS.values()))
        demands += ((GROUPS_OF_EXPERTS["groups_per_token"], None),)
        yield from (f"{setting} without multi_latent_attention" for setting in unmet(demands, args))
    elif groups := _other_groups(experts):
        yield groups
    elif experts.shared_intermediate_size % experts.intermediate_size:
        shared = MORE_OF_EXPERTS["shared_intermediate_size"].name
        yield f"{shared}={experts.shared_intermediate_size}, no multiple of {experts.intermediate_size}"
