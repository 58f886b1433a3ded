"""Migration: a legacy ``zarr`` checkpoint again, all of it, as ``torch_dist``, the format of every later Megatron.

Megatron removed its zarr backend (megatron-core 0.16). No model needs to be known: whatever Megatron saved keeps its
key, its shape, its chunks and its bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from dist_ckpt_mistral.convert.conversion import Conversion
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


def migrate(
    checkpoint: str | Path,
    target: str | Path,
    *,
    output: Output = DEFAULT_OUTPUT,
    effort: Effort = DEFAULT_EFFORT,
    ranks: Ranks = ALONE,
) -> Conversion:
    """Write a legacy ``zarr`` checkpoint as ``torch_dist``.

    All tensors keep keys, shapes, chunks and bits, optimizer state included; objects keep their values, common state
    and small files their bytes.

    Args:
        checkpoint: Root of a zarr checkpoint (megatron-core 0.15 or older), or one ``iter_*`` directory in it.
        target: Checkpoint to create.
        output: How the checkpoint is written; a data file holds ``max_file_bytes`` of tensors, or one larger chunk.
        effort: How much of the machine to use.
        ranks: The processes that share the work; by default this one alone.

    Returns:
        What was written, or with ``output.dry_run`` would be.

    Raises:
        DistCkptMistralError: The checkpoint is damaged or no zarr checkpoint, or ``target`` cannot be written. Then
            nothing is published.
    """
    return rewrite(
        Path(checkpoint),
        Path(target),
        lambda stored: _as_it_is(stored, output.max_file_bytes),
        output=output,
        effort=effort,
        ranks=ranks,
    )


def _as_it_is(stored: StoredCheckpoint, max_file_bytes: int) -> Rewriting:
    if stored.backend != ZARR:
        raise FormatError(
            f"{stored.directory} is a {stored.backend} checkpoint: expected a legacy zarr one. "
            "What is to be cut anew is for reshard."
        )
    if not (stored.directory / COMMON_FILE).exists():
        raise FormatError(
            f"{stored.directory} has no {COMMON_FILE}, without which no Megatron loads it. "
            "Copy the checkpoint again, whole."
        )
    tensors = stored.index(stored.tensors)
    chunks, objects = [*_chunks(tensors)], new_objects(stored, {})
    sizes = [math.prod(each.shape) * dtypes.itemsize_bytes(each.dtype) for each in chunks]
    files = _filled([*sizes, *(each.num_bytes for each in objects.values())], max_file_bytes)
    return Rewriting(
        stored=stored,
        config_from="none is needed",
        tensors=tensors,
        chunks=[replace(chunk, file=next(files)) for chunk in chunks],
        objects={entry: replace(each, file=next(files)) for entry, each in objects.items()},
        ignored=(),
        options={"command": "migrate", "--max-file-size": max_file_bytes},
    )


def _chunks(tensors: TensorIndex) -> Iterator[NewChunk]:
    """The chunks as they are."""
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


def _filled(sizes: Iterable[int], most_bytes: int) -> Iterator[int]:
    """Yield the number of the file for each of ``sizes``: they fill files, one after the other, in this order."""
    file = filled = 0
    for size in sizes:
        if filled and filled + size > most_bytes:
            file, filled = file + 1, 0
        filled += size
        yield file
