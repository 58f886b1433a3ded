"""The names of a multimodal model: of its vision tower and projector, and how they change those of its language model.

Hugging Face: transformers 4.50 to 5.23, models/pixtral and models/mistral3. In a Megatron checkpoint the tower and the
projector have the same names (Megatron-Bridge, models/ministral3/ministral3_bridge.py); Megatron's loaders ignore them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from dist_ckpt_mistral.gather.dtypes import Shape
from dist_ckpt_mistral.model.config.parts import Vision
from dist_ckpt_mistral.model.table.row_blocks import RowBlocks
from dist_ckpt_mistral.model.table.rules import HfPart, ModuleTensor, OwnRows, Place, TensorRule

#: Before the names of the language model: on disk in Hugging Face files, and in the keys of Megatron-Bridge.
LANGUAGE_PREFIX: Final = "language_model."
_TOWER: Final = "vision_tower."
_PROJECTOR: Final = "multi_modal_projector."
#: The vision tower in Mistral AI's own files (transformers, convert_mistral3_weights_to_hf.py).
_OWN: Final = "vision_encoder."

#: Other beginnings of names that transformers 5.24 takes (conversion_mapping.py, core_model_loading.py), and what
#: stands for them in most files. ``model.language_model.``, ``lm_head.`` and ``model.vision_tower.`` are those of its
#: memory: ``save_pretrained(save_original_format=False)`` writes them, and so does anyone who saves a state dict.
OTHER_NAMES: Final = (
    (
        re.compile(r"^(model\.){0,2}language_model\.(model\.){0,2}(?=(embed_tokens|layers|norm)\.)"),
        LANGUAGE_PREFIX + "model.",
    ),
    (re.compile(r"^(model\.)?(?=lm_head\.)"), LANGUAGE_PREFIX),
    (re.compile(r"^(model\.){1,2}(?=vision_tower\.|multi_modal_projector\.)"), ""),
)


def is_carried(mcore_key: str) -> bool:
    """Whether a key is that of a vision tower or projector."""
    return mcore_key.startswith((_TOWER, _PROJECTOR))


def with_prefix(prefix: str, mcore_key: str) -> str:
    """The key in a checkpoint that puts ``prefix`` before those of its language model.

    Vision tower and projector stand beside the language model: they have what stands before that.
    """
    if is_carried(mcore_key):
        prefix = prefix.removesuffix(LANGUAGE_PREFIX)
    return prefix + mcore_key


def vision_rules(vision: Vision, text_hidden: int) -> tuple[TensorRule, ...]:
    """The tensors of the vision tower and of the projector to ``text_hidden`` features, in transformers' order."""
    return (*_tower(vision), *_projector(vision, text_hidden))


def _tower(vision: Vision) -> Iterator[TensorRule]:
    hidden, patch = vision.hidden_size, vision.patch_size
    yield _rule(_TOWER + "patch_conv.weight", (hidden, vision.num_channels, patch, patch), _OWN + "patch_conv.weight")
    yield _rule(_TOWER + "ln_pre.weight", (hidden,), _OWN + "ln_pre.weight")
    for layer in range(vision.num_hidden_layers):
        yield from _layer(vision, *(f"{tower}transformer.layers.{layer}." for tower in (_TOWER, _OWN)))


def _layer(vision: Vision, there: str, own: str) -> Iterator[TensorRule]:
    hidden, ffn = vision.hidden_size, vision.intermediate_size
    yield _rule(there + "attention_norm.weight", (hidden,), own + "attention_norm.weight")
    wide = (ffn, hidden)
    for name, own_name, shape in (("gate", "w1", wide), ("up", "w3", wide), ("down", "w2", (hidden, ffn))):
        yield _rule(f"{there}feed_forward.{name}_proj.weight", shape, f"{own}feed_forward.{own_name}.weight")
    for name, rotated in (("k", vision.head_dim), ("v", 0), ("q", vision.head_dim), ("o", 0)):
        hf_name, own_name = f"{there}attention.{name}_proj.weight", f"{own}attention.w{name}.weight"
        yield _rule(hf_name, (hidden, hidden), own_name, rotated_rows=rotated)
    yield _rule(there + "ffn_norm.weight", (hidden,), own + "ffn_norm.weight")


def _projector(vision: Vision, text_hidden: int) -> Iterator[TensorRule]:
    hidden, merging = vision.hidden_size, "patch_merger.merging_layer.weight"
    yield _rule(_PROJECTOR + "norm.weight", (hidden,), "pre_mm_projector_norm.weight")
    yield _rule(_PROJECTOR + merging, (hidden, hidden * vision.merged_patches**2), merging)
    for name, own_name, columns in (("1", "in", hidden * vision.feature_layers), ("2", "out", text_hidden)):
        there, own = f"{_PROJECTOR}linear_{name}.", f"vision_language_adapter.w_{own_name}."
        yield _rule(there + "weight", (text_hidden, columns), own + "weight")
        if vision.projector_bias:
            yield _rule(there + "bias", (text_hidden,), own + "bias")


def _rule(name: str, shape: Shape, own_name: str, *, rotated_rows: int = 0) -> TensorRule:
    module = ModuleTensor(mcore_key=name, name=name, tp_axis=None)
    own = OwnRows(name=own_name, first_row=0, rows=shape[0], rotated_rows=rotated_rows)
    part = HfPart(hf_name=name, rows=RowBlocks.identity(shape[0]), own=(own,))
    return TensorRule(local=module, te=module, shape=shape, lead=(), place=Place.CARRIED, parts=(part,))
