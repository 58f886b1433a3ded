"""Legacy zarr checkpoints as tensorstore reads and writes them: with it Megatron reads them, too (to 0.15)."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import tensorstore
import torch
from genuine import shards

from dist_ckpt_mistral.gather.dtypes import Shape

#: What Megatron's ``.zarray`` files call dtypes; ``bfloat16`` it puts there itself.
DTYPES: Final = {
    torch.float64: "<f8",
    torch.float32: "<f4",
    torch.float16: "<f2",
    torch.bfloat16: "bfloat16",
    torch.int64: "<i8",
    torch.int32: "<i4",
    torch.int16: "<i2",
    torch.int8: "|i1",
    torch.uint8: "|u1",
    torch.bool: "|b1",
}
BACKEND: Final = {"sharded_backend": "zarr", "sharded_backend_version": 1, "common_backend": "torch"}


def new_checkpoint(directory: Path) -> Path:
    """An iteration's directory that holds nothing yet."""
    directory.mkdir(parents=True)
    (directory / "metadata.json").write_text(json.dumps(BACKEND))
    torch.save({"iteration": 7}, directory / "common.pt")
    return directory


def copied(case: str, to: Path) -> Path:
    """A copy of a genuine checkpoint's iteration, to spoil."""
    return shutil.copytree(shards(case), to)


def write_array(folder: Path, tensor: torch.Tensor, chunks: Shape) -> None:
    """Have tensorstore write an array, as Megatron has zarr write one: bare chunks, all of them."""
    described = {
        "shape": [*tensor.shape],
        "chunks": [*chunks],
        "dtype": DTYPES[tensor.dtype],
        "zarr_format": 2,
        "order": "C",
        "compressor": None,
        "filters": None,
        "fill_value": None,
    }
    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": str(folder)}, "metadata": described}
    store = tensorstore.open(spec | {"store_data_equal_to_fill_value": True}, create=True).result()
    values = tensor.view(torch.int16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()
    store.write(values.view(store.dtype.numpy_dtype)).result()


def edit_array(folder: Path, **members: Any) -> int:  # noqa: ANN401  (JSON)
    """Change what ``.zarray`` says, and how many letters it has then."""
    said = json.loads((folder / ".zarray").read_bytes())
    return (folder / ".zarray").write_text(json.dumps(said | members))


def read_arrays(directory: Path) -> dict[str, torch.Tensor]:
    """Every array of a checkpoint by its key, as tensorstore reads it."""
    folders = [path.parent for path in directory.glob("*/.zarray") if path.parent.suffix != ".sync"]
    return {folder.name: read_array(folder) for folder in folders}


def read_array(folder: Path) -> torch.Tensor:
    """One array as tensorstore reads it."""
    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": str(folder)}, "fill_missing_data_reads": False}
    store = tensorstore.open(spec, open=True, read=True).result()
    values: Any = np.array(store.read().result(), order="C")
    dtype = {name: each for each, name in DTYPES.items()}[store.spec().to_json()["metadata"]["dtype"]]
    if dtype == torch.bfloat16:
        values = values.view(np.int16)
    tensor = torch.from_numpy(values)
    if tensor.numel() == 0:  # numpy gives those other strides than torch
        tensor = torch.empty(tensor.shape, dtype=tensor.dtype)
    return tensor.view(dtype)


def chunk_files(directory: Path) -> dict[str, int]:
    """How many chunks every array has, by its key."""
    return {
        path.parent.name: sum(not each.name.startswith(".") for each in path.parent.iterdir())
        for path in directory.glob("*/.zarray")
        if path.parent.suffix != ".sync"
    }


def save_objects(directory: Path, objects: Mapping[str, Any], **options: Any) -> None:  # noqa: ANN401  (of torch.save)
    """Save objects as Megatron does, by their keys ``KEY/shard_INDEX_SHAPE``."""
    for key, value in objects.items():
        path = directory / f"{key}.pt"
        path.parent.mkdir(exist_ok=True)
        torch.save(value, path, **options)


def load_objects(directory: Path) -> dict[str, Any]:
    """Every object by its key, as torch loads it."""
    return {
        f"{path.parent.name}/{path.stem}": torch.load(path, weights_only=False)
        for path in directory.glob("*/shard_*.pt")
    }


def unlisted(archives: Mapping[str, bytes]) -> dict[str, Any]:
    """What torch loads from the archives of a ``torch_dist`` checkpoint, each a list of one."""
    loaded = {key: torch.load(io.BytesIO(archive), weights_only=False) for key, archive in archives.items()}
    assert all(type(value) is list and len(value) == 1 for value in loaded.values())
    return {key: value[0] for key, value in loaded.items()}


def in_words(value: Any) -> Any:  # noqa: ANN401  (anything)
    """A value so that two can be compared: tensors and numpy's arrays as dtype, shape and bytes."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, value.tobytes()
    if isinstance(value, dict):
        return {key: in_words(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(in_words, value))
    return value.getvalue() if isinstance(value, io.BytesIO) else value


def numbered(shape: Iterable[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor whose elements differ from their neighbours."""
    shape = tuple(shape)
    count = int(np.prod(shape, dtype=int))
    return (torch.arange(count) % 251).to(torch.float32).reshape(shape).to(dtype)
