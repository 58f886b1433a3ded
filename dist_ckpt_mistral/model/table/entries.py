"""Classify stored entries by their keys: weights, optimizer state, or entries that are no tensors of the model."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from dist_ckpt_mistral.model.table.layers import EMBEDDING_KEY
from dist_ckpt_mistral.model.table.rules import ParamState, Stage, TensorRule

#: Pattern of a layer tensor's key -> its kind; the first match counts.
_KINDS: Final = (
    (re.compile(r".*norm"), "norms"),
    (re.compile(r".*\bself_attention\."), "attention"),
    (re.compile(r".*experts\."), "experts"),
    (re.compile(r".*\bmlp\."), "MLP"),
)


def kind_of(rule: TensorRule, state: ParamState = ParamState.WEIGHTS) -> str:
    """The kind of a tensor in reports, such as attention, experts, output layer or optimizer state."""
    if state is not ParamState.WEIGHTS:
        return "optimizer state"
    if rule.stage is Stage.EMBEDDING:
        return "embedding"
    if rule.stage is Stage.CARRIED:
        return "vision"
    return next((kind for pattern, kind in _KINDS if pattern.match(rule.mcore_key)), "output layer")


#: Prefix that turns a model key into the key of a state. With several optimizers, ``chained_{n}.`` precedes it.
_STATE_PREFIX: Final = "optimizer.state.{state}."
_OPTIMIZER: Final = re.compile(r"(chained_\d+\.)?optimizer\.")
_STATE_KEY: Final = re.compile(r"(?:chained_\d+\.)?optimizer\.state\.(\w+)\.(.+)")
#: Optimizer state in flat buffers, whose layout only the run that wrote them knows: pattern of the key -> the format.
_FLAT_STATES: Final = (
    (re.compile(r"(chained_\d+\.)?optimizer\.distributed\.dp_group_idx_\d+\.gbuf_idx_"), "dp_reshardable"),
    (
        re.compile(r"(chained_\d+\.)?optimizer\.distributed\.dp_group_idx_\d+\.param_state($|/)"),
        "dp_zero_gather_scatter",
    ),
    (re.compile(r"optimizer\.distributed\.mp_rank_\w+/distrib_optim\.pt$"), "distrib_optim.pt"),
)

_EXTRA_STATE: Final = re.compile(r"(.*[./])?_extra_state($|/|\d)")

#: The beginning of every reason why an export leaves out optimizer state.
OPTIMIZER_STATE: Final = "optimizer state"
#: Stored entries that are not weights: pattern of the key -> why an export leaves it out.
_NOT_WEIGHTS: Final = (
    *((pattern, f"{OPTIMIZER_STATE} in flat buffers ({name})") for pattern, name in _FLAT_STATES),
    (_OPTIMIZER, OPTIMIZER_STATE),
    (_EXTRA_STATE, "Transformer Engine extra state"),
    (re.compile(r"rng_state($|/|\.)"), "random number generator state"),
    (re.compile(r"common_state($|/)"), "common state, read on its own"),
    (re.compile(r"(opt_param_scheduler|rerun_state_machine|iteration|checkpoint_version)\w*($|/|\.)"), "trainer state"),
)
#: Parts of names that only tensors of an adapter have, or of a model that an adapter wraps: peft 0.17 in adapter files
#: and whole state dicts; Megatron-Bridge 0.6 (peft/lora.py, canonical_lora.py, dora.py) and NeMo in checkpoints.
_OF_ADAPTER: Final = re.compile(r"base_model\.model\.|(.*\.)?(adapter|lora|to_wrap\.|base_layer\.|modules_to_save\.)")
#: The words that a model's own tensors have more where an adapter wraps their module: those of Megatron-Bridge (peft/
#: adapter_wrapper.py) and of PEFT.
_WRAPPED: Final = re.compile(r"\b(to_wrap|base_layer)\.")
_HF_NOT_WEIGHTS: Final = ((re.compile(r"(.*\.)?rotary_emb\.inv_freq$"), "recomputed from rope_theta by every reader"),)


def model_prefix(mcore_keys: Iterable[str]) -> str:
    """The prefix of every model key: ``module.`` in NeMo 2, ``model.`` in wrapped models, else empty."""
    prefixes = sorted(
        {key.removesuffix(EMBEDDING_KEY) for key in mcore_keys if key.endswith(EMBEDDING_KEY) and not why_ignored(key)},
        key=len,
    )
    return prefixes[0] if prefixes else ""


def state_key(mcore_key: str, name: str) -> str:
    """The key of the parameter ``mcore_key``'s state that Megatron calls ``name``."""
    return _STATE_PREFIX.format(state=name) + mcore_key


def split_state_key(stored_key: str) -> tuple[str, str] | None:
    """(Megatron's name of the state, key of the parameter) of a stored tensor; None if it is no optimizer state."""
    match = _STATE_KEY.fullmatch(stored_key)
    return (match[1], match[2]) if match else None


def flat_state(stored_key: str) -> str | None:
    """The format of a stored entry that is optimizer state in flat buffers, such as ``dp_reshardable``; else None."""
    return next((name for pattern, name in _FLAT_STATES if pattern.match(stored_key)), None)


def is_optimizer_state(stored_key: str) -> bool:
    """Whether a stored entry, tensor or object, belongs to an optimizer."""
    return _OPTIMIZER.match(stored_key) is not None


def is_extra_state(stored_key: str) -> bool:
    """Whether a stored entry is a module's extra state, which only FP8 training uses."""
    return _EXTRA_STATE.match(stored_key) is not None


def why_ignored(mcore_key: str, prefix: str = "") -> str | None:
    """Why a stored Megatron entry is not a weight, or None if it may be one. Its key may begin with ``prefix``."""
    keys = (mcore_key, mcore_key.removeprefix(prefix))
    return next((reason for pattern, reason in _NOT_WEIGHTS if any(map(pattern.match, keys))), None)


def is_of_adapter(name: str) -> bool:
    """Whether the key or Hugging Face name is that of an adapter's tensor or of a model wrapped in an adapter."""
    return _OF_ADAPTER.match(name) is not None


def unwrapped(name: str) -> str:
    """The name that a tensor of a model has where no adapter wraps its module."""
    return _WRAPPED.sub("", name)


def why_hf_ignored(hf_name: str) -> str | None:
    """Why a tensor of a Hugging Face file is not a weight, or None if it may be one."""
    return next((reason for pattern, reason in _HF_NOT_WEIGHTS if pattern.match(hf_name)), None)
