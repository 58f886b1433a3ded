"""The rows that Megatron adds to the vocabulary. Apart from layouts, which reading a checkpoint does not need."""

from __future__ import annotations

from typing import Final

from dist_ckpt_mistral.errors import LayoutError

#: Megatron-LM's ``--make-vocab-size-divisible-by``.
VOCABULARY_MULTIPLE: Final = 128


def vocabulary_rows(vocab_size: int, tp: int, given: int | None) -> int:
    """The rows of the embedding: those that were ``given``, else as many as Megatron-LM makes. Raises LayoutError."""
    rows = padded_vocab_size(vocab_size, tp) if given is None else given
    if rows < vocab_size or rows % tp:
        raise LayoutError(f"padded vocabulary size {rows} must be a multiple of tp={tp}, at least {vocab_size}")
    return rows


def padded_vocab_size(vocab_size: int, tp: int) -> int:
    """Megatron-LM's padded vocabulary size: the next multiple of 128 x tp (``--make-vocab-size-divisible-by`` 128)."""
    multiple = VOCABULARY_MULTIPLE * tp
    return -(-vocab_size // multiple) * multiple
