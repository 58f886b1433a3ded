"""What a rank does with the views of a stored model, beside the tasks of megatron_ranks.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from gpt_stage import Stage
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from reads import counted_reads
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch_reading import properties_of_any_torch, read_metadata
from transformers import AutoConfig, AutoModelForCausalLM

from dist_ckpt_mistral.megatron.load_sharded import LoadStrategy, load
from dist_ckpt_mistral.megatron.sharded_state_dict import sharded_state_dict
from dist_ckpt_mistral.model.config.mistral_config import MistralConfig
from dist_ckpt_mistral.model.layout.layout import ParallelLayout
from dist_ckpt_mistral.model.table.rules import KeyStyle, LayerSpec
from dist_ckpt_mistral.views.torch_dcp import HfNamedReader


def load_entries_anywhere(
    *, config: dict[str, Any], layout: dict[str, Any], style: str, hf: str, at: str, spec: str, stored_rows: int
) -> dict[str, Any]:
    """Load the factory's entries with Megatron from ``at``, and by ``load`` from there and from ``hf``; compare.

    ``stored_rows`` are those of the vocabulary in ``at``. ``different`` has what is not the same, ``padding`` rows out
    of ``hf`` that are not zero behind the vocabulary. The bytes are those read by ``load`` from ``at``, and needed.
    """
    model_config = MistralConfig.from_hf(config)

    def entries() -> dict[str, Any]:
        return sharded_state_dict(
            model_config,
            ParallelLayout(**layout),
            dist.get_rank(),
            dtype="bfloat16",
            style=KeyStyle[style],
            spec=LayerSpec[spec],
        )

    with properties_of_any_torch():
        theirs = _tensors(dist_checkpointing.load(entries(), at))
    applied = entries()
    apply_factories(applied)
    stored: Any = read_metadata(Path(at)).state_dict_metadata
    tensors = [entry for entry in nested_values(applied) if isinstance(entry, ShardedTensor)]
    sizes = [_stored_elements(entry, stored_rows) * stored[entry.key].properties.dtype.itemsize for entry in tensors]
    with counted_reads() as read:
        ours = load(entries(), at, config=model_config)
    read_bytes = sum(read)
    with properties_of_any_torch():
        by_strategy = dist_checkpointing.load(entries(), at, LoadStrategy(config=model_config))
    from_hf = _tensors(load(entries(), hf))
    built = _tensors(load(applied, at, config=model_config))
    vocabulary = {name for name in theirs if name.endswith(("word_embeddings.weight", "output_layer.weight"))}
    tp = ParallelLayout(**layout).coordinates(dist.get_rank()).tp
    padding = []
    for name in vocabulary:
        live = max(0, min(len(theirs[name]), model_config.vocab_size - tp * len(theirs[name])))
        padding += [name] if from_hf[name][live:].any() else []
        padding += [] if torch.equal(from_hf.pop(name)[:live], theirs[name][:live]) else [f"rows of {name}"]
    return {
        "tensors": len(theirs),
        "different": [
            *_different(theirs, _tensors(ours)),
            *_different(theirs, _tensors(by_strategy)),
            *_different({name: each for name, each in theirs.items() if name not in vocabulary}, from_hf),
        ],
        "parts": sum(each.numel() for each in built.values()) - sum(each.numel() for each in theirs.values()),
        "padding": padding,
        "read_bytes": read_bytes,
        "needed_bytes": sum(sizes),
    }


def _stored_elements(entry: ShardedTensor, stored_rows: int) -> int:
    """The elements of an entry that are stored: of the vocabulary, rows may be missing."""
    rows, *columns = entry.local_shape
    if entry.allow_shape_mismatch:
        rows = max(0, min(rows, stored_rows - entry.global_offset[0]))
    return int(rows * torch.Size(columns).numel())


def _flat(state: object, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(state, dict | list):
        for name, each in state.items() if isinstance(state, dict) else enumerate(state):
            yield from _flat(each, f"{path}/{name}")
    else:
        yield path, state


def _tensors(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of a loaded state dict, by their places, without Transformer Engine's extra state."""
    tensors = ((path, each) for path, each in _flat(state) if isinstance(each, torch.Tensor))
    return {path: each.detach() for path, each in tensors if "_extra_state" not in path}


def _different(theirs: dict[str, torch.Tensor], ours: dict[str, torch.Tensor]) -> list[str]:
    """The places where two state dicts do not have the same bits of the same type."""
    return [
        path
        for path in sorted({*theirs, *ours})
        if path not in theirs
        or path not in ours
        or theirs[path].dtype != ours[path].dtype
        or not torch.equal(*(each.contiguous().view(torch.uint8) for each in (theirs[path], ours[path])))
    ]


def load_live_anywhere(
    *, config: dict[str, Any], layout: dict[str, Any], style: str, hf: str, at: str, grouped: bool = False
) -> dict[str, Any]:
    """Load a live model's own entries with Megatron from ``at``, and by ``load`` from there and from ``hf``; compare.

    The models hold NaN before; ``wrong`` are the parameters of one that takes what ``load`` gives.
    """
    model_config = MistralConfig.from_hf(config)
    stage = Stage(model_config, ParallelLayout(**layout), grouped=grouped)

    def entries() -> dict[str, Any]:
        stage.forget()
        return {"model": stage.sharded_state_dict(KeyStyle[style])}

    theirs = {name: each.clone() for name, each in _tensors(_model(dist_checkpointing.load(entries(), at))).items()}
    different, wrong = [], []
    for source in (at, hf):
        loaded = load(entries(), source)
        different += _different(theirs, _tensors(loaded))
        stage.load_state_dict(loaded["model"])
        wrong += stage.differences(_hf_tensors(hf))
    return {"tensors": len(theirs), "different": different, "wrong": wrong}


def _model(loaded: dict[str, Any]) -> dict[str, Any]:
    """What Megatron loaded, without the common state."""
    return {"model": loaded["model"]}


def _hf_tensors(path: str) -> dict[str, torch.Tensor]:
    """The tensors of all safetensors files in a directory."""
    return {name: each for file in sorted(Path(path).glob("*.safetensors")) for name, each in load_file(file).items()}


def load_by_dcp(*, layout: dict[str, Any], truth: str, config: str, sources: list[str]) -> dict[str, Any]:
    """Load a model's tensors by ``torch.distributed.checkpoint`` from each of ``sources``, and compare with ``truth``.

    The tensors are DTensors, cut along one axis each, in turn, and replicated ones; then the parameters of a model of
    transformers that FSDP2 has sharded. ``truth`` is a file, ``config`` its config.json.
    """
    del layout
    expected, world = load_file(truth), dist.get_world_size()
    expected = {name: each for name, each in expected.items() if not name.startswith("RAW.")}
    mesh = init_device_mesh("cpu", (world,))
    result: dict[str, Any] = {"different": [], "read": [], "local": [], "sharded": []}
    for source in sources:
        state = {}
        for number, (name, tensor) in enumerate(expected.items()):
            axis = number % (tensor.dim() + 1)
            placement = Replicate() if axis == tensor.dim() else Shard(axis)
            state[name] = distribute_tensor(torch.zeros_like(tensor), mesh, [placement])
        with counted_reads() as read:
            dcp_load(state, storage_reader=HfNamedReader(source, config))
        result["read"].append(sum(read))
        result["local"].append(sum(each.to_local().nbytes for each in state.values()))
        result["different"] += [name for name, each in state.items() if not _is(each, expected[name])]
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config.removesuffix("/config.json")))
    model = model.to(torch.bfloat16)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for source in sources:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(float("nan"))
        state = model.state_dict()
        with counted_reads() as read:
            dcp_load(state, storage_reader=HfNamedReader(source, config))
        needed = (each.to_local().numel() * expected[name].element_size() for name, each in state.items())
        result["sharded"].append(sum(needed) - sum(read))
        for name, each in model.state_dict().items():
            result["different"] += [] if _is(each, expected[name].bfloat16()) else [f"FSDP2: {name}"]
    result["parameters"] = len(state)
    return result


def _is(tensor: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether a tensor, or a DTensor gathered from all ranks, has the expected bits."""
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return torch.equal(whole.detach().view(torch.uint8), expected.contiguous().view(torch.uint8))
