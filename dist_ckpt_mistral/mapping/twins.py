"""Compare tensors that are stored twice: only one of the two is used, so both must have the same values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dist_ckpt_mistral.errors import TensorMismatchError
from dist_ckpt_mistral.gather.compare import compare_bits
from dist_ckpt_mistral.gather.execute import DEFAULT_EFFORT, Effort
from dist_ckpt_mistral.gather.index import TensorIndex
from dist_ckpt_mistral.gather.links import whole as whole_link
from dist_ckpt_mistral.gather.plan import only_dtype, plan_segments
from dist_ckpt_mistral.mapping.checkpoint_map import Twin
from dist_ckpt_mistral.mapping.configuration import Matched
from dist_ckpt_mistral.mapping.source import ModelSource


def twin_differences(
    index: TensorIndex, twins: Sequence[Twin], effort: Effort = DEFAULT_EFFORT
) -> Iterator[tuple[Twin, str]]:
    """Yield every twin whose values differ from those of its main tensor, and how they differ."""
    apart = [twin for twin in twins if not index.tensors[twin.name].shares_bytes(index.tensors[twin.main])]
    found = {
        twin.name: f"{dtypes[0]}, not {dtypes[1]}"
        for twin in apart
        if len(set(dtypes := (index.tensors[twin.name].dtype, only_dtype(index, twin.links)))) > 1
    }
    same = {twin.name: twin for twin in apart if twin.name not in found}
    own = plan_segments(index, {name: (twin.shape, [whole_link(name, twin.shape)]) for name, twin in same.items()})
    others = plan_segments(index, {name: (twin.shape, twin.links) for name, twin in same.items()})
    found |= dict(compare_bits(own, others, [*same], effort))
    for twin in apart:
        if twin.name in found:
            yield twin, f"differs from {twin.main!r}, which is stored for the same weights: {found[twin.name]}"


def require_equal_twins(source: ModelSource, *, only_hidden: bool = False) -> None:
    """Raise TensorMismatchError if a tensor that is stored twice has two values, because only one of them is used.

    ``only_hidden`` skips the twins that have a Hugging Face name of their own in ``source``.
    """
    _require_equal(str(source.path), source.index, source.hidden_twins if only_hidden else source.twins)


def require_equal_heads(match: Matched) -> None:
    """Raise TensorMismatchError if the last stage's copy of a tied model's embeddings has other values than they."""
    if match.ranks is not None and (heads := match.ranks.heads):
        names = [twin.name for twin in heads]
        index = match.stored.index({twin.main for twin in heads})
        _require_equal(str(match.stored.directory), index.joined(match.ranks.raw.index(names), names), heads)


def _require_equal(where: str, index: TensorIndex, twins: Sequence[Twin]) -> None:
    differences = [*twin_differences(index, twins)]
    if differences:
        contradictions = "; ".join(f"{twin.name!r} {what}" for twin, what in differences)
        remove = "remove the tensor that is not meant"
        tied = f"The configuration ties them. Set tie_word_embeddings to false in config.json, or {remove}"
        advice = tied if any(twin.is_head for twin, _ in differences) else remove.capitalize()
        raise TensorMismatchError(f"{where} contradicts itself: {contradictions}. {advice}.")
