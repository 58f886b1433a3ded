"""Index and plan a checkpoint of a million chunks: ``python tools/bench/metadata.py [--layers 128 --tp 512]``.

Makes a checkpoint whose data are holes (optimizer state beside the weights), then times, each in a process of its own,
torch's pickle.load of ``.metadata`` and this package's indexing and planning; prints seconds and peak memory.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from models import make_sparse_checkpoint

from dist_ckpt_mistral.model.config import MistralConfig
from dist_ckpt_mistral.model.parallel_layout import ParallelLayout
from dist_ckpt_mistral.model.tensor_table import KeyStyle

_TORCH = """
import pickle, sys, time, torch.distributed.checkpoint.metadata, torch.distributed.checkpoint.filesystem
start = time.perf_counter()
pickle.load(open(sys.argv[1] + "/.metadata", "rb"))
"""
_INDEX = """
import sys, time, pathlib
from dist_ckpt_mistral import model_source
from dist_ckpt_mistral.formats.torch_dist import open_torch_dist
start = time.perf_counter()
open_torch_dist(pathlib.Path(sys.argv[1]))
"""
_PLAN = """
import sys, time, dist_ckpt_mistral.convert as convert
start = time.perf_counter()
convert.to_hf(sys.argv[1], sys.argv[1] + "-hf", dry_run=True)
"""
_REPORT = """
seconds = time.perf_counter() - start
peak_kib = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(seconds, int(peak_kib) / 1024)
"""


def main() -> None:
    """Make the checkpoint, run each step, print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=128)
    parser.add_argument("--tp", type=int, default=512)
    parser.add_argument("--directory", type=Path, default=None, help="keep the checkpoint here, or use the one there")
    parser.add_argument("--torch", action="store_true", help="also time torch's own pickle.load")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        directory = arguments.directory or Path(scratch) / "checkpoint"
        if not directory.exists():
            print(f"{_make(directory, arguments.layers, arguments.tp)} chunks")
        steps = {"open .metadata": _INDEX, "open, locate and plan": _PLAN}
        if arguments.torch:
            steps["torch: pickle.load"] = _TORCH
        for name, code in steps.items():
            seconds, megabytes = _timed(code, directory)
            print(json.dumps({"step": name, "seconds": round(seconds, 2), "peak_mb": round(megabytes)}))


def _make(directory: Path, layers: int, tp: int) -> int:
    config = MistralConfig(
        vocab_size=131072,
        hidden_size=16384,
        intermediate_size=tp * 128,
        num_hidden_layers=layers,
        num_attention_heads=tp,
        num_key_value_heads=tp,
        head_dim=128,
        dtype="bfloat16",
    )
    layout = ParallelLayout(tp=tp)
    return make_sparse_checkpoint(directory, config, layout, style=KeyStyle.STACKED, with_optimizer=True)


def _timed(code: str, directory: Path) -> tuple[float, float]:
    """Seconds after the imports, and peak resident memory in MiB of the whole process."""
    command = [sys.executable, "-c", code + _REPORT, str(directory)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    seconds, megabytes = map(float, output.split())
    return seconds, megabytes


if __name__ == "__main__":
    main()
