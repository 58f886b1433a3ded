"""How a checkpoint spells the tensors of a table, and where in it each Hugging Face tensor lies."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Self

from dist_ckpt_mistral.gather.dtypes import Shape
from dist_ckpt_mistral.gather.links import Link, compose, reverse, whole
from dist_ckpt_mistral.model.table.entries import state_key
from dist_ckpt_mistral.model.table.rules import Index, KeyStyle, ParamState, TensorRule
from dist_ckpt_mistral.model.table.table import HfTensor, StoredRows, TensorTable
from dist_ckpt_mistral.model.table.vision import is_carried, with_prefix

#: Stored entries that are not used: (name, reason) of each.
Ignored = tuple[tuple[str, str], ...]
#: The reason for unused vocabulary rows, which are called ``NAME[first row:last row + 1]``.
PADDING: Final = "rows that pad the vocabulary"


@dataclass(frozen=True, slots=True, kw_only=True)
class Twin:
    """A stored tensor that repeats the values of the tensor ``main``. Only ``main`` is used, so both must be equal.

    ``links`` are the boxes of the main tensor (or of several) that make up the same ``shape``, in elements.
    """

    name: str
    main: str
    shape: Shape
    links: tuple[Link, ...]
    is_head: bool

    @classmethod
    def of(cls, name: str, main: str, shape: Shape, rule: TensorRule) -> Self:
        """A twin of one tensor of the same shape."""
        origin = (0,) * len(shape)
        link = Link(source=main, source_offset=origin, target=name, target_offset=origin, shape=shape)
        return cls(name=name, main=main, shape=shape, links=(link,), is_head=rule.padded_vocabulary)

    @classmethod
    def of_alias(cls, alias: HfTensor, links: Sequence[Link]) -> Self:
        """The twin that an alias is: a Hugging Face tensor whose rows the tensors of ``links`` hold, too."""
        return cls(
            name=alias.hf_name,
            main=links[0].source,
            shape=alias.shape,
            links=tuple(links),
            is_head=alias.rule.padded_vocabulary,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointMap:
    """How a checkpoint spells the tensors of a table: its prefix, its key style, and the key of every rule.

    ``keys`` maps the ``mcore_key`` of every rule to the key under which its tensors are stored.
    ``state`` is what it maps of each parameter: the weights, or a state of the optimizer. For the latter, ``states``
    maps the key of a parameter to the stored name of its state.
    """

    table: TensorTable
    prefix: str = ""
    style: KeyStyle = KeyStyle.STACKED
    keys: Mapping[str, str]
    state: ParamState = ParamState.WEIGHTS
    states: Mapping[str, str] = field(default_factory=dict)
    ignored: Ignored = ()

    def stored(self, rule: TensorRule, index: Index) -> tuple[StoredRows, ...]:
        """The stored rows of one tensor, under keys without the prefix."""
        return self.table.stored(rule, index, self.style, self.keys[rule.mcore_key])

    def stored_name(self, mcore_key: str) -> str:
        """The stored name of the tensor that the table calls ``mcore_key``."""
        key = with_prefix(self.prefix, mcore_key)
        if self.state is ParamState.WEIGHTS or key in self.states or is_carried(mcore_key):
            return self.states.get(key, key)  # the vision tower has no optimizer state, unless it was trained elsewhere
        return state_key(key, self.state.value[0])  # the name that is missing, for the error

    def spelling(self, key: str, index: Index) -> dict[str, str]:
        """The keys that a layout using ``key`` gives the tensors of one index -> their names in this checkpoint."""
        rule = next(rule for rule in self.table.rules if key in (rule.local.mcore_key, rule.te.mcore_key))
        keys = (stored.mcore_key for stored in self.table.stored(rule, index, self.style, key))
        return dict(zip(keys, (self.stored_name(stored.mcore_key) for stored in self.stored(rule, index)), strict=True))

    def tensors(self) -> Iterator[tuple[str, TensorRule, Shape]]:
        """Yield (stored name, rule, shape without vocabulary padding) of each tensor that must be stored."""
        for rule in self.table.rules:
            for key, shape in self.table.spelled(rule, self.style, self.keys[rule.mcore_key]):
                yield self.stored_name(key), rule, shape

    def other_tensors(self) -> Iterator[tuple[str, TensorRule, Twin]]:
        """Yield (key, rule, twin) of the same tensors under the other keys of their rules."""
        for rule in self.table.rules:
            for key in rule.keys:
                if key != self.keys[rule.mcore_key]:
                    spelled = (self.table.spelled(rule, self.style, each) for each in (self.keys[rule.mcore_key], key))
                    for (main, shape), (other, _) in zip(*spelled, strict=True):
                        yield key, rule, Twin.of(self.stored_name(other), self.stored_name(main), shape, rule)

    def also_written(self) -> dict[str, tuple[str, ...]]:
        """Name of a tensor -> the other names under which ``from_hf`` writes it, for models of other layer specs."""
        found: dict[str, tuple[str, ...]] = {}
        for key, rule, twin in self.other_tensors():
            if key in rule.written_keys:
                found[twin.main] = (*found.get(twin.main, ()), twin.name)
        return found

    def twins(self, stored: Collection[str]) -> tuple[Twin, ...]:
        """The tensors of ``stored`` that repeat others under a second key."""
        return tuple(twin for _, _, twin in self.other_tensors() if twin.name in stored)

    def names(self) -> list[str]:
        """The stored names of ``tensors``."""
        return [name for name, _, _ in self.tensors()]

    def shapes(self) -> dict[str, Shape]:
        """Stored name -> minimum shape, in elements, of ``tensors``."""
        return {name: shape for name, _, shape in self.tensors()}

    def sources(self, tensor: HfTensor) -> list[str]:
        """The names of the stored tensors that make up one Hugging Face tensor."""
        stored = (rows_of for index, _ in tensor.packed() for rows_of in self.stored(tensor.rule, index))
        names = (self.stored_name(rows_of.mcore_key) for rows_of in stored if rows_of.holds_any(tensor.rows))
        return [*dict.fromkeys(names)]

    def links(self, tensor: HfTensor) -> list[Link]:
        """The stored boxes that make up one Hugging Face tensor."""
        return [link for index, at in tensor.packed() for link in self.links_of(tensor, index, at)]

    def links_of(self, tensor: HfTensor, index: Index, at: Index) -> Iterator[Link]:
        """The links of one Megatron tensor. ``index`` and its position ``at`` on leading axes are from ``packed``."""
        for rows in self.stored(tensor.rule, index):
            yield from links_of_rows(tensor, at, rows, self.stored_name(rows.mcore_key))


def links_of_rows(tensor: HfTensor, at: Index, rows_of: StoredRows, name: str) -> Iterator[Link]:
    """The links from the stored rows of one Megatron tensor, in the stored tensor ``name``, to ``tensor``.

    ``at`` is the position of the Megatron tensor on the leading axes of ``tensor``, from ``packed``.
    """
    columns = tensor.shape[len(at) + 1 :]
    origin = (0,) * len(columns)
    lead = (1,) * min(len(at), len(rows_of.index))
    end = rows_of.first_row + rows_of.rows
    for hf_row, mcore_row, rows in tensor.rows:
        low, high = max(mcore_row, rows_of.first_row), min(mcore_row + rows, end)
        if low < high:
            yield Link(
                source=name,
                source_offset=(*rows_of.index, low - rows_of.first_row, *origin),
                target=tensor.hf_name,
                target_offset=(*at, hf_row + low - mcore_row, *origin),
                shape=(*lead, high - low, *columns),
            )


def hf_links(table: TensorTable, stored: Collection[str]) -> dict[str, list[Link]]:
    """Hugging Face name -> the boxes of ``stored`` tensors that make it up, for every tensor of ``table``.

    No two tensors of ``stored`` may hold the same rows. A tensor that is not stored is made of the tensors that hold
    the same Megatron rows.
    """
    known, megatron = table.hf_tensors(), new_checkpoint_map(table)
    absent = [tensor for name, tensor in known.items() if name not in stored]
    rules = {tensor.rule.mcore_key for tensor in absent}
    links = {name: [whole(name, known[name].shape)] for name in known if name in stored}
    from_stored: dict[tuple[str, Index], list[Link]] = defaultdict(list)
    for tensor in (known[name] for name in links if known[name].rule.mcore_key in rules):
        for index, at in tensor.packed():
            from_stored[tensor.rule.mcore_key, index] += map(reverse, megatron.links_of(tensor, index, at))
    for tensor in absent:
        links[tensor.hf_name] = [
            link
            for index, at in tensor.packed()
            for second in megatron.links_of(tensor, index, at)
            for first in from_stored[tensor.rule.mcore_key, index]
            if (link := compose(first, second)) is not None
        ]
    return links


def new_checkpoint_map(table: TensorTable) -> CheckpointMap:
    """The map of a checkpoint that ``from_hf`` writes: stacked layers, no prefix, the first key of every rule."""
    return CheckpointMap(table=table, keys={rule.mcore_key: rule.mcore_key for rule in table.rules})
