"""``migrate``: a legacy ``zarr`` checkpoint in the format ``torch_dist``, which every later Megatron reads.

Megatron removed its zarr backend (megatron-core 0.16). This works for any model: every stored tensor keeps its key,
shape, chunks and bits.
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
from dist_ckpt_mistral.storage.remote_path import as_path


def migrate(
    checkpoint: str | Path,
    target: str | Path,
    *,
    output: Output = DEFAULT_OUTPUT,
    effort: Effort = DEFAULT_EFFORT,
    ranks: Ranks = ALONE,
) -> Conversion:
    """Convert a legacy ``zarr`` checkpoint to ``torch_dist``.

    All tensors, optimizer state included, keep their keys, shapes, chunks and bits. Objects keep their values; the
    common state and the small files keep their bytes.

    Args:
        checkpoint: Root of a zarr checkpoint (megatron-core 0.15 or older), or one ``iter_*`` directory in it.
        target: Checkpoint to create.
        output: How to write the checkpoint. A data file holds at most ``max_file_bytes`` of tensors, or one larger
            chunk.
        effort: Threads and memory to use.
        ranks: The processes that share the work; by default this one alone.

    Returns:
        The files that were written, or with ``output.dry_run`` would be.

    Raises:
        FormatError: The checkpoint is damaged, or is not in the format ``zarr``.
        UnsafePickleError: An object asks for something outside the allowlist.
        OutputError: ``target`` cannot be written. Nothing is published.

    Example:
        >>> dist_ckpt_mistral.migrate("old", "ckpt").config_from  # doctest: +SKIP
        'none is needed'
    """
    return rewrite(
        as_path(checkpoint),
        as_path(target),
        lambda stored: _unchanged(stored, output.max_file_bytes),
        output=output,
        effort=effort,
        ranks=ranks,
    )


def _unchanged(stored: StoredCheckpoint, max_file_bytes: int) -> Rewriting:
    """All that is stored, with the same chunks, in files of at most ``max_file_bytes``."""
    if stored.backend != ZARR:
        raise FormatError(
            f"{stored.directory} is a {stored.backend} checkpoint: expected a legacy zarr one. "
            "To cut new chunks, use reshard."
        )
    if not (stored.directory / COMMON_FILE).exists():
        raise FormatError(
            f"{stored.directory} has no {COMMON_FILE}, and Megatron does not load a checkpoint without it. "
            "Copy the checkpoint again, whole."
        )
    tensors = stored.index(stored.tensors)
    chunks, objects = [*_chunks(tensors)], new_objects(stored, {})
    sizes = [math.prod(chunk.shape) * dtypes.itemsize_bytes(chunk.dtype) for chunk in chunks]
    files = _file_numbers([*sizes, *(new_object.num_bytes for new_object in objects.values())], max_file_bytes)
    return Rewriting(
        stored=stored,
        config_from="none is needed",
        tensors=tensors,
        chunks=[replace(chunk, file=next(files)) for chunk in chunks],
        objects={entry: replace(new_object, file=next(files)) for entry, new_object in objects.items()},
        ignored=(),
        options={"command": "migrate", "--max-file-size": max_file_bytes},
    )


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


def _file_numbers(sizes: Iterable[int], max_file_bytes: int) -> Iterator[int]:
    """Yield the number of a file for each of ``sizes``, in bytes, so that files are filled one after the other."""
    file = file_bytes = 0
    for size in sizes:
        if file_bytes and file_bytes + size > max_file_bytes:
            file, file_bytes = file + 1, 0
        file_bytes += size
        yield file
