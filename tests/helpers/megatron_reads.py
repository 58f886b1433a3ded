"""What Megatron and torch really read: their own loading, rank after rank in one process, with a recorder inside."""

from __future__ import annotations

import functools
import importlib
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import filesystem
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch_reading import read_metadata

from dist_ckpt_mistral.model.config.mistral_config import MistralConfig
from dist_ckpt_mistral.model.layout.layout import ParallelLayout
from dist_ckpt_mistral.model.table.rules import KeyStyle

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata


@dataclass
class Recorded:
    """Tensors that were loaded from files: one entry a load, of the file, the bytes loaded, and those kept."""

    loads: list[tuple[str, int, int]] = field(default_factory=list)
    chunks: set[tuple[str, int]] = field(default_factory=set)

    def as_json(self) -> dict[str, Any]:
        """As ``plan --json`` tells a rank."""
        needed, read = sum(load[2] for load in self.loads), sum(load[1] for load in self.loads)
        files: dict[str, int] = {}
        for file, loaded, _ in self.loads:
            files[file] = files.get(file, 0) + loaded
        return {
            "needed_bytes": needed,
            "read_bytes": read,
            "amplification": read / needed if needed else None,
            "num_reads": len(self.loads),
            "num_chunks": len(self.chunks),
            "files": files,
        }


def reads_of_rank(
    directory: Path,
    config: MistralConfig,
    layout: ParallelLayout,
    rank: int,
    style: KeyStyle = KeyStyle.STACKED,
    states: Sequence[str] = (),
) -> dict[str, Any]:
    """Load one rank with Megatron's own strategy, and tell what was read for it.

    That is the weights or, if there are ``states``, these of each parameter, in entries that Megatron's own optimizers
    make of those of the weights.
    """
    with warnings.catch_warnings(), _rank_alone(rank, max(2, layout.world_size)), _recording() as recorded:
        warnings.simplefilter("ignore")
        factory: Any = importlib.import_module("dist_ckpt_mistral.megatron.sharded_state_dict")
        mapping: Any = importlib.import_module("megatron.core.dist_checkpointing.mapping")
        utils: Any = importlib.import_module("megatron.core.dist_checkpointing.dict_utils")
        strategies: Any = importlib.import_module("megatron.core.dist_checkpointing.strategies.torch")
        state = factory.sharded_state_dict(config, layout, rank, style=style)
        if states:
            optimizer: Any = importlib.import_module("megatron.core.dist_checkpointing.optimizer")
            state = _optimizer_state(state, states, optimizer.make_sharded_optimizer_tensor)
        mapping.apply_factories(state)
        tensors, _ = utils.extract_matching_values(state, lambda each: isinstance(each, mapping.ShardedTensor))
        # 0.16 lets the ranks agree on a plan, which they need not: the plan of a load is each rank's own.
        alone = functools.partial(strategies.checkpoint.load_state_dict, no_dist=True)
        with mock.patch.object(strategies.checkpoint, "load_state_dict", alone):
            strategies.TorchDistLoadShardedStrategy().load(tensors, directory)
    return recorded.as_json()


def _optimizer_state(entries: Any, states: Sequence[str], make: Any) -> dict[str, Any]:  # noqa: ANN401  (Megatron's)
    flat = {name: each for name, each in entries.items() if not isinstance(each, dict)}
    for name, chunk in entries.items():
        if isinstance(chunk, dict):  # one of several model chunks
            flat |= {f"{name}.{each}": entry for each, entry in chunk.items()}
    parameters = {name: each for name, each in flat.items() if hasattr(each, "flattened_range")}
    return {
        f"{state}.{name}": make(each, torch.zeros(_local_shape(each)), f"optimizer.state.{state}")
        for state in states
        for name, each in parameters.items()
    }


def _local_shape(entry: Any) -> tuple[int, ...]:  # noqa: ANN401  (Megatron's)
    """Of an entry, or of one that a factory will make."""
    shape: tuple[int, ...] = entry.local_shape if hasattr(entry, "local_shape") else entry.build_fn.tensor.local_shape
    return shape


@contextmanager
def _rank_alone(rank: int, world_size: int) -> Iterator[None]:
    """A process group of torch's fake backend: this process is ``rank``, and nobody else is there."""
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def _recording() -> Iterator[Recorded]:
    """Record what ``FileSystemReader`` loads: each stored tensor as it comes from its file, and what is kept of it."""
    recorded = Recorded()
    places: list[tuple[str, int]] = []
    slice_file = filesystem.FileSystemReader._slice_file  # noqa: SLF001  (there is no public place to listen)
    narrow: Any = vars(filesystem)["narrow_tensor_by_index"]

    def slicing(reader: Any, file: Any, place: Any) -> Any:  # noqa: ANN401  (torch's signature)
        places.append((place.relative_path, place.offset))
        return slice_file(reader, file, place)

    def reading_metadata(reader: Any, **_: Any) -> Metadata:  # noqa: ANN401  (likewise)
        return read_metadata(Path(reader.path))

    def narrowing(tensor: torch.Tensor, offsets: Any, sizes: Any) -> torch.Tensor:  # noqa: ANN401  (likewise)
        recorded.loads.append((places[-1][0], tensor.nbytes, math.prod(sizes) * tensor.itemsize))
        recorded.chunks.add(places[-1])
        kept: torch.Tensor = narrow(tensor, offsets, sizes)
        return kept

    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(filesystem.FileSystemReader, "_slice_file", slicing))
        patches.enter_context(mock.patch.object(filesystem, "narrow_tensor_by_index", narrowing))
        patches.enter_context(mock.patch.object(filesystem.FileSystemReader, "read_metadata", reading_metadata))
        yield recorded
