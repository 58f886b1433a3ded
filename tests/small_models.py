"""Small Mistral models that are unlike in what inference depends on, as transformers makes and saves them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import MistralConfig, MistralForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

if TYPE_CHECKING:
    from pathlib import Path

#: One token for each byte, behind three special ones.
VOCABULARY: Final = 259
_SIZES: Final[dict[str, Any]] = {
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
}
_YARN: Final = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 16}
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
}
#: Longer than every window, and than YaRN's original context.
PROMPT: Final = torch.randint(3, VOCABULARY, (1, 24), generator=torch.Generator().manual_seed(5))


def small_model(name: str, **changes: object) -> PreTrainedModel:
    """The model, random in float32 and large enough everywhere that a small mistake shows in the logits."""
    model = MistralForCausalLM(MistralConfig(**_SIZES | MODELS[name] | changes)).float().eval()
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
