"""``params.json``, the configuration beside Mistral AI's own files, as a Hugging Face config.json.

Keys and what they mean: mistral-inference (args.py), and what transformers' convert_mistral_weights_to_hf.py,
convert_ministral3_weights_to_hf.py and convert_mistral4_weight_to_hf.py make of them (5.x).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from dist_ckpt_mistral.errors import ConfigError, UnsupportedModelError
from dist_ckpt_mistral.formats.places import PARAMS_FILE
from dist_ckpt_mistral.model.checks import is_positive_int

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
#: What no model that the table knows has, or what only another file of the same release tells.
_REFUSED: Final[Mapping[str, str]] = {
    "vision_encoder": "a vision tower, which only Hugging Face's rendering of a release is read with",
    "quantization": "quantized weights, which only Hugging Face's rendering of a release is read with",
    "audio_encoder": "an audio encoder",
    "multimodal": "parts besides the language model",
}
_MAX_POSITIONS: Final = 4096 * 32


def config_of_params(params: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The config.json of the model that ``params`` describes; its values are yet to be checked.

    Raises ConfigError where sizes are missing, UnsupportedModelError for what only another rendering tells.
    """
    for name, what in _REFUSED.items():
        if params.get(name):
            raise UnsupportedModelError(f"{name} in {where}: it describes {what}. Give the directory with config.json.")
    missing = [name for name in _RENAMED if params.get(name) is None]
    if missing:
        raise ConfigError(f"{where} lacks {', '.join(missing)}. Check that it is the model's own {PARAMS_FILE}.")
    moe, yarn = (_section(params, name, where) for name in ("moe", "yarn"))
    model_type = "mistral4" if params.get("kv_lora_rank") else "mixtral" if moe else "ministral3" if yarn else "mistral"
    return {
        "model_type": model_type,
        **{name: params[key] for key, name in _RENAMED.items()},
        **{name: params[name] for name in _SAME if params.get(name) is not None},
        "num_key_value_heads": params.get("n_kv_heads", params["n_heads"]),
        "max_position_embeddings": params.get("max_position_embeddings", params.get("max_seq_len", _MAX_POSITIONS)),
        "tie_word_embeddings": params.get("tied_embeddings", False),
        **_window(params, model_type, where),
        **_experts(moe, _MISTRAL4 if model_type == "mistral4" else _MIXTRAL, where),
        **_rope(params, yarn, model_type, where),
    }


def _section(params: Mapping[str, Any], name: str, where: str) -> Mapping[str, Any]:
    section = params.get(name) or {}
    if not isinstance(section, Mapping):
        raise ConfigError(f"{name} in {where}: expected an object, got {section!r:.100}")
    return section


def _window(params: Mapping[str, Any], model_type: str, where: str) -> dict[str, Any]:
    """One window for all layers (which may be text), or a list of them that repeats: null is full attention."""
    given = params.get("sliding_window")
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
    unknown = [name for name in moe if name not in keys]
    if unknown:
        raise UnsupportedModelError(f"moe in {where} has {', '.join(map(repr, unknown))}, which means nothing known")
    return {name: moe.get(key, default) for key, (name, default) in keys.items()} if moe else {}


def _rope(params: Mapping[str, Any], yarn: Mapping[str, Any], model_type: str, where: str) -> dict[str, Any]:
    """YaRN, with Mistral's ``beta`` and ``alpha`` as its bounds; without ``apply_scale`` nothing else is scaled."""
    if not yarn:
        return {"rope_parameters": {"rope_type": "default", "rope_theta": params.get("rope_theta", 10_000.0)}}
    missing = [name for name in ("factor", "original_max_position_embeddings", "beta", "alpha") if name not in yarn]
    if missing:
        raise ConfigError(f"yarn in {where} lacks {', '.join(missing)}")
    if yarn.get("apply_scale"):
        raise UnsupportedModelError(f"apply_scale of yarn in {where} is not supported")
    beta = _section(params, "llama_4_scaling", where).get("beta")
    if beta is None:
        raise UnsupportedModelError(f"{where} has yarn without llama_4_scaling: no {model_type} model has it so")
    return {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": params.get("rope_theta", 1_000_000.0 if model_type == "ministral3" else 10_000.0),
            "factor": yarn["factor"],
            "original_max_position_embeddings": yarn["original_max_position_embeddings"],
            "beta_fast": yarn["beta"],
            "beta_slow": yarn["alpha"],
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": beta,
        }
    }
