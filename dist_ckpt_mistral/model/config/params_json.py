"""``params.json``, the configuration beside Mistral AI's own files, as a Hugging Face config.json.

Keys and what they mean: mistral-inference (args.py, moe.py, transformer.py), what transformers'
convert_mistral_weights_to_hf.py, convert_ministral3_weights_to_hf.py and convert_mistral4_weight_to_hf.py make of them
(5.x), and what vLLM does (transformers_utils/configs/mistral.py). Every key is used, or is known to have no effect with
the value that it has, or is an error.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, Final

from dist_ckpt_mistral.errors import ConfigError, UnsupportedModelError
from dist_ckpt_mistral.formats.places import PARAMS_FILE
from dist_ckpt_mistral.model.config.parts import is_positive_int

#: Key there -> key in config.json.
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
#: How many tokens there may be: the first of these counts, as in vLLM.
_LENGTHS: Final = ("max_position_embeddings", "max_seq_len", "model_max_length")
#: One of these: Ministral 8B calls it by the second.
_WINDOWS: Final = ("sliding_window", "_sliding_window")
_YARN: Final = ("factor", "original_max_position_embeddings", "beta", "alpha")
_USED: Final = (
    *(*_RENAMED, *_SAME, *_LENGTHS, *_WINDOWS),
    *("n_kv_heads", "tied_embeddings", "moe", "yarn", "llama_4_scaling"),
)
#: Keys that change nothing, each with the values of which that is true: None for any, as of how a model was run.
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
#: Of ``moe``: key there -> key in config.json, and what counts where it says nothing.
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
#: Of ``moe``, as ``_WITHOUT_EFFECT``. What Mistral 4 has, a Mixtral may say that it has not.
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
#: What no model that the table knows has, or what only another file of the same release tells.
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
    """The config.json of the model that ``params`` describes; its values are yet to be checked.

    Raises ConfigError where sizes are missing or contradict each other, UnsupportedModelError for what only another
    rendering tells and for keys that are not known.
    """
    params = _said(params)
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


def _said(section: Mapping[str, Any]) -> dict[str, Any]:
    """What a section says: null and empty values say nothing."""
    return {name: value for name, value in section.items() if value not in (None, {}, [])}


def _require(section: Mapping[str, Any], names: Iterable[str], where: str) -> None:
    missing = [name for name in names if name not in section]
    if missing:
        raise ConfigError(f"{where} lacks {', '.join(missing)}. Check that it is the model's own {PARAMS_FILE}.")


def _require_known(
    section: Mapping[str, Any], used: Collection[str], without_effect: Mapping[str, tuple[Any, ...] | None], where: str
) -> None:
    """Raise UnsupportedModelError for all keys that are neither used nor known to have no effect."""
    allowed = {name: without_effect.get(name, ()) for name in section if name not in used}
    problems = [
        f"{name}: {f'expected {values[0]!r}' if values else 'it means nothing known'}, got {section[name]!r:.100}"
        for name, values in allowed.items()
        if values is not None and section[name] not in values
    ]
    if problems:
        raise UnsupportedModelError(
            f"{where} is not understood: {'; '.join(problems)}. "
            "Give the directory with config.json, or remove what the model does not use."
        )


def _section(params: Mapping[str, Any], name: str, where: str) -> Mapping[str, Any]:
    section = params.get(name, {})
    if not isinstance(section, Mapping):
        raise ConfigError(f"{name} in {where}: expected an object, got {section!r:.100}")
    return _said(section)


def _window(params: Mapping[str, Any], model_type: str, where: str) -> dict[str, Any]:
    """One window for all layers (which may be text), or a list of them that repeats: null is full attention."""
    told = {name: params[name] for name in _WINDOWS if name in params}
    given = next(iter(told.values()), None)
    if any(each != given for each in told.values()):
        raise ConfigError(
            f"{' and '.join(told)} in {where} contradict each other: {' and '.join(map(repr, told.values()))}"
        )
    if isinstance(given, str) and given.isdecimal():
        given = int(given)
    if not isinstance(given, list):
        return {"sliding_window": given}
    sizes = {size for size in given if size is not None}
    layers = params["n_layers"]
    if model_type != "mistral" or len(sizes) != 1 or not is_positive_int(layers):
        raise UnsupportedModelError(f"sliding_window {given!r:.100} in {where}: expected one size, in a dense model")
    kinds = ["full_attention" if size is None else "sliding_attention" for size in given]
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
    """YaRN, with Mistral's ``beta`` and ``alpha`` as its bounds; without ``apply_scale`` nothing else is scaled.

    Without a theta, the first releases of mistral-inference (transformer.py) take 10,000 where there is a window, as in
    Mistral 7B v0.1, and else 1,000,000, as in Mixtral 8x7B.
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
            f"{model_type} model has it so. Expected yarn with llama_4_scaling in Ministral 3 and Mistral 4."
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
