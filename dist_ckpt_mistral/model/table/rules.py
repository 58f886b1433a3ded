"""The types of a tensor table: a ``TensorRule`` gives the keys, shape and content of a tensor.

No names stand here, but the part of a key that the keys of a HybridModel spell in their own way.

A rule describes one tensor, or one tensor of every layer, or of every layer and expert. The ``index`` of a tensor is
``()`` outside the layers, else ``(layer,)`` or ``(layer, expert)``. It replaces ``{layer}`` and ``{expert}`` in names.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Final, TypeAlias

from dist_ckpt_mistral.errors import PlanError
from dist_ckpt_mistral.gather.dtypes import Shape

#: The index of a tensor among those of its rule, counted from 0 in the whole model.
Index: TypeAlias = tuple[int, ...]

_AXES: Final = ("layer", "expert")
#: The axes of a weight, as tensor parallelism cuts it.
ROWS: Final = 0
COLUMNS: Final = 1
#: The keys of an MLP, which is a layer of its own in a HybridModel, and the two names of the final norm.
_OF_MLP: Final = re.compile(r"decoder\.layers\.\{layer\}\.(mlp|pre_mlp_layernorm)\.")
_FINAL_NORM, _HYBRID_FINAL_NORM = "decoder.final_layernorm.", "decoder.final_norm."


class Stage(Enum):
    """Which pipeline stage holds a tensor, in the order in which transformers lists the tensors.

    CARRIED tensors (vision tower and projector) are no part of Megatron's GPTModel; checkpoints only carry them along.
    """

    CARRIED = "no stage"
    EMBEDDING = "first stage"
    LAYER = "the stage of its layer"
    OUTPUT = "last stage"


class KeyStyle(Enum):
    """How a checkpoint spells the keys of layers (megatron-core transformer/transformer_block.py, moe/experts.py).

    STACKED has one tensor with a leading layer axis (and expert axis), PER_LAYER (``non_homogeneous_layers``) a tensor
    per layer, SINGLETON (``singleton_local_shards``) a tensor per layer and expert; it also splits ``linear_fc1`` into
    ``weight_w`` (gate) and ``weight_v`` (up). HYBRID is what a HybridModel saves (models/hybrid/hybrid_block.py, 0.16
    to 0.19): per layer, with the attention and the MLP of layer ``i`` as its layers ``2 i`` and ``2 i + 1``.
    """

    STACKED = "stacked"
    PER_LAYER = "per layer"
    SINGLETON = "singleton"
    HYBRID = "hybrid"

    @property
    def spelled_axes(self) -> int:
        """Number of index axes that the keys spell out; the others are axes of the stored tensor."""
        return {"stacked": 0, "per layer": 1, "singleton": 2, "hybrid": 1}[self.value]


class LayerSpec(Enum):
    """The modules of Megatron's layers (models/gpt/gpt_layer_specs.py). Some tensors have other names in each.

    LOCAL has Megatron's own modules and experts as ``SequentialMLP``; TRANSFORMER_ENGINE has experts as
    ``TEGroupedMLP``.
    """

    LOCAL = "local"
    TRANSFORMER_ENGINE = "transformer_engine"


class ParamState(Enum):
    """A tensor that training keeps for every parameter: it has the parameter's shape, and its key behind a prefix.

    The values are the names in Megatron's model-space formats: ``fp32_param`` in ``plain`` (Float16Optimizer) and
    ``fully_sharded_model_space`` (distributed optimizer, to 0.14), ``param`` in ``fully_reshardable`` (0.15 and newer);
    mcore optimizer/optimizer.py and distrib_optimizer.py. WEIGHTS are the parameters themselves and have no prefix.
    """

    WEIGHTS = ()
    MASTER = ("fp32_param", "param")
    EXP_AVG = ("exp_avg",)
    EXP_AVG_SQ = ("exp_avg_sq",)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowBlocks:
    """The one-to-one map between the rows of a Hugging Face tensor and rows of a Megatron tensor.

    Hugging Face row block ``i`` is Megatron rows ``[i * stride + offset, i * stride + offset + length)``. Hugging Face
    rows count up without gaps: block ``i`` is its rows ``[i * length, (i + 1) * length)``. Identity, the gate and up
    halves of ``linear_fc1``, the query, key and value rows of ``linear_qkv`` and packed experts are all of this form.
    All numbers are rows (axis 0 of one layer's tensor).

    With several ``pieces``, a Hugging Face block consists of as many pieces of ``length`` rows, and Megatron rows hold
    the first pieces of all blocks, then the second ones: piece ``j`` begins ``j * piece_stride`` rows later.
    """

    count: int
    stride: int
    offset: int
    length: int
    pieces: int = 1
    piece_stride: int = 0

    def __post_init__(self) -> None:
        """Refuse a map that is not one-to-one: blocks must be in order and must not overlap."""
        well_formed = self.count >= 0 and self.length >= 0 and self.offset >= 0 and self.pieces >= 1
        overlap = self.count > 1 and self.stride < self.length
        if self.pieces > 1 and self.piece_stride < (self.count - 1) * self.stride + self.length:
            overlap = True
        if not well_formed or overlap:
            raise PlanError(f"row blocks overlap or are negative: {self}")

    @classmethod
    def share(cls, rows: int, number: int = 0, of: int = 1) -> RowBlocks:
        """Share ``number`` of ``of`` equal contiguous shares of ``rows`` Megatron rows; by default all rows."""
        return cls(count=1, stride=rows, offset=number * (rows // of), length=rows // of)

    @property
    def hf_rows(self) -> int:
        """Number of rows of the Hugging Face tensor."""
        return self.count * self.pieces * self.length

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        """Yield ``(hf_row, mcore_row, length)`` of every block, or of every piece of every block."""
        for number in range(self.count * self.pieces):
            block, piece = divmod(number, self.pieces)
            yield number * self.length, block * self.stride + piece * self.piece_stride + self.offset, self.length


@dataclass(frozen=True, slots=True, kw_only=True)
class HfPart:
    """One Hugging Face tensor, and the Megatron rows that hold it.

    A name without ``{expert}`` for rows of experts is that of a tensor that packs all experts, one after another.
    ``consolidated`` names the tensors of Mistral AI's own files that hold the same rows, in equal shares from the first
    row on. ``rotated_rows`` is the number of rows of a rotated head: the two dimensions that turn together are
    neighbours in those files, and half a head apart in Hugging Face's. With 0 the rows have the same order in both.
    """

    hf_name: str
    rows: RowBlocks
    consolidated: tuple[str, ...] = ()
    rotated_rows: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleTensor:
    """How the modules of one layer spec name and cut a tensor.

    ``mcore_key`` is its key in a checkpoint. ``name`` is its name in the state dict of a GPTModel, where layers and
    experts count from the first of that model. ``tp_axis`` is the axis that tensor parallelism cuts, None if every rank
    holds the whole tensor. ``extra_state`` is the key and the name of the object that the module saves beside it.
    """

    mcore_key: str
    name: str
    tp_axis: int | None
    extra_state: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRule:
    """The keys, shape and content of one Megatron tensor: of the model, of every layer, or of every layer and expert.

    ``shape`` is in elements, without vocabulary padding and without the axes of the index; ``lead`` are their extents.
    ``other_parts`` are Hugging Face tensors that some files have instead of ``parts`` or beside them; each has all
    rows. ``legacy_names`` and the other fields are explained by ``tensor_row``.
    """

    local: ModuleTensor
    te: ModuleTensor
    shape: Shape
    lead: Shape
    stage: Stage
    parts: tuple[HfPart, ...]
    glu_halves: int = 1
    padded_vocabulary: bool = False
    other_keys: tuple[str, ...] = ()
    other_parts: tuple[HfPart, ...] = ()
    legacy_names: tuple[str, ...] = ()

    def module(self, spec: LayerSpec) -> ModuleTensor:
        """The names and the cut in models of a layer spec."""
        return self.local if spec is LayerSpec.LOCAL else self.te

    @property
    def mcore_key(self) -> str:
        """The key that identifies the tensor: the key with Transformer Engine's layer spec."""
        return self.te.mcore_key

    @property
    def written_keys(self) -> tuple[str, ...]:
        """The keys under which this package writes the tensor, so that models of every layer spec find it."""
        return tuple(dict.fromkeys((self.te.mcore_key, self.local.mcore_key)))

    @property
    def names(self) -> tuple[str, ...]:
        """All names of the parameter in the state dict of a rank's model, with the places of layer and expert open."""
        return tuple(dict.fromkeys((self.te.name, self.local.name, *self.legacy_names)))

    @property
    def keys(self) -> tuple[str, ...]:
        """All keys under which a checkpoint may hold the tensor."""
        return (*self.written_keys, *self.other_keys)

    @property
    def is_of_experts(self) -> bool:
        """Whether every expert has such a tensor."""
        return len(self.lead) == len(_AXES)

    def indices(self) -> Iterator[Index]:
        """Every index."""
        return itertools.product(*map(range, self.lead))


def axes_in(name: str) -> int:
    """Number of index axes that a name spells out."""
    return sum(f"{{{axis}}}" in name for axis in _AXES)


def spell_key(key: str, index: Index, style: KeyStyle) -> str:
    """The key as a checkpoint of ``style`` spells it, with the index axes that the style spells out."""
    if style is KeyStyle.HYBRID:
        layer = tuple(2 * number + (_OF_MLP.match(key) is not None) for number in index[:1])
        key, index = key.replace(_FINAL_NORM, _HYBRID_FINAL_NORM), (*layer, *index[1:])
    for axis in _AXES[style.spelled_axes :]:
        key = key.replace(f"{{{axis}}}.", "")
    return spell(key, index)


def spell(name: str, index: Index) -> str:
    """The name with its index filled in. ``{nth_expert}`` is the expert, empty for 0 as in Transformer Engine."""
    numbers = dict(zip(_AXES, index, strict=False))
    return name.format(**numbers, nth_expert=numbers.get("expert") or "")


def tensor_row(
    mcore_key: str,
    *hf: tuple[str, ...],
    shape: Shape,
    rows: tuple[RowBlocks, ...] = (),
    rotated_rows: tuple[int, ...] = (),
    other_hf: tuple[str, ...] = (),
    other_keys: tuple[str, ...] = (),
    local_key: str = "",
    te_name: str = "",
    local_name: str = "",
    legacy_names: tuple[str, ...] = (),
    tp_axis: int | None = None,
    local_tp_axis: int | None = None,
    extra_state: str = "",
    te_extra_state: str = "",
    te_extra_state_name: str = "",
    local_extra_state_name: str = "",
    stage: Stage = Stage.LAYER,
    glu_halves: int = 1,
    padded_vocabulary: bool = False,
) -> TensorRule:
    """Build the rule of one tensor: a row of the table.

    Args:
        mcore_key: The key in a checkpoint of a model with Transformer Engine's layer spec.
        hf: For each Hugging Face tensor: its name, then its ``consolidated`` names (see ``HfPart``).
        shape: The global shape in elements, without vocabulary padding: the axis of layers if the key has ``{layer}``
            (pipeline parallelism cuts it), the axis of experts if it has ``{expert}`` (expert parallelism cuts it), and
            the axes of the parameter.
        rows: For each ``hf``: its Megatron rows. The default is equal shares, one below the other.
        rotated_rows: For each ``hf``: see ``HfPart``. The default is 0.
        other_hf: Like ``hf``: a tensor of all rows that some files have instead of ``hf`` or besides.
        other_keys: Keys that other checkpoints use.
        local_key: The key in a checkpoint of a model with the local layer spec, if it differs.
        te_name: The parameter's name in a GPTModel with Transformer Engine's spec, if it differs from the key.
        local_name: The parameter's name in a GPTModel with the local spec, if it differs from the key.
        legacy_names: Its names in the models that Megatron-LM had before megatron-core's (megatron/legacy/model to
            0.11, megatron/model before), which cut the parameter alike. State dicts in its ``torch`` format have them.
        tp_axis: The axis of the parameter that tensor parallelism cuts: ``ROWS``, ``COLUMNS``, or None for no axis.
        local_tp_axis: The same for the local spec, if only the local spec cuts the parameter.
        extra_state: The key of the object that the module saves beside the parameter.
        te_extra_state: The same, if only Transformer Engine's module saves one.
        te_extra_state_name: The object's name in a GPTModel with Transformer Engine's spec, if it differs from the key.
        local_extra_state_name: The object's name in a GPTModel with the local spec, if it differs from the key.
        stage: The pipeline stage that holds the tensor.
        glu_halves: 2 if the rows are [gate; up]: tensor parallelism then cuts each half on its own.
        padded_vocabulary: Whether the rows are the vocabulary, which Megatron pads.
    """
    axes = axes_in(mcore_key)
    rows = rows or tuple(RowBlocks.share(shape[axes], number, len(hf)) for number in range(len(hf)))
    local_key, te_state = local_key or mcore_key, extra_state or te_extra_state
    return TensorRule(
        local=ModuleTensor(
            mcore_key=local_key,
            name=local_name or local_key,
            tp_axis=tp_axis if local_tp_axis is None else local_tp_axis,
            extra_state=(extra_state, local_extra_state_name or extra_state) if extra_state else None,
        ),
        te=ModuleTensor(
            mcore_key=mcore_key,
            name=te_name or mcore_key,
            tp_axis=tp_axis,
            extra_state=(te_state, te_extra_state_name or te_state) if te_state else None,
        ),
        shape=shape[axes:],
        lead=shape[:axes],
        stage=stage,
        parts=tuple(_hf_part(*each) for each in zip(hf, rows, rotated_rows or (0,) * len(hf), strict=True)),
        glu_halves=glu_halves,
        padded_vocabulary=padded_vocabulary,
        other_keys=other_keys,
        other_parts=(_hf_part(other_hf, RowBlocks.share(shape[axes])),) if other_hf else (),
        legacy_names=legacy_names,
    )


def _hf_part(names: tuple[str, ...], rows: RowBlocks, rotated_rows: int = 0) -> HfPart:
    return HfPart(hf_name=names[0], rows=rows, consolidated=names[1:], rotated_rows=rotated_rows)
