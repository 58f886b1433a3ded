"""A stored model as torch's distributed checkpoint (DCP) reads one, by Hugging Face name."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from dist_ckpt_mistral.arguments import require_types
from dist_ckpt_mistral.errors import PlanError
from dist_ckpt_mistral.gather.execute import DEFAULT_EFFORT, Effort, MemoryTarget, execute
from dist_ckpt_mistral.gather.plan import only_dtype
from dist_ckpt_mistral.mapping.rank_plan import HeldArray, box_array, plan_arrays
from dist_ckpt_mistral.model.config.mistral_config import GivenConfig
from dist_ckpt_mistral.views.lazy import opened


class HfNamedReader(StorageReader):
    """Lets ``torch.distributed.checkpoint.load`` read any model that this package opens, by Hugging Face name.

    What it loads into may be plain tensors or DTensors, sharded or replicated, at any layout: every rank reads the
    bytes of its own parts, straight out of the stored chunks. Values of another dtype are converted as ``Tensor.copy_``
    does. Names are those of files on the hub, and what transformers calls the same tensors in memory: packed experts,
    and the tied head. Unlike torch's own reader it unpickles nothing (torch 2.13,
    distributed/checkpoint/filesystem.py).

    Args:
        source: A Megatron checkpoint (root or iteration directory), a Hugging Face directory, or a hub id.
        config: For a checkpoint that lost its configuration: a ``MistralConfig``, a config.json, or a directory or hub
            id with one.
        effort: Number of threads and size of the copy buffers.

    Raises:
        DistCkptMistralError: The model is damaged, contradicts its configuration, or cannot be read.

    Example:
        torch.distributed.checkpoint.load(model.state_dict(), storage_reader=dcm.HfNamedReader("ckpt"))
    """

    def __init__(
        self, source: str | Path, config: GivenConfig | None = None, *, effort: Effort = DEFAULT_EFFORT
    ) -> None:
        """Open the model; no tensor is read yet."""
        require_types(HfNamedReader.__init__, **locals())
        self._source, self._inputs = opened(source, config)
        self._effort = effort

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:  # noqa: ANN401  (as StorageReader)
        """The shape and dtype of every tensor, each as one chunk."""
        tensors = self._source.table.hf_tensors()
        described = dict[str, TensorStorageMetadata]()
        for hf_name, links in self._source.links.items():
            size = torch.Size(tensors[hf_name].shape)
            dtype = getattr(torch, only_dtype(self._source.index, links))
            described[hf_name] = TensorStorageMetadata(
                properties=TensorProperties(dtype=dtype),
                size=size,
                chunks=[ChunkStorageMetadata(offsets=torch.Size([0] * len(size)), sizes=size)],
            )
        by_any_name = _ByAnyName(described, self._source.table.usual_name)
        return Metadata(state_dict_metadata=by_any_name, storage_data={}, storage_meta=StorageMeta())

    @torch.no_grad()
    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read the boxes that ``plan`` asks for. Raises PlanError if it asks for something other than tensors."""
        if other := [item.storage_index.fqn for item in plan.items if item.type is not LoadItemType.TENSOR]:
            raise PlanError(f"{self._source.path} holds tensors alone, and the plan asks for objects: {other}")
        wanted = [(item, planner.resolve_tensor(item).detach()) for item in plan.items]
        filled = [(item, target) for item, target in wanted if math.prod(item.lengths)]
        arrays = [self._array(number, item) for number, (item, _) in enumerate(filled)]
        copies = plan_arrays(self._source, arrays)
        direct, others = dict[int, torch.Tensor](), dict[int, torch.Tensor]()
        for number, ((_, target), array) in enumerate(zip(filled, arrays, strict=True)):
            is_bytes = target.is_cpu and target.is_contiguous() and target.dtype is getattr(torch, array.dtype)
            (direct if is_bytes else others)[number] = target

        def fill(places: dict[int, torch.Tensor]) -> None:
            with self._inputs:
                targets = {number: MemoryTarget(_bytes_of(place)) for number, place in places.items()}
                execute(copies, targets, effort=self._effort, numbers=[*places], checksums=False)

        self._effort.progress.phase("load", copies.num_bytes)
        if direct:
            fill(direct)
        for number, target in others.items():
            halfway = torch.empty(arrays[number].shape, dtype=getattr(torch, arrays[number].dtype))
            fill({number: halfway})
            target.copy_(halfway)
        for item, target in wanted:
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _array(self, number: int, item: ReadItem) -> HeldArray:
        """The box that one item of a plan asks for, in its stored dtype."""
        hf_name = self._source.table.usual_name(item.storage_index.fqn)
        dtype = only_dtype(self._source.index, self._source.links[hf_name])
        name = f"{hf_name} ({number})"
        return box_array(name, dtype, hf_name, tuple(item.storage_offsets), tuple(item.lengths))

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Do nothing: the reader stays at the model that it was made for."""

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *_: Any, **__: Any) -> None:  # noqa: ANN401
        """Do nothing: everything is known since the model was opened."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Return ``plan``."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Return ``plans``: every rank reads by itself."""
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Refuse every identifier: DCP would take this class for a path by itself."""
        del checkpoint_id
        return False


class _ByAnyName(dict[str, Any]):
    """Descriptions of tensors by the usual Hugging Face name, which are found by every name that files have."""

    def __init__(self, described: Mapping[str, TensorStorageMetadata], usual_name: Callable[[str], str]) -> None:
        super().__init__(described)
        self._usual_name = usual_name

    def __contains__(self, name: object) -> bool:
        return super().__contains__(self._usual_name(str(name)))

    def __getitem__(self, name: str) -> Any:  # noqa: ANN401  (torch's description of a tensor)
        return super().__getitem__(self._usual_name(name))


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    memory: memoryview = tensor.view(-1).view(torch.uint8).numpy().data
    return memory
