"""Resharding: a checkpoint again, all of it, with its chunks cut for another layout.

Every rank of the layout then reads whole chunks, of the weights and of the optimizer's states of them. What is no
tensor of the model keeps its bytes, and so does the common state.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

from dist_ckpt_mistral.convert.conversion import Conversion
from dist_ckpt_mistral.convert.output import DEFAULT_OUTPUT, Output
from dist_ckpt_mistral.convert.ranks import ALONE, Ranks
from dist_ckpt_mistral.convert.rewrite import Rewriting, chunk_boxes, new_objects, rewrite
from dist_ckpt_mistral.errors import TensorMismatchError
from dist_ckpt_mistral.formats.stored_checkpoint import StoredCheckpoint
from dist_ckpt_mistral.formats.torch_dist.writer import NewChunk
from dist_ckpt_mistral.gather.execute import DEFAULT_EFFORT, Effort
from dist_ckpt_mistral.gather.index import TensorIndex
from dist_ckpt_mistral.mapping.checkpoint_map import CheckpointMap
from dist_ckpt_mistral.mapping.chunking import ChunkBox, cut_chunks
from dist_ckpt_mistral.mapping.configuration import checkpoint_config, matched
from dist_ckpt_mistral.mapping.matching import FLAT_STATE_ADVICE
from dist_ckpt_mistral.model.config.mistral_config import ChosenConfig, GivenConfig, chosen_config
from dist_ckpt_mistral.model.layout.layout import ParallelLayout
from dist_ckpt_mistral.model.table.entries import flat_state, is_optimizer_state, model_prefix, split_state_key

_LOG = logging.getLogger(__name__)


def reshard(
    checkpoint: str | Path,
    target: str | Path,
    layout: ParallelLayout,
    *,
    config: GivenConfig | None = None,
    weights_only: bool = False,
    output: Output = DEFAULT_OUTPUT,
    effort: Effort = DEFAULT_EFFORT,
    ranks: Ranks = ALONE,
) -> Conversion:
    """Write a checkpoint again, cut so that every rank of ``layout`` reads only whole chunks.

    Weights and optimizer state keep keys, shapes and bits; the common state, all objects and the small files come
    along byte for byte.

    Args:
        checkpoint: Root of a Megatron checkpoint, or one ``iter_*`` or ``release`` directory in it.
        target: Checkpoint to create.
        layout: What to cut for.
        config: For checkpoints that do not tell their configuration, as in ``to_hf``.
        weights_only: Leaves all optimizer state behind, as it must be where it lies in flat buffers.
        output: How the checkpoint is written.
        effort: How much of the machine to use.
        ranks: The processes that share the work; by default this one alone.

    Returns:
        What was written, or with ``output.dry_run`` would be.

    Raises:
        LayoutError: The model cannot be cut so.
        TensorMismatchError: Optimizer state lies in flat buffers, or belongs to no weight.
        DistCkptMistralError: The checkpoint is damaged or contradicts itself, or ``target`` cannot be written. Then
            nothing is published.
    """
    return rewrite(
        Path(checkpoint),
        Path(target),
        lambda stored: _cut_for(stored, layout, chosen_config(config), weights_only=weights_only),
        output=output,
        effort=effort,
        ranks=ranks,
    )


def _cut_for(
    stored: StoredCheckpoint, layout: ParallelLayout, config: ChosenConfig | None, *, weights_only: bool
) -> Rewriting:
    where = str(stored.directory)
    known = matched(stored, checkpoint_config(stored, config))
    _LOG.info("configuration: %s", known.agreed.source)
    layout.check(known.agreed.config)
    shapes = {name: tensor.global_shape for name, tensor in stored.tensors.items()}
    names = [*stored.tensors, *stored.objects]
    if weights_only:
        left = {name: "optimizer state, which was not asked for" for name in names if is_optimizer_state(name)}
    else:
        left = {}
        _require_no_flat_state(names, where)
    kept = [name for name in stored.tensors if name not in left]
    tensors = stored.index(kept)
    cut = _cuts(known.found, {name: shapes[name] for name in kept}, layout, where)
    return Rewriting(
        stored=stored,
        config_from=known.agreed.source,
        tensors=tensors,
        chunks=[*_chunks(stored, tensors, cut)],
        objects=new_objects(stored, left),
        ignored=tuple(left.items()),
        options={
            "command": "reshard",
            "layout": repr(layout),
            "--weights-only": weights_only,
            "configuration": known.agreed.config.to_hf(),
        },
    )


def _chunks(stored: StoredCheckpoint, tensors: TensorIndex, cut: Mapping[str, list[ChunkBox]]) -> Iterator[NewChunk]:
    """The new chunks, in a file for every rank that saves any. What is not the model's stays cut as it is."""
    ranks = sorted({each.rank for group in cut.values() for each in group})
    file_of = {rank: file for file, rank in enumerate(ranks)}
    for name, tensor in tensors.tensors.items():
        as_block = stored.tensors[name].stored_shape != tensor.global_shape
        if name in cut:
            boxes = [(each.offset, each.shape, file_of[each.rank]) for each in cut[name]]
        else:
            boxes = [(offset, shape, 0) for offset, shape in chunk_boxes(tensor)]
        if as_block and len({shape for _, shape, _ in boxes}) > 1:  # only equal blocks can be stored so
            boxes = [((0,) * len(tensor.global_shape), tensor.global_shape, boxes[0][2])]
        for offset, shape, file in boxes:
            yield NewChunk(
                mcore_key=name,
                dtype=tensor.dtype,
                global_shape=tensor.global_shape,
                offset=offset,
                shape=shape,
                file=file,
                as_block=as_block,
            )


def _require_no_flat_state(names: list[str], where: str) -> None:
    flat = sorted({name for name in map(flat_state, names) if name is not None})
    if flat:
        advice = FLAT_STATE_ADVICE.format(name=flat[0])
        raise TensorMismatchError(f"{where} cannot be resharded as it is: {advice} That is what --weights-only does.")


def _cuts(
    found: CheckpointMap, shapes: Mapping[str, tuple[int, ...]], layout: ParallelLayout, where: str
) -> dict[str, list[ChunkBox]]:
    """The new chunks of all weights, and of all states of them: those are cut as their weights are."""
    of_weights: dict[str, list[ChunkBox]] = defaultdict(list)
    for cut in cut_chunks(found, shapes, layout):
        of_weights[cut.name.removeprefix(found.prefix)].append(cut)
    by_name = {group[0].name: group for group in of_weights.values()}
    states = {name: split[1] for name in shapes if (split := split_state_key(name)) is not None}
    prefix = model_prefix(states.values()) or found.prefix
    for name, key in states.items():
        group = of_weights.get(key.removeprefix(prefix), [])
        if not group or group[0].global_shape != shapes[name]:
            expected = f"{list(group[0].global_shape)}, as its parameter" if group else "a state of a parameter"
            raise TensorMismatchError(
                f"cannot reshard {name!r} {list(shapes[name])} in {where}: expected {expected}. "
                "Reshard the weights alone with --weights-only."
            )
        by_name[name] = group
    return by_name
