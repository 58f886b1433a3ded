"""Time the live gather over gloo, against a bare broadcast of the same bytes. Run it under torchrun, on a CPU.

    torchrun --nproc-per-node 4 tools/bench/live.py --tp 2 --pp 2

Every round exports the same model to all ranks and to rank 0. With ``--bridge HF`` it is the model that Megatron-Bridge
builds of a Hugging Face directory, and Bridge's own ``export_hf_weights`` has a line in every round too; Bridge must be
installed (see tests/README.md). A line has seconds, seconds for each GB of the model, and the ratio to the broadcast.
``moved`` is what rank 0's network namespace received on the loopback device; ``needed`` is what ranks must receive,
because they are not the main replica of it.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

import dist_ckpt_mistral as dcm
from dist_ckpt_mistral.megatron.live_model import AnyModel, live_parts


def main() -> None:
    """Build a model, and print one line for each way and round."""
    parser = argparse.ArgumentParser()
    for axis in ("tp", "pp", "ep"):
        parser.add_argument(f"--{axis}", type=int, default=1)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--bucket-bytes", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bridge", metavar="HF", help="a dense model of whose files Megatron-Bridge builds a model")
    arguments = parser.parse_args()
    layout = dcm.ParallelLayout(tp=arguments.tp, pp=arguments.pp, ep=arguments.ep)
    theirs: Callable[[], Iterable[object]] | None = None
    if arguments.bridge:
        config = dcm.MistralConfig.from_hf(arguments.bridge)
        model, theirs = _of_bridge(arguments.bridge, layout)
    else:
        config = _config(arguments)
        model = dcm.build_model(config, layout, device="cpu")
    mine = sum(part.values().nbytes for part in live_parts(model))
    num_bytes, others = _sum(mine), _sum(0 if dist.get_rank() == 0 else mine)
    to_all = (dist.get_world_size() - 1) * num_bytes

    def export(to: Literal["all"] | int) -> None:
        for _ in dcm.export_weights(model, config, to=to, bucket_bytes=arguments.bucket_bytes):
            pass

    ways: dict[str, tuple[Callable[[], object], int]] = {
        "broadcast": (lambda: _broadcast(num_bytes), to_all),
        "plan alone": (lambda: dcm.export_weights(model, config, bucket_bytes=arguments.bucket_bytes), 0),
        "to all": (lambda: export("all"), to_all),
        "to rank 0": (lambda: export(0), others),
    }
    if theirs is not None:
        ways["Bridge's export_hf_weights"] = (lambda: deque(theirs(), maxlen=0), to_all)
    floors: list[float] = []
    for number in range(arguments.rounds):
        for name, (way, needed) in ways.items():
            seconds, moved = _timed(way)
            floors += [seconds] if name == "broadcast" else []
            if dist.get_rank() == 0:
                per_gb, ratio = seconds / num_bytes * 1e9, seconds / statistics.median(floors)
                print(
                    f"round {number}, {name}: {seconds:.3f} s, {per_gb:.3f} s/GB, {ratio:.2f} times the broadcast, "
                    f"moved {moved / 1e6:.1f} MB, needed {needed / 1e6:.1f} MB",
                    flush=True,
                )


def _of_bridge(hf: str, layout: dcm.ParallelLayout) -> tuple[AnyModel, Callable[[], Iterable[object]]]:
    """Megatron-Bridge's model of this rank, filled from ``hf``, and how Bridge exports it."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "helpers"))
    bridge_ranks = importlib.import_module("bridge_ranks")  # what Bridge needs on a CPU
    bridge_ranks.import_bridge()
    dist.init_process_group("gloo")
    with bridge_ranks.on_cpu():
        bridge_ranks.take_place(layout)
        auto, model = bridge_ranks.built(hf, {"tp": layout.tp, "pp": layout.pp})
    return model, partial(auto.export_hf_weights, model, cpu=True, show_progress=False)


def _config(arguments: argparse.Namespace) -> dcm.MistralConfig:
    """A model of these sizes; with expert parallelism, of eight experts."""
    hidden = arguments.hidden
    return dcm.MistralConfig(
        vocab_size=32768,
        hidden_size=hidden,
        intermediate_size=hidden * 7 // 2,
        num_hidden_layers=arguments.layers,
        num_attention_heads=hidden // 128,
        num_key_value_heads=max(8, arguments.tp),
        head_dim=128,
        dtype="bfloat16",
        experts=dcm.Experts(num_experts=8, experts_per_token=2, intermediate_size=hidden) if arguments.ep > 1 else None,
    )


def _broadcast(num_bytes: int) -> None:
    """Every rank broadcasts an equal share of ``num_bytes``, 64 MiB at once, into new memory, as exports do."""
    world, message_bytes = dist.get_world_size(), 64 << 20
    for sender in range(world):
        for start in range(0, num_bytes // world, message_bytes):
            size = min(message_bytes, num_bytes // world - start)
            dist.broadcast(torch.empty(size, dtype=torch.uint8), src=sender)


def _timed(way: Callable[[], object]) -> tuple[float, int]:
    """Seconds that all ranks take, and bytes that all have received meanwhile."""
    dist.barrier()
    received, started = _received_bytes(), time.perf_counter()
    way()
    dist.barrier()
    return time.perf_counter() - started, _received_bytes() - received


def _sum(number: int) -> int:
    """The sum over all ranks."""
    value = torch.tensor(number)
    dist.all_reduce(value)
    return int(value)


def _received_bytes() -> int:
    """What the loopback device has received since it was started."""
    lines = Path("/proc/self/net/dev").read_text().splitlines()
    return int(next(line for line in lines if line.strip().startswith("lo:")).split(":")[1].split()[0])


if __name__ == "__main__":
    main()
