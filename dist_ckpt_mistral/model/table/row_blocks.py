"""The one bijection between the rows of a Hugging Face tensor and those of a Megatron tensor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dist_ckpt_mistral.errors import PlanError


@dataclass(frozen=True, slots=True, kw_only=True)
class RowBlocks:
    """Hugging Face row block ``i`` is Megatron rows ``[i * stride + offset, i * stride + offset + length)``.

    Hugging Face rows count up without gaps: block ``i`` is its rows ``[i * length, (i + 1) * length)``. Identity, the
    gate and up halves of ``linear_fc1``, the query, key and value rows of ``linear_qkv`` and packed experts are all of
    this form. All numbers are rows (axis 0 of one layer's tensor).
    """

    count: int
    stride: int
    offset: int
    length: int

    def __post_init__(self) -> None:
        """Refuse a map that is not one-to-one: blocks must be in order and must not overlap."""
        well_formed = self.count >= 0 and self.length >= 0 and self.offset >= 0
        if not well_formed or (self.count > 1 and self.stride < self.length):
            raise PlanError(f"row blocks overlap or are negative: {self}")

    @classmethod
    def identity(cls, rows: int) -> RowBlocks:
        """All ``rows`` rows, in place."""
        return cls(count=1, stride=rows, offset=0, length=rows)

    @property
    def hf_rows(self) -> int:
        """Number of rows of the Hugging Face tensor."""
        return self.count * self.length

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        """Yield ``(hf_row, mcore_row, length)`` of every block."""
        for block in range(self.count):
            yield block * self.length, block * self.stride + self.offset, self.length
