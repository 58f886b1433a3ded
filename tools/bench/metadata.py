"""Open and plan a checkpoint of a million chunks: ``python tools/bench/metadata.py [--torch] [--experts N] ...``.

Makes a sparse checkpoint with optimizer state and with ``.metadata`` as Megatron pickles it. Runs each step in its own
process and prints wall time and processor time in seconds, without imports, peak resident memory in MB, and the memory
that the step added. On a busy machine, compare the processor time. With ``--experts`` the model is a Mixtral:
``--layers 72 --tp 8 --experts 128`` has 897 000 chunks.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from models import make_sparse_checkpoint

from dist_ckpt_mistral.model.config.mistral_config import MistralConfig
from dist_ckpt_mistral.model.config.parts import Experts
from dist_ckpt_mistral.model.layout.layout import ParallelLayout
from dist_ckpt_mistral.model.table.rules import KeyStyle

#: Step -> (its imports, the statement that is timed).
_STEPS = {
    "open .metadata": (
        "import numpy; from dist_ckpt_mistral.formats.stored_checkpoint import open_stored",
        "open_stored(path)",
    ),
    "inspect": ("from dist_ckpt_mistral.cli.main import main", "main(['inspect', str(path)])"),
    "open, locate and plan": (
        "from dist_ckpt_mistral.cli.main import main; import dist_ckpt_mistral.convert.to_hf",
        "main(['to-hf', str(path), str(path) + '-hf', '--dry-run'])",
    ),
    "torch: pickle.load": (
        "import pickle; from torch.distributed.checkpoint import filesystem, metadata, planner",
        "pickle.load((path / '.metadata').open('rb'))",
    ),
}
_SCRIPT = """
import json, pathlib, sys, time
{imports}
path = pathlib.Path(sys.argv[1])
def peak():
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))) >> 10
before, cpu, start = peak(), time.process_time(), time.perf_counter()
{timed}
seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
after = peak()
print(json.dumps({{"s": round(seconds, 2), "cpu_s": round(cpu, 2), "peak_mb": after, "added_mb": after - before}}))
"""


def main() -> None:
    """Make the checkpoint, run each step, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=136)
    parser.add_argument("--tp", type=int, default=256)
    parser.add_argument("--experts", type=int, default=0, help="experts in each layer")
    parser.add_argument(
        "--directory", type=Path, default=None, help="make the checkpoint here and keep it, or use the one that is here"
    )
    parser.add_argument("--torch", action="store_true", help="also time torch's own pickle.load")
    parser.add_argument("--rounds", type=int, default=1)
    arguments = parser.parse_args()
    skipped = set() if arguments.torch else {"torch: pickle.load"}
    with tempfile.TemporaryDirectory() as scratch:
        directory = arguments.directory or Path(scratch) / "checkpoint"
        if not directory.exists():
            print(f"{_make(directory, arguments.layers, arguments.tp, arguments.experts)} chunks")
        for _ in range(arguments.rounds):
            for name, (imports, timed) in _STEPS.items():
                if name not in skipped:
                    script = _SCRIPT.format(imports=imports, timed=timed)
                    print(json.dumps({"step": name, **_run(script, directory)}), flush=True)


def _make(directory: Path, layers: int, tp: int, experts: int) -> int:
    """Make the sparse checkpoint. Returns its number of chunks."""
    size = tp * 128
    mixture = Experts(num_experts=experts, experts_per_token=2, intermediate_size=size) if experts else None
    config = MistralConfig(
        vocab_size=131072,
        hidden_size=16384,
        intermediate_size=size,
        num_hidden_layers=layers,
        num_attention_heads=tp,
        num_key_value_heads=tp,
        head_dim=128,
        dtype="bfloat16",
        model_type="mixtral" if experts else "mistral",
        experts=mixture,
    )
    return make_sparse_checkpoint(
        directory,
        config,
        ParallelLayout(tp=tp),
        style=KeyStyle.STACKED,
        with_optimizer=True,
        weights_only=True,
    )


def _run(script: str, directory: Path) -> dict[str, float]:
    """Run a script and return its measurements, the JSON in its last line."""
    command = [sys.executable, "-c", script, str(directory)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    measured: dict[str, float] = json.loads(output.splitlines()[-1])
    return measured


if __name__ == "__main__":
    main()
