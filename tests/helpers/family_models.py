"""Small models of the whole Mistral family, random, as transformers makes and saves them."""

from __future__ import annotations

import copy
from typing import Any, Final

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.mistral4.modeling_mistral4 import Mistral4ForCausalLM

SIZES: Final[dict[str, Any]] = {
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 64,
}
_YARN: Final = {
    "rope_type": "yarn",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.3,
}
_LATENT: Final[dict[str, Any]] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 0,
    "rope_parameters": _YARN,
}
_TYPES: Final = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
#: Case -> what its config.json says.
FAMILY: Final[dict[str, dict[str, Any]]] = {
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "ministral": {"model_type": "ministral", "sliding_window": 5, "layer_types": _TYPES},
    "ministral3, tied": {"model_type": "ministral3", "tie_word_embeddings": True, "rope_parameters": _YARN},
    "mistral4": {"model_type": "mistral4", **_LATENT, "n_shared_experts": 1},
    "mistral4, groups, plain queries": {
        "model_type": "mistral4",
        **_LATENT,
        "q_lora_rank": None,
        "n_shared_experts": 2,
        "n_group": 2,
        "topk_group": 1,
        "routed_scaling_factor": 1.5,
        "norm_topk_prob": False,
    },
}


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class of a causal model; transformers' AutoModelForCausalLM does not know Mistral 4's (5.23)."""
    found: type[PreTrainedModel] = (
        Mistral4ForCausalLM if config.model_type == "mistral4" else MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    )
    return found


def randomize(model: PreTrainedModel) -> None:
    """Make every parameter random, norms included."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))


def family_model(case: str, dtype: torch.dtype = torch.bfloat16, **changes: object) -> PreTrainedModel:
    """The model of a case, every parameter random, norms included; ``changes`` are of its config.json."""
    sizes = copy.deepcopy(SIZES | FAMILY[case] | changes)  # transformers writes into rope_parameters
    config = AutoConfig.for_model(sizes.pop("model_type"), **sizes)
    model = model_class(config)(config)
    randomize(model)
    return model.to(dtype).eval()
