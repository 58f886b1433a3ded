"""What one rank holds: local tensors, each with the boxes of stored tensors that it is, and objects beside them.

Of which tensors, and which part of each, ``ParallelLayout`` says.
"""

from __future__ import annotations

from dataclasses import dataclass

from dist_ckpt_mistral.model.table.rules import Index, KeyStyle, ModuleTensor, TensorRule
from dist_ckpt_mistral.model.table.table import StoredRows, TensorTable


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalBox:
    """One box of a stored tensor. All tuples are in elements and have the axes of the stored tensor.

    ``fragments`` counts the boxes along each axis.
    """

    mcore_key: str
    global_shape: tuple[int, ...]
    global_offset: tuple[int, ...]
    shape: tuple[int, ...]
    fragments: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalTensor:
    """One local tensor of one rank. ``boxes`` are its rows in order: one box, or gate and up of ``linear_fc1``.

    ``mcore_key`` is that of ``rule`` which the boxes go by. ``local_shape`` is in elements; ``prepended_axes`` counts
    the leading axes that only the stored tensor has. ``replica_id`` is Megatron's (copy of the stage, tensor-parallel
    rank, data-parallel rank with context parallelism; for experts the ranks are those of the expert grid); the copy of
    all zeros is the one that is saved.
    """

    rule: TensorRule
    index: Index
    mcore_key: str
    module_name: str
    local_shape: tuple[int, ...]
    prepended_axes: int
    boxes: tuple[LocalBox, ...]
    replica_id: tuple[int, int, int]

    @property
    def layer(self) -> int | None:
        """The layer that it belongs to, counted in the whole model; None outside of the layers."""
        return self.index[0] if self.index else None

    @property
    def is_main_replica(self) -> bool:
        """Whether this is the copy that is saved."""
        return not any(self.replica_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalObject:
    """One object that a rank saves beside its tensors: shape and offset count elements of a stored array of objects."""

    mcore_key: str
    module_name: str
    global_shape: tuple[int, ...]
    global_offset: tuple[int, ...]
    replica_id: tuple[int, int, int]


def local_tensor(
    table: TensorTable,
    rule: TensorRule,
    module: ModuleTensor,
    rows: int,
    index: Index,
    name: str,
    part: tuple[int, int],
    style: KeyStyle,
    replica_id: tuple[int, int, int],
) -> LocalTensor:
    """One local tensor: ``part`` says which of how many tensor-parallel parts."""
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
    return LocalTensor(
        rule=rule,
        index=index,
        mcore_key=module.mcore_key,
        module_name=name,
        local_shape=tuple(shape),
        prepended_axes=len(boxes[0].global_shape) - len(shape),
        boxes=boxes,
        replica_id=replica_id,
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
