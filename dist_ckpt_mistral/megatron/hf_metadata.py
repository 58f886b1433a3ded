"""ShardedTensors with Hugging Face names: their classes, and ``add_hf_metadata`` for the entries of a live model.

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
    """A tensor that ``produce`` makes when it is needed."""

    produce: Callable[[], torch.Tensor]


Data: TypeAlias = torch.Tensor | PendingTensor | None


class _OnDemand:
    """Adds a ``data`` to a sharded entry that is produced at its first use, and then kept."""

    _data: Data

    @property
    def data(self) -> torch.Tensor | None:
        """The local tensor, or None if Megatron allocates it on load."""
        if isinstance(self._data, PendingTensor):
            self._data = self._data.produce()
        return self._data

    @data.setter
    def data(self, data: Data) -> None:
        self._data = data


@dataclass
class HfShardedTensor(_OnDemand, ShardedTensor):  # type: ignore[misc]  # megatron is untyped
    """Megatron's ShardedTensor with the Hugging Face tensors whose rows it holds.

    ``hf_parts`` has one entry for each Hugging Face tensor. Its rows count rows of the stored tensor ``key``, without
    the axes of layer and expert. A local tensor that is only vocabulary padding has no parts. ``data`` may be a
    ``PendingTensor``.
    """

    hf_parts: tuple[HfPart, ...] = ()

    @property
    def hf_names(self) -> tuple[str, ...]:
        """Names of the Hugging Face tensors whose rows this local tensor holds."""
        return tuple(part.hf_name for part in self.hf_parts)

    def validate_metadata_integrity(self) -> None:
        """Check as Megatron does, without producing a pending tensor."""
        data = self._data
        self._data = None if isinstance(data, PendingTensor) else data
        super().validate_metadata_integrity()
        self._data = data


@dataclass
class HfShardedTensorFactory(_OnDemand, ShardedTensorFactory):  # type: ignore[misc]  # megatron is untyped
    """Megatron's ShardedTensorFactory with a ``build_fn`` that makes HfShardedTensors and accepts a PendingTensor."""

    def build(self) -> Any:  # noqa: ANN401  (as ShardedTensorFactory)
        """Build the entries as Megatron does, without producing a pending tensor."""
        return self.build_fn(self.key, self._data, self.replica_id, self.flattened_range)


def add_hf_metadata(sharded_state_dict: ShardedStateDict, config: MistralConfig) -> ShardedStateDict:
    """Copy a live model's sharded state dict and add the Hugging Face names to the entries of its tensors.

    Works for every key style, and for the local and the Transformer Engine layer spec. Objects and optimizer state stay
    as they are.

        state = dcm.add_hf_metadata(model.sharded_state_dict(), config)
        state["embedding.word_embeddings.weight"].hf_names  # ("model.embed_tokens.weight",)

    Args:
        sharded_state_dict: The result of ``GPTModel.sharded_state_dict()``. It is not changed.
        config: The configuration of the model.

    Returns:
        A copy in which every ShardedTensor is a ``HfShardedTensor``. The data of the tensors is shared, not copied.

    Raises:
        TensorMismatchError: A model with ``config`` does not have some of the tensors, or has them in another shape.
            The error names them all.
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
    """The rows of a stored tensor that hold one tensor of a rule: that of a layer, of an expert or of the model."""

    rule: TensorRule
    index: Index
    rows: StoredRows

    def hf_parts(self, first_row: int, rows: int) -> tuple[HfPart, ...]:
        """The Hugging Face tensors in ``rows`` rows of the stored tensor, starting at ``first_row``."""
        first = self.rows.first_row + first_row
        return tuple(
            self._stored_part(part)
            for part in self.rule.parts
            if any(start < first + rows and first < start + length for _, start, length in part.rows)
        )

    def _stored_part(self, part: HfPart) -> HfPart:
        """The rows of ``part`` that are in the stored tensor, which may hold only the gate or up half of linear_fc1."""
        start, end = self.rows.first_row, self.rows.first_row + self.rows.rows
        low, high = max(part.rows.offset, start), min(part.rows.offset + part.rows.length, end)
        return HfPart(
            hf_name=spell(part.hf_name, self.index),
            rows=replace(part.rows, offset=low - start, length=high - low),
            first_hf_row=low - part.rows.offset,
        )


StoredIndex: TypeAlias = dict[tuple[str, tuple[int, ...]], StoredLayer]


def stored_index(table: TensorTable) -> StoredIndex:
    """All stored tensors in all key styles, by (key, offset on the axes of layer and expert)."""
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
    """A ``build_fn`` that adds Hugging Face names to the entries that the live model's ``build_fn`` makes."""

    build_fn: Callable[..., Any]
    weight_key: str
    index: StoredIndex

    def __call__(self, key: str, *args: object) -> Any:  # noqa: ANN401  (as build_fn)
        """Build the entries. ``key`` is that of the weight; Megatron's optimizers put a prefix before it."""
        prefix = key.removesuffix(self.weight_key)

        def annotated(entry: object) -> object:
            return _annotated_tensor(self.index, prefix, entry) if isinstance(entry, ShardedTensor) else entry

        return dict_list_map_outplace(annotated, self.build_fn(key, *args))


def _annotated(entry: object, index: StoredIndex) -> object:
    """``entry`` with Hugging Face names if it is an entry of a weight, else ``entry`` itself."""
    if isinstance(entry, HfShardedTensor | HfShardedTensorFactory) or why_ignored(getattr(entry, "key", "")):
        return entry
    if isinstance(entry, ShardedTensor):
        return _annotated_tensor(index, "", entry)
    if isinstance(entry, ShardedTensorFactory):
        values = {field.name: getattr(entry, field.name) for field in fields(ShardedTensorFactory)}
        values["build_fn"] = _AnnotatedBuild(entry.build_fn, entry.key, index)
        factory = HfShardedTensorFactory(**values)
        factory.build()  # raises errors now instead of at the save
        return factory
    return entry


def _annotated_tensor(index: StoredIndex, prefix: str, tensor: ShardedTensor) -> HfShardedTensor:
    """``tensor`` with Hugging Face names. Raises TensorMismatchError for an unknown key, offset or shape."""
    layers, axis = _stored_layers(index, tensor.key.removeprefix(prefix), tensor)
    if not layers:
        raise TensorMismatchError(f"unknown tensor {tensor.key!r} with global_offset {tensor.global_offset}")
    expected = layers[0].rows.global_shape
    if layers[0].rule.padded_vocabulary:
        expected = (max(expected[0], tensor.global_shape[0]), *expected[1:])
    if tensor.global_shape != expected:
        raise TensorMismatchError(f"shape mismatch for {tensor.key!r}: expected {expected}, got {tensor.global_shape}")
    values = {field.name: getattr(tensor, field.name) for field in fields(ShardedTensor)}
    first, rows = tensor.global_offset[axis], tensor.local_shape[axis - tensor.prepend_axis_num]
    parts = dict.fromkeys(part for layer in layers for part in layer.hf_parts(first, rows))
    return HfShardedTensor(**values, hf_parts=tuple(parts))


def _stored_layers(index: StoredIndex, key: str, tensor: ShardedTensor) -> tuple[list[StoredLayer], int]:
    """The stored rows that a live ``tensor`` is part of, and its axis of rows.

    They are those of one expert or layer. Only GroupedMLP (moe/experts.py, to 0.16) has those of several experts, on
    the first axis of its local tensor.
    """
    lead = tensor.prepend_axis_num
    offset = tensor.global_offset[:lead]
    if (key, offset) in index:
        return [index[key, offset]], lead
    experts = range(tensor.global_offset[lead], tensor.global_offset[lead] + tensor.local_shape[0])
    return [index[key, (*offset, expert)] for expert in experts if (key, (*offset, expert)) in index], lead + 1
