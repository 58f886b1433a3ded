"""Megatron's ShardedTensors with Hugging Face names: the classes, and naming what a live model holds.

Upstream: megatron-core dist_checkpointing/mapping.py, the same in 0.16 and 0.19.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, TypeAlias

import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from dist_ckpt_mistral.errors import TensorMismatchError
from dist_ckpt_mistral.model.config.mistral_config import MistralConfig
from dist_ckpt_mistral.model.table.entries import why_ignored
from dist_ckpt_mistral.model.table.rules import HfPart, Index, KeyStyle, TensorRule, spell
from dist_ckpt_mistral.model.table.table import StoredRows, TensorTable, tensor_table

ShardedStateDict: TypeAlias = dict[str, Any]


@dataclass(frozen=True, slots=True)
class PendingTensor:
    """A tensor that nobody has asked for yet."""

    produce: Callable[[], torch.Tensor]


Data: TypeAlias = torch.Tensor | PendingTensor | None


class _OnDemand:
    """Gives a sharded entry a ``data`` that is produced when first touched, and kept from then on."""

    _data: Data

    @property
    def data(self) -> torch.Tensor | None:
        """The local tensor, or None where Megatron is to allocate it."""
        if isinstance(self._data, PendingTensor):
            self._data = self._data.produce()
        return self._data

    @data.setter
    def data(self, data: Data) -> None:
        self._data = data


@dataclass
class HfShardedTensor(_OnDemand, ShardedTensor):  # type: ignore[misc]  # megatron is untyped
    """Megatron's ShardedTensor, and the Hugging Face tensors that it holds rows of.

    The rows of ``hf_parts`` are those of the stored tensor ``key``, without its axes of layer and expert. A local
    tensor of nothing but vocabulary padding has no parts. ``data`` may be given as a ``PendingTensor``.
    """

    hf_parts: tuple[HfPart, ...] = ()

    @property
    def hf_names(self) -> tuple[str, ...]:
        """Names of the Hugging Face tensors that this local tensor holds rows of."""
        return tuple(part.hf_name for part in self.hf_parts)

    def validate_metadata_integrity(self) -> None:
        """Check as Megatron does, but produce no tensor for it."""
        held = self._data
        self._data = None if isinstance(held, PendingTensor) else held
        super().validate_metadata_integrity()
        self._data = held


@dataclass
class HfShardedTensorFactory(_OnDemand, ShardedTensorFactory):  # type: ignore[misc]  # megatron is untyped
    """Megatron's ShardedTensorFactory whose ``build_fn`` makes HfShardedTensors, and takes a ``PendingTensor``."""

    def build(self) -> Any:  # noqa: ANN401  (whatever build_fn gives)
        """Build the entries as Megatron does, but leave a pending tensor pending."""
        return self.build_fn(self.key, self._data, self.replica_id, self.flattened_range)


def add_hf_metadata(sharded_state_dict: ShardedStateDict, config: MistralConfig) -> ShardedStateDict:
    """A copy of a live model's sharded state dict whose tensors say which Hugging Face tensors they hold rows of.

    Tensor data is shared, not copied, and the given dict stays as it is. Works for every key style and for the local
    and the Transformer Engine spec; objects and optimizer state pass through unchanged.

    Raises TensorMismatchError for tensors that ``config`` does not have, or has in another shape; all are named.
    """
    index = stored_index(tensor_table(config))
    problems = []

    def annotated(entry: object) -> object:
        try:
            return _annotated(entry, index)
        except TensorMismatchError as error:
            problems.append(str(error))
            return entry

    copy: ShardedStateDict = dict_list_map_outplace(annotated, sharded_state_dict)
    if problems:
        raise TensorMismatchError("; ".join(problems) + ". Check that the configuration is this model's.")
    return copy


@dataclass(frozen=True, slots=True)
class StoredLayer:
    """One index's part of a stored tensor: the rule that it follows, and where its rows lie."""

    rule: TensorRule
    index: Index
    rows: StoredRows

    def hf_parts(self, first_row: int, rows: int) -> tuple[HfPart, ...]:
        """The Hugging Face tensors with rows among ``rows`` rows of the stored tensor, from ``first_row`` on."""
        first = self.rows.first_row + first_row
        return tuple(
            self._own(part)
            for part in self.rule.parts
            if any(start < first + rows and first < start + length for _, start, length in part.rows)
        )

    def _own(self, part: HfPart) -> HfPart:
        """A part of the rule as far as its rows are in the stored tensor, which may have one half of a packed one."""
        start, end = self.rows.first_row, self.rows.first_row + self.rows.rows
        low, high = max(part.rows.offset, start), min(part.rows.offset + part.rows.length, end)
        return HfPart(
            hf_name=spell(part.hf_name, self.index),
            rows=replace(part.rows, offset=low - start, length=high - low),
            first_hf_row=low - part.rows.offset,
        )


StoredIndex: TypeAlias = dict[tuple[str, tuple[int, ...]], StoredLayer]


def stored_index(table: TensorTable) -> StoredIndex:
    """All stored tensors in all key styles, by key and coordinates on the axes that only the stored tensor has."""
    return {
        (rows.mcore_key, rows.index): StoredLayer(rule, index, rows)
        for rule in table.rules
        for style in KeyStyle
        for index in rule.indices()
        for key in rule.keys
        for rows in table.stored(rule, index, style, key)
    }


@dataclass(frozen=True, slots=True)
class _AnnotatedBuild:
    """The ``build_fn`` of a live model's factory, with Hugging Face names added to what it builds."""

    build_fn: Callable[..., Any]
    own_key: str
    index: StoredIndex

    def __call__(self, key: str, *args: object) -> Any:  # noqa: ANN401  (whatever build_fn gives)
        """Build as the live model does. Megatron's optimizers put a prefix before the model's own key."""
        prefix = key.removesuffix(self.own_key)

        def annotated(entry: object) -> object:
            return _annotated_tensor(self.index, prefix, entry) if isinstance(entry, ShardedTensor) else entry

        return dict_list_map_outplace(annotated, self.build_fn(key, *args))


def _annotated(entry: object, index: StoredIndex) -> object:
    if isinstance(entry, HfShardedTensor | HfShardedTensorFactory) or why_ignored(getattr(entry, "key", "")):
        return entry
    if isinstance(entry, ShardedTensor):
        return _annotated_tensor(index, "", entry)
    if isinstance(entry, ShardedTensorFactory):
        own = {field.name: getattr(entry, field.name) for field in fields(ShardedTensorFactory)}
        own["build_fn"] = _AnnotatedBuild(entry.build_fn, entry.key, index)
        factory = HfShardedTensorFactory(**own)
        factory.build()  # for its errors, which should come now and not at the save
        return factory
    return entry


def _annotated_tensor(index: StoredIndex, prefix: str, tensor: ShardedTensor) -> HfShardedTensor:
    held, axis = _held_by(index, tensor.key.removeprefix(prefix), tensor)
    if not held:
        raise TensorMismatchError(f"unknown tensor {tensor.key!r} with global_offset {tensor.global_offset}")
    expected = held[0].rows.global_shape
    if held[0].rule.padded_vocabulary:
        expected = (max(expected[0], tensor.global_shape[0]), *expected[1:])
    if tensor.global_shape != expected:
        raise TensorMismatchError(f"shape mismatch for {tensor.key!r}: expected {expected}, got {tensor.global_shape}")
    own = {field.name: getattr(tensor, field.name) for field in fields(ShardedTensor)}
    first, rows = tensor.global_offset[axis], tensor.local_shape[axis - tensor.prepend_axis_num]
    parts = dict.fromkeys(part for each in held for part in each.hf_parts(first, rows))
    return HfShardedTensor(**own, hf_parts=tuple(parts))


def _held_by(index: StoredIndex, key: str, tensor: ShardedTensor) -> tuple[list[StoredLayer], int]:
    """The stored tensors that a live one holds rows of, and the axis of rows.

    It is one, but for GroupedMLP (moe/experts.py, to 0.16): there the first axis counts experts.
    """
    lead = tensor.prepend_axis_num
    at = tensor.global_offset[:lead]
    if (key, at) in index:
        return [index[key, at]], lead
    experts = range(tensor.global_offset[lead], tensor.global_offset[lead] + tensor.local_shape[0])
    return [index[key, (*at, expert)] for expert in experts if (key, (*at, expert)) in index], lead + 1
