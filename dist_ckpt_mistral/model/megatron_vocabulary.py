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
    given, padded = args.get("vocab_size"), args.get("padded_vocab_size")
    for name, size in (("vocab_size", given), ("padded_vocab_size", padded)):
        if size is not None and not is_positive_int(size):
            raise ConfigError(f"{name} in {where}: expected a positive integer, got {size!r}")
    if given is not None and args.get("tokenizer_type") in _WITHOUT_VOCABULARY:
        return _null_vocab_size(int(given), padded, args, where)
    if given is not None and (padded is None or _pads_to(given, padded, args)):
        return int(given)
    if padded is None:
        raise ConfigError(f"{where} do not tell the vocabulary size. Give config.json with --config.")
    _LOG.warning(
        "%s do not tell the vocabulary size before padding: all %s rows are taken. "
        "Give config.json with --config to leave padded rows behind.",
        where,
        padded,
    )
    return int(padded)


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
    multiple = (args.get("make_vocab_size_divisible_by") or VOCABULARY_MULTIPLE) * (
        args.get("tensor_model_parallel_size") or 1
    )
    return size <= padded < size + multiple
