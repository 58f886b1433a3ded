"""Translate ``params.json``, the configuration of Mistral AI's consolidated files, into a Hugging Face config.json.

Sources for the meaning of the keys: mistral-inference (args.py, moe.py, transformer.py), transformers 5.x
(convert_mistral_weights_to_hf.py, convert_ministral3_weights_to_hf.py, convert_mistral4_weight_to_hf.py) and vLLM
(transformers_utils/configs/mistral.py). Every key is used, or is known to have no effect at its value, or is an error.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, Final

from dist_ckpt_mistral.errors import ConfigError, UnsupportedModelError
from dist_ckpt_mistral.formats.kinds import PARAMS_FILE
from dist_ckpt_mistral.model.config.parts import is_positive_int

#: Key of params.json -> key of config.json.
_RENAMED: Final[Mapping[str, str]] = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "hidden_dim": "intermediate_size",
    "n_heads": "num_attention_heads",
    "vocab_size": "vocab_size",
    "norm_eps": "rms_norm_eps",
}
_SAME: Final = (
    *("head_dim", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
    "rope_theta",
)
#: Keys of the longest context in tokens; the first that is there counts, as in vLLM.
_LENGTHS: Final = ("max_position_embeddings", "max_seq_len", "model_max_length")
#: Keys of the window; Ministral 8B has the second.
_WINDOWS: Final = ("sliding_window", "_sliding_window")
_YARN: Final = ("factor", "original_max_position_embeddings", "beta", "alpha")
_USED: Final = (
    *(*_RENAMED, *_SAME, *_LENGTHS, *_WINDOWS),
    *("n_kv_heads", "tied_embeddings", "moe", "yarn", "llama_4_scaling"),
)
#: Keys without effect on the model -> the values for which that is true; None for every value, as for how it is run.
_WITHOUT_EFFECT: Final[Mapping[str, tuple[Any, ...] | None]] = {
    "model_type": ("transformer",),
    "activation": ("silu",),
    "causal": (True,),
    "use_biases": (False,),
    "softcap": (0,),
    "ada_rms_norm_t_cond": (False,),
    "max_batch_size": None,
    "model_parallel": None,
}
#: Key of ``moe`` -> (key of config.json, default).
_MIXTRAL: Final = {"num_experts": ("num_local_experts", None), "num_experts_per_tok": ("num_experts_per_tok", None)}
_MISTRAL4: Final = {
    "num_experts": ("n_routed_experts", None),
    "num_experts_per_tok": ("num_experts_per_tok", None),
    "first_k_dense_replace": ("first_k_dense_replace", 0),
    "num_shared_experts": ("n_shared_experts", 1),
    "expert_hidden_dim": ("moe_intermediate_size", None),
    "routed_scale": ("routed_scaling_factor", 1.0),
    "num_expert_groups": ("n_group", 1),
    "num_expert_groups_per_tok": ("topk_group", 1),
}
#: ``_WITHOUT_EFFECT`` for the keys of ``moe``. A Mixtral may have those of Mistral 4 with values that turn them off.
_MOE_WITHOUT_EFFECT: Final[Mapping[str, tuple[Any, ...] | None]] = {
    "expert_parallel": None,
    "expert_model_parallel": None,
    "route_every_n": (1,),
    "renorm_strategy": ("WEIGHTS",),
    "use_load_balancing_bias": (False,),
    "first_k_dense_replace": (0,),
    "num_shared_experts": (0,),
    "routed_scale": (1,),
    "num_expert_groups": (1,),
    "num_expert_groups_per_tok": (1,),
}
#: Keys of models that the tensor table does not know, or that only the release's Hugging Face files describe fully.
_REFUSED: Final[Mapping[str, str]] = {
    "vision_encoder": "a vision tower, which only Hugging Face's rendering of a release is read with",
    **dict.fromkeys(
        ("quantization", "quantization_config"),
        "quantized weights, which only Hugging Face's rendering of a release is read with",
    ),
    "audio_encoder": "an audio encoder",
    "multimodal": "parts besides the language model",
    "lora": "an adapter beside the model",
}
_MAX_POSITIONS: Final = 4096 * 32


def config_of_params(params: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The content of config.json for the model that ``params`` describes. ``MistralConfig`` checks the values.

    Raises ConfigError where sizes are missing or contradict each other, UnsupportedModelError for unknown keys and for
    models that only Hugging Face's files describe fully.
    """
    params = _without_empty(params)
    for name, what in _REFUSED.items():
        if name in params:
            raise UnsupportedModelError(f"{name} in {where}: it describes {what}. Give the directory with config.json.")
    _require_known(params, _USED, _WITHOUT_EFFECT, where)
    _require(params, _RENAMED, where)
    moe, yarn = (_section(params, name, where) for name in ("moe", "yarn"))
    model_type = "mistral4" if params.get("kv_lora_rank") else "mixtral" if moe else "ministral3" if yarn else "mistral"
    window = _window(params, model_type, where)
    return {
        "model_type": model_type,
        **{name: params[key] for key, name in _RENAMED.items()},
        **{name: params[name] for name in _SAME if name in params},
        "num_key_value_heads": params.get("n_kv_heads", params["n_heads"]),
        "max_position_embeddings": next((params[name] for name in _LENGTHS if name in params), _MAX_POSITIONS),
        "tie_word_embeddings": params.get("tied_embeddings", False),
        **window,
        **_experts(moe, _MISTRAL4 if model_type == "mistral4" else _MIXTRAL, where),
        **_rope(params, yarn, model_type, where, has_window=window["sliding_window"] is not None),
    }


def _without_empty(section: Mapping[str, Any]) -> dict[str, Any]:
    """The section without null and empty values, which mean the same as a missing key."""
    return {name: value for name, value in section.items() if value not in (None, {}, [])}


def _require(section: Mapping[str, Any], names: Iterable[str], where: str) -> None:
    """Raise ConfigError if a key is missing."""
    missing = [name for name in names if name not in section]
    if missing:
        raise ConfigError(f"{where} lacks {', '.join(missing)}. Check that it is the model's own {PARAMS_FILE}.")


def _require_known(
    section: Mapping[str, Any], used: Collection[str], without_effect: Mapping[str, tuple[Any, ...] | None], where: str
) -> None:
    """Raise UnsupportedModelError for all keys that are neither used nor known to have no effect."""
    allowed = {name: without_effect.get(name, ()) for name in section if name not in used}
    problems = [
        f"{name}: {f'expected {values[0]!r}' if values else 'unknown key'}, got {section[name]!r:.100}"
        for name, values in allowed.items()
        if values is not None and section[name] not in values
    ]
    if problems:
        raise UnsupportedModelError(
            f"{where} is not understood: {'; '.join(problems)}. "
            "Give the directory with config.json, or remove what the model does not use."
        )


def _section(params: Mapping[str, Any], name: str, where: str) -> Mapping[str, Any]:
    """The section ``name`` without empty values; empty if there is none. Raises ConfigError if it is no object."""
    section = params.get(name, {})
    if not isinstance(section, Mapping):
        raise ConfigError(f"{name} in {where}: expected an object, got {section!r:.100}")
    return _without_empty(section)


def _window(params: Mapping[str, Any], model_type: str, where: str) -> dict[str, Any]:
    """The window as keys of config.json.

    ``params`` has one number (or its text) for all layers, or a list that repeats over the layers, with null for full
    attention.
    """
    windows = {name: params[name] for name in _WINDOWS if name in params}
    window = next(iter(windows.values()), None)
    if any(other != window for other in windows.values()):
        raise ConfigError(
            f"{' and '.join(windows)} in {where} contradict each other: {' and '.join(map(repr, windows.values()))}"
        )
    if isinstance(window, str) and window.isdecimal():
        window = int(window)
    if not isinstance(window, list):
        return {"sliding_window": window}
    sizes = {size for size in window if size is not None}
    layers = params["n_layers"]
    if model_type != "mistral" or len(sizes) != 1 or not is_positive_int(layers):
        raise UnsupportedModelError(f"sliding_window {window!r:.100} in {where}: expected one size, in a dense model")
    kinds = ["full_attention" if size is None else "sliding_attention" for size in window]
    return {
        "model_type": "ministral",
        "sliding_window": sizes.pop(),
        "layer_types": [kinds[layer % len(kinds)] for layer in range(layers)],
    }


def _experts(moe: Mapping[str, Any], keys: Mapping[str, tuple[str, Any]], where: str) -> dict[str, Any]:
    _require_known(moe, keys, _MOE_WITHOUT_EFFECT, f"moe of {where}")
    return {name: moe.get(key, default) for key, (name, default) in keys.items()} if moe else {}


def _rope(
    params: Mapping[str, Any], yarn: Mapping[str, Any], model_type: str, where: str, *, has_window: bool
) -> dict[str, Any]:
    """The rope_parameters of config.json. Mistral's ``beta`` and ``alpha`` are the bounds of YaRN.

    Without ``rope_theta``, the first releases of mistral-inference (transformer.py) take 10,000 for a model with a
    window, as Mistral 7B v0.1 is, else 1,000,000, as for Mixtral 8x7B.
    """
    scaling = _section(params, "llama_4_scaling", where)
    if model_type in ("ministral3", "mistral4"):
        _require(params, ["rope_theta"], where)
    if not yarn and not scaling:
        theta = params.get("rope_theta", 10_000.0 if has_window else 1_000_000.0)
        return {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}
    if not (yarn and scaling) or model_type == "mixtral":
        raise UnsupportedModelError(
            f"{' and '.join(name for name in ('moe', 'yarn', 'llama_4_scaling') if name in params)} in {where}: no "
            f"{model_type} model has this. Expected yarn with llama_4_scaling, in Ministral 3 or Mistral 4."
        )
    _require(yarn, _YARN, f"yarn of {where}")
    _require_known(yarn, _YARN, {"apply_scale": (False,)}, f"yarn of {where}")
    _require(scaling, ["beta"], f"llama_4_scaling of {where}")
    original = yarn["original_max_position_embeddings"]
    same_original = {"original_max_position_embeddings": (original,)}
    _require_known(scaling, ["beta"], same_original, f"llama_4_scaling of {where}")
    return {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": params["rope_theta"],
            "factor": yarn["factor"],
            "original_max_position_embeddings": original,
            "beta_fast": yarn["beta"],
            "beta_slow": yarn["alpha"],
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": scaling["beta"],
        }
    }
