"""Match stored tensors with the tensor table: of a checkpoint, a Hugging Face model, or consolidated files.

Nothing is guessed. Every stored tensor must be a tensor of the model or be ignored for a reason, and every tensor of
the model must be stored with the right shape. All problems are reported together.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Final

from dist_ckpt_mistral.errors import TensorMismatchError, UnsupportedModelError
from dist_ckpt_mistral.gather.dtypes import Shape
from dist_ckpt_mistral.mapping.checkpoint_map import CheckpointMap, Ignored
from dist_ckpt_mistral.mapping.consolidated import consolidated_shapes
from dist_ckpt_mistral.messages import counted, listed
from dist_ckpt_mistral.model.table.entries import (
    flat_state,
    is_of_adapter,
    model_prefix,
    split_state_key,
    why_hf_ignored,
    why_ignored,
)
from dist_ckpt_mistral.model.table.rules import KeyStyle, ParamState, TensorRule
from dist_ckpt_mistral.model.table.table import FileSpelling, HfTensor, TensorTable
from dist_ckpt_mistral.model.table.vision import is_carried

_NO_STATES: Final[Mapping[str, str]] = {}


def match_checkpoint(
    table: TensorTable,
    tensors: Mapping[str, Shape],
    objects: Iterable[str],
    where: str,
    state: ParamState = ParamState.WEIGHTS,
    *,
    kind: str = "checkpoint",
) -> CheckpointMap:
    """Match the stored ``tensors`` (key -> global shape in elements) and ``objects`` (keys) with the table.

    ``state`` selects the weights, or a state of the optimizer. A checkpoint may hold all or none of the vision tensors,
    which Megatron's model does not have; without them, the map is that of the language model. Errors call what holds
    the tensors ``where``, a ``kind``.

    Raises:
        TensorMismatchError: Tensors are missing, unknown or of another shape (it lists all), or the optimizer state is
            in a format that cannot be read.
        UnsupportedModelError: The tensors are those of an adapter.
    """
    objects = tuple(objects)
    refuse_adapter(tensors, where)
    states = {} if state is ParamState.WEIGHTS else names_of_states(state, tensors, objects, where)
    by_key = {key: tensors[name] for key, name in states.items()} or tensors
    found = _spelled(table, by_key, state, states)
    return require_complete(found, tensors, objects, where, kind=kind)


def require_complete(
    found: CheckpointMap, tensors: Mapping[str, Shape], objects: Iterable[str], where: str, *, kind: str = "checkpoint"
) -> CheckpointMap:
    """``found``, with the entries that it ignores; its table may lack the vision tensors if none is stored.

    The arguments, and the error for missing, misshapen and unknown tensors, are those of ``match_checkpoint``.
    """
    table = found.table
    if not any(found.stored_name(rule.mcore_key) in tensors for rule in table.carried):
        found = replace(found, table=table.without_carried())
    missing = [name for name in found.names() if name not in tensors]
    ignored, unknown = _left(found, tensors)
    problems = [
        *_problem(missing, "missing"),
        *_misshapen(found, tensors),
        *_problem(unknown, "unknown to the table"),
    ]
    advice = f"Check that the configuration belongs to this {kind}."
    if not table.carried and any(map(is_carried, unknown)):
        advice = "Give the config.json of the whole multimodal model with --config."
    if problems:
        raise TensorMismatchError(
            f"{where} does not hold the model that its configuration describes: {'; '.join(problems)}. {advice}"
        )
    ignored += [(key, why_ignored(key, found.prefix) or "not a tensor") for key in objects]
    return replace(found, ignored=tuple(ignored))


def _left(found: CheckpointMap, tensors: Mapping[str, Shape]) -> tuple[list[tuple[str, str]], list[str]]:
    """The stored tensors that ``found`` does not use: (name, reason) of those to ignore, and the unknown ones."""
    used, states = set(found.names()), set(found.states.values())
    others: set[str] = set()
    if found.state is not ParamState.WEIGHTS:
        weights = _spelled(found.table, tensors)
        others = {*weights.names(), *_again(weights)} - used
    again = set(_again(found))
    ignored, unknown = [], []
    for name in tensors:
        reason = None if name in states else why_ignored(name, found.prefix)
        if reason is None and name in others:
            reason = "weights in the precision of training"
        if reason is None and name in again:
            reason = "the same weights again, under another key"
        if reason is not None:
            ignored.append((name, reason))
        elif name not in used:
            unknown.append(f"{name} {list(tensors[name])}")
    return ignored, unknown


def _again(found: CheckpointMap) -> Iterator[str]:
    """The names of the tensors of ``found`` under the other keys of their rules."""
    return (twin.name for _, _, twin in found.other_tensors())


def names_of_states(state: ParamState, tensors: Iterable[str], objects: Iterable[str], where: str) -> dict[str, str]:
    """Key of a parameter -> stored name of its state. Raises TensorMismatchError for none, or two of one key."""
    names: dict[str, str] = {}
    for name in tensors:
        called, key = split_state_key(name) or ("", "")
        if called in state.value:
            if key in names:
                raise TensorMismatchError(
                    f"{where} holds {state.name} of {key!r} twice: as {names[key]!r} and {name!r}"
                )
            names[key] = name
    if not names:
        raise TensorMismatchError(_why_absent(state, [*tensors, *objects], where))
    return names


_CALLED: Final = {
    ParamState.MASTER: "master weights",
    ParamState.EXP_AVG: "first moments (exp_avg)",
    ParamState.EXP_AVG_SQ: "second moments (exp_avg_sq)",
}


def _why_absent(state: ParamState, names: Iterable[str], where: str) -> str:
    """The error text for a checkpoint without this state: the reason and the way out. ``names`` are all its entries."""
    what = f"{where} holds no {_CALLED[state]} that can be read"
    flat = sorted({name for name in map(flat_state, names) if name is not None})
    if flat:
        return f"{what}: {FLAT_STATE_ADVICE.format(name=flat[0])}"
    if any(map(split_state_key, names)):
        kept = (
            "its optimizer keeps none, as where a model is trained in float32: then the weights are the master weights"
        )
        return f"{what}: {kept}."
    return f"{what}: it has no optimizer state. Give a checkpoint that training saved with its optimizer."


#: The error text for optimizer state in flat buffers (Megatron-LM training/checkpointing.py, 0.15 to 0.19).
FLAT_STATE_ADVICE: Final = (
    "its optimizer state is in the format {name}, flat buffers whose layout only a run of the same tensor and pipeline "
    "parallelism knows. Resume once in Megatron at that parallelism and save with --dist-ckpt-optim-fully-reshardable "
    "(Megatron-LM 0.15 or newer), or go on with the weights alone."
)


def _spelled(
    table: TensorTable,
    names: Collection[str],
    state: ParamState = ParamState.WEIGHTS,
    states: Mapping[str, str] = _NO_STATES,
) -> CheckpointMap:
    """How the parameter keys ``names`` spell the tensors of the table."""
    prefix = model_prefix(names)
    style, keys = spelling(table, {name.removeprefix(prefix) for name in names if name.startswith(prefix)})
    return CheckpointMap(table=table, prefix=prefix, style=style, keys=keys, state=state, states=states)


def spelling(table: TensorTable, present: set[str]) -> tuple[KeyStyle, dict[str, str]]:
    """The key style, and the key for the ``mcore_key`` of every rule, that match the most of ``present``."""

    def count(rule: TensorRule, style: KeyStyle, key: str) -> int:
        return len({name for name, _ in table.spelled(rule, style, key)} & present)

    @cache
    def score(style: KeyStyle) -> int:
        return sum(any(count(rule, style, key) for key in rule.keys) for rule in table.rules)

    complete = (style for style in KeyStyle if score(style) == len(table.rules))
    style = next(complete, None) or max(KeyStyle, key=score)
    return style, {rule.mcore_key: max(rule.keys, key=partial(count, rule, style)) for rule in table.rules}


def _problem(names: Sequence[str], what: str) -> list[str]:
    """One problem of all tensors ``names``, in words; none if there are no names."""
    return [f"{counted(len(names), 'tensor is', 'tensors are')} {what}: {listed(names)}"] if names else []


def _misshapen(found: CheckpointMap, tensors: Mapping[str, Shape]) -> list[str]:
    problems = []
    again = ((twin.name, rule, twin.shape) for _, rule, twin in found.other_tensors())
    for name, rule, expected in (*found.tensors(), *again):
        shape = tensors.get(name)
        if shape is not None and not _fits(shape, expected, rule):
            least = "at least " if rule.padded_vocabulary else ""
            problems.append(f"shape of {name}: expected {least}{list(expected)}, got {list(shape)}")
    return problems


def _fits(shape: Shape, expected: Shape, rule: TensorRule) -> bool:
    """Whether the shapes are equal, or the vocabulary is larger than expected (padded)."""
    if rule.padded_vocabulary and len(shape) == len(expected):
        return shape[0] >= expected[0] and shape[1:] == expected[1:]
    return shape == expected


def refuse_adapter(names: Iterable[str], where: str) -> None:
    """Raise UnsupportedModelError if a name belongs to an adapter, or to a layer that an adapter wraps."""
    found = [name for name in names if is_of_adapter(name)]
    if found:
        raise UnsupportedModelError(
            f"{where} holds an adapter (LoRA or another of PEFT), alone or around its model: expected the tensors of a "
            f"whole model, got {len(found)} of an adapter: {listed(found)}. Merge it into its model first, with what "
            "trained it (peft: merge_and_unload), and give the merged model."
        )


def match_hf(
    table: TensorTable, tensors: Mapping[str, Shape], where: str, *, adapter: bool = False
) -> tuple[FileSpelling, Ignored]:
    """Match the tensors of a Hugging Face model, or of an ``adapter`` (name -> shape in elements), with the table.

    Returns how the files spell the tensors, and the ignored ones. Raises TensorMismatchError that lists every missing,
    unknown and misshapen tensor, and UnsupportedModelError for an adapter.
    """
    if not adapter:
        refuse_adapter(tensors, where)
    known = table.hf_tensors()
    ignored = tuple((name, reason) for name in tensors if name not in known and (reason := why_hf_ignored(name)))
    dropped = {name for name, _ in ignored}
    kept = {name: shape for name, shape in tensors.items() if name not in dropped}
    found = table.spelling(kept)
    _require_all({name: tensor.shape for name, tensor in known.items()}, kept, where, missing=found.missing)
    return found, ignored


def match_consolidated(table: TensorTable, tensors: Mapping[str, Shape], where: str) -> list[HfTensor]:
    """Match the tensors of consolidated files (name -> shape in elements) with the table.

    Returns the Hugging Face tensors that they make up. Raises TensorMismatchError that lists every missing, unknown and
    misshapen tensor.
    """
    found = [tensor for tensor in table.hf_tensors().values() if not tensor.is_alias]
    expected = {name: shape for tensor in found for name, shape in consolidated_shapes(tensor).items()}
    refuse_adapter(tensors, where)
    _require_all(expected, tensors, where, missing=[name for name in expected if name not in tensors])
    return found


def _require_all(
    expected: Mapping[str, Shape], tensors: Mapping[str, Shape], where: str, *, missing: Sequence[str]
) -> None:
    """Raise TensorMismatchError if tensors are ``missing``, unknown, or of another shape than ``expected``."""
    unknown = [f"{name} {list(shape)}" for name, shape in tensors.items() if name not in expected]
    problems = [*_problem(missing, "missing"), *_problem(unknown, "unknown to the table")]
    problems += [
        f"shape of {name}: expected {list(shape)}, got {list(tensors[name])}"
        for name, shape in expected.items()
        if name in tensors and tensors[name] != shape
    ]
    if problems:
        raise TensorMismatchError(
            f"{where} does not hold the model that its configuration describes: {'; '.join(problems)}. "
            "Check that config.json belongs to these files."
        )
