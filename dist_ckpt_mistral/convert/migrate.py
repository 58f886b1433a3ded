"""``migrate``: a checkpoint in one of Megatron's legacy formats as ``torch_dist``, which every later Megatron reads.

Megatron removed its ``zarr`` backend (megatron-core 0.16). Such a checkpoint may be of any model: every stored tensor
keeps its key, shape, chunks and bits. One of the per-rank ``torch`` format loads only at the parallelism that saved it,
and does not tell how its ranks belong together: the tensor table does, so it must be of a model of the table.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from dist_ckpt_mistral.arguments import require_types
from dist_ckpt_mistral.convert.conversion import Conversion
from dist_ckpt_mistral.convert.joined_ranks import empty_extra_states, left_behind, new_common_file
from dist_ckpt_mistral.convert.output import DEFAULT_OUTPUT, Output
from dist_ckpt_mistral.convert.ranks import ALONE, Ranks
from dist_ckpt_mistral.convert.rewrite import Rewriting, chunk_boxes, new_objects, rewrite
from dist_ckpt_mistral.errors import FormatError
from dist_ckpt_mistral.formats.stored_checkpoint import ZARR, StoredCheckpoint
from dist_ckpt_mistral.formats.torch_dist.common_state import COMMON_FILE
from dist_ckpt_mistral.formats.torch_dist.writer import NewChunk
from dist_ckpt_mistral.gather import dtypes
from dist_ckpt_mistral.gather.execute import DEFAULT_EFFORT, Effort
from dist_ckpt_mistral.gather.index import TensorIndex
from dist_ckpt_mistral.mapping.checkpoint_map import CheckpointMap
from dist_ckpt_mistral.mapping.configuration import checkpoint_config, matched
from dist_ckpt_mistral.mapping.twins import require_equal_heads
from dist_ckpt_mistral.model.config.mistral_config import ChosenConfig, GivenConfig, chosen_config
from dist_ckpt_mistral.model.table.entries import split_state_key, state_key
from dist_ckpt_mistral.storage.remote_path import as_path

_LOG = logging.getLogger(__name__)


def migrate(
    checkpoint: str | Path,
    target: str | Path,
    *,
    config: GivenConfig | None = None,
    output: Output = DEFAULT_OUTPUT,
    effort: Effort = DEFAULT_EFFORT,
    ranks: Ranks = ALONE,
) -> Conversion:
    """Convert a checkpoint in one of Megatron's legacy formats, ``zarr`` or ``torch``, to ``torch_dist``.

    Of ``zarr``, all tensors, optimizer state included, keep their keys, shapes, chunks and bits. Objects keep their
    values; the common state and the small files keep their bytes. Of ``torch``, the weights of all ranks, with the
    state of a plain optimizer, become the chunks of one model, and the common state keeps its plain values. Flat
    optimizer state and generator states stay behind.

    Args:
        checkpoint: Root of a zarr checkpoint (megatron-core 0.15 or older) or of one in the legacy torch format
            (``mp_rank_*``), or one ``iter_*`` or ``release`` directory in it.
        target: Checkpoint to create.
        config: Configuration for a checkpoint in the legacy torch format that has lost its own. Others need none.
        output: How to write the checkpoint. A data file holds at most ``max_file_bytes`` of tensors, or one larger
            chunk.
        effort: Threads and memory to use.
        ranks: The processes that share the work; by default this one alone.

    Returns:
        The files that were written, or with ``output.dry_run`` would be.

    Raises:
        FormatError: The checkpoint is damaged, or is not in a legacy format.
        ConfigError: A checkpoint in the legacy torch format has no configuration, or contradictory ones.
        TensorMismatchError: Tensors of it are missing, unknown or of another shape.
        UnsafePickleError: An object asks for something outside the allowlist.
        OutputError: ``target`` cannot be written. Nothing is published.

    Example:
        >>> dist_ckpt_mistral.migrate("old", "ckpt").config_from  # doctest: +SKIP
        'none is needed'
    """
    require_types(migrate, **locals())
    return rewrite(
        as_path(checkpoint),
        as_path(target),
        lambda stored: _migrated(stored, config, output.max_file_bytes),
        output=output,
        effort=effort,
        ranks=ranks,
    )


def _migrated(stored: StoredCheckpoint, config: GivenConfig | None, max_file_bytes: int) -> Rewriting:
    """The new content of a checkpoint in a legacy format."""
    if stored.is_of_modules:
        return _joined(stored, chosen_config(config), max_file_bytes)
    if stored.backend != ZARR:
        raise FormatError(
            f"{stored.directory} is a {stored.backend} checkpoint: expected one in zarr, torch or an FSDP format. "
            "To cut new chunks, use reshard."
        )
    return _unchanged(stored, max_file_bytes)


def _unchanged(stored: StoredCheckpoint, max_file_bytes: int) -> Rewriting:
    """All that is stored, with the same chunks, in files of at most ``max_file_bytes``."""
    if not (stored.directory / COMMON_FILE).exists():
        raise FormatError(
            f"{stored.directory} has no {COMMON_FILE}, and Megatron does not load a checkpoint without it. "
            "Copy the checkpoint again, whole."
        )
    tensors = stored.index(stored.tensors)
    objects = new_objects(stored, {})
    files = _FileNumbers(max_file_bytes)
    return Rewriting(
        stored=stored,
        config_from="none is needed",
        tensors=tensors,
        chunks=[*_numbered(_chunks(tensors), files)],
        objects={entry: replace(each, file=files.next(each.num_bytes)) for entry, each in objects.items()},
        ignored=(),
        options={"command": "migrate", "--max-file-size": max_file_bytes},
    )


def _joined(stored: StoredCheckpoint, config: ChosenConfig | None, max_file_bytes: int) -> Rewriting:
    """The model of a legacy ``torch`` checkpoint, with the parts of the ranks for chunks."""
    match = matched(stored, checkpoint_config(stored, config))
    _LOG.info("configuration: %s", match.agreed.source)
    require_equal_heads(match)
    tensors = match.stored.index(match.stored.tensors)
    files, others = _FileNumbers(max_file_bytes), _other_keys(match.found)
    chunks = (replace(chunk, other_keys=others(chunk.mcore_key)) for chunk in _chunks(tensors))
    return Rewriting(
        stored=match.stored,
        config_from=match.agreed.source,
        tensors=tensors,
        chunks=[*_numbered(chunks, files)],
        objects={},
        ignored=left_behind(stored),
        options={
            "command": "migrate",
            "--max-file-size": max_file_bytes,
            "configuration": match.agreed.config.to_hf(),
        },
        new_objects=[empty_extra_states(match.table)],
        new_files=new_common_file(match),
    )


def _other_keys(found: CheckpointMap) -> Callable[[str], tuple[str, ...]]:
    """A function of a key: the other keys of the same tensor, or state of one, for models of other layer specs."""
    also_written = found.also_written()

    def others(key: str) -> tuple[str, ...]:
        state, parameter = split_state_key(key) or ("", key)
        keys = also_written.get(parameter, ())
        return tuple(state_key(each, state) for each in keys) if state else keys

    return others


def _chunks(tensors: TensorIndex) -> Iterator[NewChunk]:
    """The stored chunks, all in file 0."""
    for tensor in tensors.tensors.values():
        for offset, shape in chunk_boxes(tensor):
            yield NewChunk(
                mcore_key=tensor.name,
                dtype=tensor.dtype,
                global_shape=tensor.global_shape,
                offset=offset,
                shape=shape,
                file=0,
            )


def _numbered(chunks: Iterable[NewChunk], files: _FileNumbers) -> Iterator[NewChunk]:
    """The chunks in the files that they go into."""
    for chunk in chunks:
        yield replace(chunk, file=files.next(math.prod(chunk.shape) * dtypes.itemsize_bytes(chunk.dtype)))


class _FileNumbers:
    """The number of a file for each of many sizes, in bytes, so that files are filled one after the other."""

    def __init__(self, max_file_bytes: int) -> None:
        self._max_file_bytes, self._file, self._file_bytes = max_file_bytes, 0, 0

    def next(self, num_bytes: int) -> int:
        """The number of the file for ``num_bytes`` more."""
        if self._file_bytes and self._file_bytes + num_bytes > self._max_file_bytes:
            self._file, self._file_bytes = self._file + 1, 0
        self._file_bytes += num_bytes
        return self._file
