"""Migration: a legacy ``zarr`` checkpoint again, all of it, as ``torch_dist``, the format of every later Megatron.

Megatron removed its zarr backend (megatron-core 0.16). No model needs to be known: whatever Megatron saved keeps its
key, its shape, its chunks and its bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final

from dist_ckpt_mistral.convert.conversion import Conversion
from dist_ckpt_mistral.convert.ranks import ALONE, Ranks
from dist_ckpt_mistral.convert.rewrite import Rewriting, new_objects, own_boxes, rewrite
from dist_ckpt_mistral.errors import ConfigError, FormatError
from dist_ckpt_mistral.formats.stored_checkpoint import ZARR, StoredCheckpoint
from dist_ckpt_mistral.formats.torch_dist.common_state import COMMON_FILE
from dist_ckpt_mistral.formats.torch_dist.writer import NewChunk
from dist_ckpt_mistral.gather import dtypes
from dist_ckpt_mistral.gather.execute import DEFAULT_EFFORT, Effort
from dist_ckpt_mistral.gather.index import TensorIndex

#: How much a data file holds, unless one chunk or object has more.
FILE_BYTES: Final = 5_000_000_000


def migrate(
    checkpoint: str | Path,
    output: str | Path,
    *,
    max_file_bytes: int = FILE_BYTES,
    manifest: bool = True,
    overwrite: bool = False,
    resume: bool = False,
    dry_run: bool = False,
    effort: Effort = DEFAULT_EFFORT,
    ranks: Ranks = ALONE,
) -> Conversion:
    """Write a legacy ``zarr`` checkpoint (root or iteration) as ``torch_dist``.

    All tensors keep keys, shapes, chunks and bits, optimizer state included; objects keep their values, common state
    and small files their bytes. A data file holds ``max_file_bytes`` of tensors, or one chunk that is larger.
    ``manifest`` adds integrity.json. ``resume`` goes on with what a run that was killed or failed has copied;
    ``dry_run`` checks everything and touches nothing. Raises DistCkptMistralError; then nothing is published.
    """
    return rewrite(
        Path(checkpoint),
        Path(output),
        lambda stored: _as_it_is(stored, max_file_bytes),
        manifest=manifest,
        overwrite=overwrite,
        resume=resume,
        dry_run=dry_run,
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
    if max_file_bytes < 1:
        raise ConfigError(f"max_file_bytes: expected at least 1, got {max_file_bytes}")
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
        for offset, shape in own_boxes(tensor):
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
