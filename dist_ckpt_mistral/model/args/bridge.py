"""Translate between a ``MistralConfig`` and ``run_config.yaml``, which Megatron-Bridge keeps in every checkpoint.

Its section ``model`` is either one model provider with all fields (megatron/bridge/models/gpt_provider.py,
``GPTModelProvider``, 0.1 to 0.7), or a ``GPTModelConfig`` around a section ``transformer`` (0.6 and newer,
megatron/training/models/gpt.py of megatron-core 0.19). The fields are Megatron-LM's args under other names: this module
renames them, and megatron_args.py reads and writes them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any, Final

from dist_ckpt_mistral.errors import ConfigError
from dist_ckpt_mistral.messages import listed
from dist_ckpt_mistral.model.args.fields import LATENT, UNCHANGED
from dist_ckpt_mistral.model.args.megatron_args import from_megatron_args, to_megatron_args
from dist_ckpt_mistral.model.config.mistral_config import MistralConfig
from dist_ckpt_mistral.model.config.parts import is_positive_int

#: Bridge's name -> name in Megatron-LM's args, where they differ.
_RENAMED: Final[Mapping[str, str]] = {
    "seq_length": "max_position_embeddings",  # Bridge gives GPTModel its seq_length as max_sequence_length
    "num_moe_experts": "num_experts",
    "rope_scaling": "use_rope_scaling",
    "seq_len_interpolation_factor": "rotary_seq_len_interpolation_factor",
    "yarn_rotary_scaling_factor": "rotary_scaling_factor",
    "yarn_mscale": "mscale",
    "yarn_mscale_all_dim": "mscale_all_dim",
}
#: Bridge's fields for YaRN that have no effect with latent attention: those of MLATransformerConfig count then.
_ONLY_WITHOUT_MLA: Final = ("yarn_rotary_scaling_factor", "yarn_mscale", "yarn_mscale_all_dim")
#: Fields that a GPTModelConfig passes on to an MLATransformerConfig, while it serializes its own defaults (0.19).
_HANDED_ON: Final = ("rotary_base", "rotary_percent")
#: Fields that must be there: their defaults in Bridge would have to be guessed.
_REQUIRED: Final = (
    *("share_embeddings_and_output_weights", "gated_linear_unit", "activation_func"),
    *("num_layers", "hidden_size", "num_attention_heads", "vocab_size"),
)
#: Megatron-LM's args that Bridge expresses otherwise or has no field for.
_ONLY_OF_ARGS: Final = (
    *("swiglu", "group_query_attention", "untie_embeddings_and_output_weights", "padded_vocab_size"),
    *("norm_epsilon", "apply_layernorm_1p", "squared_relu", "quick_geglu", "openai_gelu"),
    *("hybrid_layer_pattern", "hybrid_override_pattern"),
    *("heterogeneous_layers_config_path", "heterogeneous_layers_config_encoded_json"),
)
#: Whether attention is latent -> the class that Bridge makes of the section ``model``. The classes for single families
#: have other defaults or a vision tower.
_PROVIDERS: Final[Mapping[bool, str]] = {
    False: "megatron.bridge.models.gpt_provider.GPTModelProvider",
    True: "megatron.bridge.models.mla_provider.MLAModelProvider",
}
#: Keys of a section that are no fields of the model.
_OF_A_SECTION: Final = ("_target_", "_call_", "_builder_", "transformer")
#: Limits of a Hugging Face configuration, in values and in levels.
_MOST_VALUES: Final = 10_000
_MOST_DEEP: Final = 10
#: The function silu as Bridge writes it: the target of a mapping, or its name (models/gpt/model_config.py, 0.7).
_SILU: Final = ("torch.nn.functional.silu", "silu")


def from_run_config(run_config: Mapping[str, Any], where: str) -> MistralConfig:
    """The configuration in the content of a ``run_config.yaml``; ``where`` names the file in errors.

    Raises UnsupportedModelError for another architecture, ConfigError when sizes are missing or do not fit.
    """
    values = _model_fields(run_config, where)
    missing = [name for name in _REQUIRED if values.get(name) is None]
    if missing:
        raise ConfigError(f"{where} lacks {', '.join(missing)}. Give the model's config.json with --config.")
    return from_megatron_args(_as_args(values), model_fields(where))


def hf_config_of(run_config: Mapping[str, Any], where: str) -> dict[str, Any] | None:
    """The Hugging Face configuration in the section ``model``, as in config.json; None without one.

    Providers of multimodal models keep it (models/ministral3/ministral3_provider.py, 0.6), and the sizes of the vision
    tower stand nowhere else. It is written as arguments of its class (training/utils/config_utils.py, 0.6), or as the
    ``config_dict`` of ``from_dict`` (megatron/training/config/yaml_utils.py of megatron-core 0.19). ``where`` names the
    file in errors. Raises ConfigError if it is absurdly large, as YAML's aliases can make it.
    """
    model = run_config.get("model")
    found = model.get("hf_config") if isinstance(model, Mapping) else None
    if not isinstance(found, Mapping):
        return None
    inner = found.get("config_dict")
    values = _as_json(inner if isinstance(inner, Mapping) else found, where, itertools.count(1))
    return values if isinstance(values, dict) else None


def _as_json(value: object, where: str, counted: Iterator[int], depth: int = 0) -> object:
    """A value as config.json has it: without the names of classes, and dtypes by their names."""
    if next(counted) > _MOST_VALUES or depth > _MOST_DEEP:
        raise ConfigError(f"hf_config in {where} is nested too deep, or has more than {_MOST_VALUES} values")
    if isinstance(value, Mapping):
        target = value.get("_target_")
        if "_call_" in value and isinstance(target, str):
            return target.removeprefix("torch.")
        kept = {str(name): each for name, each in value.items() if name != "_target_"}
        return {name: _as_json(each, where, counted, depth + 1) for name, each in kept.items()}
    if isinstance(value, list | tuple):
        return [_as_json(each, where, counted, depth + 1) for each in value]
    return value


def to_run_config(config: MistralConfig, *, dtype: str, tp: int, pp: int, ep: int) -> dict[str, Any]:
    """The content of a ``run_config.yaml`` with which Bridge opens the weights; ``from_run_config`` reads it back.

    Arguments and errors are those of ``to_megatron_args``. Bridge imports the object that a ``_target_`` names if its
    allowlist has it (megatron/bridge/utils/instantiate_utils.py, 0.6). From the section ``checkpoint`` it knows that
    the checkpoint has no training state (training/checkpointing.py).
    """
    args = to_megatron_args(config, dtype=dtype, tp=tp, pp=pp, ep=ep)
    is_latent = config.latent_attention is not None
    omitted = {*_ONLY_OF_ARGS, *UNCHANGED, *(() if is_latent else (field.name for field in LATENT.values()))}
    names = {arg: name for name, arg in _RENAMED.items() if not (is_latent and name in _ONLY_WITHOUT_MLA)}
    return {
        "model": {
            "_target_": _PROVIDERS[is_latent],
            **{names.get(arg, arg): value for arg, value in args.items() if arg not in omitted},
            "activation_func": _named("torch.nn.functional.silu"),
            "gated_linear_unit": True,
            "gradient_accumulation_fusion": False,  # only for training; may need extensions
            "params_dtype": _named(f"torch.{dtype}"),
            "share_embeddings_and_output_weights": config.tie_word_embeddings,
            "should_pad_vocab": False,  # AutoBridge exports all rows that its model has
            "transformer_layer_spec": _named("megatron.bridge.models.gpt_provider.default_layer_spec"),
        },
        "checkpoint": {"save_optim": False, "save_rng": False, "fully_parallel_save": False},
        "tokenizer": None,
    }


def _named(target: str) -> dict[str, Any]:
    """A function, class or dtype as Bridge writes it; ``_plain`` reads it."""
    return {"_target_": target, "_call_": False}


def model_fields(where: str) -> str:
    """The name in errors of the part of a ``run_config.yaml`` that describes the model."""
    return f"the model fields of {where}"


def args_of_run_config(run_config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Megatron-LM's args for the model in the content of a ``run_config.yaml``; ``where`` names the file in errors.

    Fields that it leaves out are left out of the args. Raises ConfigError if it does not describe a model.
    """
    return _as_args(_model_fields(run_config, where))


def _model_fields(run_config: Mapping[str, Any], where: str) -> dict[str, object]:
    """The fields of the sections ``model`` and ``model.transformer``. Raises ConfigError where the two differ."""
    model = run_config.get("model")
    if not isinstance(model, Mapping):
        raise ConfigError(f"{where} has no section model. Give the model's config.json with --config.")
    inner, outer = (_fields(section) for section in (model.get("transformer"), model))
    if inner.get("multi_latent_attention"):
        outer = {name: value for name, value in outer.items() if name not in _HANDED_ON}
    differ = [name for name in outer if name in inner and outer[name] != inner[name]]
    if differ:
        values = [f"{name:.60} ({outer[name]!r:.60} and {inner[name]!r:.60})" for name in differ]
        raise ConfigError(
            f"the sections model and model.transformer of {where} differ about "
            f"{listed(values)}. Give the model's config.json with --config."
        )
    return inner | outer


def _fields(section: object) -> dict[str, object]:
    """The fields of one section; empty if there is no such section."""
    items = section.items() if isinstance(section, Mapping) else ()
    return {str(name): _plain(value) for name, value in items if name not in _OF_A_SECTION}


def _as_args(values: Mapping[str, Any]) -> dict[str, Any]:
    """Bridge's fields under Megatron-LM's names, and the args that Megatron-LM has instead of some."""
    heads, hidden, tied = (
        values.get(name) for name in ("num_attention_heads", "hidden_size", "share_embeddings_and_output_weights")
    )
    without = _ONLY_WITHOUT_MLA if values.get("multi_latent_attention") else ()
    args = {_RENAMED.get(name, name): value for name, value in values.items() if name not in without}
    if args.get("kv_channels") is None and is_positive_int(heads) and is_positive_int(hidden):
        args["kv_channels"] = hidden // heads  # TransformerConfig.__post_init__, all versions
    groups = values.get("num_query_groups")
    gated, function = values.get("gated_linear_unit"), values.get("activation_func")
    derived = {
        "swiglu": None if gated is None or function is None else gated is True and function in _SILU,
        "num_query_groups": heads if groups is None else groups,
        "untie_embeddings_and_output_weights": None if tied is None else not tied,
    }
    args |= {name: value for name, value in derived.items() if value is not None}
    return {**args, "group_query_attention": True, "padded_vocab_size": None}


def _plain(value: object) -> object:
    """A scalar, a list of scalars, or the target of a mapping, such as a function or a dtype.

    Any other value becomes the words "a mapping" or "a list": YAML aliases may make it endless in an error message.
    """
    if isinstance(value, Mapping):
        target = value.get("_target_")
        return target if isinstance(target, str) else "a mapping"
    if isinstance(value, list | tuple):
        return list(value) if all(isinstance(item, int | float | str | None) for item in value) else "a list"
    return value
