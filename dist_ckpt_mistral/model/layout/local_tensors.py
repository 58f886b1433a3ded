"""The local tensors and objects of one rank of a layout, each tensor with its boxes in the stored tensors.

They are computed here, without Megatron, because an import cuts its chunks where Megatron is not installed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dist_ckpt_mistral.errors import LayoutError
from dist_ckpt_mistral.messages import concise_repr
from dist_ckpt_mistral.model.layout.layout import ParallelLayout, RankCoordinates
from dist_ckpt_mistral.model.layout.pipeline import ModelChunk
from dist_ckpt_mistral.model.layout.vocabulary import vocabulary_rows
from dist_ckpt_mistral.model.table.layers import LEGACY_TIED_HEAD
from dist_ckpt_mistral.model.table.rules import (
    ROWS,
    Index,
    KeyStyle,
    LayerSpec,
    ModuleTensor,
    Stage,
    TensorRule,
    spell,
    spell_key,
)
from dist_ckpt_mistral.model.table.table import StoredRows, TensorTable


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalBox:
    """One box of a stored tensor. All tuples are in elements and have the axes of the stored tensor.

    Args:
        mcore_key: The key of the stored tensor, without the prefix of a state of the optimizer.
        global_shape: The shape of the stored tensor.
        global_offset: The offset of the box in it.
        shape: The shape of the box.
        fragments: Number of boxes along each axis, Megatron's ``axis_fragmentations``.
    """

    mcore_key: str
    global_shape: tuple[int, ...]
    global_offset: tuple[int, ...]
    shape: tuple[int, ...]
    fragments: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalTensor:
    """One local tensor of one rank.

    Args:
        index: The tensor's place in the model: (), (layer,) or (layer, expert).
        local_index: The same in the local module, whose layers and experts count from 0.
        mcore_key: The key of the stored tensor, with ``{layer}`` and ``{expert}`` not filled in.
        module_name: Its name in the state dict of the local module.
        open_names: All its names there, also in models of other layer specs and of older releases, with ``{layer}`` and
            ``{expert}`` not filled in.
        local_shape: Its shape in elements.
        prepended_axes: Number of leading axes that only the stored tensor has.
        boxes: The boxes of stored tensors that hold its rows, in order: one box, or gate and up of ``linear_fc1``.
        replica_id: Megatron's (copy of the pipeline stage, tensor-parallel rank, data-parallel rank with context
            parallelism). For experts the ranks are those of the expert grid.
        has_padding: Whether the vocabulary of the stored tensor may be padded.
        live_rows: Number of its rows that do not pad the vocabulary. They come first.
    """

    index: Index
    local_index: Index
    mcore_key: str
    module_name: str
    open_names: tuple[str, ...]
    local_shape: tuple[int, ...]
    prepended_axes: int
    boxes: tuple[LocalBox, ...]
    replica_id: tuple[int, int, int]
    has_padding: bool
    live_rows: int

    __repr__ = concise_repr

    @property
    def layer(self) -> int | None:
        """The number of its layer in the whole model; None for a tensor outside the layers."""
        return self.index[0] if self.index else None

    @property
    def names(self) -> tuple[str, ...]:
        """``open_names``, filled in; the first is ``module_name``."""
        return tuple(dict.fromkeys((self.module_name, *(spell(name, self.local_index) for name in self.open_names))))

    @property
    def is_main_replica(self) -> bool:
        """Whether this is the copy that Megatron saves: all of ``replica_id`` is 0."""
        return not any(self.replica_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalObject:
    """One object that a rank saves beside its tensors, an element of a stored array of objects.

    ``global_shape`` is the shape of that array, ``global_offset`` the index of the object in it.
    """

    mcore_key: str
    module_name: str
    global_shape: tuple[int, ...]
    global_offset: tuple[int, ...]
    replica_id: tuple[int, int, int]


def require_divisible(layout: ParallelLayout, table: TensorTable) -> None:
    """Raise LayoutError if tensor parallelism does not cut the tensors of adapters in ``table`` into equal parts.

    ``layout.check`` does the same for the sizes of a model.
    """
    for rule in (rule for adapter in table.adapters for rule in adapter.rules):
        axis = rule.te.tp_axis
        if axis is None or rule.padded_vocabulary:
            continue
        parts = layout.tp * (rule.glu_halves if axis == ROWS else 1)
        if rule.shape[axis] % parts:
            key = spell_key(rule.mcore_key, (), KeyStyle.STACKED)
            raise LayoutError(
                f"tp={layout.tp} cannot cut {key} {list(rule.shape)} of the adapter: expected a multiple of {parts}, "
                f"got {rule.shape[axis]}. Choose a tp that divides it."
            )


def local_tensors(
    layout: ParallelLayout,
    table: TensorTable,
    chunk: ModelChunk,
    at: RankCoordinates,
    *,
    style: KeyStyle = KeyStyle.STACKED,
    spec: LayerSpec = LayerSpec.LOCAL,
    vocab_rows: int | None = None,
) -> Iterator[LocalTensor]:
    """Yield the local tensors of the rank ``at`` in one model chunk, in the order of the table.

    ``spec`` chooses the modules. ``vocab_rows`` is the padded vocabulary size, by default that of Megatron-LM. The
    model must have passed ``layout.check``.
    """
    for rule in table.rules:
        rows, module = _rows(rule, layout.tp, vocab_rows), rule.module(spec)
        part, copy = _share(layout, rule, module, at)
        names = rule.names
        for index, local in _local_indices(layout, rule, chunk, at):
            both = (spell(module.name, local), names)
            yield _local_tensor(table, rule, module, rows, (index, local), both, part, style, (0, *copy))
        if rule.stage is Stage.EMBEDDING and chunk.is_last and not chunk.is_first:
            for name in rule.other_keys:
                # Tied embeddings: the last stage describes its copy of them as a head (language_module.py, 0.12+).
                both = (name, (LEGACY_TIED_HEAD,))
                yield _local_tensor(table, rule, module, rows, ((), ()), both, part, style, (1, *copy))


def local_objects(
    layout: ParallelLayout,
    table: TensorTable,
    chunk: ModelChunk,
    at: RankCoordinates,
    *,
    style: KeyStyle = KeyStyle.STACKED,
    spec: LayerSpec = LayerSpec.LOCAL,
) -> Iterator[LocalObject]:
    """Yield the objects that the modules of the rank ``at`` save beside the tensors of one model chunk."""
    for rule in table.rules:
        module = rule.module(spec)
        if module.extra_state is None:
            continue
        key, name = module.extra_state
        (rank, _), (_, copy) = _share(layout, rule, module, at)
        for index, local in _local_indices(layout, rule, chunk, at):
            yield LocalObject(
                mcore_key=spell_key(key, index, style),
                module_name=spell(name, local),
                global_shape=rule.lead[style.spelled_axes :] or (1,),
                global_offset=index[style.spelled_axes :] or (0,),
                replica_id=(0, rank, copy),
            )


def _rows(rule: TensorRule, tp: int, vocab_rows: int | None) -> int:
    """Rows of the tensor of one index, with vocabulary padding where it applies."""
    if not rule.padded_vocabulary:
        return rule.shape[0]
    return vocabulary_rows(rule.shape[0], tp, vocab_rows)


def _share(
    layout: ParallelLayout, rule: TensorRule, module: ModuleTensor, at: RankCoordinates
) -> tuple[tuple[int, int], tuple[int, int]]:
    """(part, number of parts) of tensor parallelism, and the (tp, dp) entries of Megatron's ``replica_id``."""
    rank, ways, copy = at.tp, layout.tp, at.dp_cp
    if rule.is_of_experts:
        rank, ways, copy = at.etp, layout.etp or layout.tp, at.edp
    return (rank, ways), (0 if module.tp_axis is not None else rank, copy)


def _local_indices(
    layout: ParallelLayout, rule: TensorRule, chunk: ModelChunk, at: RankCoordinates
) -> Iterator[tuple[Index, Index]]:
    """Yield (index in the model, index in the local module) of each tensor of ``rule`` that a rank has in ``chunk``."""
    if rule.stage is Stage.CARRIED:
        return
    if rule.stage is not Stage.LAYER:
        if chunk.is_first if rule.stage is Stage.EMBEDDING else chunk.is_last:
            yield (), ()
        return
    for local, layer in enumerate(chunk.layers):
        if not rule.is_of_experts:
            yield (layer,), (local,)
            continue
        share = rule.lead[1] // layout.ep
        for expert in range(share):
            yield (layer, at.ep * share + expert), (local, expert)


def _local_tensor(
    table: TensorTable,
    rule: TensorRule,
    module: ModuleTensor,
    rows: int,
    indices: tuple[Index, Index],
    names: tuple[str, tuple[str, ...]],
    part: tuple[int, int],
    style: KeyStyle,
    replica_id: tuple[int, int, int],
) -> LocalTensor:
    """One local tensor; ``part`` is (part, number of parts) of tensor parallelism.

    ``indices`` are its index in the model and in the local module, ``names`` its ``module_name`` and ``open_names``.
    """
    index, local_index = indices
    shape = [rows, *rule.shape[1:]]
    if module.tp_axis is not None:
        shape[module.tp_axis] //= part[1]
    halves = rule.glu_halves
    boxes = tuple(
        _box(rule, module, rows, half, stored, part)
        for stored in table.stored(rule, index, style, module.mcore_key)
        for half in range(
            stored.first_row * halves // rule.shape[0], (stored.first_row + stored.rows) * halves // rule.shape[0]
        )
    )
    live_rows = rule.shape[0] - boxes[0].global_offset[-len(shape)] if rule.padded_vocabulary else shape[0]
    return LocalTensor(
        index=index,
        local_index=local_index,
        mcore_key=module.mcore_key,
        module_name=names[0],
        open_names=names[1],
        local_shape=tuple(shape),
        prepended_axes=len(boxes[0].global_shape) - len(shape),
        boxes=boxes,
        replica_id=replica_id,
        has_padding=rule.padded_vocabulary,
        live_rows=min(shape[0], max(0, live_rows)),
    )


def _box(
    rule: TensorRule, module: ModuleTensor, rows: int, half: int, stored: StoredRows, part: tuple[int, int]
) -> LocalBox:
    """The part of ``stored`` that a rank holds of one half (of the only one, for most tensors)."""
    global_rows = rows if rule.padded_vocabulary else stored.rows
    half_rows = rows // rule.glu_halves
    shape, offset = [half_rows, *rule.shape[1:]], [half * half_rows - stored.first_row, *(0,) * len(rule.shape[1:])]
    fragments = [global_rows // half_rows, *(1,) * len(rule.shape[1:])]
    if module.tp_axis is not None:
        rank, ways = part
        shape[module.tp_axis] //= ways
        offset[module.tp_axis] += rank * shape[module.tp_axis]
        fragments[module.tp_axis] *= ways
    lead = stored.global_shape[: len(stored.index)]
    return LocalBox(
        mcore_key=stored.mcore_key,
        global_shape=(*lead, global_rows, *rule.shape[1:]),
        global_offset=(*stored.index, *offset),
        shape=(*(1,) * len(lead), *shape),
        fragments=(*lead, *fragments),
    )
