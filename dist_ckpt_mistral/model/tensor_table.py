"""The tensor table of a Mistral model. Names of tensors stand here, in layer_table.py and in vision_table.py alone.

Row orders, axes and keys: megatron-core 0.12 to 0.19, local and Transformer Engine spec (transformer/attention.py,
multi_latent_attention.py, mlp.py and moe/experts.py, models/gpt/gpt_model.py and gpt_layer_specs.py); Hugging Face
names on disk: transformers 4.34 to 5.23, models/mistral, mixtral and mistral4; names in Mistral AI's own files
("consolidated"): mistral-inference, and what transformers' convert_mistral*_to_hf.py read. A Megatron key is written
in tables with ``{layer}`` and ``{expert}`` in it; ``KeyStyle`` says how a checkpoint spells it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Final

from dist_ckpt_mistral.model.config import MistralConfig
from dist_ckpt_mistral.model.layer_table import layer_rules, state_beside, whole
from dist_ckpt_mistral.model.row_blocks import RowBlocks
from dist_ckpt_mistral.model.tensor_rules import (
    Index,
    KeyStyle,
    ModuleTensor,
    OwnRows,
    Place,
    TensorRule,
    axes_in,
    spell,
    spell_key,
)
from dist_ckpt_mistral.model.vision_table import IN_MEMORY, LANGUAGE_PREFIX, vision_rules
from dist_ckpt_mistral.shapes import Shape

#: The name under which a last pipeline stage holds its copy of tied embeddings.
TIED_OUTPUT_NAME: Final = "output_layer.weight"
#: The head of a model that does not tie it: in Megatron, in Hugging Face files, in Mistral AI's own.
_HEAD: Final = (TIED_OUTPUT_NAME, "lm_head.weight", "output.weight")

#: Objects that only models of Transformer Engine up to megatron-core 0.14 look for.
OLD_EXTRA_STATES: Final = ("decoder.layers.self_attention.core_attention._extra_state",)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredRows:
    """Where one tensor's rows ``[first_row, first_row + rows)`` lie in a checkpoint of some key style.

    ``index`` are the coordinates on the leading axes of the stored tensor (of layer and expert, as far as its key does
    not spell them) and ``global_shape`` is its shape.
    """

    mcore_key: str
    index: Index
    first_row: int
    rows: int
    global_shape: Shape


@dataclass(frozen=True, slots=True, kw_only=True)
class HfTensor:
    """One Hugging Face tensor of the model: name, shape in elements, and the Megatron rows that hold it.

    ``index`` is that of the Megatron tensor, or what the name spells of it: then the leading axes of ``shape`` are the
    rest, and the rows are those of every tensor.
    """

    hf_name: str
    shape: Shape
    rule: TensorRule
    index: Index
    rows: RowBlocks
    own: tuple[OwnRows, ...]
    is_alias: bool = False

    def packed(self) -> Iterator[tuple[Index, Index]]:
        """The indices of the Megatron tensors with its rows, each with its coordinates on the leading axes."""
        rest = self.rule.lead[len(self.index) :]
        return ((self.index + at, at) for at in itertools.product(*map(range, rest)))


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorTable:
    """All tensors of one model. Rules stand in the order in which transformers lists the model's state dict.

    ``renamed`` are other beginnings of Hugging Face names, each with the one that stands for it in this table.
    """

    num_layers: int
    rules: tuple[TensorRule, ...]
    renamed: tuple[tuple[str, str], ...] = ()

    @property
    def carried(self) -> tuple[TensorRule, ...]:
        """The rules of what Megatron's model does not have."""
        return tuple(rule for rule in self.rules if rule.place is Place.CARRIED)

    def without_carried(self) -> TensorTable:
        """The table of what Megatron's model has."""
        return replace(self, rules=tuple(rule for rule in self.rules if rule.place is not Place.CARRIED))

    def usual_name(self, hf_name: str) -> str:
        """The name in this table of a tensor that a file calls ``hf_name``."""
        for other, usual in self.renamed:
            if hf_name.startswith(other):
                return usual + hf_name.removeprefix(other)
        return hf_name

    def hf_tensors(self) -> dict[str, HfTensor]:
        """Every Hugging Face tensor by name, in state-dict order: embedding, layers, norm, head; then aliases."""
        by_layer = sorted(
            (tensor for rule in self.rules for tensor in _hf_tensors(rule)),
            key=lambda tensor: (tensor.is_alias, _PLACES.index(tensor.rule.place), tensor.index[:1]),
        )
        return {tensor.hf_name: tensor for tensor in by_layer}

    def stored(self, rule: TensorRule, index: Index, style: KeyStyle, key: str = "") -> tuple[StoredRows, ...]:
        """Where the tensor of ``index`` lies in a checkpoint of ``style``; ``key`` picks one of ``rule.keys``."""
        spelled = style.spelled_axes
        name = spell_key(key or rule.mcore_key, index, style)
        halves = ("_w", "_v") if style is KeyStyle.SINGLETON and rule.glu_halves > 1 else ("",)
        rows = rule.shape[0] // len(halves)
        return tuple(
            StoredRows(
                mcore_key=name + half,
                index=index[spelled:],
                first_row=number * rows,
                rows=rows,
                global_shape=(*rule.lead[spelled:], rows, *rule.shape[1:]),
            )
            for number, half in enumerate(halves)
        )

    def extra_states(self, style: KeyStyle) -> dict[str, Shape]:
        """The objects besides that models of any layer spec look for: key and shape of each."""
        found = {}
        for rule in self.rules:
            for module in (rule.local, rule.te):
                if module.extra_state is not None:
                    key = module.extra_state[0]
                    for index in itertools.product(*map(range, rule.lead[: style.spelled_axes])):
                        name, shape = spell_key(key, index, style), rule.lead[len(index) :]
                        found[name] = shape or (1,)
        return found

    def spelled(self, rule: TensorRule, style: KeyStyle, key: str = "") -> Iterator[tuple[str, Shape]]:
        """The stored tensors that hold all tensors of ``rule``: key and shape of each, once."""
        for index in itertools.product(*map(range, rule.lead[: style.spelled_axes])):
            rest = (0,) * (len(rule.lead) - len(index))
            for stored in self.stored(rule, index + rest, style, key):
                yield stored.mcore_key, stored.global_shape


_PLACES: Final = tuple(Place)


def _hf_tensors(rule: TensorRule) -> Iterator[HfTensor]:
    for part in rule.parts:
        for hf_name in (part.hf_name, *rule.hf_aliases):
            spelled = axes_in(hf_name)
            for index in itertools.product(*map(range, rule.lead[:spelled])):
                yield HfTensor(
                    hf_name=spell(hf_name, index),
                    shape=(*rule.lead[spelled:], part.rows.hf_rows, *rule.shape[1:]),
                    rule=rule,
                    index=index,
                    rows=part.rows,
                    own=part.own,
                    is_alias=hf_name != part.hf_name,
                )


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
    aliases = (_HEAD[1],) if config.tie_word_embeddings else ()
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
    return (norm, _vocabulary_rule(*_HEAD, config, Place.OUTPUT))


def config_as_stored(config: MistralConfig, names: Iterable[str]) -> MistralConfig:
    """``config`` beside the stored tensors of these ``names``, of any rendering: see ``MistralConfig.as_stored``."""
    heads = tuple(f".{head}" for head in _HEAD)
    return config.as_stored(has_head=any(f".{name}".endswith(heads) for name in names))
