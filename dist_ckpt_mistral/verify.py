"""Bit-exact comparison of two models, whatever they are stored as, in bounded memory."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dist_ckpt_mistral.errors import ConfigError
from dist_ckpt_mistral.formats.places import Kind, what_is
from dist_ckpt_mistral.gather.compare import Difference, compare_bits
from dist_ckpt_mistral.gather.execute import DEFAULT_EFFORT, Effort
from dist_ckpt_mistral.mapping.source import ModelSource, completed, open_source, twin_differences
from dist_ckpt_mistral.model.config.agreement import Disagreement
from dist_ckpt_mistral.model.config.mistral_config import ChosenConfig, GivenConfig, chosen_config, given_directory


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The outcome of a comparison; sizes in bytes. ``not_compared`` says what checkpoints hold besides the model.

    ``configurations`` are the values that the configurations of A and B give differently.
    """

    num_tensors: int
    num_bytes: int
    differences: tuple[Difference, ...]
    not_compared: tuple[str, ...]
    configurations: tuple[Disagreement, ...] = ()

    @property
    def is_equal(self) -> bool:
        """Whether both hold the same tensors, bit for bit, and read them in the same way."""
        return not self.differences and not any(each.of_weights for each in self.configurations)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"equal": self.is_equal, **asdict(self)}


def open_pair(a: Path, b: Path, *, config: ChosenConfig | None = None) -> tuple[ModelSource, ModelSource]:
    """Open both sides. A checkpoint that tells no configuration goes by ``config``, else by the other side's."""
    if config is not None:
        return open_source(a, config=config), open_source(b, config=config)
    try:
        source_a = open_source(a)
    except ConfigError:
        source_b = open_source(b)
        return open_source(a, config=_of_other(source_b)), source_b
    try:
        source_b = open_source(b)
    except ConfigError:
        return source_a, open_source(b, config=_of_other(source_a))
    return _as_part_of(source_b, source_a), _as_part_of(source_a, source_b)


def _as_part_of(whole: ModelSource, source: ModelSource) -> ModelSource:
    """``source``, but the language model of ``whole`` if that is multimodal and training saved ``source`` without."""
    if not whole.table.carried or source.table.carried or source.config.hf_config is not None:
        return source
    return open_source(source.path, config=_of_other(whole))


def _of_other(source: ModelSource) -> ChosenConfig:
    """The configuration of one side, for the other one to go by."""
    return ChosenConfig(config=source.config, source=f"{source.config_from} of {source.path}")


def compare(
    a: str | Path,
    b: str | Path,
    *,
    config: GivenConfig | None = None,
    effort: Effort = DEFAULT_EFFORT,
) -> Comparison:
    """Compare two models tensor by tensor and bit by bit: Megatron checkpoints, Hugging Face directories or hub ids.

    A checkpoint that tells no configuration goes by ``config``, else by the other side's; a directory given for
    ``config`` also completes one that holds only the language model of a multimodal model. Raises DistCkptMistralError
    if either cannot be read.
    """
    source_a, source_b = open_pair(Path(a), Path(b), config=chosen_config(config))
    directory = given_directory(config, vision=True)
    if directory is not None:
        source_a, source_b = completed(source_a, directory), completed(source_b, directory)
    return compare_sources(source_a, source_b, effort)


def compare_sources(a: ModelSource, b: ModelSource, effort: Effort) -> Comparison:
    """Compare all tensors of ``a`` and ``b`` by their Hugging Face names: presence, shape, dtype, and every bit.

    What one stores besides, such as the head of tied embeddings, must be what the other stores, or else what would
    stand for it there. What a checkpoint stores under two keys must be the same.
    """
    in_a, in_b = ({tensor.hf_name: tensor for tensor in source.tensors} for source in (a, b))
    aliases_a, aliases_b = (
        {t.hf_name: t for t in source.table.hf_tensors().values() if t.is_alias} for source in (a, b)
    )
    besides = (in_a.keys() ^ in_b.keys()) & aliases_a.keys() & aliases_b.keys()
    in_a, in_b = in_a | {name: aliases_a[name] for name in besides}, in_b | {name: aliases_b[name] for name in besides}
    differences = [
        Difference(hf_name=name, what="only in A" if name in in_a else "only in B") for name in in_a.keys() ^ in_b
    ]
    for source, where in ((a, "A"), (b, "B")):
        found = twin_differences(source.index, source.hidden_twins, effort)
        differences += [Difference(hf_name=twin.name, what=f"in {where}, {what}") for twin, what in found]
    common = []
    for name in (name for name in in_a if name in in_b):
        described = [
            f"{source.dtype_of(held[name])} {list(held[name].shape)}" for source, held in ((a, in_a), (b, in_b))
        ]
        if described[0] == described[1]:
            common.append(name)
        else:
            differences.append(Difference(hf_name=name, what=f"{described[0]} in A, {described[1]} in B"))
    plan_a, plan_b = a.plan_of(in_a[name] for name in common), b.plan_of(in_b[name] for name in common)
    differences += compare_bits(plan_a, plan_b, common, effort)
    return Comparison(
        num_tensors=len(common),
        num_bytes=plan_a.num_bytes,
        differences=tuple(sorted(differences, key=lambda difference: difference.hf_name)),
        not_compared=_not_compared(a, b),
        configurations=tuple(a.agreed.disagreements(b.agreed)),
    )


def _not_compared(a: ModelSource, b: ModelSource) -> tuple[str, ...]:
    """What two checkpoints hold besides the model: who deletes one because both are equal must know of it."""
    if {what_is(source.path).kind for source in (a, b)} != {Kind.CHECKPOINT}:
        return ()
    in_a, in_b = (Counter(reason for _, reason in source.ignored) for source in (a, b))
    return tuple(f"{reason}: {in_a[reason]} entries in A, {in_b[reason]} in B" for reason in sorted({*in_a, *in_b}))
