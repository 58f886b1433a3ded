"""One rank of a check that Megatron can load a checkpoint: ``RANK=0 python -m dist_ckpt_mistral.megatron.load_check``.

Megatron's own ``dist_checkpointing.load`` fills this rank's sharded state dict. The expected values are computed here
independently of the package, with the safetensors library and torch operations on the original Hugging Face files.
Only the names come from the tensor table. The check needs no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from safetensors import safe_open

from dist_ckpt_mistral.megatron.hf_metadata import HfShardedTensorFactory
from dist_ckpt_mistral.megatron.sharded_state_dict import sharded_state_dict
from dist_ckpt_mistral.model.config.mistral_config import MistralConfig
from dist_ckpt_mistral.model.layout.layout import ParallelLayout


def main() -> None:
    """Join the other ranks, load and compare, and write the result to REPORTS/rankN.json."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tp", type=int, required=True)
    parser.add_argument("--pp", type=int, required=True)
    parser.add_argument("hf", type=Path, help="Hugging Face directory")
    parser.add_argument("checkpoint", help="iteration directory of the checkpoint")
    parser.add_argument("reports", type=Path, help="directory for the results, empty before the first rank starts")
    arguments = parser.parse_args()
    rank = int(os.environ["RANK"])
    layout = ParallelLayout(tp=arguments.tp, pp=arguments.pp)
    dist.init_process_group(
        "gloo",
        init_method=(arguments.reports.absolute() / "rendezvous").as_uri(),
        rank=rank,
        world_size=layout.world_size,
        timeout=timedelta(minutes=5),
    )
    result = check_rank(arguments.hf, arguments.checkpoint, layout, rank)
    (arguments.reports / f"rank{rank}.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def check_rank(hf: Path, checkpoint: str, layout: ParallelLayout, rank: int) -> dict[str, Any]:
    """Load and compare the tensors of ``rank``.

    The result has the rank's layers, its other tensors, their number and size, and the names of those that differ.
    """
    config = MistralConfig.from_hf(hf)
    state = sharded_state_dict(config, layout, rank, padded_vocab_size=config.vocab_size)  # without padding rows
    hf_names = {name: _hf_names(entry) for name, entry in state.items()}
    started = time.perf_counter()
    loaded = dist_checkpointing.load(state, checkpoint)
    load_seconds = time.perf_counter() - started
    tensors = {name: loaded[name] for name, names in hf_names.items() if names}
    originals = _read(hf, [name for names in hf_names.values() for name in names])
    tp_rank = layout.coordinates(rank).tp
    different = [
        name
        for name, tensor in tensors.items()
        if not _is_part(tensor, [originals[hf_name] for hf_name in hf_names[name]], config, layout.tp, tp_rank)
    ]
    return {
        "layers": sorted({int(match[1]) for name in originals if (match := re.search(r"\.layers\.(\d+)\.", name))}),
        "others": sorted(name for name in originals if ".layers." not in name),
        "num_tensors": len(tensors),
        "num_bytes": sum(tensor.nbytes for tensor in tensors.values()),
        "load_seconds": load_seconds,
        "different": different,
    }


def _hf_names(entry: Any) -> tuple[str, ...]:  # noqa: ANN401  (an entry of a sharded state dict)
    """The names of the Hugging Face tensors whose rows an entry holds, in order; empty for objects."""
    parts = entry.build() if isinstance(entry, HfShardedTensorFactory) else [entry]
    return tuple(name for part in parts for name in getattr(part, "hf_names", ()))


def _read(hf: Path, names: Sequence[str]) -> Mapping[str, torch.Tensor]:
    """Read the named tensors from the safetensors files in a directory."""
    tensors = {}
    for path in sorted(hf.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors.update({name: file.get_tensor(name) for name in set(names) & set(file.keys())})
    return tensors


def _is_part(tensor: torch.Tensor, originals: list[torch.Tensor], config: MistralConfig, tp: int, tp_rank: int) -> bool:
    """Whether ``tensor`` equals part ``tp_rank`` of ``tp`` of the original tensors, bit for bit.

    The originals are query, key and value; gate and up; or a single tensor.
    """
    if len(originals) == 3:  # noqa: PLR2004  (query, key, value: interleaved by query group)
        groups = [original.view(config.num_key_value_heads, -1, config.hidden_size) for original in originals]
        expected = torch.cat(groups, dim=1).flatten(0, 1).chunk(tp)[tp_rank]
    elif len(originals) == 2:  # noqa: PLR2004  (gate and up, each cut by itself)
        expected = torch.cat([original.chunk(tp)[tp_rank] for original in originals])
    else:
        expected = originals[0]
        for axis, size in enumerate(tensor.shape):
            if size != expected.shape[axis]:
                expected = expected.chunk(tp, axis)[tp_rank]
    return torch.equal(tensor.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))


if __name__ == "__main__":
    main()
