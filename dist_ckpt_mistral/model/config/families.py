"""The models of the Mistral family that the tensor table knows, by Hugging Face's ``model_type``.

What each is made of, and what transformers fills in for keys that its config.json leaves out (transformers 4.34 to
5.23, models/*/configuration_*.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from dist_ckpt_mistral.errors import UnsupportedModelError
from dist_ckpt_mistral.model.config.parts import Experts, is_positive_int

#: A value of a config.json, whatever it is: ``MistralConfig`` and its parts check it.
Raw = Mapping[str, Any]

LATENT_SIZES: Final = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


def _yarn(theta: float, factor: float, original: int) -> dict[str, Any]:
    """What Ministral 3 and Mistral 4 have where config.json says nothing of rotary embeddings."""
    scaling = {"factor": factor, "original_max_position_embeddings": original, "mscale": 1.0, "mscale_all_dim": 1.0}
    return {"rope_type": "yarn", "rope_theta": theta, "llama_4_scaling_beta": 0.1, **scaling}


def _mixtral_experts(raw: Raw) -> Experts:
    return Experts(
        num_experts=raw["num_local_experts"],
        experts_per_token=raw["num_experts_per_tok"],
        intermediate_size=raw["intermediate_size"],
    )


def _mixtral_keys(experts: Experts) -> dict[str, Any]:
    return {"num_local_experts": experts.num_experts, "num_experts_per_tok": experts.experts_per_token}


def _mistral4_experts(raw: Raw) -> Experts:
    size, shared = raw["moe_intermediate_size"], raw["n_shared_experts"]
    return Experts(
        num_experts=raw["n_routed_experts"],
        experts_per_token=raw["num_experts_per_tok"],
        intermediate_size=size,
        shared_intermediate_size=size * shared if is_positive_int(size) and is_positive_int(shared) else shared,
        normalized=raw["norm_topk_prob"],
        routed_scaling_factor=raw["routed_scaling_factor"],
        num_groups=raw["n_group"],
        groups_per_token=raw["topk_group"],
        packed=True,
    )


def _mistral4_keys(experts: Experts) -> dict[str, Any]:
    return {
        "n_routed_experts": experts.num_experts,
        "num_experts_per_tok": experts.experts_per_token,
        "moe_intermediate_size": experts.intermediate_size,
        "n_shared_experts": experts.shared_intermediate_size // experts.intermediate_size,
        "norm_topk_prob": experts.normalized,
        "routed_scaling_factor": experts.routed_scaling_factor,
        "n_group": experts.num_groups,
        "topk_group": experts.groups_per_token,
        "first_k_dense_replace": 0,
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Models of one ``model_type``: the class that runs them, what config.json must say, and what it may leave out.

    ``fixed`` are keys with the only value of them that Megatron's layers can express. ``ignored`` are keys that other
    families have, and that transformers ignores in this one. ``renamed`` are other names of keys: they count before
    those (transformers' ``attribute_map``). ``experts`` reads a config.json, and ``expert_keys`` are what it says of
    them.
    """

    architecture: str
    required: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    ignored: tuple[str, ...] = ("layer_types",)
    renamed: Mapping[str, str] = field(default_factory=dict)
    experts: Callable[[Raw], Experts] | None = None
    expert_keys: Callable[[Experts], dict[str, Any]] = lambda _: {}
    has_latent_attention: bool = False


COMMON_DEFAULTS: Final[Mapping[str, Any]] = {
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "max_position_embeddings": 4096 * 32,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
#: Keys with the only value of them that Megatron's layers can express, in all families: an activation, attention to
#: later tokens (``create_causal_mask``, masking_utils.py, 5.24), and layers that differ (integrations/heterogeneity).
COMMON_FIXED: Final[Mapping[str, Any]] = {"hidden_act": "silu", "is_causal": True, "per_layer_config": None}
#: What transformers fills in is filled in here, with one exception: it takes a missing ``sliding_window`` of
#: ``mistral`` and ``ministral`` for 4096, the value of Mistral 7B v0.1 and of no model since. Writers that leave out
#: null make it missing in models without a window. So it is none here, and a warning says so.
FAMILIES: Final[Mapping[str, Family]] = {
    "mistral": Family(architecture="MistralForCausalLM"),
    "mixtral": Family(
        architecture="MixtralForCausalLM",
        required=("num_local_experts", "num_experts_per_tok"),
        defaults={"rms_norm_eps": 1e-5, "rope_theta": 1_000_000.0, "sliding_window": None},
        renamed={"num_experts": "num_local_experts"},
        experts=_mixtral_experts,
        expert_keys=_mixtral_keys,
    ),
    "ministral": Family(architecture="MinistralForCausalLM", ignored=()),
    "ministral3": Family(
        architecture="Ministral3ForCausalLM",
        defaults={
            "rms_norm_eps": 1e-5,
            "head_dim": 128,
            "max_position_embeddings": 262_144,
            "sliding_window": None,
            "pad_token_id": 11,
            "rope_parameters": _yarn(1_000_000.0, 16.0, 16_384),
        },
    ),
    "mistral4": Family(
        architecture="Mistral4ForCausalLM",
        required=(
            *("moe_intermediate_size", "n_routed_experts", "n_shared_experts", "num_experts_per_tok"),
            *LATENT_SIZES[1:],
        ),
        defaults={
            "q_lora_rank": 1024,
            "num_key_value_heads": None,
            "sliding_window": None,
            "max_position_embeddings": 1_048_576,
            "norm_topk_prob": True,
            "routed_scaling_factor": 1.0,
            "n_group": 1,
            "topk_group": 1,
            "pad_token_id": 11,
            "rope_parameters": _yarn(10_000.0, 128.0, 8192),
        },
        fixed={"first_k_dense_replace": 0, "attention_bias": False, "rope_interleave": True},
        ignored=("layer_types", "sliding_window"),
        renamed={"num_local_experts": "n_routed_experts"},
        experts=_mistral4_experts,
        expert_keys=_mistral4_keys,
        has_latent_attention=True,
    ),
}
#: Models whose layers differ in what they attend to.
WITH_LAYER_TYPES: Final = tuple(name for name, family in FAMILIES.items() if "layer_types" not in family.ignored)
#: A language model of one of the families, with a vision tower: its own config stands under ``text_config``.
MULTIMODAL: Final = "mistral3"
MULTIMODAL_ARCHITECTURE: Final = "Mistral3ForConditionalGeneration"
#: The vision tower of all of these, and what transformers fills in for keys that its config leaves out.
VISION_TYPE: Final = "pixtral"
VISION_DEFAULTS: Final[Mapping[str, Any]] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_channels": 3,
    "patch_size": 16,
}
#: HF ``model_type`` values that the tensor table knows.
MODEL_TYPES: Final = (*FAMILIES, MULTIMODAL)
#: The classes whose tensors the table knows. Which of them a config.json names makes no difference: transformers goes
#: by ``model_type``, and so does the table.
_ARCHITECTURES: Final = (*(family.architecture for family in FAMILIES.values()), MULTIMODAL_ARCHITECTURE)
#: What FSDP puts before the name of a class, and transformers takes off again (modeling_utils.py, 5.24).
_FSDP: Final = "FSDP"

#: What is known of other models of Mistral AI, and why they are not supported.
_REFUSED: Final[Mapping[str, str]] = {
    **dict.fromkeys(
        ("mistral_large4", "mistral_large4_text"),
        "Megatron-core (0.19) has no layers that share latents or leave out rotary embeddings and has no soft cap of "
        "logits, so no GPTModel holds these weights",
    ),
    **dict.fromkeys(("voxtral", "voxtral_realtime"), "a model of speech, whose language model is not stored alone"),
    "pixtral": "a vision tower alone",
}


def require_supported(raw: Raw, where: str) -> str:
    """The ``model_type`` of a config.json. Raises UnsupportedModelError for one that the tensor table does not know."""
    model_type = raw.get("model_type")
    if isinstance(model_type, str) and model_type in MODEL_TYPES:
        return model_type
    reason = _REFUSED.get(model_type) if isinstance(model_type, str) else None
    raise UnsupportedModelError(
        f"model_type {model_type!r} in {where} is not supported{f' ({reason})' if reason else ''}: "
        f"the tensor table knows {', '.join(MODEL_TYPES)}."
    )


def require_language_model(raw: Raw, where: str) -> None:
    """Raise UnsupportedModelError if ``architectures`` of a config.json names a class with another head, or none."""
    named = raw.get("architectures") or []
    names = named if isinstance(named, list) else [named]
    others = [name for name in names if str(name).removeprefix(_FSDP) not in _ARCHITECTURES]
    if others:
        family = FAMILIES.get(raw["model_type"])
        expected = family.architecture if family else MULTIMODAL_ARCHITECTURE
        raise UnsupportedModelError(
            f"architectures in {where}: expected {expected} (Megatron's GPTModel has no head but that of a language "
            f"model), got {', '.join(map(repr, others)):.200}. Give the language model that it was made from."
        )
