"""The tensors of a LoRA adapter, derived from those of the model that it adapts: no tensor of a model is named here.

A LoRA of rank r adapts a matrix W [rows, columns] by A [r, columns] and B [rows, r]: W becomes W + scale * B A. The key
of A is the key of W with other words in place of its last one, ``weight``, and so are the names in files of PEFT. A has
the columns of W. The rows of B are those of W, in the same row blocks.

Sources: Megatron-Bridge 0.6.2, peft/lora.py, canonical_lora.py and utils.py (``ParallelLinearAdapter``); mcore-bridge
1.6.5 (of ms-swift 4), tuners/lora.py; PEFT 0.21, tuners/lora/layer.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum
from typing import Final

from dist_ckpt_mistral.errors import LayoutError
from dist_ckpt_mistral.model.table.rules import (
    COLUMNS,
    ROWS,
    HfPart,
    ModuleTensor,
    RowBlocks,
    Stage,
    TensorRule,
)
from dist_ckpt_mistral.model.table.vision import in_memory

_WEIGHT: Final = "weight"
#: The beginning of every name in files of PEFT, and its names of A and B. PEFT adapts the modules of the model in
#: memory, so it has their names.
PEFT_PREFIX: Final = "base_model.model."
A, B = "lora_A.weight", "lora_B.weight"
#: Other names that the same tensors have: in the state dict of a model in memory, and in files by the names on disk.
OTHER_PEFT_NAMES: Final = (
    (re.compile(r"\.(lora_[AB])\.default(?=\.weight$)"), r".\1"),
    (re.compile(r"^base_model\.model\.language_model\.model\."), PEFT_PREFIX + "model.language_model."),
)
#: Megatron-Bridge's names of the modules of A and B, and those of ms-swift, which are PEFT's.
_IN, _OUT = "linear_in", "linear_out"
_SWIFT_ROLES: Final = {_IN: "lora_A", _OUT: "lora_B"}
#: The number of axes of a matrix.
_MATRIX: Final = 2


class Form(Enum):
    """How a checkpoint stores the adapter of a matrix that is several matrices in Hugging Face's model.

    FUSED has one A and one B for all of them (LoRA of Megatron-Bridge), SEPARATE one of each for every one of them
    (its CanonicalLoRA). SWIFT is FUSED under PEFT's own names, and cut otherwise (ms-swift).
    """

    FUSED = "LoRA of Megatron-Bridge"
    SEPARATE = "CanonicalLoRA of Megatron-Bridge"
    SWIFT = "LoRA of ms-swift"


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """The adapter of one matrix of the table, in all layers.

    Args:
        base: The rule of the matrix.
        form: How A and B are stored.
        parts: The Hugging Face tensors that it adapts: all of ``base``, or one of them.
        rank: The rank.
        name: PEFT's name of the adapter, where the keys have it.
        row_order_tp: The tensor parallelism by whose ranks B's rows are ordered, which matters if ``is_in_rank_order``.
    """

    base: TensorRule
    form: Form
    parts: tuple[HfPart, ...]
    rank: int
    name: str = "default"
    row_order_tp: int = 1

    @property
    def is_in_rank_order(self) -> bool:
        """Whether the order of B's stored rows depends on the tensor parallelism of the run that saved them.

        ms-swift stores the local rows [gate; up] of every rank one after another. Megatron-Bridge cuts the rows of
        ``adapter_gate`` and ``adapter_up`` in halves, as if each were [gate; up], and stores all first halves before
        all second ones.
        """
        return self.base.glu_halves > 1 and self.form is not Form.FUSED

    @property
    def rules(self) -> tuple[TensorRule, TensorRule]:
        """The rules of A and of B."""
        return self.a, self.b

    @property
    def a(self) -> TensorRule:
        """The rule of A. Each of the Hugging Face tensors has all of its rows."""
        whole = RowBlocks.share(self.rank)
        rows = {part.hf_name: whole for part in self.parts}
        return self._rule(_IN, A, (self.rank, self.base.shape[1]), rows, halves=1)

    @property
    def b(self) -> TensorRule:
        """The rule of B."""
        rows = sum(part.rows.hf_rows for part in self.parts)
        halves = self.base.glu_halves if self.form is not Form.SWIFT else 1
        blocks = {part.hf_name: self._rows_of(part) for part in self.parts}
        return self._rule(_OUT, B, (rows, self.rank), blocks, halves=halves)

    def _rows_of(self, part: HfPart) -> RowBlocks:
        """The rows of B that belong to a Hugging Face tensor: those of the matrix, or what their order is instead."""
        rows, tp = part.rows, self.row_order_tp
        if self.form is Form.SEPARATE:
            own, cut = rows.hf_rows, self.base.glu_halves * tp
            if not self.is_in_rank_order or tp == 1:
                return RowBlocks.share(own)
            if own % cut:
                raise LayoutError(f"{self.keys[1]}: expected rows in {cut} equal parts (tp={tp}), got {own} rows")
            return RowBlocks(
                count=tp,
                stride=own // cut,
                offset=0,
                length=own // cut,
                pieces=self.base.glu_halves,
                piece_stride=own // self.base.glu_halves,
            )
        if self.is_in_rank_order and tp > 1:
            return RowBlocks(
                count=tp, stride=self.base.shape[0] // tp, offset=rows.offset // tp, length=rows.length // tp
            )
        return rows

    @property
    def keys(self) -> tuple[str, str]:
        """The keys of A and of B, with ``{layer}``."""
        return self.a.mcore_key, self.b.mcore_key

    def _rule(
        self, role: str, hf_role: str, shape: tuple[int, int], rows: dict[str, RowBlocks], *, halves: int
    ) -> TensorRule:
        parts = tuple(HfPart(hf_name=peft_name(name, hf_role), rows=blocks) for name, blocks in rows.items())
        return TensorRule(
            local=self._module(self.base.local, role),
            te=self._module(self.base.te, role),
            shape=shape,
            lead=self.base.lead,
            stage=self.base.stage,
            parts=parts,
            glu_halves=halves,
            padded_vocabulary=self.base.padded_vocabulary and role == _OUT,
        )

    def _module(self, base: ModuleTensor, role: str) -> ModuleTensor:
        """The names of A or B in the modules of a layer spec, and its axis that tensor parallelism cuts."""
        words = {
            Form.FUSED: f"adapter.{role}.{_WEIGHT}",
            Form.SEPARATE: f"adapter.{_adapter_of(self.parts[0])}.{role}.{_WEIGHT}",
            Form.SWIFT: f"{_SWIFT_ROLES[role]}.{self.name}.{_WEIGHT}",
        }[self.form]
        return ModuleTensor(
            mcore_key=base.mcore_key.removesuffix(_WEIGHT) + words,
            name=base.name.removesuffix(_WEIGHT) + words,
            tp_axis=self._cut_axis(base, role),
        )

    def _cut_axis(self, base: ModuleTensor, role: str) -> int | None:
        """The axis of A or B that tensor parallelism cuts.

        A is cut along its columns where the input of the matrix is cut. Otherwise Megatron-Bridge cuts A along the
        rank, and always B along its rows; ms-swift leaves whole what the matrix does not cut.
        """
        is_swift = self.form is Form.SWIFT
        if role == _IN and base.tp_axis == COLUMNS:
            return COLUMNS
        if is_swift and (role == _IN or base.tp_axis != ROWS):
            return None
        return ROWS


def can_adapt(rule: TensorRule) -> bool:
    """Whether a LoRA of the matrix is read and written: that of a linear module, but not of experts or a router.

    Every linear module in the layers has an extra state, which tells them from norms and from the router.
    """
    is_linear = rule.te.extra_state is not None or rule.stage is Stage.OUTPUT
    return len(rule.shape) == _MATRIX and is_linear and not rule.is_of_experts


def possible_adapters(rule: TensorRule, names: tuple[str, ...]) -> Iterator[Adapter]:
    """Yield every adapter that a checkpoint may hold of a matrix, of rank 1. ``names`` are PEFT's names of adapters."""
    adapter = Adapter(base=rule, form=Form.FUSED, parts=rule.parts, rank=1)
    yield adapter
    if len(rule.parts) > 1:
        for part in rule.parts:
            yield replace(adapter, form=Form.SEPARATE, parts=(part,))
    for name in names:
        yield replace(adapter, form=Form.SWIFT, name=name)


def peft_name(hf_name: str, role: str) -> str:
    """PEFT's name in files of A or B of the tensor ``hf_name``."""
    return PEFT_PREFIX + in_memory(hf_name).removesuffix(_WEIGHT) + role


def module_of(hf_name: str) -> str:
    """The name, as PEFT has it, of the module whose weight is the tensor ``hf_name``."""
    return in_memory(hf_name).removesuffix(f".{_WEIGHT}")


def _adapter_of(part: HfPart) -> str:
    """CanonicalLoRA's name for the adapter of a Hugging Face tensor: ``adapter_q`` for ``q_proj.weight``."""
    return f"adapter_{part.hf_name.split('.')[-2].removesuffix('_proj')}"
