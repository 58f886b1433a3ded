"""The rows that Megatron adds to the vocabulary. Apart from layouts, which reading a checkpoint does not need."""

from __future__ import annotations

from typing import Final

#: Megatron-LM's ``--make-vocab-size-divisible-by``.
VOCABULARY_MULTIPLE: Final = 128


def padded_vocab_size(vocab_size: int, tp: int) -> int:
    """Megatron-LM's padded vocabulary size: the next multiple of 128 x tp (``--make-vocab-size-divisible-by`` 128)."""
    multiple = VOCABULARY_MULTIPLE * tp
    return -(-vocab_size // multiple) * multiple
