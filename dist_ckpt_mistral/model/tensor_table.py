"""The tensor table of a Mistral model. Names of tensors stand here, in layer_table.py and in vision_table.py alone.

Row orders, axes and keys: megatron-core 0.12 to 0.19, local and Transformer Engine spec (transformer/attention.py,
multi_latent_attention.py, mlp.py and moe/experts.py, models/gpt/gpt_model.py and gpt_layer_specs.py); Hugging Face
names on disk: transformers 4.34 to 5.23, models/mistral, mixtral and mistral4; names in Mistral AI's own files
("consolidated"): mistral-inference, and what transformers' convert_mistral*_to_hf.py read. A Megatron key is written
in tables with ``{layer}`` and ``{expert}`` in it; ``KeyStyle`` says how a checkpoint spells it.
"""

from __future__ import annotations

from typing import Final

from dist_ckpt_mistral.model.config import MistralConfig
from dist_ckpt_mistral.model.layer_table import layer_rules, state_beside, whole
from dist_ckpt_mistral.model.tensor_rules import ModuleTensor, Place, TensorRule, TensorTable
from dist_ckpt_mistral.model.vision_table import IN_MEMORY, LANGUAGE_PREFIX, vision_rules

#: The name under which a last pipeline stage holds its copy of tied embeddings.
TIED_OUTPUT_NAME: Final = "output_layer.weight"

#: Objects that only models of Transformer Engine up to megatron-core 0.14 look for.
OLD_EXTRA_STATES: Final = ("decoder.layers.self_attention.core_attention._extra_state",)


def tensor_table(config: MistralConfig) -> TensorTable:
    """The tensor table of a model."""
    rules = (_embedding(config), *layer_rules(config, _hf_prefix(config)), *_output(config))
    if config.vision is None:
        return TensorTable(num_layers=config.num_hidden_layers, rules=rules)
    rules = (*vision_rules(config.vision, config.hidden_size), *rules)
    return TensorTable(num_layers=config.num_hidden_layers, rules=rules, renamed=IN_MEMORY)


def _hf_prefix(config: MistralConfig) -> str:
    """What stands before the names of the language model in Hugging Face files."""
    return "" if config.vision is None else LANGUAGE_PREFIX


def _vocabulary_rule(
    key: str, hf_name: str, own_name: str, config: MistralConfig, place: Place, *aliases: str
) -> TensorRule:
    module = ModuleTensor(mcore_key=key, name=key, tp_axis=0)
    return TensorRule(
        local=module,
        te=module,
        shape=(config.vocab_size, config.hidden_size),
        lead=(),
        place=place,
        parts=whole(_hf_prefix(config) + hf_name, config.vocab_size, own_name),
        padded_vocabulary=True,
        hf_aliases=tuple(_hf_prefix(config) + alias for alias in aliases),
    )


def _embedding(config: MistralConfig) -> TensorRule:
    aliases = ("lm_head.weight",) if config.tie_word_embeddings else ()
    key = "embedding.word_embeddings.weight"
    names = ("model.embed_tokens.weight", "tok_embeddings.weight")
    return _vocabulary_rule(key, *names, config, Place.EMBEDDING, *aliases)


def _output(config: MistralConfig) -> tuple[TensorRule, ...]:
    key = "decoder.final_layernorm.weight"
    norm = TensorRule(
        local=ModuleTensor(mcore_key=key, name=key, tp_axis=None),
        te=ModuleTensor(mcore_key=key, name=key, tp_axis=None, extra_state=state_beside(key, key)),
        shape=(config.hidden_size,),
        lead=(),
        place=Place.OUTPUT,
        parts=whole(_hf_prefix(config) + "model.norm.weight", config.hidden_size, "norm.weight"),
    )
    if config.tie_word_embeddings:
        return (norm,)
    return (norm, _vocabulary_rule(TIED_OUTPUT_NAME, "lm_head.weight", "output.weight", config, Place.OUTPUT))
