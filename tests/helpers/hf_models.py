"""Real Hugging Face models, small and random, as transformers makes and saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from plain_models import SIZES
from transformers import MistralConfig, MistralForCausalLM, PreTrainedModel


def random_model(dtype: torch.dtype = torch.bfloat16, **sizes: object) -> PreTrainedModel:
    """A model with random weights, norms included; ``sizes`` override SIZES."""
    model = MistralForCausalLM(MistralConfig(**SIZES | sizes))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model.to(dtype).eval()


def saved(model: PreTrainedModel, folder: Path, *, max_shard_size: int = 5_000_000_000) -> Path:
    """Save as transformers does, and give back the folder."""
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """What the model in ``folder`` says to ``tokens``, loaded as transformers does by default."""
    model = MistralForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        result: torch.Tensor = model(tokens).logits
    return result


def megatron_tensors(hf: dict[str, torch.Tensor], sizes: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What a Megatron checkpoint must hold for the Hugging Face tensors, in torch operations."""

    def stacked(*parts: str) -> torch.Tensor:
        layers = range(sizes["num_hidden_layers"])
        return torch.stack(
            [torch.cat([hf[f"model.layers.{layer}.{part}.weight"] for part in parts]) for layer in layers]
        )

    layers, groups, hidden = sizes["num_hidden_layers"], sizes["num_key_value_heads"], sizes["hidden_size"]
    heads = [
        stacked(f"self_attn.{each}_proj").view(layers, groups, -1, sizes["head_dim"], hidden)
        for each in ("q", "k", "v")
    ]
    tensors = {
        "embedding.word_embeddings.weight": hf["model.embed_tokens.weight"],
        "decoder.layers.self_attention.linear_qkv.weight": torch.cat(heads, 2).reshape(layers, -1, hidden),
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight": stacked("input_layernorm"),
        "decoder.layers.self_attention.linear_proj.weight": stacked("self_attn.o_proj"),
        "decoder.layers.mlp.linear_fc1.weight": stacked("mlp.gate_proj", "mlp.up_proj"),
        "decoder.layers.mlp.linear_fc1.layer_norm_weight": stacked("post_attention_layernorm"),
        "decoder.layers.mlp.linear_fc2.weight": stacked("mlp.down_proj"),
        "decoder.final_layernorm.weight": hf["model.norm.weight"],
    }
    if not sizes["tie_word_embeddings"]:
        tensors["output_layer.weight"] = hf["lm_head.weight"]
    return tensors
