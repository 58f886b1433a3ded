"""Small models of the family that are unlike in what inference depends on, as transformers makes and saves them."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Final

import torch
from family_models import model_class
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerFast

if TYPE_CHECKING:
    from pathlib import Path

#: One token for each byte, behind three special ones.
VOCABULARY: Final = 259
_SIZES: Final[dict[str, Any]] = {
    "model_type": "mistral",
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "sliding_window": None,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,  # some families have a default, which a prompt may hold
}
_YARN: Final = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 16}
_SCALED: Final = _YARN | {"llama_4_scaling_beta": 0.7}
_MIXTRAL: Final[dict[str, Any]] = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
_MISTRAL4: Final[dict[str, Any]] = {
    "model_type": "mistral4",
    "head_dim": 10,
    "q_lora_rank": 16,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "moe_intermediate_size": 20,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 0,
    "rope_parameters": _SCALED | {"mscale": 1.0, "mscale_all_dim": 1.0},
}
_SOME: Final = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
MODELS: Final[dict[str, dict[str, Any]]] = {
    "full attention": {},
    "sliding window": {"sliding_window": 5},
    "yarn": {"rope_parameters": _YARN},
    "yarn, all values": {
        "rope_parameters": _YARN
        | {"beta_fast": 16.0, "beta_slow": 2.0, "mscale": 0.7, "mscale_all_dim": 1.3, "truncate": False}
    },
    "yarn, attention factor": {"rope_parameters": _YARN | {"attention_factor": 1.4}},
    "grouped queries, other base": {"num_key_value_heads": 2, "rope_parameters": {"rope_theta": 500.0}},
    "tied": {"tie_word_embeddings": True, "num_key_value_heads": 2},
    "head_dim of its own": {"head_dim": 14, "num_key_value_heads": 2, "sliding_window": 7},
    "mixtral": _MIXTRAL,
    "ministral": {"model_type": "ministral", "sliding_window": 5, "layer_types": _SOME},
    "ministral3": {"model_type": "ministral3", "num_key_value_heads": 2, "rope_parameters": _SCALED},
    "mistral4": _MISTRAL4,
    "mistral4, groups": {
        **_MISTRAL4,
        "n_shared_experts": 2,
        "n_group": 2,
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.5,
        "rope_parameters": _SCALED | {"mscale": 0.8, "mscale_all_dim": 0.6, "attention_factor": 1.3},
    },
}
#: Longer than every window, and than YaRN's original context.
PROMPT: Final = torch.randint(3, VOCABULARY, (1, 24), generator=torch.Generator().manual_seed(5))


def small_model(name: str, **changes: object) -> PreTrainedModel:
    """The model, random in float32 and large enough everywhere that a small mistake shows in the logits."""
    sizes = copy.deepcopy(_SIZES | MODELS[name] | changes)  # transformers writes into rope_parameters
    config = AutoConfig.for_model(sizes.pop("model_type"), **sizes)
    model = model_class(config)(config).float().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if parameter.ndim == 1 else 0.3 * noise)
    return model


def save_tokenizer(folder: Path) -> None:
    """Save a tokenizer of bytes, as transformers does."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<unk>", "<s>", "</s>", *alphabet]
    bytes_ = Tokenizer(models.BPE(vocab={name: number for number, name in enumerate(names)}, merges=[]))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_.decoder = decoders.ByteLevel()
    bytes_.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = dict(zip(("unk_token", "bos_token", "eos_token"), names, strict=False))
    PreTrainedTokenizerFast(tokenizer_object=bytes_, **special).save_pretrained(folder)
