"""Export a checkpoint as other converters do: ``python tools/bench/peers.py PEER CKPT OUT``.

``dcp-full`` loads everything with torch DCP, renames and splits the tensors, and calls ``save_file``, like slime's
converter. ``model`` loads the same tensors into a Hugging Face model and calls ``save_pretrained``, because
Megatron-Bridge also builds a model. Both support only the dense model of this benchmark.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from dist_ckpt_mistral.formats.places import resolve_directory

HEADS, GROUPS, DIM = 32, 8, 128


def load_all(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Load the whole checkpoint into memory. Returns the tensors by Megatron key."""
    reader = FileSystemReader(resolve_directory(checkpoint))
    described = reader.read_metadata().state_dict_metadata.items()
    state: dict[str, Any] = {
        key: torch.empty(value.size, dtype=value.properties.dtype)
        for key, value in described
        if isinstance(value, TensorStorageMetadata)
    }
    load(state, storage_reader=reader, no_dist=True)
    return state


def to_hf(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Convert tensors by Megatron key to tensors by Hugging Face name, with torch operations."""
    layers = "decoder.layers."
    hf = {
        "model.embed_tokens.weight": state["embedding.word_embeddings.weight"],
        "model.norm.weight": state["decoder.final_layernorm.weight"],
        "lm_head.weight": state["output_layer.weight"],
    }
    same = {
        "self_attn.o_proj": "self_attention.linear_proj.weight",
        "mlp.down_proj": "mlp.linear_fc2.weight",
        "input_layernorm": "self_attention.linear_qkv.layer_norm_weight",
        "post_attention_layernorm": "mlp.linear_fc1.layer_norm_weight",
    }
    for layer, (qkv, fc1) in enumerate(
        zip(state[layers + "self_attention.linear_qkv.weight"], state[layers + "mlp.linear_fc1.weight"], strict=True)
    ):
        here = f"model.layers.{layer}."
        groups = qkv.view(GROUPS, HEADS // GROUPS + 2, DIM, -1)
        parts = groups.split([HEADS // GROUPS, 1, 1], dim=1)
        for name, part in zip("qkv", parts, strict=True):
            hf[f"{here}self_attn.{name}_proj.weight"] = part.reshape(-1, qkv.shape[-1]).contiguous()
        hf[here + "mlp.gate_proj.weight"], hf[here + "mlp.up_proj.weight"] = (half.clone() for half in fc1.chunk(2))
        for name, key in same.items():
            hf[f"{here}{name}.weight"] = state[layers + key][layer].clone()
    return hf


def main() -> None:
    """Run one converter."""
    peer, checkpoint, output = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    hf = to_hf(load_all(checkpoint))
    if peer == "dcp-full":
        output.mkdir(parents=True)
        save_file(hf, output / "model.safetensors", metadata={"format": "pt"})
        return
    from transformers import AutoConfig, AutoModelForCausalLM  # noqa: PLC0415  (only this converter needs it)

    config = AutoConfig.from_pretrained(resolve_directory(checkpoint) / "hf")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.to_empty(device="cpu")
    model.load_state_dict(hf)
    model.save_pretrained(output)


if __name__ == "__main__":
    main()
