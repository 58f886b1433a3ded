"""What a tensor table is made of: rules that say of every tensor its keys, its shape, and what it holds. No names.

A model's tensor is one of many: of its layer, or of its layer and expert. Where it stands among them is its ``index``:
``()`` outside of the layers, ``(layer,)``, or ``(layer, expert)``. The names of a rule contain ``{layer}`` and
``{expert}`` where an index fills them in.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Final, TypeAlias

from dist_ckpt_mistral.gather.dtypes import Shape
from dist_ckpt_mistral.model.table.row_blocks import RowBlocks

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
    layer spec uses, but others have. ``other_parts`` are Hugging Face tensors that some files have instead of those of
    ``parts``, or besides: each has all rows.
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
    other_parts: tuple[HfPart, ...] = ()

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


def axes_in(name: str) -> int:
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
