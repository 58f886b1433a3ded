"""What a tensor table is made of: rules that say of every tensor its keys, its shape, and what it holds. No names.

A model's tensor is one of many: of its layer, or of its layer and expert. Where it stands among them is its ``index``:
``()`` outside of the layers, ``(layer,)``, or ``(layer, expert)``. The names of a rule contain ``{layer}`` and
``{expert}`` where an index fills them in.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum
from typing import Final, TypeAlias

from dist_ckpt_mistral.model.row_blocks import RowBlocks
from dist_ckpt_mistral.shapes import Shape

#: Where a tensor stands among those of its rule.
Index: TypeAlias = tuple[int, ...]

_AXES: Final = ("layer", "expert")


class Place(Enum):
    """Which pipeline stage holds a tensor, in the order in which transformers lists them.

    Those that are CARRIED belong to the model, but Megatron's does not have them: checkpoints only carry them along.
    """

    CARRIED = "no stage"
    EMBEDDING = "first stage"
    LAYER = "the stage of its layer"
    OUTPUT = "last stage"


class KeyStyle(Enum):
    """How a checkpoint spells the keys of layers (megatron-core transformer/transformer_block.py, moe/experts.py).

    STACKED has one tensor with a leading layer axis (and expert axis), PER_LAYER (``non_homogeneous_layers``) a tensor
    per layer, SINGLETON (``singleton_local_shards``) a tensor per layer and expert; it also splits ``linear_fc1`` into
    ``weight_w`` (gate) and ``weight_v`` (up).
    """

    STACKED = "stacked"
    PER_LAYER = "per layer"
    SINGLETON = "singleton"

    @property
    def spelled_axes(self) -> int:
        """How many axes of an index the keys spell out; the others are axes of the stored tensor."""
        return {"stacked": 0, "per layer": 1, "singleton": 2}[self.value]


class LayerSpec(Enum):
    """Which modules Megatron makes layers of (models/gpt/gpt_layer_specs.py). They call some tensors differently.

    LOCAL is Megatron's own, with experts as ``SequentialMLP``; TRANSFORMER_ENGINE has them as ``TEGroupedMLP``.
    """

    LOCAL = "local"
    TRANSFORMER_ENGINE = "transformer_engine"


class ParamState(Enum):
    """A tensor that training keeps for every parameter, of its shape and, behind a prefix, under its key.

    A value is what Megatron's model-space formats call the state: ``fp32_param`` in ``plain`` (Float16Optimizer) and
    ``fully_sharded_model_space`` (distributed optimizer, to 0.14), ``param`` in ``fully_reshardable`` (0.15 and newer);
    mcore optimizer/optimizer.py and distrib_optimizer.py. WEIGHTS are the parameters themselves, without a prefix.
    """

    WEIGHTS = ()
    MASTER = ("fp32_param", "param")
    EXP_AVG = ("exp_avg",)
    EXP_AVG_SQ = ("exp_avg_sq",)


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnRows:
    """``rows`` rows of a Hugging Face tensor, from ``first_row`` on, that are a tensor of Mistral AI's own files.

    Where heads of ``rotated_rows`` rows are rotated, the two dimensions that turn together are neighbours there, while
    in Hugging Face's they are half a head apart; elsewhere (0) rows are in the same order.
    """

    name: str
    first_row: int
    rows: int
    rotated_rows: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class HfPart:
    """One Hugging Face tensor and the Megatron rows that hold it; ``own`` are the tensors of Mistral AI's own files.

    A name without ``{expert}`` for rows of experts stands for a tensor that packs all experts, one behind the other.
    ``rows`` count from ``first_hf_row`` of the Hugging Face tensor: above 0 where a stored tensor has only the rest.
    """

    hf_name: str
    rows: RowBlocks
    own: tuple[OwnRows, ...] = ()
    first_hf_row: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleTensor:
    """What the modules of one layer spec make of a tensor.

    ``mcore_key`` is its key in a checkpoint, ``name`` its name in the state dict of a GPTModel (where layers and
    experts count from the first of that model), ``tp_axis`` the axis along which tensor parallelism cuts it: None if
    every rank holds it whole. ``extra_state`` is the key and the name of the object that the module saves besides.
    """

    mcore_key: str
    name: str
    tp_axis: int | None
    extra_state: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRule:
    """One Megatron tensor of every layer, of every layer and expert, or of the model: its keys, shape and content.

    ``shape`` is in elements, without the axes of its index, whose extents are ``lead``, and without vocabulary padding.
    ``glu_halves`` is 2 where rows are [gate; up] and each half is cut on its own. ``other_keys`` are keys that neither
    layer spec uses, but others have. ``hf_aliases`` are Hugging Face names of the same values in some files.
    """

    local: ModuleTensor
    te: ModuleTensor
    shape: Shape
    lead: Shape
    place: Place
    parts: tuple[HfPart, ...]
    glu_halves: int = 1
    padded_vocabulary: bool = False
    other_keys: tuple[str, ...] = ()
    hf_aliases: tuple[str, ...] = ()

    def module(self, spec: LayerSpec) -> ModuleTensor:
        """What a layer spec makes of it."""
        return self.local if spec is LayerSpec.LOCAL else self.te

    @property
    def mcore_key(self) -> str:
        """The key that stands for the tensor: what training with Transformer Engine calls it."""
        return self.te.mcore_key

    @property
    def written_keys(self) -> tuple[str, ...]:
        """The keys under which this package writes the tensor, so that models of every layer spec find it."""
        return tuple(dict.fromkeys((self.te.mcore_key, self.local.mcore_key)))

    @property
    def keys(self) -> tuple[str, ...]:
        """All keys under which a checkpoint may hold the tensor."""
        return (*self.written_keys, *self.other_keys)

    @property
    def is_of_experts(self) -> bool:
        """Whether every expert has one."""
        return len(self.lead) == len(_AXES)

    def indices(self) -> Iterator[Index]:
        """Every index."""
        return itertools.product(*map(range, self.lead))


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredRows:
    """Where one tensor's rows ``[first_row, first_row + rows)`` lie in a checkpoint of some key style.

    ``index`` are the coordinates on the leading axes of the stored tensor (of layer and expert, as far as its key does
    not spell them) and ``global_shape`` is its shape.
    """

    mcore_key: str
    index: Index
    first_row: int
    rows: int
    global_shape: Shape


@dataclass(frozen=True, slots=True, kw_only=True)
class HfTensor:
    """One Hugging Face tensor of the model: name, shape in elements, and the Megatron rows that hold it.

    ``index`` is that of the Megatron tensor, or what the name spells of it: then the leading axes of ``shape`` are the
    rest, and the rows are those of every tensor.
    """

    hf_name: str
    shape: Shape
    rule: TensorRule
    index: Index
    rows: RowBlocks
    own: tuple[OwnRows, ...]
    is_alias: bool = False

    def packed(self) -> Iterator[tuple[Index, Index]]:
        """The indices of the Megatron tensors with its rows, each with its coordinates on the leading axes."""
        rest = self.rule.lead[len(self.index) :]
        return ((self.index + at, at) for at in itertools.product(*map(range, rest)))


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorTable:
    """All tensors of one model. Rules stand in the order in which transformers lists the model's state dict.

    ``renamed`` are other beginnings of Hugging Face names, each with the one that stands for it in this table.
    """

    num_layers: int
    rules: tuple[TensorRule, ...]
    renamed: tuple[tuple[str, str], ...] = ()

    @property
    def carried(self) -> tuple[TensorRule, ...]:
        """The rules of what Megatron's model does not have."""
        return tuple(rule for rule in self.rules if rule.place is Place.CARRIED)

    def without_carried(self) -> TensorTable:
        """The table of what Megatron's model has."""
        return replace(self, rules=tuple(rule for rule in self.rules if rule.place is not Place.CARRIED))

    def usual_name(self, hf_name: str) -> str:
        """The name in this table of a tensor that a file calls ``hf_name``."""
        for other, usual in self.renamed:
            if hf_name.startswith(other):
                return usual + hf_name.removeprefix(other)
        return hf_name

    def hf_tensors(self) -> dict[str, HfTensor]:
        """Every Hugging Face tensor by name, in state-dict order: embedding, layers, norm, head; then aliases."""
        by_layer = sorted(
            (tensor for rule in self.rules for tensor in _hf_tensors(rule)),
            key=lambda tensor: (tensor.is_alias, _PLACES.index(tensor.rule.place), tensor.index[:1]),
        )
        return {tensor.hf_name: tensor for tensor in by_layer}

    def stored(self, rule: TensorRule, index: Index, style: KeyStyle, key: str = "") -> tuple[StoredRows, ...]:
        """Where the tensor of ``index`` lies in a checkpoint of ``style``; ``key`` picks one of ``rule.keys``."""
        spelled = style.spelled_axes
        name = spell_key(key or rule.mcore_key, index, style)
        halves = ("_w", "_v") if style is KeyStyle.SINGLETON and rule.glu_halves > 1 else ("",)
        rows = rule.shape[0] // len(halves)
        return tuple(
            StoredRows(
                mcore_key=name + half,
                index=index[spelled:],
                first_row=number * rows,
                rows=rows,
                global_shape=(*rule.lead[spelled:], rows, *rule.shape[1:]),
            )
            for number, half in enumerate(halves)
        )

    def extra_states(self, style: KeyStyle) -> dict[str, Shape]:
        """The objects besides that models of any layer spec look for: key and shape of each."""
        found = {}
        for rule in self.rules:
            for module in (rule.local, rule.te):
                if module.extra_state is not None:
                    key = module.extra_state[0]
                    for index in itertools.product(*map(range, rule.lead[: style.spelled_axes])):
                        name, shape = spell_key(key, index, style), rule.lead[len(index) :]
                        found[name] = shape or (1,)
        return found

    def spelled(self, rule: TensorRule, style: KeyStyle, key: str = "") -> Iterator[tuple[str, Shape]]:
        """The stored tensors that hold all tensors of ``rule``: key and shape of each, once."""
        for index in itertools.product(*map(range, rule.lead[: style.spelled_axes])):
            rest = (0,) * (len(rule.lead) - len(index))
            for stored in self.stored(rule, index + rest, style, key):
                yield stored.mcore_key, stored.global_shape


_PLACES: Final = tuple(Place)


def _hf_tensors(rule: TensorRule) -> Iterator[HfTensor]:
    for part in rule.parts:
        for hf_name in (part.hf_name, *rule.hf_aliases):
            spelled = _axes_in(hf_name)
            for index in itertools.product(*map(range, rule.lead[:spelled])):
                yield HfTensor(
                    hf_name=spell(hf_name, index),
                    shape=(*rule.lead[spelled:], part.rows.hf_rows, *rule.shape[1:]),
                    rule=rule,
                    index=index,
                    rows=part.rows,
                    own=part.own,
                    is_alias=hf_name != part.hf_name,
                )


def _axes_in(name: str) -> int:
    """How many axes of an index a name spells out."""
    return sum(f"{{{axis}}}" in name for axis in _AXES)


def spell_key(key: str, index: Index, style: KeyStyle) -> str:
    """A key as a checkpoint of ``style`` spells it, with its index filled in where that does."""
    for axis in _AXES[style.spelled_axes :]:
        key = key.replace(f"{{{axis}}}.", "")
    return spell(key, index)


def spell(name: str, index: Index) -> str:
    """A name with its index filled in. ``{nth_expert}`` is Transformer Engine's: it leaves out a number of 0."""
    numbers = dict(zip(_AXES, index, strict=False))
    return name.format(**numbers, nth_expert=numbers.get("expert") or "")
