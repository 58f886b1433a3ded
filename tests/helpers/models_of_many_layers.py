"""Models that many ranks can share: eight layers, and values that tell every row apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from family_models import model_class
from transformers import AutoConfig

EXPERT_MODELS: dict[str, dict[str, Any]] = {
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4},
    "mistral4": {
        "model_type": "mistral4",
        "num_key_value_heads": 8,
        "head_dim": 14,
        "q_lora_rank": 16,
        "kv_lora_rank": 12,
        "qk_nope_head_dim": 10,
        "qk_rope_head_dim": 4,
        "v_head_dim": 6,
        "moe_intermediate_size": 20,
        "n_routed_experts": 4,
        "n_shared_experts": 2,
        "first_k_dense_replace": 0,
    },
}


@torch.no_grad()
def save_hf(folder: Path, differs: dict[str, Any]) -> Path:
    """Save a small Mistral model in several files, with values that tell every row apart."""
    sizes = {
        "vocab_size": 250,
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 6,
        "sliding_window": None,
        "tie_word_embeddings": False,
    }
    config = AutoConfig.for_model(**{"model_type": "mistral"} | sizes | differs)
    model = model_class(config)(config).bfloat16()
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.normal_()
    model.save_pretrained(folder, max_shard_size="40KB")
    return folder
