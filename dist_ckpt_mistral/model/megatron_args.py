"""``MistralConfig`` <-> the ``args`` namespace of Megatron-LM's ``pretrain_gpt.py``, by the table of its fields."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Final

from dist_ckpt_mistral.dtypes import TorchDtype
from dist_ckpt_mistral.errors import ConfigError, UnsupportedModelError
from dist_ckpt_mistral.model.config import MistralConfig
from dist_ckpt_mistral.model.megatron_fields import (
    ARCHITECTURE,
    COMPUTED,
    DTYPE_FLAGS,
    MSCALE,
    MSCALE_ALL_DIM,
    SAME_VALUE,
    UNCHANGED,
    YARN,
    Field,
)
from dist_ckpt_mistral.model.megatron_vocabulary import vocab_size_of
from dist_ckpt_mistral.model.parallel_layout import VOCABULARY_MULTIPLE, padded_vocab_size
from dist_ckpt_mistral.model.yarn import YarnScaling

_WINDOW: Final = re.compile(r"\(?\s*(-?\d{1,9})\s*,\s*(-?\d{1,9})\s*,?\s*\)?")


def to_megatron_args(config: MistralConfig, *, dtype: str, tp: int, pp: int) -> dict[str, Any]:
    """The fields that Megatron-LM's ``--use-checkpoint-args`` and Megatron-Bridge read; plain values and one dtype.

    ``dtype`` is that of the stored weights; ``tp`` and ``pp`` are the layout that Megatron-LM assumes by default.
    """
    described: list[tuple[Field, Any]] = [
        *((field, getattr(config, attribute)) for attribute, field in SAME_VALUE.items()),
        *ARCHITECTURE,
        *((COMPUTED[name], value) for name, value in _computed(config, dtype, tp).items()),
        *_yarn_args(config.yarn),
    ]
    args = {name: value for field, value in described for name in field.names}
    if float(config.rope_theta).is_integer():
        args["rotary_base"] = int(config.rope_theta)  # what --rotary-base gives
    return {
        **args,
        **UNCHANGED,
        "params_dtype": TorchDtype(dtype),
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
    }


def _computed(config: MistralConfig, dtype: str, tp: int) -> dict[str, Any]:
    return {
        "group_query_attention": True,
        "num_query_groups": config.num_key_value_heads,
        "window_size": config.window_size,
        "window_attn_skip_freq": None,
        "untie_embeddings_and_output_weights": not config.tie_word_embeddings,
        "seq_length": config.max_position_embeddings,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "position_embedding_type": "rope" if config.yarn is None else "yarn",
        "vocab_size": config.vocab_size,
        "make_vocab_size_divisible_by": VOCABULARY_MULTIPLE,
        "padded_vocab_size": padded_vocab_size(config.vocab_size, tp),
        **{flag: dtype == name for flag, name in DTYPE_FLAGS.items()},
    }


def _yarn_args(yarn: YarnScaling | None) -> list[tuple[Field, Any]]:
    """The YaRN fields. Megatron-LM's mscales of 1 and 0 give what transformers does without any."""
    if yarn is None:
        return []
    mscale, mscale_all_dim = yarn.megatron_mscales
    scales = zip((MSCALE, MSCALE_ALL_DIM), (mscale, mscale_all_dim), strict=True)
    return [
        *((field, getattr(yarn, attribute)) for attribute, field in YARN.items()),
        *((field, field.default if value is None else value) for field, value in scales),
    ]


def from_megatron_args(args: Mapping[str, Any], where: str = "the checkpoint's args") -> MistralConfig:
    """The configuration in a checkpoint's own ``args``. What the args leave open is logged as a warning.

    Raises UnsupportedModelError for another architecture, ConfigError when sizes are missing or do not fit.
    """
    position = COMPUTED["position_embedding_type"].of(args)
    missing = [field.name for field in SAME_VALUE.values() if field.of(args) is None]
    missing += ["position_embedding_type"] if position is None else []
    if missing:
        raise ConfigError(f"{where} lack {', '.join(missing)}. Give the model's config.json with --config.")
    _refuse_other_architectures(args, where)
    sizes = {attribute: field.of(args) for attribute, field in SAME_VALUE.items()}
    return MistralConfig(
        **sizes,
        vocab_size=vocab_size_of(args, where),
        num_key_value_heads=_num_query_groups(args),
        sliding_window=_sliding_window(args, where),
        tie_word_embeddings=not COMPUTED["untie_embeddings_and_output_weights"].of(args),
        yarn=_yarn(args) if position == "yarn" else None,
        dtype=next((dtype for flag, dtype in DTYPE_FLAGS.items() if args.get(flag)), None),
    )


def _refuse_other_architectures(args: Mapping[str, Any], where: str) -> None:
    foreign = [
        f"{field.name}={found!r}"
        for field, value in ARCHITECTURE
        if (found := field.of(args)) != value and (value or found)
    ]
    position = args["position_embedding_type"]
    foreign += [f"position_embedding_type={position!r}"] if position not in ("rope", "yarn") else []
    if foreign:
        raise UnsupportedModelError(f"{where} are not those of a dense Mistral model: {', '.join(foreign)}")


def _num_query_groups(args: Mapping[str, Any]) -> Any:  # noqa: ANN401  (whatever it is, MistralConfig checks it)
    """Without ``group_query_attention`` every head has its own keys, whatever ``num_query_groups`` says."""
    groups = args.get("num_query_groups")
    grouped = args.get("group_query_attention", groups is not None)
    return groups if grouped else args["num_attention_heads"]


def _sliding_window(args: Mapping[str, Any], where: str) -> int | None:
    """Megatron's (W - 1, 0) as Hugging Face's W; None and (-1, ...) are full attention.

    The parser makes a tuple of ``--window-size 4095,0``; a file may hold a list, or the text.
    """
    given: Any = args.get("window_size")
    if given is None:
        return None
    text = _WINDOW.fullmatch(given) if isinstance(given, str) else None
    window = tuple(int(size) for size in text.groups()) if text else given
    if not (isinstance(window, list | tuple) and [type(size) for size in window] == [int, int]):
        raise ConfigError(f"window_size in {where}: expected (before, after), got {given!r}")
    before: int = window[0]
    after: int = window[1]
    if before < 0:
        return None
    if after > 0:
        raise UnsupportedModelError(f"window_size {given!r} in {where}: Mistral models see nothing after a token.")
    skip = args.get("window_attn_skip_freq")
    if skip is not None and not (isinstance(skip, list | tuple) and all(layer == 1 for layer in skip)):
        raise UnsupportedModelError(
            f"window_attn_skip_freq {skip!r} in {where}: all layers of a Mistral model have the window, or none."
        )
    return before + 1


def _yarn(args: Mapping[str, Any]) -> YarnScaling:
    """YaRN as Megatron computes it. What transformers has no mscales for, an ``attention_factor`` says.

    One mscale without the other counts for nothing, as in ``_yarn_get_concentration_factor`` (0.16 to 0.19).
    """
    values = {attribute: field.of(args) for attribute, field in YARN.items()}
    mscales = (args.get(MSCALE.name), args.get(MSCALE_ALL_DIM.name))
    if None in mscales or mscales == (MSCALE.default, MSCALE_ALL_DIM.default):
        return YarnScaling(**values)
    scaling = YarnScaling(**values, mscale=mscales[0], mscale_all_dim=mscales[1])
    if all(mscales):
        return scaling
    above, below = (0.1 * mscale * math.log(scaling.factor) + 1 for mscale in mscales if mscale is not None)
    return YarnScaling(**values, attention_factor=above / below)
