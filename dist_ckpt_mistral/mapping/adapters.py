"""Match the tensors of a LoRA adapter in a Megatron checkpoint, and find what describes it.

A run saves the adapter alone (Megatron-Bridge, ms-swift), or the adapter and the model that it adapts. Which matrices
are adapted, in which form and of which rank, is read off the stored keys and shapes; their rows and names are those of
the table.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Final

from dist_ckpt_mistral.errors import TensorMismatchError, UnsupportedModelError
from dist_ckpt_mistral.formats.stored_checkpoint import StoredCheckpoint
from dist_ckpt_mistral.gather.dtypes import Shape
from dist_ckpt_mistral.mapping.checkpoint_map import CheckpointMap
from dist_ckpt_mistral.mapping.matching import names_of_states, require_complete, spelling
from dist_ckpt_mistral.messages import listed
from dist_ckpt_mistral.model.table.adapters import Adapter, can_adapt, possible_adapters
from dist_ckpt_mistral.model.table.entries import is_of_adapter, unwrapped, why_ignored
from dist_ckpt_mistral.model.table.rules import KeyStyle, ParamState, TensorRule, spell, spell_key
from dist_ckpt_mistral.model.table.table import TensorTable

#: PEFT's name of an adapter, in ms-swift's keys.
_ADAPTER_NAME: Final = re.compile(r".*\.lora_A\.(\w+)\.weight$")
#: Adapters that are not read: pattern of their keys -> what they are.
_OTHERS: Final = (
    (re.compile(r".*(weight_magnitude|lora_magnitude_vector)"), "DoRA (a magnitude for every row)"),
    (re.compile(r".*experts\."), "adapters of experts"),
    (re.compile(r".*router\."), "an adapter of a router"),
    (re.compile(r".*(embedding|lora_embedding_)"), "an adapter of the embedding"),
    (re.compile(r".*modules_to_save\."), "whole modules that PEFT saved beside its adapter"),
    (re.compile(r".*(lora_kqv_adapter|adapter_layer|infused_adapter|linear_adapter)"), "adapters of NeMo 1"),
    (re.compile(r".*\.bias$"), "an adapter with biases"),
)
_REST: Final = "an adapter of a form that is not known"


def weights_of_adapter(names: Iterable[str]) -> list[str]:
    """The stored names that are weights of an adapter: neither optimizer state nor weights that it wraps."""
    return [name for name in names if is_of_adapter(unwrapped(name)) and why_ignored(name) is None]


def holds_adapter(names: Iterable[str]) -> bool:
    """Whether tensors of these stored names are those of an adapter, or of a model that an adapter wraps."""
    return any(is_of_adapter(name) and why_ignored(name) is None for name in names)


def holds_base(names: Iterable[str]) -> bool:
    """Whether tensors of these stored names include weights of a model, and not of an adapter alone."""
    return any(map(_is_of_base, names))


def match_adapter(table: TensorTable, checkpoint: StoredCheckpoint, state: ParamState) -> CheckpointMap:
    """Match a checkpoint that holds an adapter. The map's table has its tensors, and the model's if they are there.

    Of an optimizer's ``state`` there is that of the adapter alone, which is what is trained.

    Raises:
        TensorMismatchError: Tensors are missing, unknown or of another shape.
        UnsupportedModelError: It is another adapter than a LoRA that this package reads.
    """
    where = str(checkpoint.directory)
    shapes = {name: tensor.global_shape for name, tensor in checkpoint.tensors.items()}
    has_base = holds_base(shapes) and state is ParamState.WEIGHTS
    if state is ParamState.WEIGHTS:
        stored = _unwrapped_names(shapes, where)
    else:
        stored = names_of_states(state, shapes, checkpoint.objects, where)
    by_key = {key: shapes[name] for key, name in stored.items()}
    prefix = _prefix(by_key, table.rules)
    present = {key.removeprefix(prefix): shape for key, shape in by_key.items() if key.startswith(prefix)}
    cuts = {key.removeprefix(prefix): _row_cuts(checkpoint, name) for key, name in stored.items() if is_of_adapter(key)}
    adapters = tuple(_adapters(table.rules, present, cuts, where))
    _refuse_others(adapters, present, where)
    whole = table.with_adapters(adapters) if has_base else table.of_adapters(adapters)
    style, keys = spelling(whole, {*present})
    states = {key: name for key, name in stored.items() if key != name}
    found = CheckpointMap(table=whole, prefix=prefix, style=style, keys=keys, state=state, states=states)
    if not has_base:  # of a model beside the adapter, the optimizer has no state
        shapes = {name: shape for name, shape in shapes.items() if name in states or not _is_of_base(name)}
    return require_complete(found, shapes, checkpoint.objects, where)


def _is_of_base(name: str) -> bool:
    """Whether a stored name is that of a weight of a model, which an adapter may wrap."""
    return not is_of_adapter(unwrapped(name)) and why_ignored(name) is None


def _unwrapped_names(names: Iterable[str], where: str) -> dict[str, str]:
    """Key without the words of a wrapper -> stored name, of every weight. Raises TensorMismatchError for two names."""
    stored: dict[str, str] = {}
    for name in names:
        if why_ignored(name) is None:
            other = stored.setdefault(unwrapped(name), name)
            if other != name:
                raise TensorMismatchError(
                    f"{where} holds {unwrapped(name)!r} twice: as {other!r} and {name!r}. Remove the tensor that is "
                    "not meant."
                )
    return stored


def adapters_in_files(rules: Iterable[TensorRule], shapes: Mapping[str, Shape]) -> Iterator[Adapter]:
    """Yield the adapters of which files hold A or B (name of PEFT -> shape), each of one Hugging Face tensor."""
    for rule in filter(can_adapt, rules):
        for adapter in possible_adapters(rule, ()):
            if len(adapter.parts) > 1:
                continue
            index = (0,) * len(rule.lead)
            a, b = (shapes.get(spell(each.parts[0].hf_name, index)) for each in adapter.rules)
            if a is not None or b is not None:
                rank = a[0] if a else (b or (1,))[-1]
                yield replace(adapter, rank=max(1, rank))


def _prefix(names: Collection[str], rules: Iterable[TensorRule]) -> str:
    """The prefix of the keys: what stands before the first word of a rule's key, such as ``module.`` of NeMo 2."""
    words = "|".join(sorted({re.escape(rule.mcore_key.partition(".")[0]) for rule in rules if can_adapt(rule)}))
    pattern = re.compile(rf"(?:.*?\.)??(?=(?:{words})\.)")
    prefixes = {match[0] for name in names if is_of_adapter(name) and (match := pattern.match(name))}
    return min(prefixes, key=len, default="")


def _row_cuts(checkpoint: StoredCheckpoint, name: str) -> int:
    """Into how many pieces the chunks cut the rows of a matrix (the last axis but one)."""
    offsets = checkpoint.tensors[name].offsets
    return len(set(offsets[:, -2].tolist())) if offsets.ndim > 1 and offsets.shape[1] > 1 else 1


def _adapters(
    rules: Iterable[TensorRule], present: Mapping[str, Shape], cuts: Mapping[str, int], where: str
) -> Iterator[Adapter]:
    """Yield the adapters of which ``present`` (key without prefix -> shape) holds A or B in the first layer."""
    names = tuple(sorted({match[1] for key in present if (match := _ADAPTER_NAME.match(key))}))
    if len(names) > 1:
        raise UnsupportedModelError(
            f"{where} holds several adapters: expected one, got {listed(names)}. Save the one that you want alone."
        )
    for rule in filter(can_adapt, rules):
        for adapter in possible_adapters(rule, names):
            a, b = (_first(each, present) for each in adapter.rules)
            if a is None and b is None:
                continue
            rank = (present[a][-2] if len(present[a]) > 1 else 1) if a is not None else present[b or ""][-1]
            found = replace(adapter, rank=max(1, rank))
            if found.is_in_rank_order and b is not None:
                found = replace(found, row_order_tp=max(1, cuts[b] // found.b.glu_halves))
            yield found


def _first(rule: TensorRule, present: Mapping[str, Shape]) -> str | None:
    """The stored key of a rule's first tensor, in whichever style it is spelled."""
    index = (0,) * len(rule.lead)
    spelled = (spell_key(rule.mcore_key, index, style) + half for style in KeyStyle for half in ("", "_w"))
    return next((key for key in spelled if key in present), None)


def _refuse_others(adapters: Collection[Adapter], present: Mapping[str, Shape], where: str) -> None:
    """Raise UnsupportedModelError for tensors of adapters that are none of ``adapters``, by name."""
    styles = [(style, half) for style in KeyStyle for half in ("", "_w", "_v")]
    known = {
        spell_key(rule.mcore_key, index, style) + half
        for adapter in adapters
        for rule in adapter.rules
        for index in rule.indices()
        for style, half in styles
    }
    others = [key for key in present if is_of_adapter(key) and key not in known]
    if others:
        kinds = dict.fromkeys(_what(key) for key in others)
        raise UnsupportedModelError(
            f"{where} holds an adapter that is not read: expected a LoRA of linear modules, got {', '.join(kinds)}: "
            f"{listed(others)}. Merge it into its model first, with what trained it (peft: merge_and_unload), and give "
            "the merged model."
        )


def _what(key: str) -> str:
    return next((what for pattern, what in _OTHERS if pattern.match(key)), _REST)
