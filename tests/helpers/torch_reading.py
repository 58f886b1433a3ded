"""What torch's own distributed checkpointing makes of a checkpoint: the oracle for stored bytes, and a tool to edit."""

from __future__ import annotations

import contextlib
import itertools
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorProperties, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load


class _Foreign:
    """Stands in for Megatron's classes, which say nothing about tensors, and which not every torch can import."""

    def __setstate__(self, state: object) -> None:
        """Forget what it was."""


class _MetadataUnpickler(pickle.Unpickler):
    """Python's own unpickler, with torch's own classes."""

    def find_class(self, module_name: str, global_name: str) -> Any:  # noqa: ANN401  (a class or a function)
        return _Foreign if module_name.startswith("megatron.") else super().find_class(module_name, global_name)


@contextlib.contextmanager
def properties_of_any_torch() -> Iterator[None]:
    """Let torch read TensorProperties of torch 2.15, which has a sixth field that older ones trip over."""
    original: Any = TensorProperties.__setstate__
    with mock.patch.object(TensorProperties, "__setstate__", lambda self, state: original(self, state[:5])):
        yield


def read_metadata(directory: Path) -> Metadata:
    """Read ``.metadata`` as torch does, written by whichever version."""
    with properties_of_any_torch(), (directory / ".metadata").open("rb") as file:
        metadata = _MetadataUnpickler(file).load()
    assert isinstance(metadata, Metadata)
    return metadata


@contextlib.contextmanager
def edited_metadata(directory: Path) -> Iterator[Any]:
    """Edit ``.metadata`` as torch's own objects; what is yielded is pickled again by torch's own classes."""
    metadata: Any = read_metadata(directory)
    for name in ("all_local_plans", "mcore_data"):
        vars(metadata).pop(name, None)
    yield metadata
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))


class _Reader(FileSystemReader):
    """A reader that is torch's own but for the unpickling."""

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:  # noqa: ANN401  (torch's signature)
        return read_metadata(Path(self.path))


def load_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, put together by torch's plain DCP."""
    described = read_metadata(directory).state_dict_metadata
    state = {
        key: torch.full(tuple(each.size), 77, dtype=each.properties.dtype)
        for key, each in described.items()
        if isinstance(each, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no process group, and which of its parts torch deprecates
        load(state, storage_reader=_Reader(directory), no_dist=True)
    return state


def load_in_own_shapes(directory: Path) -> dict[str, torch.Tensor]:
    """The same, but optimizer state that Megatron stored as blocks in the shape of its parameter."""
    loaded = load_tensors(directory)
    shapes = {key: tensor.shape for key, tensor in loaded.items() if not key.startswith("optimizer")}
    return {
        key: blocks_put_together(tensor, shapes[key.split(".", 3)[3]]) if key.startswith("optimizer.state") else tensor
        for key, tensor in loaded.items()
    }


def blocks_put_together(stored: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """What Megatron's fully_sharded_model_space stores as [X/x, Y/y, xy], as [X, Y]; other tensors as they are."""
    if stored.shape == shape:
        return stored
    block = [size // blocks for size, blocks in zip(shape, stored.shape[:-1], strict=True)]
    whole = torch.empty(shape, dtype=stored.dtype)
    for index in itertools.product(*map(range, stored.shape[:-1])):
        place = tuple(slice(i * size, (i + 1) * size) for i, size in zip(index, block, strict=True))
        whole[place] = stored[index].reshape(block)
    return whole


def raw_bytes(tensor: torch.Tensor) -> bytes:
    """The row-major bytes of a tensor."""
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def described(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]:
    """Dtype, shape and every bit of tensors, for comparisons that take NaN for equal to itself."""
    return {name: (tensor.dtype, tuple(tensor.shape), raw_bytes(tensor)) for name, tensor in tensors.items()}


def hf_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a directory, as the safetensors library reads them."""
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def objects(directory: Path) -> dict[str, bytes]:
    """The archive of every object, byte for byte."""
    metadata: Any = read_metadata(directory)
    return {
        index.fqn: (directory / at.relative_path).read_bytes()[at.offset : at.offset + at.length]
        for index, at in metadata.storage_data.items()
        if index.offset is None
    }


def stored_boxes(directory: Path) -> dict[tuple[str, tuple[int, ...], tuple[int, ...]], str]:
    """Every chunk of every tensor, by name, offset and sizes: the file that it lies in."""
    metadata: Any = read_metadata(directory)
    files = {(index.fqn, index.offset): at.relative_path for index, at in metadata.storage_data.items()}
    return {
        (name, tuple(chunk.offsets), tuple(chunk.sizes)): files[name, chunk.offsets]
        for name, entry in metadata.state_dict_metadata.items()
        for chunk in getattr(entry, "chunks", ())
    }
