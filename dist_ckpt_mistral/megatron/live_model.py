"""What a rank holds of a live model: the main replicas of its tensors, found through Megatron's own entries."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, is_main_replica

from dist_ckpt_mistral.gather.dtypes import require_known
from dist_ckpt_mistral.mapping.live_source import RankBox
from dist_ckpt_mistral.megatron.runtime import without_cuda
from dist_ckpt_mistral.model.table.entries import why_ignored

#: A rank's model: a GPTModel, in any wrappers (DDP, Float16Module), or the list of its model chunks.
AnyModel: TypeAlias = torch.nn.Module | Sequence[torch.nn.Module]


@dataclass(frozen=True, slots=True, kw_only=True)
class LivePart:
    """A part of a stored tensor in this rank's memory: its box, and its values, which may be made when asked for."""

    box: RankBox
    values: Callable[[], torch.Tensor]


def live_parts(model: AnyModel) -> list[LivePart]:
    """The parts of stored tensors that this rank is the main replica of, in the order of Megatron's entries."""
    parts, position = [], 0
    for chunk in model_chunks(model):
        with contextlib.nullcontext() if torch.cuda.is_available() else without_cuda():
            entries = chunk.sharded_state_dict()
        for entry, values in _sharded_tensors(entries):
            if why_ignored(entry.key) or not is_main_replica(entry.replica_id):
                continue
            box = RankBox(
                mcore_key=entry.key,
                dtype=require_known(str(entry.dtype).removeprefix("torch."), repr(entry.key)),
                global_shape=tuple(entry.global_shape),
                global_offset=tuple(entry.global_offset),
                shape=(*(1,) * entry.prepend_axis_num, *entry.local_shape),
                position=position,
            )
            parts.append(LivePart(box=box, values=values))
            position += math.prod(box.shape) * entry.dtype.itemsize
    return parts


def model_chunks(model: AnyModel) -> list[Any]:
    """The GPTModels of a rank's model, without their wrappers."""
    return [_unwrapped(chunk) for chunk in (model if isinstance(model, Sequence) else [model])]


def _unwrapped(chunk: Any) -> Any:  # noqa: ANN401  (a module)
    while isinstance(inner := getattr(chunk, "module", None), torch.nn.Module):
        chunk = inner
    return chunk


def device_of(model: AnyModel) -> torch.device:
    """The device of a rank's model; of a rank without any parameters, CUDA if available, else the CPU."""
    for chunk in model_chunks(model):
        for parameter in chunk.parameters():
            return torch.device(parameter.device)
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _sharded_tensors(entries: object) -> Iterator[tuple[ShardedTensor, Callable[[], torch.Tensor]]]:
    """Yield the ShardedTensors among nested ``entries`` and those that factories make, each with its values."""
    for entry in _leaves(entries):
        if isinstance(entry, ShardedTensor):
            yield entry, entry.data.detach
        elif isinstance(entry, ShardedTensorFactory):
            for number, built in enumerate(_built(entry)):
                if built.data.untyped_storage().data_ptr() == entry.data.untyped_storage().data_ptr():
                    yield built, built.data.detach
                else:  # GroupedMLP (moe/experts.py, to 0.16) transposes: its copies must not all exist at once
                    yield built.without_data(), partial(_built_again, entry, number)


def _leaves(entries: object) -> Iterator[object]:
    """Yield what is in nested dicts, lists and tuples."""
    if isinstance(entries, dict | list | tuple):
        for each in entries.values() if isinstance(entries, dict) else entries:
            yield from _leaves(each)
    else:
        yield entries


def _built(factory: ShardedTensorFactory) -> list[ShardedTensor]:
    return [entry for entry in _leaves(factory.build()) if isinstance(entry, ShardedTensor)]


def _built_again(factory: ShardedTensorFactory, number: int) -> torch.Tensor:
    values: torch.Tensor = _built(factory)[number].data
    return values.detach()
