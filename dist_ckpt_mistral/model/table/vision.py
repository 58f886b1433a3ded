"""The tensors of a multimodal model's vision tower and projector, and the prefix of its language model's names.

Hugging Face: transformers 4.50 to 5.23, models/pixtral and models/mistral3. In a Megatron checkpoint the tower and the
projector have the same names (Megatron-Bridge, models/ministral3/ministral3_bridge.py); Megatron's loaders ignore them.
Mistral AI's own files: transformers, models/mistral3/convert_mistral3_weights_to_hf.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from dist_ckpt_mistral.gather.dtypes import Shape
from dist_ckpt_mistral.model.config.parts import Vision
from dist_ckpt_mistral.model.table.rules import Stage, TensorRule, tensor_row

#: Prefix of the language model's names in Hugging Face files and in Megatron-Bridge's keys.
LANGUAGE_PREFIX: Final = "language_model."
#: Prefixes of the vision tower and of the projector from it to the language model.
_CARRIED: Final = ("vision_tower.", "multi_modal_projector.")

#: Other prefixes of names that transformers 5.24 reads (conversion_mapping.py, core_model_loading.py), and the usual
#: prefix in files. ``model.language_model.``, ``lm_head.`` and ``model.vision_tower.`` are the names of the model in
#: memory: ``save_pretrained(save_original_format=False)`` and a saved state dict have them.
OTHER_NAMES: Final = (
    (
        re.compile(r"^(model\.){0,2}language_model\.(model\.){0,2}(?=(embed_tokens|layers|norm)\.)"),
        LANGUAGE_PREFIX + "model.",
    ),
    (re.compile(r"^(model\.)?(?=lm_head\.)"), LANGUAGE_PREFIX),
    (re.compile(r"^(model\.){1,2}(?=vision_tower\.|multi_modal_projector\.)"), ""),
)

#: The names of the model in memory, for those in files: what ``OTHER_NAMES`` reads, the other way round.
_NAMES_IN_MEMORY: Final = (
    (re.compile(r"^language_model\.model\."), "model.language_model."),
    (re.compile(r"^language_model\.(?=lm_head\.)"), ""),
)


def in_memory(hf_name: str) -> str:
    """The name in transformers' model of a tensor that files call ``hf_name``."""
    for pattern, name in _NAMES_IN_MEMORY:
        hf_name = pattern.sub(name, hf_name, count=1)
    return hf_name


def is_carried(mcore_key: str) -> bool:
    """Whether a key is that of a vision tower or projector."""
    return mcore_key.startswith(_CARRIED)


def with_prefix(prefix: str, mcore_key: str) -> str:
    """The key in a checkpoint whose language model keys begin with ``prefix``.

    Vision tower and projector are beside the language model: their keys lack the ``language_model.`` of ``prefix``.
    """
    if is_carried(mcore_key):
        prefix = prefix.removesuffix(LANGUAGE_PREFIX)
    return prefix + mcore_key


def vision_rules(vision: Vision, text_hidden_size: int) -> tuple[TensorRule, ...]:
    """The tensors of the vision tower and of the projector to ``text_hidden_size`` features, in transformers' order."""
    return (*_tower(vision), *_projector(vision, text_hidden_size))


def _tower(vision: Vision) -> Iterator[TensorRule]:
    """The vision tower: models/pixtral."""
    hidden_size, intermediate_size, patch_size = vision.hidden_size, vision.intermediate_size, vision.patch_size
    yield _row(
        "vision_tower.patch_conv.weight",
        "vision_encoder.patch_conv.weight",
        (hidden_size, vision.num_channels, patch_size, patch_size),
    )
    yield _row("vision_tower.ln_pre.weight", "vision_encoder.ln_pre.weight", (hidden_size,))
    for layer in range(vision.num_hidden_layers):
        yield _row(
            f"vision_tower.transformer.layers.{layer}.attention_norm.weight",
            f"vision_encoder.transformer.layers.{layer}.attention_norm.weight",
            (hidden_size,),
        )
        yield _row(
            f"vision_tower.transformer.layers.{layer}.feed_forward.gate_proj.weight",
            f"vision_encoder.transformer.layers.{layer}.feed_forward.w1.weight",
            (intermediate_size, hidden_size),
        )
        yield _row(
            f"vision_tower.transformer.layers.{layer}.feed_forward.up_proj.weight",
            f"vision_encoder.transformer.layers.{layer}.feed_forward.w3.weight",
            (intermediate_size, hidden_size),
        )
        yield _row(
            f"vision_tower.transformer.layers.{layer}.feed_forward.down_proj.weight",
            f"vision_encoder.transformer.layers.{layer}.feed_forward.w2.weight",
            (hidden_size, intermediate_size),
        )
        yield _row(
            f"vision_tower.transformer.layers.{layer}.attention.k_proj.weight",
            f"vision_encoder.transformer.layers.{layer}.attention.wk.weight",
            (hidden_size, hidden_size),
            rotated_rows=vision.head_dim,
        )
        yield _row(
            f"vision_tower.transformer.layers.{layer}.attention.v_proj.weight",
            f"vision_encoder.transformer.layers.{layer}.attention.wv.weight",
            (hidden_size, hidden_size),
        )
        yield _row(
            f"vision_tower.transformer.layers.{layer}.attention.q_proj.weight",
            f"vision_encoder.transformer.layers.{layer}.attention.wq.weight",
            (hidden_size, hidden_size),
            rotated_rows=vision.head_dim,
        )
        yield _row(
            f"vision_tower.transformer.layers.{layer}.attention.o_proj.weight",
            f"vision_encoder.transformer.layers.{layer}.attention.wo.weight",
            (hidden_size, hidden_size),
        )
        yield _row(
            f"vision_tower.transformer.layers.{layer}.ffn_norm.weight",
            f"vision_encoder.transformer.layers.{layer}.ffn_norm.weight",
            (hidden_size,),
        )


def _projector(vision: Vision, text_hidden_size: int) -> Iterator[TensorRule]:
    """The projector: models/mistral3."""
    hidden_size = vision.hidden_size
    yield _row("multi_modal_projector.norm.weight", "pre_mm_projector_norm.weight", (hidden_size,))
    yield _row(
        "multi_modal_projector.patch_merger.merging_layer.weight",
        "patch_merger.merging_layer.weight",
        (hidden_size, hidden_size * vision.merged_patches**2),
    )
    linear_1 = (text_hidden_size, hidden_size * vision.feature_layers)
    yield _row("multi_modal_projector.linear_1.weight", "vision_language_adapter.w_in.weight", linear_1)
    if vision.projector_bias:
        yield _row("multi_modal_projector.linear_1.bias", "vision_language_adapter.w_in.bias", linear_1[:1])
    linear_2 = (text_hidden_size, text_hidden_size)
    yield _row("multi_modal_projector.linear_2.weight", "vision_language_adapter.w_out.weight", linear_2)
    if vision.projector_bias:
        yield _row("multi_modal_projector.linear_2.bias", "vision_language_adapter.w_out.bias", linear_2[:1])


def _row(name: str, consolidated: str, shape: Shape, *, rotated_rows: int = 0) -> TensorRule:
    """The rule of a tensor with the same ``name`` and rows in Megatron checkpoints and Hugging Face files."""
    return tensor_row(name, (name, consolidated), shape=shape, stage=Stage.CARRIED, rotated_rows=(rotated_rows,))
