"""The tensor table of a Mistral model, from the rows in layers.py and vision.py.

Keys contain ``{layer}`` and ``{expert}``; ``KeyStyle`` says how a checkpoint spells them.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Final

from dist_ckpt_mistral.gather.dtypes import Shape
from dist_ckpt_mistral.model.config.mistral_config import MistralConfig
from dist_ckpt_mistral.model.table.adapters import OTHER_PEFT_NAMES, Adapter
from dist_ckpt_mistral.model.table.layers import OTHER_EXPERT_NAMES, OTHER_TEXT_NAMES, language_rules
from dist_ckpt_mistral.model.table.rules import (
    Index,
    KeyStyle,
    RowBlocks,
    Stage,
    TensorRule,
    axes_in,
    spell,
    spell_key,
)
from dist_ckpt_mistral.model.table.vision import OTHER_NAMES, vision_rules

#: Keys of objects that models with Transformer Engine expect up to megatron-core 0.14.
OLD_EXTRA_STATES: Final = ("decoder.layers.self_attention.core_attention._extra_state",)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredRows:
    """The stored tensor that holds rows ``[first_row, first_row + rows)`` of one tensor.

    ``index`` gives the coordinates on the leading axes of the stored tensor: the layer and expert that its key does not
    spell out. ``global_shape`` is its shape in elements.
    """

    mcore_key: str
    index: Index
    first_row: int
    rows: int
    global_shape: Shape

    def holds_any(self, rows: RowBlocks) -> bool:
        """Whether some of these Megatron rows are stored here."""
        end = self.first_row + self.rows
        return any(max(row, self.first_row) < min(row + length, end) for _, row, length in rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class HfTensor:
    """One Hugging Face tensor of the model: its name, its shape in elements, and the Megatron rows that hold it.

    ``index`` is the index of the Megatron tensor as far as the name spells it. The remaining axes of the index, if any,
    are the leading axes of ``shape``, and ``rows`` are then the rows of each Megatron tensor. An alias is one of the
    rule's ``other_parts``. ``consolidated`` and ``rotated_rows`` are those of ``HfPart``.
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
        """Yield the index of each Megatron tensor that holds its rows, and the coordinates on the leading axes."""
        rest = self.rule.lead[len(self.index) :]
        return ((self.index + at, at) for at in itertools.product(*map(range, rest)))


@dataclass(frozen=True, slots=True, kw_only=True)
class FileSpelling:
    """The Hugging Face tensors that hold a model in files: the usual ones of the table, or aliases of them.

    ``stored_again`` are aliases of usual tensors that are stored too. ``missing`` are the names of the usual tensors
    that are not stored, not even as an alias.
    """

    usual: tuple[HfTensor, ...]
    stored_again: tuple[HfTensor, ...]
    missing: tuple[str, ...]

    @property
    def tensors(self) -> tuple[HfTensor, ...]:
        """The usual tensors, under whichever name they are stored, and the aliases stored beside them."""
        return (*self.usual, *self.stored_again)


@dataclass(frozen=True, kw_only=True)
class TensorTable:
    """All tensors of one model. Rules have the order of the state dict in transformers.

    ``renamed`` pairs a pattern for an unusual part of Hugging Face names with the part that this table has instead.
    ``adapters`` are those whose tensors are among ``rules``.
    """

    num_layers: int
    rules: tuple[TensorRule, ...]
    renamed: tuple[tuple[re.Pattern[str], str], ...] = ()
    adapters: tuple[Adapter, ...] = ()

    def of_adapters(self, adapters: Iterable[Adapter]) -> TensorTable:
        """The table of the tensors of ``adapters`` alone; their names are those of PEFT."""
        adapters = tuple(adapters)
        rules = tuple(rule for adapter in adapters for rule in adapter.rules)
        return replace(self, rules=rules, renamed=OTHER_PEFT_NAMES, adapters=adapters)

    def with_adapters(self, adapters: Iterable[Adapter]) -> TensorTable:
        """This table and the tensors of ``adapters``."""
        of_adapters = self.of_adapters(adapters)
        return replace(self, rules=(*self.rules, *of_adapters.rules), adapters=of_adapters.adapters)

    def without_adapters(self) -> TensorTable:
        """This table without the tensors of adapters."""
        of_adapters = {rule.mcore_key for adapter in self.adapters for rule in adapter.rules}
        rules = tuple(rule for rule in self.rules if rule.mcore_key not in of_adapters)
        return replace(self, rules=rules, adapters=())

    @property
    def carried(self) -> tuple[TensorRule, ...]:
        """The rules of tensors that Megatron's model does not have."""
        return tuple(rule for rule in self.rules if rule.stage is Stage.CARRIED)

    def without_carried(self) -> TensorTable:
        """This table without the tensors that Megatron's model does not have."""
        return replace(self, rules=tuple(rule for rule in self.rules if rule.stage is not Stage.CARRIED))

    def usual_name(self, hf_name: str) -> str:
        """The table's name for the tensor ``hf_name`` of a file."""
        for pattern, usual in self.renamed:
            hf_name = pattern.sub(usual, hf_name, count=1)
        return hf_name

    def hf_tensors(self) -> Mapping[str, HfTensor]:
        """Every Hugging Face tensor by name, in state-dict order: embedding, layers, norm, head; then aliases."""
        return self._hf_tensors

    @functools.cached_property
    def _hf_tensors(self) -> dict[str, HfTensor]:
        by_layer = sorted(
            (tensor for rule in self.rules for tensor in _hf_tensors(rule)),
            key=lambda tensor: (tensor.is_alias, _STAGES.index(tensor.rule.stage), tensor.index[:1]),
        )
        return {tensor.hf_name: tensor for tensor in by_layer}

    def sources_of_rows(self) -> Iterator[HfTensor]:
        """Yield Hugging Face tensors that together have every Megatron row once: of those with the same, the first."""
        seen = set[tuple[str, Index, RowBlocks]]()
        for tensor in self.hf_tensors().values():
            rows = (tensor.rule.mcore_key, tensor.index, tensor.rows)
            if not tensor.is_alias and rows not in seen:
                seen.add(rows)
                yield tensor

    def spelling(self, hf_names: Collection[str]) -> FileSpelling:
        """Which tensors of the model files with these tensor names hold."""
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
        """The stored rows of the tensor at ``index`` in a checkpoint of ``style``; ``key`` is one of ``rule.keys``."""
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
        """Key and shape of each object that models of any layer spec expect beside the tensors."""
        objects = {}
        for rule in self.rules:
            for module in (rule.local, rule.te):
                if module.extra_state is not None:
                    key = module.extra_state[0]
                    for index in itertools.product(*map(range, rule.lead[: style.spelled_axes])):
                        name, shape = spell_key(key, index, style), rule.lead[len(index) :]
                        objects[name] = shape or (1,)
        return objects

    def spelled(self, rule: TensorRule, style: KeyStyle, key: str = "") -> Iterator[tuple[str, Shape]]:
        """Yield key and shape, once each, of the stored tensors that hold all tensors of ``rule``."""
        for index in itertools.product(*map(range, rule.lead[: style.spelled_axes])):
            rest = (0,) * (len(rule.lead) - len(index))
            for stored in self.stored(rule, index + rest, style, key):
                yield stored.mcore_key, stored.global_shape


_STAGES: Final = tuple(Stage)


def _leading(tensor: HfTensor) -> set[tuple[str, Index]]:
    """The key of a tensor with every prefix of its index. An alias with one of these holds the tensor."""
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
    """``config``, with ties decided by the ``names`` of stored tensors in any format: ``MistralConfig.as_stored``."""
    embedding, *_, head = language_rules(replace(config, tie_word_embeddings=False, vision=None))
    stored = [f".{name}" for name in names]
    # A tied model may be stored as its head alone (safetensors.torch.save_model keeps the first of two names).
    has_both = all(any(name.endswith(_endings(rule)) for name in stored) for rule in (embedding, head))
    return config.as_stored(has_head=has_both)


def _endings(rule: TensorRule) -> tuple[str, ...]:
    """The endings of a tensor's names in every format."""
    (part,) = rule.parts
    names = (rule.mcore_key, part.hf_name.removeprefix("model."), *part.consolidated)
    return tuple(f".{name}" for name in names)
