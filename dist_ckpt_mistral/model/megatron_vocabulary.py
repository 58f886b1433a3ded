"""How large a vocabulary is, told from the ``args`` of Megatron-LM, which pads it and seldom stores the true size."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Final

from dist_ckpt_mistral.errors import ConfigError
from dist_ckpt_mistral.model.checks import is_positive_int
from dist_ckpt_mistral.model.parallel_layout import VOCABULARY_MULTIPLE

_LOG = logging.getLogger(__name__)

#: Tokenizers that have no vocabulary but ``args.vocab_size``. Up to 0.17 each adds an end-of-document token to it; from
#: 0.18 on, which brought the field, the token is one of them (core/tokenizers/text/libraries/null_tokenizer.py).
_WITHOUT_VOCABULARY: Final = ("NullTokenizer", "NullMultimodalTokenizer")
_END_OF_DOCUMENT: Final = "null_tokenizer_eod_id"


def vocab_size_of(args: Mapping[str, Any], where: str) -> int:
    """The true vocabulary size if the args tell it, else the padded one, with a warning.

    ``args.vocab_size`` is what the user typed: it counts where it pads to the ``padded_vocab_size`` of the args.
    """
    given, padded = _sizes(args, where)
    if given is not None and args.get("tokenizer_type") in _WITHOUT_VOCABULARY:
        return _null_vocab_size(given, padded, args, where)
    if given is not None and (padded is None or _pads_to(given, padded, args)):
        return given
    if padded is None:
        raise ConfigError(f"{where} do not tell the vocabulary size. Give config.json with --config.")
    _LOG.warning(
        "%s do not tell the vocabulary size before padding: all %s rows are taken. "
        "Give config.json with --config to leave padded rows behind.",
        where,
        padded,
    )
    return padded


def other_vocab_size(args: Mapping[str, Any], vocab_size: int, where: str) -> int | None:
    """The vocabulary size that the args tell, if it cannot be ``vocab_size``; None where it can.

    Args that tell only the padded size allow every size that Megatron-LM pads to it. A NullTokenizer may or may not
    have counted its end-of-document token.
    """
    given, padded = _sizes(args, where)
    if given is not None and args.get("tokenizer_type") in _WITHOUT_VOCABULARY:
        return None if vocab_size in (given, given + 1) else given
    if given is not None and (padded is None or _pads_to(given, padded, args)):
        return None if vocab_size == given else given
    return None if padded is None or _pads_to(vocab_size, padded, args) else padded


def is_padding(rows: int, vocab_size: int, args: Mapping[str, Any], *, most_tp: int) -> bool:
    """Whether a vocabulary of ``vocab_size`` may be stored in ``rows`` rows.

    That is so where ``args``, which may be empty, pad it to them, or where Megatron's default does at a tensor
    parallelism of up to ``most_tp``.
    """
    multiples = [_multiple(args), *(VOCABULARY_MULTIPLE * tp for tp in range(1, most_tp + 1))]
    return rows == vocab_size or any(rows % each == 0 and 0 < rows - vocab_size < each for each in multiples)


def _sizes(args: Mapping[str, Any], where: str) -> tuple[int | None, int | None]:
    """``vocab_size`` and ``padded_vocab_size`` of the args. Raises ConfigError where one is not a size."""
    given, padded = args.get("vocab_size"), args.get("padded_vocab_size")
    for name, size in (("vocab_size", given), ("padded_vocab_size", padded)):
        if size is not None and not is_positive_int(size):
            raise ConfigError(f"{name} in {where}: expected a positive integer, got {size!r}")
    return given, padded


def _null_vocab_size(given: int, padded: int | None, args: Mapping[str, Any], where: str) -> int:
    """The size that a NullTokenizer stands for.

    Scripts go on counting as up to 0.17, and Megatron-LM takes the padded size from a checkpoint whatever they say. One
    row too many only pads, one too few loses a token: unless the user placed the token, the larger size is taken.
    """
    if args.get(_END_OF_DOCUMENT) is not None or (padded is not None and given >= padded):
        return given
    if _END_OF_DOCUMENT in args:
        _LOG.warning(
            "%s name a NullTokenizer of %s tokens, with or without one for the end of a document: %s rows are taken. "
            "Give config.json with --config for another number.",
            where,
            given,
            given + 1,
        )
    return given + 1


def _pads_to(size: int, padded: int, args: Mapping[str, Any]) -> bool:
    """Whether Megatron-LM pads ``size`` to ``padded`` (``vocab_size_with_padding``, all versions)."""
    return size <= padded < size + _multiple(args)


def _multiple(args: Mapping[str, Any]) -> int:
    """What Megatron-LM pads a vocabulary to a multiple of."""
    factors = (args.get("make_vocab_size_divisible_by"), args.get("tensor_model_parallel_size"))
    multiple, tp = (each if is_positive_int(each) else None for each in factors)
    return (multiple or VOCABULARY_MULTIPLE) * (tp or 1)
