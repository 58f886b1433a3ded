"""A stored checkpoint against the tensor table: what is there, what it holds in Hugging Face's names, what is wrong.

Nothing is guessed: every stored tensor is a tensor of the model or is ignored for a reason, and every tensor of the
model is there with the right shape; else all problems are reported together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from dist_ckpt_mistral.errors import TensorMismatchError
from dist_ckpt_mistral.gather.links import Link
from dist_ckpt_mistral.model.tensor_table import (
    HfTensor,
    KeyStyle,
    StoredRows,
    TensorRule,
    TensorTable,
    model_prefix,
    why_hf_ignored,
    why_ignored,
)
from dist_ckpt_mistral.name_ranges import listed
from dist_ckpt_mistral.shapes import Shape

Ignored = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointMap:
    """How a checkpoint spells the tensors of a table: its prefix, its key style, and the key it uses for every rule."""

    table: TensorTable
    prefix: str = ""
    style: KeyStyle = KeyStyle.STACKED
    keys: Mapping[TensorRule, str]
    ignored: Ignored = ()

    def stored(self, rule: TensorRule, layer: int | None) -> tuple[StoredRows, ...]:
        """Where the rows of one tensor lie, under keys without the prefix."""
        return self.table.stored(rule, layer, self.style, self.keys[rule])

    def names(self) -> list[str]:
        """Every stored tensor that holds weights, as the checkpoint spells it."""
        return list(
            dict.fromkeys(
                self.prefix + stored.mcore_key
                for rule in self.table.rules
                for layer in self.table.layers_of(rule)
                for stored in self.stored(rule, layer)
            )
        )

    def key_of(self, tensor: HfTensor) -> str:
        """The stored tensor that holds the first row of a Hugging Face tensor."""
        return next(link.source for link in self.links(tensor))

    def links(self, tensor: HfTensor) -> list[Link]:
        """The stored boxes that make up one Hugging Face tensor."""
        stored = self.stored(tensor.rule, tensor.layer)
        columns = tensor.shape[1:]
        origin = (0,) * len(columns)
        return [
            Link(
                source=self.prefix + rows_of.mcore_key,
                source_offset=(*rows_of.index, mcore_row - rows_of.first_row, *origin),
                target=tensor.hf_name,
                target_offset=(hf_row, *origin),
                shape=(rows, *columns),
            )
            for hf_row, mcore_row, rows in tensor.rows
            for rows_of in stored
            if rows_of.first_row <= mcore_row < rows_of.first_row + rows_of.rows
        ]


def new_checkpoint_map(table: TensorTable) -> CheckpointMap:
    """How this package itself spells the tensors: stacked layers, no prefix, the first key of every rule."""
    return CheckpointMap(table=table, keys={rule: rule.mcore_key for rule in table.rules})


def match_checkpoint(
    table: TensorTable, tensors: Mapping[str, Shape], objects: Iterable[str], where: str
) -> CheckpointMap:
    """Match the stored ``tensors`` (key -> global shape in elements) and ``objects`` (keys) against the table.

    Raises TensorMismatchError that lists every missing, unknown and misshapen tensor.
    """
    prefix = model_prefix(tensors)
    present = {key.removeprefix(prefix) for key in tensors if key.startswith(prefix)}
    style, keys = _spelling(table, present)
    found = CheckpointMap(table=table, prefix=prefix, style=style, keys=keys)
    problems = [*_missing(found, tensors), *_misshapen(found, tensors)]
    used = set(found.names())
    ignored, unknown = [], []
    for key in tensors:
        if key in used:
            continue
        reason = why_ignored(key, prefix)
        if reason is None:
            unknown.append(f"{key} {list(tensors[key])}")
        else:
            ignored.append((key, reason))
    if unknown:
        problems.append(f"{len(unknown)} tensors are unknown to the table: {listed(unknown)}")
    if problems:
        raise TensorMismatchError(
            f"{where} does not hold the model that its configuration describes: {'; '.join(problems)}. "
            "Check that the configuration belongs to this checkpoint."
        )
    ignored += [(key, why_ignored(key, prefix) or "not a tensor") for key in objects]
    return CheckpointMap(table=table, prefix=prefix, style=style, keys=keys, ignored=tuple(ignored))


def _spelling(table: TensorTable, present: set[str]) -> tuple[KeyStyle, dict[TensorRule, str]]:
    """The key style, and of every rule the key, of which most is present."""

    def held(rule: TensorRule, style: KeyStyle, key: str) -> int:
        spelled = {
            stored.mcore_key for layer in table.layers_of(rule) for stored in table.stored(rule, layer, style, key)
        }
        return len(spelled & present)

    scores = {
        style: sum(max(held(rule, style, key) > 0 for key in rule.keys) for rule in table.rules) for style in KeyStyle
    }
    style = max(KeyStyle, key=lambda candidate: scores[candidate])
    return style, {rule: max(rule.keys, key=lambda key: held(rule, style, key)) for rule in table.rules}


def _missing(found: CheckpointMap, tensors: Mapping[str, Shape]) -> list[str]:
    missing = [name for name in found.names() if name not in tensors]
    return [f"{len(missing)} tensors are missing: {listed(missing)}"] if missing else []


def _misshapen(found: CheckpointMap, tensors: Mapping[str, Shape]) -> list[str]:
    problems = {}
    for rule in found.table.rules:
        for layer in found.table.layers_of(rule):
            for stored in found.stored(rule, layer):
                shape = tensors.get(found.prefix + stored.mcore_key)
                if shape is not None and not _fits(shape, stored.global_shape, rule):
                    least = "at least " if rule.padded_vocabulary else ""
                    name, expected = found.prefix + stored.mcore_key, list(stored.global_shape)
                    problems[name] = f"shape of {name}: expected {least}{expected}, got {list(shape)}"
    return list(problems.values())


def _fits(shape: Shape, expected: Shape, rule: TensorRule) -> bool:
    """Equal shapes; a vocabulary may be padded, never cut."""
    if rule.padded_vocabulary and len(shape) == len(expected):
        return shape[0] >= expected[0] and shape[1:] == expected[1:]
    return shape == expected


def match_hf(table: TensorTable, tensors: Mapping[str, Shape], where: str) -> tuple[list[HfTensor], Ignored]:
    """Match the tensors of a Hugging Face model (name -> shape) against the table: those it has, in table order.

    Raises TensorMismatchError that lists every missing, unknown and misshapen tensor.
    """
    known = table.hf_tensors()
    missing = [name for name, tensor in known.items() if name not in tensors and not tensor.is_alias]
    ignored = tuple((name, reason) for name in tensors if name not in known and (reason := why_hf_ignored(name)))
    dropped = {name for name, _ in ignored}
    unknown = [f"{name} {list(shape)}" for name, shape in tensors.items() if name not in known and name not in dropped]
    problems = [f"{len(missing)} tensors are missing: {listed(missing)}"] if missing else []
    problems += [f"{len(unknown)} tensors are unknown to the table: {listed(unknown)}"] if unknown else []
    problems += [
        f"shape of {name}: expected {list(tensor.shape)}, got {list(tensors[name])}"
        for name, tensor in known.items()
        if name in tensors and tensors[name] != tensor.shape
    ]
    if problems:
        raise TensorMismatchError(
            f"{where} does not hold the model that its configuration describes: {'; '.join(problems)}. "
            "Check that config.json belongs to these files."
        )
    return [tensor for name, tensor in known.items() if name in tensors], ignored
