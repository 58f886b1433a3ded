"""ShardedTensors with Hugging Face names: their classes, and ``add_hf_metadata`` for the entries of a live model.

Upstream: megatron-core dist_checkpointing/mapping.py, the same in 0.16 and 0.19.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any, Final, TypeAlias

import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from dist_ckpt_mistral.arguments import require_types
from dist_ckpt_mistral.errors import TensorMismatchError
from dist_ckpt_mistral.gather.dtypes import Shape
from dist_ckpt_mistral.gather.links import Link, compose
from dist_ckpt_mistral.mapping.checkpoint_map import links_of_rows
from dist_ckpt_mistral.model.config.mistral_config import MistralConfig
from dist_ckpt_mistral.model.table.entries import why_ignored
from dist_ckpt_mistral.model.table.rules import Index, KeyStyle, TensorRule
from dist_ckpt_mistral.model.table.table import HfTensor, StoredRows, TensorTable, tensor_table
from dist_ckpt_mistral.model.table.vision import LANGUAGE_PREFIX

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


@dataclass(frozen=True, slots=True, kw_only=True)
class HfBox:
    """A box of a Hugging Face tensor whose elements a local tensor holds, in the same order. All is in elements.

    ``hf_tensor[box.hf_slices]`` equals ``entry.data[box.local_slices].reshape(box.shape)``. The offsets have the axes
    of the Hugging Face tensor and of the local tensor; ``shape`` has those of the Hugging Face tensor.
    """

    hf_name: str
    hf_shape: Shape
    hf_offset: Shape
    shape: Shape
    local_offset: Shape

    @property
    def hf_slices(self) -> tuple[slice, ...]:
        """The box in the Hugging Face tensor."""
        return _slices(self.hf_offset, self.shape)

    @property
    def local_slices(self) -> tuple[slice, ...]:
        """The box in the local tensor."""
        return _slices(self.local_offset, self.shape)


def _slices(offset: Shape, shape: Shape) -> tuple[slice, ...]:
    """The box at ``offset``. The last axes of ``shape`` are those of the offset; others of the offset have extent 1."""
    extents = ((1,) * len(offset) + shape)[len(shape) :]
    return tuple(slice(low, low + extent) for low, extent in zip(offset, extents, strict=True))


@dataclass
class HfShardedTensor(_OnDemand, ShardedTensor):  # type: ignore[misc]  # megatron is untyped
    """Megatron's ShardedTensor with the boxes of Hugging Face tensors that it holds.

    With ``hf_boxes`` the Hugging Face tensors can be gathered from entries alone: those of all main replicas hold each
    element once. A local tensor that is only vocabulary padding has no boxes. ``data`` may be a ``PendingTensor``.
    """

    hf_boxes: tuple[HfBox, ...] = ()

    @property
    def hf_names(self) -> tuple[str, ...]:
        """Names of the Hugging Face tensors of which this local tensor holds boxes."""
        return tuple(dict.fromkeys(box.hf_name for box in self.hf_boxes))

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

    Works for every key style, for the local and the Transformer Engine layer spec, and for multimodal models. Objects
    and optimizer state stay as they are.

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
    require_types(add_hf_metadata, **locals())
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
    """The rows of a stored tensor that hold one tensor of a rule: that of a layer, of an expert or of the model.

    ``hf_tensors`` are the Hugging Face tensors that these rows hold, with the position on their leading axes.
    """

    rule: TensorRule
    rows: StoredRows
    hf_tensors: tuple[tuple[HfTensor, Index], ...]

    def hf_boxes(self, global_offset: Shape, local_shape: Shape) -> Iterator[HfBox]:
        """The boxes in a local tensor of ``local_shape``, which begins at ``global_offset`` of the stored tensor."""
        local = Link(
            source="",
            source_offset=(0,) * len(local_shape),
            target=self.rows.mcore_key,
            target_offset=global_offset,
            shape=local_shape,
        )
        for tensor, at in self.hf_tensors:
            for link in links_of_rows(tensor, at, self.rows, self.rows.mcore_key):
                if (box := compose(local, link)) is not None:
                    yield HfBox(
                        hf_name=tensor.hf_name,
                        hf_shape=tensor.shape,
                        hf_offset=box.target_offset,
                        shape=(1,) * (len(tensor.shape) - len(box.shape)) + box.shape,
                        local_offset=box.source_offset,
                    )


StoredIndex: TypeAlias = dict[tuple[str, tuple[int, ...]], StoredLayer]


#: The key styles of a GPTModel. Those of a HybridModel use the same keys for other layers.
_GPT_STYLES: Final = tuple(style for style in KeyStyle if style is not KeyStyle.HYBRID)


def stored_index(table: TensorTable, *styles: KeyStyle) -> StoredIndex:
    """All stored tensors in ``styles``, by (key, offset on the axes of layer and expert); by default a GPTModel's."""
    hf_tensors = defaultdict[tuple[str, Index], list[tuple[HfTensor, Index]]](list)
    for tensor in table.hf_tensors().values():
        for index, at in () if tensor.is_alias else tensor.packed():
            hf_tensors[tensor.rule.mcore_key, index].append((tensor, at))
    return {
        (rows.mcore_key, rows.index): StoredLayer(rule, rows, tuple(hf_tensors[rule.mcore_key, index]))
        for rule in table.rules
        for style in styles or _GPT_STYLES
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
            return annotated_tensor(self.index, prefix, entry) if isinstance(entry, ShardedTensor) else entry

        return dict_list_map_outplace(annotated, self.build_fn(key, *args))


def _annotated(entry: object, index: StoredIndex) -> object:
    """``entry`` with Hugging Face names if it is an entry of a weight, else ``entry`` itself."""
    if isinstance(entry, HfShardedTensor | HfShardedTensorFactory) or why_ignored(getattr(entry, "key", "")):
        return entry
    if isinstance(entry, ShardedTensor):
        return annotated_tensor(index, "", entry)
    if isinstance(entry, ShardedTensorFactory):
        values = {field.name: getattr(entry, field.name) for field in fields(ShardedTensorFactory)}
        values["build_fn"] = _AnnotatedBuild(entry.build_fn, entry.key, index)
        factory = HfShardedTensorFactory(**values)
        factory.build()  # raises errors now instead of at the save
        return factory
    return entry


def annotated_tensor(index: StoredIndex, prefix: str, tensor: ShardedTensor) -> HfShardedTensor:
    """``tensor`` with Hugging Face names. Raises TensorMismatchError for an unknown key, offset or shape."""
    layers = _stored_layers(index, tensor.key.removeprefix(prefix).removeprefix(LANGUAGE_PREFIX), tensor)
    if not layers:
        raise TensorMismatchError(f"unknown tensor {tensor.key!r} with global_offset {tensor.global_offset}")
    expected = layers[0].rows.global_shape
    if layers[0].rule.padded_vocabulary:
        expected = (max(expected[0], tensor.global_shape[0]), *expected[1:])
    if tensor.global_shape != expected:
        raise TensorMismatchError(f"shape mismatch for {tensor.key!r}: expected {expected}, got {tensor.global_shape}")
    values = {field.name: getattr(tensor, field.name) for field in fields(ShardedTensor)}
    boxes = (box for layer in layers for box in layer.hf_boxes(tensor.global_offset, tensor.local_shape))
    return HfShardedTensor(**values, hf_boxes=tuple(boxes))


def _stored_layers(index: StoredIndex, key: str, tensor: ShardedTensor) -> list[StoredLayer]:
    """The stored rows that a live ``tensor`` is part of.

    They are those of one expert or layer. Only GroupedMLP (moe/experts.py, to 0.16) has those of several experts, on
    the first axis of its local tensor.
    """
    lead = tensor.prepend_axis_num
    offset = tensor.global_offset[:lead]
    if (key, offset) in index:
        return [index[key, offset]]
    experts = range(tensor.global_offset[lead], tensor.global_offset[lead] + tensor.local_shape[0])
    return [index[key, (*offset, expert)] for expert in experts if (key, (*offset, expert)) in index]
