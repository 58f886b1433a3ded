"""Models in Mistral AI's own rendering, as its tools save them: transformers' conversion, the other way."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from family_models import family_model
from hf_models import random_model
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from transformers import PreTrainedModel

DENSE = "mistral"

#: What transformers' convert_mistral_weights_to_hf.py and convert_mistral4_weight_to_hf.py rename, the other way.
NAMES = {
    "model.embed_tokens.": "tok_embeddings.",
    "model.norm.": "norm.",
    "lm_head.": "output.",
    "model.layers.": "layers.",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_a_proj": "attention.wq_a",
    "self_attn.q_b_proj": "attention.wq_b",
    "self_attn.kv_a_proj_with_mqa": "attention.wkv_a_with_mqa",
    "self_attn.kv_b_proj": "attention.wkv_b",
    "self_attn.q_a_layernorm": "attention.q_a_norm",
    "self_attn.kv_a_layernorm": "attention.kv_a_norm",
    **{f"self_attn.{name}_proj": f"attention.w{name}" for name in "qkvo"},
    "mlp.shared_experts.": "shared_experts.",
    "mlp.gate.": "gate.",
    "mlp.experts.": "experts.",
    "block_sparse_moe.": "feed_forward.",
    "mlp.": "feed_forward.",
    "gate_proj": "w1",
    "down_proj.weight": "w2.weight",
    "up_proj.weight": "w3.weight",
}


def model_of(case: str) -> PreTrainedModel:
    """The model of a case."""
    return random_model(sliding_window=7) if case == DENSE else family_model(case)


def consolidated_tensors(hf: dict[str, torch.Tensor], config: Any) -> dict[str, torch.Tensor]:  # noqa: ANN401  (of any family)
    """Hugging Face's tensors as Mistral AI names and orders them, in torch operations."""
    own = {}
    for name, tensor in hf.items():
        called = name
        for theirs, ours in NAMES.items():
            called = called.replace(theirs, ours)
        if name.endswith(("self_attn.q_proj.weight", "self_attn.k_proj.weight")) and config.model_type != "mistral4":
            rows, columns = tensor.shape  # convert_mistral_weights_to_hf.py, permute_for_rope, the other way
            halves = tensor.view(rows // config.head_dim, 2, config.head_dim // 2, columns)
            own[called] = halves.transpose(1, 2).reshape(rows, columns)
        elif name.endswith("gate_up_proj"):
            for expert, both in enumerate(tensor):
                for which, half in zip(("w1", "w3"), both.chunk(2), strict=True):
                    own[called.replace("gate_up_proj", f"{expert}.{which}.weight")] = half
        elif name.endswith("experts.down_proj"):
            own |= {called.replace("down_proj", f"{expert}.w2.weight"): each for expert, each in enumerate(tensor)}
        else:
            own[called] = tensor
    return {name: tensor.contiguous() for name, tensor in own.items()}


def params_of(config: Any) -> dict[str, Any]:  # noqa: ANN401  (of any family)
    """What params.json says of a model."""
    params = {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "hidden_dim": config.intermediate_size,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "vocab_size": config.vocab_size,
        "norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_parameters["rope_theta"],
        "max_seq_len": config.max_position_embeddings,
        "tied_embeddings": config.tie_word_embeddings,
    }
    window = getattr(config, "sliding_window", None)
    types = [kind == "sliding_attention" for kind in getattr(config, "layer_types", None) or []]
    if window is not None:
        params["sliding_window"] = [window if has else None for has in types] if types else str(window)
    if config.model_type == "mixtral":
        params["moe"] = {"num_experts": config.num_local_experts, "num_experts_per_tok": config.num_experts_per_tok}
    if config.model_type == "mistral4":
        sizes = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        params |= {name: getattr(config, name) for name in sizes}
        params["moe"] = {
            "num_experts": config.n_routed_experts,
            "num_experts_per_tok": config.num_experts_per_tok,
            "num_shared_experts": config.n_shared_experts,
            "expert_hidden_dim": config.moe_intermediate_size,
            "first_k_dense_replace": 0,
        }
    else:
        params["head_dim"] = config.head_dim
    rope = config.rope_parameters
    if rope.get("rope_type") == "yarn":
        params["yarn"] = {
            "factor": rope["factor"],
            "apply_scale": False,
            "beta": 32,
            "alpha": 1,
            "original_max_position_embeddings": rope["original_max_position_embeddings"],
        }
        params["llama_4_scaling"] = {"beta": rope["llama_4_scaling_beta"]}
    return params


def save_consolidated(model: PreTrainedModel, hf: Path, folder: Path, *, files: int = 1) -> None:
    """Save a model in Hugging Face's rendering, and in Mistral AI's own, in one file or several."""
    model.save_pretrained(hf)
    tensors = consolidated_tensors(load_file(hf / "model.safetensors"), model.config)
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(params_of(model.config)))
    if files == 1:
        save_file(tensors, folder / "consolidated.safetensors")
        return
    weight_map = {
        name: f"consolidated-0000{1 + i % files}-of-0000{files}.safetensors" for i, name in enumerate(tensors)
    }
    for file in set(weight_map.values()):
        save_file({name: tensor for name, tensor in tensors.items() if weight_map[name] == file}, folder / file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "consolidated.safetensors.index.json").write_text(json.dumps(index))
