"""What stored entries are, by their keys: weights, states of them, or something that is no tensor of the model."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from dist_ckpt_mistral.model.table.layers import EMBEDDING_KEY
from dist_ckpt_mistral.model.table.rules import ParamState, Place, TensorRule

#: What to call tensors of layers: the first pattern that the key matches says it.
_KINDS: Final = (
    (re.compile(r".*norm"), "norms"),
    (re.compile(r".*\bself_attention\."), "attention"),
    (re.compile(r".*experts\."), "experts"),
    (re.compile(r".*\bmlp\."), "MLP"),
)


def kind_of(rule: TensorRule, state: ParamState = ParamState.WEIGHTS) -> str:
    """What a tensor is, for people: embedding, attention, MLP, experts, norms, output layer or optimizer state."""
    if state is not ParamState.WEIGHTS:
        return "optimizer state"
    if rule.place is Place.EMBEDDING:
        return "embedding"
    return next((kind for pattern, kind in _KINDS if pattern.match(rule.mcore_key)), "output layer")


#: What stands before a model key to make it that of a state (several optimizers may count themselves before that).
_STATE_PREFIX: Final = "optimizer.state.{state}."
_OPTIMIZER: Final = re.compile(r"(chained_\d+\.)?optimizer\.")
_STATE_KEY: Final = re.compile(r"(?:chained_\d+\.)?optimizer\.state\.(\w+)\.(.+)")
#: Optimizer state as flat buffers, whose layout only the run knows that made them: pattern of the key -> the format.
_FLAT_STATES: Final = (
    (re.compile(r"(chained_\d+\.)?optimizer\.distributed\.dp_group_idx_\d+\.gbuf_idx_"), "dp_reshardable"),
    (
        re.compile(r"(chained_\d+\.)?optimizer\.distributed\.dp_group_idx_\d+\.param_state($|/)"),
        "dp_zero_gather_scatter",
    ),
)

#: How every reason begins for which an export leaves out what the optimizer keeps.
OPTIMIZER_STATE: Final = "optimizer state"
#: Stored entries that are not weights: pattern of the key -> why an export leaves it out.
_NOT_WEIGHTS: Final = (
    *((pattern, f"{OPTIMIZER_STATE} in flat buffers ({name})") for pattern, name in _FLAT_STATES),
    (_OPTIMIZER, OPTIMIZER_STATE),
    (re.compile(r"(.*[./])?_extra_state($|/|\d)"), "Transformer Engine extra state"),
    (re.compile(r"rng_state($|/|\.)"), "random number generator state"),
    (re.compile(r"common_state($|/)"), "common state, read on its own"),
    (re.compile(r"(opt_param_scheduler|rerun_state_machine|iteration|checkpoint_version)\w*($|/|\.)"), "trainer state"),
)
#: Parts of names that only tensors of an adapter have, or a model that one is wrapped around: peft 0.17 in files of its
#: own and of whole state dicts, Megatron-Bridge 0.6 (peft/lora.py, canonical_lora.py, dora.py) and NeMo in checkpoints.
_OF_ADAPTER: Final = re.compile(r"base_model\.model\.|(.*\.)?(adapter|lora|to_wrap\.|base_layer\.|modules_to_save\.)")
_HF_NOT_WEIGHTS: Final = ((re.compile(r"(.*\.)?rotary_emb\.inv_freq$"), "recomputed from rope_theta by every reader"),)


def model_prefix(mcore_keys: Iterable[str]) -> str:
    """What stands before every model key: ``module.`` in NeMo 2, ``model.`` in wrapped models, else nothing."""
    found = sorted(
        {key.removesuffix(EMBEDDING_KEY) for key in mcore_keys if key.endswith(EMBEDDING_KEY) and not why_ignored(key)},
        key=len,
    )
    return found[0] if found else ""


def state_key(mcore_key: str, name: str) -> str:
    """The key of the state that Megatron calls ``name``, of the parameter ``mcore_key``."""
    return _STATE_PREFIX.format(state=name) + mcore_key


def split_state_key(stored_key: str) -> tuple[str, str] | None:
    """(what Megatron calls the state, the parameter's own key) of a stored tensor; None if it is no such state."""
    match = _STATE_KEY.fullmatch(stored_key)
    return (match[1], match[2]) if match else None


def flat_state(stored_key: str) -> str | None:
    """The format of a stored entry that is optimizer state in flat buffers, such as ``dp_reshardable``; else None."""
    return next((name for pattern, name in _FLAT_STATES if pattern.match(stored_key)), None)


def is_optimizer_state(stored_key: str) -> bool:
    """Whether a stored entry, tensor or object, belongs to an optimizer."""
    return _OPTIMIZER.match(stored_key) is not None


def why_ignored(mcore_key: str, prefix: str = "") -> str | None:
    """Why a stored Megatron entry is not a weight, or None if it might be one; ``prefix`` may stand before its key."""
    keys = (mcore_key, mcore_key.removeprefix(prefix))
    return next((reason for pattern, reason in _NOT_WEIGHTS if any(map(pattern.match, keys))), None)


def is_of_adapter(name: str) -> bool:
    """Whether a tensor, by its key or its Hugging Face name, belongs to an adapter or to a model wrapped in one."""
    return _OF_ADAPTER.match(name) is not None


def why_hf_ignored(hf_name: str) -> str | None:
    """Why a tensor of a Hugging Face file is not a weight, or None if it might be one."""
    return next((reason for pattern, reason in _HF_NOT_WEIGHTS if pattern.match(hf_name)), None)
