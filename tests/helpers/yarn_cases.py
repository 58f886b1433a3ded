"""YaRN in every spelling of a config.json that transformers takes."""

from __future__ import annotations

from typing import Any

BASE: dict[str, Any] = {
    "model_type": "mistral",
    "hidden_size": 64,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 50,
    "max_position_embeddings": 256,
    "sliding_window": None,
    "rope_theta": 10000.0,
}

YARN: dict[str, Any] = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32}

CASES: dict[str, dict[str, Any]] = {
    "as little as possible": {"rope_scaling": YARN},
    "as transformers 5 writes it": {"rope_parameters": YARN | {"rope_theta": 31000.0}},
    "as Yarn-Mistral-7b-128k has it": {
        "rope_scaling": {"type": "yarn", "factor": 16.0, "finetuned": True, "original_max_position_embeddings": 16}
    },
    "mscales": {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3}},
    "a zero mscale is none": {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 0.0}},
    "one mscale alone is none": {"rope_scaling": YARN | {"mscale": 0.7}},
    "nor is the other alone": {"rope_scaling": YARN | {"mscale_all_dim": 1.3}},
    "attention factor": {"rope_scaling": YARN | {"attention_factor": 1.5, "mscale": 0.7, "mscale_all_dim": 1.3}},
    "attention factor 1": {"rope_scaling": YARN | {"attention_factor": 1.0}},
    "betas, not truncated": {"rope_scaling": YARN | {"beta_fast": 16, "beta_slow": 2, "truncate": False}},
    "null betas": {"rope_scaling": YARN | {"beta_fast": None, "beta_slow": None}},
    "no factor": {"rope_scaling": YARN | {"factor": None, "original_max_position_embeddings": 64}},
    "no original length": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    "original length outside": {"rope_scaling": YARN, "original_max_position_embeddings": 48},
    "not stretched": {"rope_scaling": YARN | {"factor": 1.0}},
}
