"""The sharded state dict of a Mistral model, for any rank of any layout: no model, no process group, no GPU.

Entries equal those of a real ``GPTModel.sharded_state_dict()`` of either layer spec (megatron-core 0.16 and 0.19:
transformer/transformer_block.py, mlp.py, moe/experts.py and utils.py, models/common/language_module/language_module.py)
and also say which Hugging Face tensors they hold rows of.

Tensors may be supplied on demand. Creating and validating a state dict then produces none of them; a save produces
those of main replicas, each once. From its first touch on an entry keeps its tensor: Megatron's writer holds all that
a rank writes at once (dist_checkpointing/strategies/torch.py), so a save needs memory for just that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject

from dist_ckpt_mistral.errors import ConfigError, TensorMismatchError
from dist_ckpt_mistral.gather.dtypes import require_weight_dtype
from dist_ckpt_mistral.megatron.hf_metadata import (
    Data,
    HfShardedTensor,
    HfShardedTensorFactory,
    PendingTensor,
    ShardedStateDict,
    StoredIndex,
    stored_index,
)
from dist_ckpt_mistral.model.config.mistral_config import MistralConfig
from dist_ckpt_mistral.model.layout.layout import ParallelLayout
from dist_ckpt_mistral.model.layout.local_tensors import LocalTensor
from dist_ckpt_mistral.model.table.entries import state_key, why_ignored
from dist_ckpt_mistral.model.table.rules import KeyStyle, LayerSpec, ParamState, spell_key
from dist_ckpt_mistral.model.table.table import tensor_table

#: Produces the tensor that a ``LocalTensor`` describes, of its ``local_shape`` and the given dtype.
Supplier: TypeAlias = Callable[[LocalTensor, torch.dtype], torch.Tensor]


def sharded_state_dict(
    config: MistralConfig,
    layout: ParallelLayout,
    rank: int,
    *,
    data: Mapping[str, Any] | Supplier | None = None,
    dtype: torch.dtype | str | None = None,
    style: KeyStyle = KeyStyle.STACKED,
    spec: LayerSpec = LayerSpec.LOCAL,
    padded_vocab_size: int | None = None,
) -> ShardedStateDict:
    """What ``rank`` of ``layout`` holds of the model, for Megatron's ``dist_checkpointing.save`` and ``load``.

    Keys are the tensors' names in the local module. With virtual pipeline stages they stand one level down, under
    ``model0``, ``model1``, ... as in Megatron-LM.

    Args:
        config: The model.
        layout: The parallel layout.
        rank: Counts as Megatron does for ``layout``: in its ``order``, by default tp-cp-ep-dp-pp with pp slowest.
        data: None to let ``load`` allocate; or a mapping of the keys of the result to tensors, such as a module's
            state dict; or a ``Supplier``, called when Megatron first touches a tensor.
        dtype: Of every tensor (torch's own or its name); by default what ``config`` says.
        style: How keys of layers are spelled; a load must ask in the style of the checkpoint.
        spec: Which modules the model's layers are made of; tensors are called and cut as these do.
        padded_vocab_size: Rows of embedding and head, by default what Megatron-LM pads to. A load may ask for any size.

    Raises:
        LayoutError: The layout does not fit the model, or ``rank`` or ``padded_vocab_size`` the layout.
        ConfigError: Neither ``dtype`` nor ``config`` gives a dtype that weights can have.
        TensorMismatchError: ``data`` lacks tensors, has unknown ones, or some of another shape or dtype. What a
            ``Supplier`` gives is checked when it is called.
    """
    at, table = layout.coordinates(rank), tensor_table(config)
    dtype = weight_dtype(config, dtype)
    entries = tensor_entries(
        config, layout, rank, data=data, dtype=dtype, style=style, spec=spec, vocab_rows=padded_vocab_size
    )
    for chunk, own in zip(layout.model_chunks(table.num_layers, at.pp), entries, strict=True):
        for each in layout.local_objects(table, chunk, at, style=style, spec=spec):
            own[each.module_name] = ShardedObject(
                each.mcore_key, None, each.global_shape, each.global_offset, replica_id=each.replica_id
            )
    return nested(entries)


def tensor_entries(
    config: MistralConfig,
    layout: ParallelLayout,
    rank: int,
    *,
    data: Mapping[str, Any] | Supplier | None,
    dtype: torch.dtype,
    style: KeyStyle,
    spec: LayerSpec,
    vocab_rows: int | None,
    state: str | None = None,
) -> list[ShardedStateDict]:
    """The entries of tensors alone, for every model chunk of ``rank``; arguments are those of ``sharded_state_dict``.

    ``state`` is Megatron's name of a state of the parameters to describe in their place, such as ``exp_avg``.
    """
    layout.check(config)
    at, table = layout.coordinates(rank), tensor_table(config)
    chunks = layout.model_chunks(table.num_layers, at.pp)
    held = [
        tuple(layout.local_tensors(table, each, at, style=style, spec=spec, vocab_rows=vocab_rows)) for each in chunks
    ]
    make = _Entries(stored_index(table), style, dtype, state)
    return [
        {each.module_name: make.of(each, source(each)) for each in tensors}
        for tensors, source in zip(held, _sources(data, held, dtype), strict=True)
    ]


def nested(chunks: list[ShardedStateDict]) -> ShardedStateDict:
    """What belongs to each model chunk, as Megatron-LM nests it."""
    return {f"model{number}": each for number, each in enumerate(chunks)} if len(chunks) > 1 else chunks[0]


def weight_dtype(config: MistralConfig, dtype: torch.dtype | str | None) -> torch.dtype:
    """The dtype of the weights: ``dtype``, else what ``config`` says. Raises ConfigError if they cannot have it."""
    chosen = config.dtype if dtype is None else dtype
    if chosen is None:
        raise ConfigError("no dtype for the weights: the configuration does not say one. Give dtype.")
    return torch_dtype(chosen)


def torch_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """The dtype itself. Raises ConfigError if weights cannot have it."""
    name = str(dtype).removeprefix("torch.")
    require_weight_dtype(name)
    found: torch.dtype = getattr(torch, name)
    return found


@dataclass(frozen=True, slots=True)
class _Entries:
    """Makes the entries of local tensors."""

    index: StoredIndex
    style: KeyStyle
    dtype: torch.dtype
    state: str | None

    def of(self, held: LocalTensor, data: Data) -> HfShardedTensor | HfShardedTensorFactory:
        """What Megatron's ``make_sharded_tensors_for_checkpoint`` and ``apply_swiglu_sharded_factory`` would make."""
        # The factory of linear_fc1 has the key of the whole; singleton style names only gate and up.
        key = spell_key(held.mcore_key, held.index, self.style)
        build = _Build(held, key, self.index, self.dtype)
        key = key if self.state is None else state_key(key, self.state)
        if len(held.boxes) == 1:
            return build(key, data, held.replica_id, None)[0]
        return HfShardedTensorFactory(key, data, build, torch.cat, held.replica_id)


@dataclass(frozen=True, slots=True)
class _Build:
    """Megatron's ``build_fn`` of one local tensor."""

    held: LocalTensor
    own_key: str
    index: StoredIndex
    dtype: torch.dtype

    @torch.no_grad()
    def __call__(
        self, key: str, data: Data, replica_id: tuple[int, ...], flattened_range: slice | None
    ) -> list[HfShardedTensor]:
        """An entry for every box. Megatron's optimizers put a prefix before the key and give other ``data``."""
        boxes, lead = self.held.boxes, self.held.prepended_axes
        return [
            HfShardedTensor(
                key=key + box.mcore_key.removeprefix(self.own_key),
                data=piece,
                dtype=piece.dtype if isinstance(piece, torch.Tensor) else self.dtype,
                local_shape=box.shape[lead:],
                global_shape=box.global_shape,
                global_offset=box.global_offset,
                axis_fragmentations=box.fragments,
                replica_id=replica_id,
                prepend_axis_num=lead,
                allow_shape_mismatch=self.held.rule.padded_vocabulary,
                flattened_range=flattened_range,
                hf_parts=self.index[box.mcore_key, box.global_offset[:lead]].hf_parts(
                    box.global_offset[lead], box.shape[lead]
                ),
            )
            for box, piece in zip(boxes, _pieces(data, len(boxes)), strict=True)
        ]


@dataclass(slots=True)
class _Splitter:
    """Supplies a tensor once and hands out its pieces; a piece is kept until it is taken."""

    produce: Callable[[], torch.Tensor]
    count: int
    waiting: dict[int, torch.Tensor] = field(default_factory=dict)

    def take(self, number: int) -> torch.Tensor:
        if number not in self.waiting:
            self.waiting = dict(enumerate(self.produce().chunk(self.count)))
        return self.waiting.pop(number)


def _pieces(data: Data, count: int) -> list[Data]:
    """``data`` cut into ``count`` equal pieces along its rows."""
    if data is None or count == 1:
        return [data] * count  # the very object: Megatron's optimizers know their parameters by identity
    if isinstance(data, PendingTensor):
        splitter = _Splitter(data.produce, count)
        return [PendingTensor(partial(splitter.take, number)) for number in range(count)]
    return list(data.chunk(count))


def _sources(
    data: Mapping[str, Any] | Supplier | None, held: list[tuple[LocalTensor, ...]], dtype: torch.dtype
) -> list[Callable[[LocalTensor], Data]]:
    """For every model chunk, what gives the data of its tensors."""
    if data is None:
        return [lambda _: None] * len(held)
    if not isinstance(data, Mapping):
        return [lambda each: PendingTensor(partial(_supplied, data, each, dtype))] * len(held)
    names = [f"model{number}" for number in range(len(held))]
    given = {f"{name}/": data.get(name, {}) for name in names} if len(held) > 1 else {"": data}
    problems = [f"unknown model chunk {name!r}" for name in data if len(held) > 1 and name not in names]
    for (where, tensors), expected in zip(given.items(), held, strict=True):
        problems += _problems(where, tensors, expected, dtype)
    if problems:
        raise TensorMismatchError("; ".join(problems) + ". Give the state dict of this rank's model.")
    return [partial(_named, tensors) for tensors in given.values()]


def _named(tensors: Mapping[str, torch.Tensor], held: LocalTensor) -> torch.Tensor:
    return tensors[held.module_name]


def _problems(where: str, given: Mapping[str, Any], held: tuple[LocalTensor, ...], dtype: torch.dtype) -> Iterator[str]:
    expected = {each.module_name: each for each in held}
    unknown = [name for name in given if name not in expected and not why_ignored(name)]
    for name in unknown:
        yield f"unknown tensor {where + name!r}"
    for name, each in expected.items():
        if name not in given:
            yield f"no tensor for {where + name!r}"
        else:
            yield from _misfits(where + name, given[name], each, dtype)


def _misfits(name: str, tensor: object, held: LocalTensor, dtype: torch.dtype) -> Iterator[str]:
    if not isinstance(tensor, torch.Tensor):
        yield f"wrong type for {name!r}: expected a tensor, got {type(tensor).__name__}"
        return
    if tuple(tensor.shape) != held.local_shape:
        yield f"shape mismatch for {name!r}: expected {held.local_shape}, got {tuple(tensor.shape)}"
    if tensor.dtype != dtype:
        yield f"dtype mismatch for {name!r}: expected {dtype}, got {tensor.dtype}"


def _supplied(supplier: Supplier, held: LocalTensor, dtype: torch.dtype) -> torch.Tensor:
    tensor = supplier(held, dtype)
    problems = list(_misfits(held.module_name, tensor, held, dtype))
    if problems:
        raise TensorMismatchError("the supplier gave another tensor: " + "; ".join(problems))
    return tensor


def optimizer_state_dict(
    config: MistralConfig,
    layout: ParallelLayout,
    rank: int,
    *,
    distributed: bool = True,
    data: Mapping[str, Mapping[str, Any] | Supplier] | None = None,
    style: KeyStyle = KeyStyle.STACKED,
    spec: LayerSpec = LayerSpec.LOCAL,
    padded_vocab_size: int | None = None,
) -> dict[str, ShardedStateDict]:
    """What ``rank`` of ``layout`` holds of the optimizer: master weights and both moments of Adam, in float32.

    Under each of Megatron's names for these stands a dict like that of ``sharded_state_dict``, keyed by the names of
    the parameters in the local module; entries say which Hugging Face tensors they hold rows of, as those of the
    weights do. Megatron's optimizers number parameters instead, in an order that only they know: entries are the same,
    their place is not.

    Args:
        config: The model.
        layout: The parallel layout.
        rank: Counts as Megatron does for ``layout``.
        distributed: Whether it is Megatron's distributed optimizer (``fully_reshardable``), which calls the master
            weights ``param``; the ordinary one (``plain``) calls them ``fp32_param``.
        data: None to let ``load`` allocate; or under each of the names what ``sharded_state_dict`` takes as ``data``.
        style: How keys of layers are spelled; a load must ask in the style of the checkpoint.
        spec: Which modules the model's layers are made of.
        padded_vocab_size: Rows of embedding and head, by default what Megatron-LM pads to.

    Raises:
        LayoutError: The layout does not fit the model, or ``rank`` or ``padded_vocab_size`` the layout.
        TensorMismatchError: As for ``sharded_state_dict``.
    """
    which = -1 if distributed else 0
    names = [state.value[which] for state in ParamState if state is not ParamState.WEIGHTS]
    return {
        name: nested(
            tensor_entries(
                config,
                layout,
                rank,
                data=None if data is None else data[name],
                dtype=torch.float32,
                style=style,
                spec=spec,
                vocab_rows=padded_vocab_size,
                state=name,
            )
        )
        for name in names
    }
