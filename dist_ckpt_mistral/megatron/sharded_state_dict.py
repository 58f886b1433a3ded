"""The sharded state dict of a Mistral model and its optimizer, for any rank of any layout.

Making one needs no model, no process group and no GPU. Entries equal those of a real ``GPTModel.sharded_state_dict()``
of either layer spec (megatron-core 0.16 and 0.19: transformer/transformer_block.py, mlp.py, moe/experts.py and
utils.py, models/common/language_module/language_module.py). They also have the boxes of the Hugging Face tensors
that they hold.

A ``Supplier`` produces tensors on demand. Making and validating a state dict produces none of them. A save produces
each tensor of the main replicas once, and its entry then keeps it: Megatron's writer needs all tensors of a rank at the
same time (dist_checkpointing/strategies/torch.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject

from dist_ckpt_mistral.arguments import require_types
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
from dist_ckpt_mistral.messages import listed
from dist_ckpt_mistral.model.config.mistral_config import MistralConfig
from dist_ckpt_mistral.model.layout.layout import ParallelLayout
from dist_ckpt_mistral.model.layout.local_tensors import LocalTensor, local_objects, local_tensors
from dist_ckpt_mistral.model.table.entries import state_key, why_ignored
from dist_ckpt_mistral.model.table.rules import KeyStyle, LayerSpec, ParamState, spell_key
from dist_ckpt_mistral.model.table.table import tensor_table

#: Produces the tensor that a ``LocalTensor`` describes, with its ``local_shape`` and the given dtype.
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
    """Make the sharded state dict of ``rank``, for Megatron's ``dist_checkpointing.save`` and ``load``.

    Example::

        state = dcm.sharded_state_dict(config, dcm.ParallelLayout(tp=2, pp=4), rank=3)
        loaded = megatron.core.dist_checkpointing.load(state, "ckpt/iter_0000500")

    Args:
        config: The configuration of the model.
        layout: The parallel layout.
        rank: A rank of ``layout``, counted in its ``order`` (by default tp-cp-ep-dp-pp, tp fastest), as in Megatron.
        data: The tensors: a mapping from the keys of the result to tensors, such as the state dict of a module, or a
            ``Supplier`` that is called when Megatron first uses a tensor. With None, ``load`` allocates them.
        dtype: Dtype of all tensors, as a torch dtype or its name; by default that of ``config``.
        style: Spelling of the keys of layers. To load a checkpoint, give the style that it was saved with.
        spec: Megatron's modules for the layers. They decide the names of the tensors and how they are cut.
        padded_vocab_size: Rows of the embedding and of the output layer; by default the next multiple of 128 x tp, as
            in Megatron-LM. Any size can be loaded from a checkpoint with another one.

    Returns:
        ``HfShardedTensor``, ``HfShardedTensorFactory`` and ``ShardedObject`` entries, by the name of the tensor in the
        local module. With virtual pipeline stages the entries of each stage are one level down, under ``model0``,
        ``model1``, ..., as in Megatron-LM.

    Raises:
        LayoutError: The layout does not fit the model, or ``rank`` or ``padded_vocab_size`` does not fit the layout.
        ConfigError: Neither ``dtype`` nor ``config`` gives a dtype for weights.
        TensorMismatchError: Tensors in ``data`` are missing, unknown, or of another shape or dtype. A tensor of a
            ``Supplier`` is checked when it is produced.
    """
    require_types(sharded_state_dict, **locals())
    at, table = layout.coordinates(rank), tensor_table(config)
    dtype = weight_dtype(config, dtype)
    entries = tensor_entries(
        config, layout, rank, data=data, dtype=dtype, style=style, spec=spec, vocab_rows=padded_vocab_size
    )
    for chunk, chunk_entries in zip(layout.model_chunks(table.num_layers, at.pp), entries, strict=True):
        for local in local_objects(layout, table, chunk, at, style=style, spec=spec):
            chunk_entries[local.module_name] = ShardedObject(
                local.mcore_key, None, local.global_shape, local.global_offset, replica_id=local.replica_id
            )
    return nested(entries)


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
    """Make the sharded state dict of the optimizer of ``rank``: float32 master weights and both moments of Adam.

    The entries are equal to those of Megatron's optimizers and can be loaded from their checkpoints. Their places in
    the state dict are not: Megatron's optimizers number the parameters instead of naming them, in an order that only
    the optimizer knows.

        state = dcm.optimizer_state_dict(config, dcm.ParallelLayout(tp=2), rank=0)
        state["exp_avg"]["embedding.word_embeddings.weight"].hf_names  # ("model.embed_tokens.weight",)

    Args:
        config: The configuration of the model.
        layout: The parallel layout.
        rank: A rank of ``layout``, counted as for ``sharded_state_dict``.
        distributed: True for Megatron's distributed optimizer (format ``fully_reshardable``), which calls the master
            weights ``param``; False for the ordinary one (format ``plain``), which calls them ``fp32_param``.
        data: The tensors, for each state by its name in Megatron what ``sharded_state_dict`` takes as ``data``. With
            None, ``load`` allocates them.
        style: Spelling of the keys of layers. To load a checkpoint, give the style that it was saved with.
        spec: Megatron's modules for the layers.
        padded_vocab_size: Rows of the embedding and of the output layer, as for ``sharded_state_dict``.

    Returns:
        A dict like that of ``sharded_state_dict`` for each state, by its name in Megatron: ``param`` or ``fp32_param``,
        ``exp_avg`` and ``exp_avg_sq``.

    Raises:
        LayoutError: The layout does not fit the model, or ``rank`` or ``padded_vocab_size`` does not fit the layout.
        TensorMismatchError: ``data`` does not fit, as for ``sharded_state_dict``.
    """
    require_types(optimizer_state_dict, **locals())
    which = -1 if distributed else 0
    names = [state.value[which] for state in ParamState if state is not ParamState.WEIGHTS]
    if data is not None and data.keys() != {*names}:
        raise TensorMismatchError(
            f"data: expected the states {listed(names)}, got {listed([*map(str, data)]) or 'none'}"
        )
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
    """The entries of the tensors of each model chunk of ``rank``. The arguments are those of ``sharded_state_dict``.

    With ``state``, Megatron's name of a state of the optimizer such as ``exp_avg``, they are the entries of that state.
    """
    layout.check(config)
    at, table = layout.coordinates(rank), tensor_table(config)
    tensors = [
        tuple(local_tensors(layout, table, chunk, at, style=style, spec=spec, vocab_rows=vocab_rows))
        for chunk in layout.model_chunks(table.num_layers, at.pp)
    ]
    make = _Entries(stored_index(table, style), style, dtype, state)
    return [
        {tensor.module_name: make.of(tensor, source(tensor)) for tensor in chunk_tensors}
        for chunk_tensors, source in zip(tensors, _sources(data, tensors, dtype), strict=True)
    ]


def nested(chunks: list[ShardedStateDict]) -> ShardedStateDict:
    """The state dict of all model chunks, nested as in Megatron-LM."""
    return {f"model{number}": chunk for number, chunk in enumerate(chunks)} if len(chunks) > 1 else chunks[0]


def weight_dtype(config: MistralConfig, dtype: torch.dtype | str | None) -> torch.dtype:
    """``dtype``, else the dtype of ``config``. Raises ConfigError if there is none or weights cannot have it."""
    chosen = config.dtype if dtype is None else dtype
    if chosen is None:
        raise ConfigError("no dtype for the weights: the configuration does not give one. Give dtype.")
    return torch_dtype(chosen)


def torch_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """The torch dtype, given itself or its name. Raises ConfigError if weights cannot have it."""
    name = str(dtype).removeprefix("torch.")
    require_weight_dtype(name)
    result: torch.dtype = getattr(torch, name)
    return result


def dtype_name(dtype: torch.dtype | str | None) -> str | None:
    """The name of ``torch_dtype``; None for none."""
    return None if dtype is None else str(torch_dtype(dtype)).removeprefix("torch.")


@dataclass(frozen=True, slots=True)
class _Entries:
    """Makes the entries of local tensors."""

    index: StoredIndex
    style: KeyStyle
    dtype: torch.dtype
    state: str | None

    def of(self, tensor: LocalTensor, data: Data) -> HfShardedTensor | HfShardedTensorFactory:
        """The entry that ``make_sharded_tensors_for_checkpoint`` or ``apply_swiglu_sharded_factory`` makes."""
        # The factory of linear_fc1 has this key in every style; its entries for gate and up have others in SINGLETON.
        key = spell_key(tensor.mcore_key, tensor.index, self.style)
        build = _Build(tensor, key, self.index, self.dtype)
        key = key if self.state is None else state_key(key, self.state)
        if len(tensor.boxes) == 1:
            return build(key, data, tensor.replica_id, None)[0]
        return HfShardedTensorFactory(key, data, build, torch.cat, tensor.replica_id)


@dataclass(frozen=True, slots=True)
class _Build:
    """The ``build_fn`` of one local tensor."""

    tensor: LocalTensor
    weight_key: str
    index: StoredIndex
    dtype: torch.dtype

    @torch.no_grad()
    def __call__(
        self, key: str, data: Data, replica_id: tuple[int, ...], flattened_range: slice | None
    ) -> list[HfShardedTensor]:
        """An entry for each box. Megatron's optimizers give other ``data``, and a ``key`` with a prefix."""
        boxes, lead = self.tensor.boxes, self.tensor.prepended_axes
        return [
            HfShardedTensor(
                key=key + box.mcore_key.removeprefix(self.weight_key),
                data=piece,
                dtype=piece.dtype if isinstance(piece, torch.Tensor) else self.dtype,
                local_shape=box.shape[lead:],
                global_shape=box.global_shape,
                global_offset=box.global_offset,
                axis_fragmentations=box.fragments,
                replica_id=replica_id,
                prepend_axis_num=lead,
                allow_shape_mismatch=self.tensor.has_padding,
                flattened_range=flattened_range,
                hf_boxes=tuple(
                    self.index[box.mcore_key, box.global_offset[:lead]].hf_boxes(box.global_offset, box.shape[lead:])
                ),
            )
            for box, piece in zip(boxes, _pieces(data, len(boxes)), strict=True)
        ]


@dataclass(slots=True)
class _Splitter:
    """Produces a tensor once and gives out its pieces. A piece is kept only until it is taken."""

    produce: Callable[[], torch.Tensor]
    count: int
    waiting: dict[int, torch.Tensor] = field(default_factory=dict)

    def take(self, number: int) -> torch.Tensor:
        """Piece ``number`` of ``count`` equal ones along the rows."""
        if number not in self.waiting:
            self.waiting = dict(enumerate(self.produce().chunk(self.count)))
        return self.waiting.pop(number)


def _pieces(data: Data, count: int) -> list[Data]:
    """``data`` cut into ``count`` equal pieces along its rows."""
    if data is None or count == 1:
        return [data] * count  # not a copy: Megatron's optimizers compare parameters by identity
    if isinstance(data, PendingTensor):
        splitter = _Splitter(data.produce, count)
        return [PendingTensor(partial(splitter.take, number)) for number in range(count)]
    return list(data.chunk(count))


def _sources(
    data: Mapping[str, Any] | Supplier | None, tensors: list[tuple[LocalTensor, ...]], dtype: torch.dtype
) -> list[Callable[[LocalTensor], Data]]:
    """For each model chunk, a function from its local tensors to their ``data``. ``tensors`` are those of the chunks.

    Raises TensorMismatchError if ``data`` is a mapping that does not fit the tensors.
    """
    if data is None:
        return [lambda _: None] * len(tensors)
    if not isinstance(data, Mapping):
        return [lambda tensor: PendingTensor(partial(_supplied, data, tensor, dtype))] * len(tensors)
    names = [f"model{number}" for number in range(len(tensors))]
    state_dicts = {f"{name}/": data.get(name, {}) for name in names} if len(tensors) > 1 else {"": data}
    problems = [f"unknown model chunk {name!r}" for name in data if len(tensors) > 1 and name not in names]
    for (prefix, state_dict), chunk_tensors in zip(state_dicts.items(), tensors, strict=True):
        problems += _problems(prefix, state_dict, chunk_tensors, dtype)
    if problems:
        raise TensorMismatchError("; ".join(problems) + ". Give the state dict of this rank's model.")
    return [partial(_named, state_dict) for state_dict in state_dicts.values()]


def _named(state_dict: Mapping[str, torch.Tensor], tensor: LocalTensor) -> torch.Tensor:
    """The data of a local tensor in the state dict of its model chunk."""
    return state_dict[tensor.module_name]


def _problems(
    prefix: str, state_dict: Mapping[str, Any], tensors: tuple[LocalTensor, ...], dtype: torch.dtype
) -> Iterator[str]:
    """Yield what does not fit between the state dict of a model chunk and its local tensors."""
    expected = {tensor.module_name: tensor for tensor in tensors}
    unknown = [name for name in state_dict if name not in expected and not why_ignored(name)]
    for name in unknown:
        yield f"unknown tensor {prefix + name!r}"
    for name, tensor in expected.items():
        if name not in state_dict:
            yield f"no tensor for {prefix + name!r}"
        else:
            yield from _misfits(prefix + name, state_dict[name], tensor, dtype)


def _misfits(name: str, data: object, tensor: LocalTensor, dtype: torch.dtype) -> Iterator[str]:
    """Yield how the type, shape and dtype of ``data`` differ from those of the local tensor."""
    if not isinstance(data, torch.Tensor):
        yield f"wrong type for {name!r}: expected a tensor, got {type(data).__name__}"
        return
    if tuple(data.shape) != tensor.local_shape:
        yield f"shape mismatch for {name!r}: expected {tensor.local_shape}, got {tuple(data.shape)}"
    if data.dtype != dtype:
        yield f"dtype mismatch for {name!r}: expected {dtype}, got {data.dtype}"


def _supplied(supplier: Supplier, tensor: LocalTensor, dtype: torch.dtype) -> torch.Tensor:
    """The data that ``supplier`` gives for a local tensor. Raises TensorMismatchError if it does not fit."""
    data = supplier(tensor, dtype)
    problems = list(_misfits(tensor.module_name, data, tensor, dtype))
    if problems:
        raise TensorMismatchError("the supplier gave another tensor: " + "; ".join(problems))
    return data
