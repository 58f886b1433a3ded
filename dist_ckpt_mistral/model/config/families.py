"""The models of the Mistral family that the tensor table knows, by Hugging Face's ``model_type``.

For each: its parts, and the defaults of transformers for keys that its config.json leaves out (transformers 4.34 to
5.23, models/*/configuration_*.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from dist_ckpt_mistral.errors import UnsupportedModelError
from dist_ckpt_mistral.model.config.parts import Experts, is_positive_int

#: The content of a config.json. Its values are unchecked until ``MistralConfig`` and its parts are made of them.
Raw = Mapping[str, Any]

LATENT_SIZES: Final = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


def _yarn(theta: float, factor: float, original: int) -> dict[str, Any]:
    """The default ``rope_parameters`` of Ministral 3 and Mistral 4."""
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
    """Models of one ``model_type``.

    ``architecture`` is the class of transformers that runs them. ``required`` are the keys that config.json must have
    beside the sizes of every family, ``defaults`` the values of keys that it may leave out. ``fixed`` gives the one
    value of a key that Megatron's layers can express. ``ignored`` are keys of other families that transformers ignores
    in this one. ``renamed`` maps another name of a key to that key and counts first (transformers' ``attribute_map``).
    ``experts`` reads the experts from a config.json, and ``expert_keys`` gives its keys for them.
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
#: Keys of all families with the one value that Megatron's layers can express: the activation, attention to later tokens
#: (``create_causal_mask``, masking_utils.py, 5.24), and layers that differ (integrations/heterogeneity).
COMMON_FIXED: Final[Mapping[str, Any]] = {"hidden_act": "silu", "is_causal": True, "per_layer_config": None}
#: Defaults are those of transformers, with one exception: for a missing ``sliding_window`` of ``mistral`` and
#: ``ministral`` it takes 4096, the value of Mistral 7B v0.1 and of no model since. Writers that leave out null make it
#: missing in models without a window. So a missing key means no window here, with a warning.
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
#: Families whose layers may differ in their attention (``layer_types``).
WITH_LAYER_TYPES: Final = tuple(name for name, family in FAMILIES.items() if "layer_types" not in family.ignored)
#: A language model of one of the families with a vision tower; ``text_config`` holds the language model's config.
MULTIMODAL: Final = "mistral3"
MULTIMODAL_ARCHITECTURE: Final = "Mistral3ForConditionalGeneration"
#: The ``model_type`` of their vision tower, and the defaults of transformers for its keys.
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
#: The classes whose tensors the table knows. It makes no difference which one a config.json names: transformers and the
#: table go by ``model_type``.
_ARCHITECTURES: Final = (*(family.architecture for family in FAMILIES.values()), MULTIMODAL_ARCHITECTURE)
#: Prefix of a class name under FSDP, which transformers removes (modeling_utils.py, 5.24).
_FSDP: Final = "FSDP"

#: Other models of Mistral AI -> why they are not supported.
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
    """Raise UnsupportedModelError if ``architectures`` in a config.json names a class that is no language model."""
    architectures = raw.get("architectures") or []
    names = architectures if isinstance(architectures, list) else [architectures]
    others = [name for name in names if str(name).removeprefix(_FSDP) not in _ARCHITECTURES]
    if others:
        family = FAMILIES.get(raw["model_type"])
        expected = family.architecture if family else MULTIMODAL_ARCHITECTURE
        raise UnsupportedModelError(
            f"architectures in {where}: expected {expected} (Megatron's GPTModel has only the head of a language "
            f"model), got {', '.join(map(repr, others)):.200}. Give the language model that it was made from."
        )
