"""A live model as a source: the boxes of stored tensors that its ranks hold in memory, matched with the tensor table.

The ranks take the place of files, so that the plans of a conversion fit a live model, too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

from dist_ckpt_mistral.errors import PlanError, TensorMismatchError, for_all
from dist_ckpt_mistral.gather.dtypes import Shape
from dist_ckpt_mistral.gather.index import IndexedTensor, TensorIndex
from dist_ckpt_mistral.gather.plan import only_dtype
from dist_ckpt_mistral.mapping.configuration import agreed
from dist_ckpt_mistral.mapping.matching import match_checkpoint
from dist_ckpt_mistral.mapping.source import ModelSource
from dist_ckpt_mistral.messages import listed
from dist_ckpt_mistral.model.config.mistral_config import ChosenConfig
from dist_ckpt_mistral.model.table.table import tensor_table

_MODEL: Final = Path("the live model")


class RankBox(NamedTuple):
    """A box of a stored tensor that a rank holds in memory, as a contiguous row-major array.

    Offsets and shapes are in elements and have the axes of the stored tensor. ``position`` is the first byte in the
    virtual file of the rank, in which its boxes lie one behind the other.
    """

    mcore_key: str
    dtype: str
    global_shape: Shape
    global_offset: Shape
    shape: Shape
    position: int


def live_source(chosen: ChosenConfig, boxes: Sequence[Sequence[RankBox]]) -> ModelSource:
    """The model whose main replicas are ``boxes``, one sequence for each rank. File ``r`` of its index is rank ``r``.

    Raises:
        TensorMismatchError: It is not the model of the configuration (all tensors are named), holds weights twice that
            the configuration ties, or ranks disagree about the shape or dtype of a tensor.
        PlanError: The boxes of a tensor leave a gap or overlap.
    """
    by_key = defaultdict[str, list[tuple[int, RankBox]]](list)
    for rank, boxes_of_rank in enumerate(boxes):
        for box in boxes_of_rank:
            by_key[box.mcore_key].append((rank, box))
    tensors = {tensor.name: tensor for tensor in for_all(_joined, by_key.items())}
    known = agreed(str(_MODEL), chosen, (), tensors)
    table = tensor_table(known.config)
    shapes = {name: tensor.global_shape for name, tensor in tensors.items()}
    found = match_checkpoint(table, shapes, (), str(_MODEL), kind="model")
    if twins := found.twins(tensors):
        pairs = listed([f"{twin.name} beside {twin.main}" for twin in twins])
        raise TensorMismatchError(
            f"{_MODEL} holds weights of its own that {known.source} ties to others: {pairs}. "
            "Give the configuration with tie_word_embeddings=false, or build the model with tied embeddings."
        )
    for_all(_require_whole, [tensors[name] for name in found.names()])
    index = TensorIndex(files=tuple(Path(f"rank {rank}") for rank in range(len(boxes))), tensors=tensors)
    links = {tensor.hf_name: found.links(tensor) for tensor in found.table.hf_tensors().values()}
    for_all(lambda links_to: only_dtype(index, links_to), links.values())
    return ModelSource(
        path=_MODEL,
        kind="live model",
        agreed=known,
        table=table,
        index=index,
        tensors=tuple(tensor for tensor in found.table.hf_tensors().values() if not tensor.is_alias),
        links=links,
        ignored=(),
        hf_files=None,
        assets=(),
        carried_from=None,
    )


def _joined(parts: tuple[str, Sequence[tuple[int, RankBox]]]) -> IndexedTensor:
    """The stored tensor of a key and all its boxes with their ranks."""
    key, boxes = parts
    ranks_of = defaultdict[tuple[str, Shape], list[int]](list)
    for rank, box in boxes:
        ranks_of[box.dtype, box.global_shape].append(rank)
    if len(ranks_of) > 1:
        said = "; ".join(f"{_ranks(ranks)}: {dtype} {list(shape)}" for (dtype, shape), ranks in ranks_of.items())
        raise TensorMismatchError(f"the ranks disagree about {key!r}: {said}")
    ((dtype, shape),) = ranks_of
    return IndexedTensor.build(
        key, dtype, shape, [(box.global_offset, box.shape, rank, box.position) for rank, box in boxes]
    )


def _require_whole(tensor: IndexedTensor) -> None:
    try:
        tensor.require_whole(f"the parts of {tensor.name!r} on {_ranks(tensor.files.tolist())} are not the whole")
    except PlanError as error:
        raise PlanError(f"{error} (main replicas, {list(tensor.global_shape)} in all)") from error


def _ranks(ranks: Sequence[int]) -> str:
    different = sorted({*ranks})
    return f"rank{'s' if len(different) > 1 else ''} {listed([*map(str, different)])}"
