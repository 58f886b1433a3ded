"""Small Mistral models in Hugging Face directories, written without torch: the same files that transformers writes.

``tests/against/test_plain_models.py`` holds them against transformers; ``hf_models`` has living models.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

#: Sizes that differ from each other wherever they can: a swap of two must not go unnoticed.
SIZES: Final[dict[str, Any]] = {
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 64,
    "sliding_window": None,
    "tie_word_embeddings": False,
}
#: What transformers adds of its own.
_CONFIG: Final[dict[str, Any]] = {
    "architectures": ["MistralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "dtype": "bfloat16",
    "eos_token_id": 2,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "model_type": "mistral",
    "pad_token_id": None,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "transformers_version": "5.24.0",
    "use_cache": True,
}
_GENERATION: Final[dict[str, Any]] = {
    "_from_model_config": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "output_attentions": False,
    "output_hidden_states": False,
    "transformers_version": "5.24.0",
    "use_cache": True,
}


def save_model(folder: Path, *, max_shard_size: int = 5_000_000_000, **sizes: object) -> Path:
    """Save an untied bfloat16 model with random weights; ``sizes`` override SIZES. Gives back the folder."""
    config = SIZES | sizes
    random = np.random.default_rng(0)
    tensors = {name: random.standard_normal(shape).astype(ml_dtypes.bfloat16) for name, shape in _shapes(config)}
    folder.mkdir(parents=True)
    _write_json(folder / "config.json", _CONFIG | config)
    _write_json(folder / "generation_config.json", _GENERATION)
    files: list[dict[str, Any]] = [{}]
    for name, tensor in tensors.items():
        if files[-1] and sum(each.nbytes for each in files[-1].values()) + tensor.nbytes > max_shard_size:
            files.append({})
        files[-1][name] = tensor
    if len(files) == 1:
        save_file(files[0], folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = [f"model-{number:05}-of-{len(files):05}.safetensors" for number in range(1, len(files) + 1)]
    for file, held in zip(names, files, strict=True):
        save_file(held, folder / file, metadata={"format": "pt"})
    metadata = {
        "total_parameters": sum(tensor.size for tensor in tensors.values()),
        "total_size": sum(tensor.nbytes for tensor in tensors.values()),
    }
    weight_map = {name: file for file, held in zip(names, files, strict=True) for name in held}
    _write_json(folder / "model.safetensors.index.json", {"metadata": metadata, "weight_map": weight_map})
    return folder


#: The files that only tell of the others.
CHECKSUM_FILES = ("checksums.json", "integrity.json")


def contents(folder: Path) -> dict[str, bytes]:
    """All files under ``folder``, hidden ones included, by their relative names; not what only tells of the others."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in CHECKSUM_FILES]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def _shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor, in the order in which transformers deals them out to files."""
    hidden, between = config["hidden_size"], config["intermediate_size"]
    heads, groups = (config[name] * config["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for number in range(config["num_hidden_layers"]):
        layer = f"model.layers.{number}"
        yield f"{layer}.self_attn.q_proj.weight", (heads, hidden)
        yield f"{layer}.self_attn.k_proj.weight", (groups, hidden)
        yield f"{layer}.self_attn.v_proj.weight", (groups, hidden)
        yield f"{layer}.self_attn.o_proj.weight", (hidden, heads)
        yield f"{layer}.mlp.gate_proj.weight", (between, hidden)
        yield f"{layer}.mlp.up_proj.weight", (between, hidden)
        yield f"{layer}.mlp.down_proj.weight", (hidden, between)
        yield f"{layer}.input_layernorm.weight", (hidden,)
        yield f"{layer}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (config["vocab_size"], hidden)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
