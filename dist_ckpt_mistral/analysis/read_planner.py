"""Plan the reads of every rank of a layout from a checkpoint's metadata. The data files may be absent."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np

from dist_ckpt_mistral.arguments import require_types
from dist_ckpt_mistral.errors import SourceError
from dist_ckpt_mistral.formats import stored_checkpoint
from dist_ckpt_mistral.formats.stored_checkpoint import StoredCheckpoint
from dist_ckpt_mistral.gather import dtypes
from dist_ckpt_mistral.gather.boxes import require_tiling
from dist_ckpt_mistral.gather.index import IndexedTensor, TensorIndex
from dist_ckpt_mistral.mapping.configuration import checkpoint_config, matched
from dist_ckpt_mistral.mapping.matching import FLAT_STATE_ADVICE, match_checkpoint
from dist_ckpt_mistral.mapping.read_plan import ReadingPlan, plan_reads
from dist_ckpt_mistral.model.config.mistral_config import ConfigOverride, GivenConfig, MistralConfig, chosen_config
from dist_ckpt_mistral.model.layout.layout import ParallelLayout
from dist_ckpt_mistral.model.table.entries import flat_state, split_state_key
from dist_ckpt_mistral.model.table.rules import ParamState
from dist_ckpt_mistral.storage.remote_path import as_path

_LOG = logging.getLogger(__name__)

#: Reason to leave out the optimizer state of megatron-core 0.12 to 0.14: the reads of their own loading are unknown.
_BLOCKS: Final = (
    "its optimizer state is in the format fully_sharded_model_space, which only megatron-core 0.12 to 0.14 load, in a "
    "way of their own"
)


def plan_reading(
    checkpoint: str | Path, layout: ParallelLayout, *, config: GivenConfig | None = None, weights_only: bool = False
) -> ReadingPlan:
    """Plan the reads of every rank of ``layout`` from a Megatron checkpoint. Only its metadata is used.

    The vocabulary is padded as Megatron-LM pads it for ``layout``. Padding rows that are not stored are not read.

    Args:
        checkpoint: Root of a Megatron checkpoint, or one ``iter_*`` or ``release`` directory in it.
        layout: The layout that would load the checkpoint.
        config: Configuration for a checkpoint that has lost its own: a ``MistralConfig``, a config.json, or a directory
            or hub id with one.
        weights_only: Leave out optimizer state.

    Returns:
        The chunks and bytes that every rank reads.

    Raises:
        LayoutError: Megatron would refuse the layout.
        FormatError: The metadata is damaged, or ``checkpoint`` is no checkpoint.
        TensorMismatchError: Tensors of the model are missing or have other shapes.
        PlanError: The chunks of a tensor overlap or leave gaps.

    Example:
        >>> plan = dist_ckpt_mistral.plan_reading("ckpt", ParallelLayout(tp=4))  # doctest: +SKIP
        >>> plan.total.amplification  # doctest: +SKIP
        2.0
    """
    require_types(plan_reading, **locals())
    stored = _open(as_path(checkpoint), has_config=config is not None)
    stored_checkpoint.require_loadable(stored.directory)
    match = matched(stored, checkpoint_config(stored, chosen_config(config)))
    layout.check(match.agreed.config)
    states, left_out = ((ParamState.WEIGHTS,), None) if weights_only else _states(stored)
    shapes = {name: tensor.global_shape for name, tensor in stored.tensors.items()}
    optimizer = [
        match_checkpoint(match.table, shapes, stored.objects, str(stored.directory), state) for state in states[1:]
    ]
    maps = (match.found, *optimizer)
    names = [name for each in maps for name in replace(each, table=each.table.without_carried()).names()]
    return plan_reads(
        layout,
        maps,
        _index(stored, names),
        path=stored.directory,
        config_from=match.agreed.source,
        left_out=left_out,
        reshard_options=_reshard_options(config, weights_only=weights_only or left_out not in (None, _BLOCKS)),
    )


def _reshard_options(config: GivenConfig | None, *, weights_only: bool) -> tuple[str, ...]:
    """The options of ``reshard`` for the same configuration and, if ``weights_only``, without optimizer state."""
    override = isinstance(config, ConfigOverride)
    given = config.config if isinstance(config, ConfigOverride) else config
    words = [] if given is None else ["--config", "CONFIG" if isinstance(given, MistralConfig) else str(given)]
    return (*words, *["--override-config"] * override, *["--weights-only"] * weights_only)


def _open(checkpoint: Path, *, has_config: bool) -> StoredCheckpoint:
    """Open a checkpoint with its common state, which may lie in a data file.

    If the common state cannot be read and the caller has a configuration, open the checkpoint without common state and
    log a warning.
    """
    try:
        return stored_checkpoint.open_stored(checkpoint)
    except SourceError as error:
        if not has_config:
            raise
        stored = stored_checkpoint.open_stored(checkpoint, with_common_state=False)
        _LOG.warning("the configuration in the common state is not compared: %s", error)
        return stored


def _states(checkpoint: StoredCheckpoint) -> tuple[tuple[ParamState, ...], str | None]:
    """The states of the parameters to plan, and the reason why other stored optimizer state is not planned."""
    states = {name: split[0] for name in checkpoint.tensors if (split := split_state_key(name)) is not None}
    flat = sorted({kind for name in (*checkpoint.tensors, *checkpoint.objects) if (kind := flat_state(name))})
    if any(checkpoint.tensors[name].stored_shape != checkpoint.tensors[name].global_shape for name in states):
        return (ParamState.WEIGHTS,), _BLOCKS
    stored = [state for state in ParamState if state is ParamState.WEIGHTS or set(states.values()) & set(state.value)]
    return tuple(stored), FLAT_STATE_ADVICE.format(name=flat[0]) if flat else None


def _natural_order(name: str) -> list[tuple[int, str]]:
    """A sort key by which files of rank 10 come after files of rank 2."""
    return [(int(part or -1), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _index(checkpoint: StoredCheckpoint, names: Sequence[str]) -> TensorIndex:
    """The chunks of ``names``. The position of a chunk is that of its archive, not of its data."""
    chunks_of = {name: checkpoint.chunks(name) for name in names}
    all_files = tuple(checkpoint.file_bytes)
    used = {all_files[number] for chunks in chunks_of.values() for number in set(chunks.files.tolist())}
    files = sorted(used, key=_natural_order)
    new_numbers = {name: number for number, name in enumerate(files)}
    renumbered = np.array([new_numbers.get(name, -1) for name in all_files])  # files without chunks get -1
    tensors = {}
    for name, chunks in chunks_of.items():
        shape = checkpoint.tensors[name].global_shape
        require_tiling(chunks.offsets, chunks.shapes, shape, f"the stored chunks of {name!r} are not whole")
        tensors[name] = IndexedTensor(
            name=name,
            dtype=dtypes.require_known(checkpoint.tensors[name].dtype, repr(name)),
            global_shape=shape,
            offsets=chunks.offsets,
            shapes=chunks.shapes,
            files=renumbered[chunks.files],
            positions=chunks.positions,
        )
    return TensorIndex(files=tuple(checkpoint.directory / name for name in files), tensors=tensors)
