"""The tensor table of a Mistral model. Its rows stand in layers.py and in vision.py.

Their keys have ``{layer}`` and ``{expert}`` in them; ``KeyStyle`` says how a checkpoint spells a key.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Final

from dist_ckpt_mistral.gather.dtypes import Shape
from dist_ckpt_mistral.model.config.mistral_config import MistralConfig
from dist_ckpt_mistral.model.table.layers import OTHER_EXPERT_NAMES, OTHER_TEXT_NAMES, language_rules
from dist_ckpt_mistral.model.table.rules import (
    Index,
    KeyStyle,
    Place,
    RowBlocks,
    TensorRule,
    axes_in,
    spell,
    spell_key,
)
from dist_ckpt_mistral.model.table.vision import OTHER_NAMES, vision_rules

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
    rest, and the rows are those of every tensor. An alias is one of a rule's ``other_parts``. ``consolidated`` and
    ``rotated_rows`` are those of its ``HfPart``.
    """

    hf_name: str
    shape: Shape
    rule: TensorRule
    index: Index
    rows: RowBlocks
    consolidated: tuple[str, ...]
    rotated_rows: int
    is_alias: bool = False

    def packed(self) -> Iterator[tuple[Index, Index]]:
        """The indices of the Megatron tensors with its rows, each with its coordinates on the leading axes."""
        rest = self.rule.lead[len(self.index) :]
        return ((self.index + at, at) for at in itertools.product(*map(range, rest)))


@dataclass(frozen=True, slots=True, kw_only=True)
class FileSpelling:
    """Which Hugging Face tensors hold a model in files: the usual ones of the table, or aliases of some.

    ``stored_again`` are the aliases of usual tensors that are stored as well, ``missing`` the names of the usual
    tensors that nothing holds.
    """

    usual: tuple[HfTensor, ...]
    stored_again: tuple[HfTensor, ...]
    missing: tuple[str, ...]

    @property
    def tensors(self) -> tuple[HfTensor, ...]:
        """What the model is seen to have: its usual tensors, however they are stored, and what is stored besides."""
        return (*self.usual, *self.stored_again)


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorTable:
    """All tensors of one model. Rules stand in the order in which transformers lists the model's state dict.

    ``renamed`` are other parts of Hugging Face names, each with what stands for it in this table.
    """

    num_layers: int
    rules: tuple[TensorRule, ...]
    renamed: tuple[tuple[re.Pattern[str], str], ...] = ()

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
            hf_name = other.sub(usual, hf_name, count=1)
        return hf_name

    def hf_tensors(self) -> dict[str, HfTensor]:
        """Every Hugging Face tensor by name, in state-dict order: embedding, layers, norm, head; then aliases."""
        by_layer = sorted(
            (tensor for rule in self.rules for tensor in _hf_tensors(rule)),
            key=lambda tensor: (tensor.is_alias, _PLACES.index(tensor.rule.place), tensor.index[:1]),
        )
        return {tensor.hf_name: tensor for tensor in by_layer}

    def spelling(self, hf_names: Collection[str]) -> FileSpelling:
        """How files that hold tensors of these names spell the model."""
        tensors = self.hf_tensors().values()
        aliases = [tensor for tensor in tensors if tensor.is_alias and tensor.hf_name in hf_names]
        usual = [(tensor, _leading(tensor)) for tensor in tensors if not tensor.is_alias]
        stored = set[tuple[str, Index]]().union(*(keys for tensor, keys in usual if tensor.hf_name in hf_names))
        instead = {(tensor.rule.mcore_key, tensor.index) for tensor in aliases} - stored
        return FileSpelling(
            usual=tuple(tensor for tensor, _ in usual),
            stored_again=tuple(tensor for tensor in aliases if (tensor.rule.mcore_key, tensor.index) in stored),
            missing=tuple(t.hf_name for t, keys in usual if t.hf_name not in hf_names and not keys & instead),
        )

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


def _leading(tensor: HfTensor) -> set[tuple[str, Index]]:
    """The rule of a tensor with every beginning of its index: an alias that has one of these holds the tensor."""
    return {(tensor.rule.mcore_key, tensor.index[:axes]) for axes in range(len(tensor.index) + 1)}


def _hf_tensors(rule: TensorRule) -> Iterator[HfTensor]:
    for part in (*rule.parts, *rule.other_parts):
        spelled = axes_in(part.hf_name)
        for index in itertools.product(*map(range, rule.lead[:spelled])):
            yield HfTensor(
                hf_name=spell(part.hf_name, index),
                shape=(*rule.lead[spelled:], part.rows.hf_rows, *rule.shape[1:]),
                rule=rule,
                index=index,
                rows=part.rows,
                consolidated=part.consolidated,
                rotated_rows=part.rotated_rows,
                is_alias=part in rule.other_parts,
            )


def tensor_table(config: MistralConfig) -> TensorTable:
    """The tensor table of a model."""
    rules = language_rules(config)
    renamed = OTHER_TEXT_NAMES if config.vision is None else OTHER_NAMES
    if config.experts is not None and not config.experts.packed:
        renamed = (*renamed, *OTHER_EXPERT_NAMES)
    if config.vision is not None:
        rules = (*vision_rules(config.vision, config.hidden_size), *rules)
    return TensorTable(num_layers=config.num_hidden_layers, rules=rules, renamed=renamed)


def config_as_stored(config: MistralConfig, names: Iterable[str]) -> MistralConfig:
    """``config`` beside the stored tensors of these ``names``, of any rendering: see ``MistralConfig.as_stored``."""
    embedding, *_, head = language_rules(replace(config, tie_word_embeddings=False, vision=None))
    stored = [f".{name}" for name in names]
    # A tied model may be stored as its head alone (safetensors.torch.save_model keeps the first of two names).
    has_both = all(any(name.endswith(_endings(rule)) for name in stored) for rule in (embedding, head))
    return config.as_stored(has_head=has_both)


def _endings(rule: TensorRule) -> tuple[str, ...]:
    """What the names of a tensor end with, in every rendering."""
    (part,) = rule.parts
    names = (rule.mcore_key, part.hf_name.removeprefix("model."), *part.consolidated)
    return tuple(f".{name}" for name in names)
