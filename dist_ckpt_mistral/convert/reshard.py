"""``reshard``: a checkpoint with the same content, whose chunks are cut for another layout.

Every rank of that layout then reads whole chunks of weights and optimizer state. All other tensors keep their chunks.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

from dist_ckpt_mistral.arguments import require_types
from dist_ckpt_mistral.convert.conversion import Conversion
from dist_ckpt_mistral.convert.joined_ranks import empty_extra_states, left_behind, new_common_file
from dist_ckpt_mistral.convert.output import DEFAULT_OUTPUT, Output
from dist_ckpt_mistral.convert.ranks import ALONE, Ranks
from dist_ckpt_mistral.convert.rewrite import Rewriting, chunk_boxes, new_objects, rewrite
from dist_ckpt_mistral.errors import LayoutError, TensorMismatchError
from dist_ckpt_mistral.formats.stored_checkpoint import StoredCheckpoint
from dist_ckpt_mistral.formats.torch_dist.writer import NewChunk
from dist_ckpt_mistral.gather.execute import DEFAULT_EFFORT, Effort
from dist_ckpt_mistral.gather.index import TensorIndex
from dist_ckpt_mistral.mapping.checkpoint_map import CheckpointMap
from dist_ckpt_mistral.mapping.chunking import ChunkBox, cut_chunks
from dist_ckpt_mistral.mapping.configuration import checkpoint_config, matched
from dist_ckpt_mistral.mapping.matching import FLAT_STATE_ADVICE
from dist_ckpt_mistral.mapping.twins import require_equal_heads
from dist_ckpt_mistral.model.config.mistral_config import ChosenConfig, GivenConfig, chosen_config
from dist_ckpt_mistral.model.layout.layout import ParallelLayout
from dist_ckpt_mistral.model.table.entries import flat_state, is_optimizer_state, model_prefix, split_state_key
from dist_ckpt_mistral.model.table.rules import KeyStyle, spell_key
from dist_ckpt_mistral.storage.remote_path import as_path

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
    """Rewrite a checkpoint so that every rank of ``layout`` reads only whole chunks.

    Weights and optimizer state keep their keys, shapes and bits. The common state, all objects and the small files are
    copied byte for byte.

    Args:
        checkpoint: Root of a Megatron checkpoint, or one ``iter_*`` or ``release`` directory in it.
        target: Checkpoint to create.
        layout: The layout to cut the chunks for.
        config: Configuration for a checkpoint that has lost its own: a ``MistralConfig``, a config.json, or a directory
            or hub id with one.
        weights_only: Leave out all optimizer state. Needed if it is in flat buffers, which cannot be cut.
        output: How to write the checkpoint.
        effort: Threads and memory to use.
        ranks: The processes that share the work; by default this one alone.

    Returns:
        The files that were written, or with ``output.dry_run`` would be.

    Raises:
        LayoutError: The model cannot be divided for this layout.
        TensorMismatchError: Optimizer state is in flat buffers or belongs to no weight, or tensors of the model are
            missing or of another shape.
        ConfigError: There is no configuration, or configurations contradict each other.
        FormatError: The checkpoint is damaged.
        OutputError: ``target`` cannot be written. Nothing is published.

    Example:
        >>> dist_ckpt_mistral.reshard("ckpt", "resharded", ParallelLayout(tp=2, pp=2))  # doctest: +SKIP
    """
    require_types(reshard, **locals())
    return rewrite(
        as_path(checkpoint),
        as_path(target),
        lambda stored: _resharded(stored, layout, chosen_config(config), weights_only=weights_only),
        output=output,
        effort=effort,
        ranks=ranks,
    )


def _resharded(
    stored: StoredCheckpoint, layout: ParallelLayout, config: ChosenConfig | None, *, weights_only: bool
) -> Rewriting:
    """All that is stored, or without optimizer state, with chunks for ``layout``."""
    directory = str(stored.directory)
    match = matched(stored, checkpoint_config(stored, config))
    _LOG.info("configuration: %s", match.agreed.source)
    require_equal_heads(match)
    layout.check(match.agreed.config)
    _require_row_order(match.found, layout, directory)
    names = [*match.stored.tensors, *stored.objects]
    if weights_only:
        ignored = {name: "optimizer state, which was not asked for" for name in names if is_optimizer_state(name)}
    else:
        ignored = {}
        _require_no_flat_state(names, directory)
    ignored |= left_behind(stored)
    stored = match.stored
    shapes = {name: tensor.global_shape for name, tensor in stored.tensors.items() if name not in ignored}
    tensors = stored.index(shapes)
    boxes = _chunk_boxes(match.found, shapes, layout, directory)
    return Rewriting(
        stored=stored,
        config_from=match.agreed.source,
        tensors=tensors,
        chunks=[*_chunks(stored, tensors, boxes)],
        objects=new_objects(stored, ignored),
        ignored=tuple(ignored.items()),
        options={
            "command": "reshard",
            "layout": repr(layout),
            "--weights-only": weights_only,
            "configuration": match.agreed.config.to_hf(),
        },
        new_objects=[empty_extra_states(match.table)] if match.ranks else [],
        new_files=new_common_file(match) if match.ranks else {},
        is_adapter=bool(match.table.adapters),
    )


def _chunks(stored: StoredCheckpoint, tensors: TensorIndex, boxes: Mapping[str, list[ChunkBox]]) -> Iterator[NewChunk]:
    """The new chunks, in one file for every rank with chunks. Tensors without ``boxes`` keep their chunks."""
    ranks = sorted({box.rank for boxes_of_tensor in boxes.values() for box in boxes_of_tensor})
    file_of = {rank: file for file, rank in enumerate(ranks)}
    for name, tensor in tensors.tensors.items():
        as_block = stored.tensors[name].stored_shape != tensor.global_shape
        if name in boxes:
            chunks = [(box.offset, box.shape, file_of[box.rank]) for box in boxes[name]]
        else:
            chunks = [(offset, shape, 0) for offset, shape in chunk_boxes(tensor)]
        if as_block and len({shape for _, shape, _ in chunks}) > 1:  # the blocks of a tensor must have equal shapes
            chunks = [((0,) * len(tensor.global_shape), tensor.global_shape, chunks[0][2])]
        for offset, shape, file in chunks:
            yield NewChunk(
                mcore_key=name,
                dtype=tensor.dtype,
                global_shape=tensor.global_shape,
                offset=offset,
                shape=shape,
                file=file,
                as_block=as_block,
            )


def _require_row_order(found: CheckpointMap, layout: ParallelLayout, directory: str) -> None:
    """Raise LayoutError if the order of an adapter's stored rows is that of another tensor parallelism."""
    for adapter in found.table.adapters:
        if adapter.is_in_rank_order and adapter.row_order_tp != layout.tp:
            key = spell_key(adapter.b.mcore_key, (), KeyStyle.STACKED)
            raise LayoutError(
                f"{key} in {directory} cannot be resharded to tp={layout.tp}: {adapter.form.value} stores its rows in "
                f"an order that only tp={adapter.row_order_tp} loads rightly. Export the adapter with to-hf, and "
                f"import it with from-hf --tp {layout.tp}."
            )


def _require_no_flat_state(names: list[str], directory: str) -> None:
    flat = sorted({name for name in map(flat_state, names) if name is not None})
    if flat:
        advice = FLAT_STATE_ADVICE.format(name=flat[0])
        raise TensorMismatchError(f"{directory} cannot be resharded as it is: {advice} --weights-only does that.")


def _chunk_boxes(
    checkpoint_map: CheckpointMap, shapes: Mapping[str, tuple[int, ...]], layout: ParallelLayout, directory: str
) -> dict[str, list[ChunkBox]]:
    """The new chunks of all weights and their optimizer states. A state is cut as its weight."""
    by_weight: dict[str, list[ChunkBox]] = defaultdict(list)
    for box in cut_chunks(checkpoint_map, shapes, layout):
        by_weight[box.name.removeprefix(checkpoint_map.prefix)].append(box)
    by_name = {boxes[0].name: boxes for boxes in by_weight.values()}
    states = {name: split[1] for name in shapes if (split := split_state_key(name)) is not None}
    prefix = model_prefix(states.values()) or checkpoint_map.prefix
    for name, key in states.items():
        boxes = by_weight.get(key.removeprefix(prefix), [])
        if not boxes or boxes[0].global_shape != shapes[name]:
            expected = f"{list(boxes[0].global_shape)}, as its parameter" if boxes else "a state of a parameter"
            raise TensorMismatchError(
                f"cannot reshard {name!r} {list(shapes[name])} in {directory}: expected {expected}. "
                "Reshard the weights alone with --weights-only."
            )
        by_name[name] = boxes
    return by_name
