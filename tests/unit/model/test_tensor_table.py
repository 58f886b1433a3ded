"""The table is written in whole names: who searches the source for a tensor's name finds its row, and only that."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

import dist_ckpt_mistral
from dist_ckpt_mistral.model.config.mistral_config import MistralConfig
from dist_ckpt_mistral.model.config.parts import Experts, LatentAttention, Vision
from dist_ckpt_mistral.model.table import layers, vision
from dist_ckpt_mistral.model.table.rules import TensorRule, tensor_row
from dist_ckpt_mistral.model.table.table import tensor_table

_TABLE: Final = (Path(layers.__file__), Path(vision.__file__))
_TEXT: Final = "\n".join(path.read_text() for path in _TABLE)


def _without_docstrings(path: Path) -> str:
    """A module as Python prints it, without comments and docstrings: examples there may name a tensor."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


_OTHERS: Final = {
    path: _without_docstrings(path)
    for path in Path(dist_ckpt_mistral.__file__).parent.rglob("*.py")
    if path not in _TABLE
}
_SIZES: Final[dict[str, Any]] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
}
_MIXTRAL: Final = Experts(num_experts=4, experts_per_token=2, intermediate_size=8)
_MISTRAL4: Final = Experts(
    num_experts=4, experts_per_token=2, intermediate_size=8, shared_intermediate_size=8, packed=True
)


def _latent(q_lora_rank: int | None) -> LatentAttention:
    return LatentAttention(
        q_lora_rank=q_lora_rank, kv_lora_rank=6, qk_nope_head_dim=2, qk_rope_head_dim=2, v_head_dim=3
    )


def _vision(*, projector_bias: bool) -> Vision:
    return Vision(
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_channels=3,
        patch_size=2,
        merged_patches=2,
        feature_layers=1,
        projector_bias=projector_bias,
    )


#: What models there are -> the fields of MistralConfig that make them.
_CONFIGS: Final[dict[str, dict[str, Any]]] = {
    "dense": {},
    "tied": {"tie_word_embeddings": True},
    "mixtral": {"experts": _MIXTRAL},
    "mistral 4": {"experts": _MISTRAL4, "latent_attention": _latent(4)},
    "queries without a latent": {"experts": _MISTRAL4, "latent_attention": _latent(None)},
    "latent attention before an MLP": {"latent_attention": _latent(4)},
    "multimodal": {"vision": _vision(projector_bias=True)},
    "multimodal, tied": {"vision": _vision(projector_bias=False), "tie_word_embeddings": True},
    "multimodal mixtral": {"vision": _vision(projector_bias=False), "experts": _MIXTRAL},
    "multimodal mistral 4": {
        "vision": _vision(projector_bias=False),
        "experts": _MISTRAL4,
        "latent_attention": _latent(4),
    },
}
_NAMES: Final = """
embedding.word_embeddings.weight decoder.final_layernorm.weight output_layer.weight
decoder.layers.{layer}.self_attention.linear_qkv.weight self_attention.linear_qkv.layer_norm_weight
self_attention.linear_q_down_proj.weight linear_kv_up_proj.layer_norm_weight self_attention.linear_proj._extra_state
decoder.layers.{layer}.input_layernorm.weight mlp.linear_fc1.weight mlp.linear_fc1.layer_norm_weight
mlp.experts.experts.{expert}.linear_fc2.weight mlp.experts.local_experts.{expert}.linear_fc1.weight
mlp.experts.linear_fc1.weight{expert} mlp.router.weight mlp.shared_experts.linear_fc2.weight
model.embed_tokens.weight model.layers.{layer}.self_attn.q_proj.weight mlp.gate_proj.weight lm_head.weight
language_model.model.layers.{layer}.self_attn.o_proj.weight self_attn.kv_a_proj_with_mqa.weight mlp.experts.down_proj
block_sparse_moe.experts.{expert}.w1.weight block_sparse_moe.gate.weight post_attention_layernorm.weight
vision_tower.transformer.layers.{layer}.attention.k_proj.weight multi_modal_projector.linear_1.bias
tok_embeddings.weight layers.{layer}.attention.wq.weight layers.{layer}.feed_forward.w3.weight wkv_a_with_mqa.weight
layers.{layer}.experts.{expert}.w2.weight vision_encoder.transformer.layers.{layer}.attention.wk.weight
vision_language_adapter.w_in.weight pre_mm_projector_norm.weight
"""
#: What people look for, in Megatron, in Hugging Face files and in Mistral AI's own.
_SEARCHES: Final = _NAMES.split()


def _names(rule: TensorRule) -> Iterator[str]:
    """All names of one tensor, the layers of a vision tower as ``{layer}`` too."""
    names = [*rule.keys]
    for module in (rule.local, rule.te):
        names += [module.name, *(module.extra_state or ())]
    for part in (*rule.parts, *rule.other_parts):
        names += [part.hf_name, *part.consolidated]
    yield from (re.sub(r"\.layers\.\d+\.", ".layers.{layer}.", name) for name in names)


@pytest.mark.parametrize("model", _CONFIGS)
def test_every_name_stands_in_the_table_whole(model: str) -> None:
    """Keys, modules' names, extra states, Hugging Face names and consolidated ones are all literally in the source."""
    config = MistralConfig(**_SIZES | _CONFIGS[model])
    names = {name for rule in tensor_table(config).rules for name in _names(rule)}
    assert len(names) > 30
    assert [name for name in names if name not in _TEXT] == []


@pytest.mark.parametrize("searched", _SEARCHES)
def test_a_search_lands_in_the_table(searched: str) -> None:
    """A search of the package for a name that people know finds the table, and no other module."""
    assert searched in _TEXT
    assert [path for path, text in _OTHERS.items() if searched in text] == []


@pytest.mark.parametrize("model", _CONFIGS)
def test_no_name_stands_elsewhere(model: str) -> None:
    """No other module of the package has the whole name of a tensor in its code."""
    config = MistralConfig(**_SIZES | _CONFIGS[model])
    names = {name for rule in tensor_table(config).rules for name in _names(rule)}
    assert [(path, name) for path, text in _OTHERS.items() for name in names if name in text] == []


def test_one_row_a_tensor() -> None:
    """No Megatron key begins two rows."""
    calls = (node for path in _TABLE for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
    rows = [ast.unparse(call.args[0]) for call in calls if ast.unparse(call.func) in {"tensor_row", "_row"}]
    rows.remove("name")  # all of vision's
    assert len(rows) >= 40
    assert [row for row, count in Counter(rows).items() if count > 1] == []


def test_a_row_must_say_the_rows_of_each_part() -> None:
    """Without row blocks parts have equal shares of the rows; with some, each part must have its own."""
    row = tensor_row("key", ("gate", "w1"), ("up", "w3"), shape=(6, 4))
    gate, up = row.parts
    assert (list(gate.rows), list(up.rows)) == ([(0, 0, 3)], [(0, 3, 3)])
    with pytest.raises(ValueError, match="zip"):
        tensor_row("key", ("gate", "w1"), ("up", "w3"), shape=(6, 4), rows=(gate.rows,))
