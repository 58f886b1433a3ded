"""Plans what every rank of a layout reads of a stored checkpoint.

Only the metadata is read: the data files may be elsewhere.
"""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np

from dist_ckpt_mistral.analysis.read_plan import (
    OPTIMIZER,
    WEIGHTS,
    ChunkList,
    RankReads,
    ReadingPlan,
    WantedBox,
    chunk_list,
    chunk_reads,
)
from dist_ckpt_mistral.errors import FormatError
from dist_ckpt_mistral.formats import stored_checkpoint
from dist_ckpt_mistral.formats.stored_checkpoint import StoredCheckpoint
from dist_ckpt_mistral.gather import dtypes
from dist_ckpt_mistral.gather.boxes import require_tiling
from dist_ckpt_mistral.gather.index import IndexedTensor, TensorIndex
from dist_ckpt_mistral.mapping.checkpoint_map import CheckpointMap
from dist_ckpt_mistral.mapping.chunking import SPEC
from dist_ckpt_mistral.mapping.configuration import checkpoint_config, matched
from dist_ckpt_mistral.mapping.matching import FLAT_STATE_ADVICE, match_checkpoint
from dist_ckpt_mistral.model.config.mistral_config import GivenConfig, chosen_config
from dist_ckpt_mistral.model.layout.layout import ParallelLayout, RankCoordinates
from dist_ckpt_mistral.model.layout.local_tensors import local_tensors
from dist_ckpt_mistral.model.layout.pipeline import ModelChunk
from dist_ckpt_mistral.model.table.entries import flat_state, kind_of, split_state_key
from dist_ckpt_mistral.model.table.rules import ParamState

_LOG = logging.getLogger(__name__)

#: Why the optimizer state of megatron-core 0.12 to 0.14 is left out: what their loading reads of it is not known here.
_BLOCKS: Final = (
    "its optimizer state is in the format fully_sharded_model_space, which only megatron-core 0.12 to 0.14 load, in a "
    "way of their own"
)


def plan_reading(
    checkpoint: str | Path, layout: ParallelLayout, *, config: GivenConfig | None = None, weights_only: bool = False
) -> ReadingPlan:
    """Plan what every rank of ``layout`` reads of a Megatron checkpoint.

    ``config`` (itself, a config.json, or a directory with one) is for checkpoints that lost theirs. ``weights_only``
    leaves optimizer state out. The vocabulary is padded as Megatron-LM pads it for ``layout``; rows that are not stored
    need no reading. Raises LayoutError where Megatron would refuse the layout, FormatError, TensorMismatchError or
    PlanError where the checkpoint is not whole.
    """
    opened = _opened(Path(checkpoint), is_described=config is not None)
    known = matched(opened, checkpoint_config(opened, chosen_config(config)))
    layout.check(known.agreed.config)
    stored_checkpoint.require_loadable(opened.directory)
    states, left_out = ((ParamState.WEIGHTS,), None) if weights_only else _states(opened)
    shapes = {name: tensor.global_shape for name, tensor in opened.tensors.items()}
    others = [
        match_checkpoint(known.table, shapes, opened.objects, str(opened.directory), state) for state in states[1:]
    ]
    found = [replace(each, table=each.table.without_carried()) for each in (known.found, *others)]  # the rest: unread
    index = _unlocated_index(opened, [name for each in found for name in each.names()])
    chunks = chunk_list(index)
    kinds = {name: kind for each in found for name, kind in _kinds(each).items()}
    weights = set(found[0].names())
    return ReadingPlan(
        path=opened.directory,
        config_from=known.agreed.source,
        layout=layout,
        files=tuple(path.name for path in index.files),
        chunks=chunks,
        kinds=tuple(kinds[name] for name in chunks.names),
        parts=tuple(WEIGHTS if name in weights else OPTIMIZER for name in chunks.names),
        groups=tuple(_groups(layout, found, index, chunks)),
        left_out=left_out,
    )


def _opened(checkpoint: Path, *, is_described: bool) -> StoredCheckpoint:
    """The checkpoint with its common state, which may lie in a data file.

    Without data files, a checkpoint that is described otherwise is still planned: what its own common state says of the
    model then stays unread, and a warning says so.
    """
    try:
        return stored_checkpoint.open_stored(checkpoint)
    except FormatError as error:
        if not is_described:
            raise
        opened = stored_checkpoint.open_stored(checkpoint, with_common_state=False)
        _LOG.warning("what the common state says of the model is not compared: %s", error)
        return opened


def _states(checkpoint: StoredCheckpoint) -> tuple[tuple[ParamState, ...], str | None]:
    """What there is to read of every parameter, and why there is optimizer state besides that cannot be planned."""
    states = {name: split[0] for name in checkpoint.tensors if (split := split_state_key(name)) is not None}
    flat = sorted({kind for name in (*checkpoint.tensors, *checkpoint.objects) if (kind := flat_state(name))})
    if any(checkpoint.tensors[name].stored_shape != checkpoint.tensors[name].global_shape for name in states):
        return (ParamState.WEIGHTS,), _BLOCKS
    called = [state for state in ParamState if state is ParamState.WEIGHTS or set(states.values()) & set(state.value)]
    return tuple(called), FLAT_STATE_ADVICE.format(name=flat[0]) if flat else None


def _natural(name: str) -> list[tuple[int, str]]:
    """Files of rank 10 after those of rank 2."""
    return [(int(part or -1), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _unlocated_index(checkpoint: StoredCheckpoint, names: Sequence[str]) -> TensorIndex:
    """The chunks of ``names``; of each, the position is that of the archive that holds it."""
    stored = {name: checkpoint.chunks(name) for name in names}
    every = tuple(checkpoint.file_bytes)
    used = {every[number] for chunks in stored.values() for number in set(chunks.files.tolist())}
    files = sorted(used, key=_natural)
    numbers = {name: number for number, name in enumerate(files)}
    number = np.array([numbers.get(name, -1) for name in every])  # no chunk is in the others
    tensors = {}
    for name, chunks in stored.items():
        shape = checkpoint.tensors[name].global_shape
        require_tiling(chunks.offsets, chunks.shapes, shape, f"the stored chunks of {name!r} are not whole")
        tensors[name] = IndexedTensor(
            name=name,
            dtype=dtypes.require_known(checkpoint.tensors[name].dtype, repr(name)),
            global_shape=shape,
            offsets=chunks.offsets,
            shapes=chunks.shapes,
            files=number[chunks.files],
            positions=chunks.positions,
        )
    return TensorIndex(files=tuple(checkpoint.directory / name for name in files), tensors=tensors)


def _kinds(found: CheckpointMap) -> dict[str, str]:
    """What each stored tensor is, for people."""
    return {name: kind_of(rule, found.state) for name, rule, _ in found.tensors()}


def _groups(
    layout: ParallelLayout, found: Sequence[CheckpointMap], index: TensorIndex, chunks: ChunkList
) -> Iterator[RankReads]:
    """Ranks by what they hold, in the order of the first of each."""
    places: dict[RankCoordinates, list[int]] = defaultdict(list)
    for rank in range(layout.world_size):
        places[replace(layout.coordinates(rank), cp=0, dp=0, dp_cp=0, edp=0)].append(rank)  # copies of each other
    ranks: dict[tuple[int, tuple[WantedBox, ...]], list[int]] = defaultdict(list)
    for at, same in places.items():
        held = layout.model_chunks(found[0].table.num_layers, at.pp)
        ranks[at.pp, tuple(box for each in found for box in _wanted(layout, each, held, at))] += same
    for (stage, boxes), same in ranks.items():
        held = layout.model_chunks(found[0].table.num_layers, stage)
        yield RankReads(
            ranks=tuple(sorted(same)),
            stage=stage,
            layers=tuple(layer for each in held for layer in each.layers),
            reads=chunk_reads(index, chunks, boxes),
        )


def _wanted(
    layout: ParallelLayout, found: CheckpointMap, model_chunks: Sequence[ModelChunk], at: RankCoordinates
) -> Iterator[WantedBox]:
    """The boxes of a rank, under the keys that the checkpoint has for them."""
    for model_chunk in model_chunks:
        for held in local_tensors(layout, found.table, model_chunk, at, style=found.style, spec=SPEC):
            names = found.spelling(held.mcore_key, held.index)
            for box in held.boxes:
                yield WantedBox(names[box.mcore_key], box.global_offset, box.shape)
