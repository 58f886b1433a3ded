"""Conversions against ``cp`` of the same bytes: ``python tools/bench/run.py --work DIR [--rounds 5] ...``.

Every round runs each command once, ``cp`` before and after, so that a machine whose speed drifts hurts both alike;
outputs of the round before are deleted first. Printed: seconds and ratio to the mean of the two ``cp``s, as minimum and
median, and peak resident memory. Every round is appended to a results file, one JSON object a line.

"warm" reads sources from the page cache, "cold" from the disk (it drops the page cache before each command, as root);
both wait for no disk at the end (``--no-sync``), as ``cp`` does. "durable" is warm and waits until the output is on the
disk, for ``cp`` too (``sync -f``).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from models import config_of_size, make_checkpoint, make_hf_model, model_bytes

HERE = Path(__file__).parent
LAYOUTS = {"tp2pp2": (2, 2), "tp8": (8, 1), "tp1": (1, 1)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One timed command."""

    seconds: float
    peak_mb: float


def timed(command: list[str], *, sync: Path | None = None) -> Run:
    """Run a command to its end; with ``sync``, until the file system of that path has written everything."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    _, status, usage = os.wait4(process.pid, 0)
    errors = process.stderr.read().decode() if process.stderr else ""
    if status != 0:
        raise SystemExit(f"{' '.join(command)} failed: {errors[-2000:]}")
    if sync is not None:
        subprocess.run(["sync", "-f", str(sync)], check=True)
    return Run(seconds=time.perf_counter() - start, peak_mb=usage.ru_maxrss / 1024)


def commands(work: Path, layout: str, peers: list[str], *, no_sync: bool) -> dict[str, tuple[list[str], Path, Path]]:
    """Name -> (command, its input, its output)."""
    tool = [sys.executable, "-m", "dist_ckpt_mistral"]
    extra = ["--no-sync"] if no_sync else []
    tp, pp = LAYOUTS[layout]
    hf, checkpoint = work / "hf", work / layout
    found = {
        "to-hf": ([*tool, "to-hf", str(checkpoint), str(work / "out-hf"), *extra], checkpoint, work / "out-hf"),
        "from-hf": (
            [*tool, "from-hf", str(hf), str(work / "out-ckpt"), "--tp", str(tp), "--pp", str(pp), *extra],
            hf,
            work / "out-ckpt",
        ),
        "verify": ([*tool, "verify", str(checkpoint), str(hf)], checkpoint, work / "out-none"),
    }
    for peer in peers:
        output = work / f"out-{peer}"
        found[peer] = ([sys.executable, str(HERE / "peers.py"), peer, str(checkpoint), str(output)], checkpoint, output)
    return found


def measure(work: Path, layout: str, mode: str, rounds: int, peers: list[str], results: Path) -> None:
    """All rounds of one mode, then the summary."""
    ratios: dict[str, list[float]] = {}
    seconds: dict[str, list[float]] = {}
    peaks: dict[str, list[float]] = {}
    for number in range(rounds):
        for name, (command, source, output) in commands(work, layout, peers, no_sync=mode != "durable").items():
            before = baseline(name, source, work, mode)
            prepare(source, output, mode)
            run = timed(command, sync=work if mode == "durable" else None)
            shutil.rmtree(output, ignore_errors=True)
            after = baseline(name, source, work, mode)
            mean = (before + after) / 2
            seconds.setdefault(name, []).append(run.seconds)
            ratios.setdefault(name, []).append(run.seconds / mean)
            peaks.setdefault(name, []).append(run.peak_mb)
            record = {
                "layout": layout,
                "mode": mode,
                "round": number,
                "command": name,
                "cp_s": mean,
                **asdict(run),
            }
            with results.open("a") as file:
                file.write(json.dumps(record) + "\n")
    for name, values in ratios.items():
        print(
            f"{layout:8}{mode:9}{name:12}{min(seconds[name]):7.2f}{statistics.median(seconds[name]):8.2f} s"
            f"   ratio {min(values):5.2f} min {statistics.median(values):5.2f} median {max(values):5.2f} max"
            f"   {max(peaks[name]):6.0f} MB"
        )


def baseline(name: str, source: Path, work: Path, mode: str) -> float:
    """Seconds of ``cp -r`` of the source; for ``verify``, of ``cmp`` of the Hugging Face files with a copy."""
    target = work / "out-cp"
    prepare(source, target, mode)
    if name == "verify":
        twin = work / "twin"
        if not twin.exists():
            shutil.copytree(work / "hf", twin)
            prepare(source, target, mode)
        pairs = [f"cmp '{file}' '{twin / file.name}'" for file in sorted((work / "hf").glob("*.safetensors"))]
        return timed(["sh", "-c", " && ".join(pairs)]).seconds
    run = timed(["cp", "-r", str(source), str(target)], sync=work if mode == "durable" else None)
    shutil.rmtree(target)
    return run.seconds


def prepare(source: Path, output: Path, mode: str) -> None:
    """Remove the old output, and bring the page cache into the state of ``mode``."""
    shutil.rmtree(output, ignore_errors=True)
    if mode == "cold":
        subprocess.run(["sync"], check=True)
        Path("/proc/sys/vm/drop_caches").write_text("3")
    else:
        for file in sorted(source.rglob("*")):
            if file.is_file():
                with file.open("rb") as stream:
                    while stream.read(1 << 24):
                        pass


def size(text: str) -> int:
    """``4GB`` in bytes."""
    return int(float(text.upper().removesuffix("GB")) * 10**9)


def main() -> None:
    """Make what is missing, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="a directory for some five times --size")
    parser.add_argument("--size", type=size, default="4GB")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layout", choices=LAYOUTS, default="tp2pp2")
    parser.add_argument("--modes", nargs="+", choices=("warm", "durable", "cold"), default=["warm", "durable"])
    parser.add_argument("--peers", nargs="*", default=[], help="dcp-full, model: see peers.py")
    parser.add_argument("--results", type=Path, default=Path("results.jsonl"))
    arguments = parser.parse_args()
    config = config_of_size(arguments.size)
    if not (arguments.work / "hf").exists():
        make_hf_model(arguments.work / "hf", config)
    if not (arguments.work / arguments.layout).exists():
        tp, pp = LAYOUTS[arguments.layout]
        make_checkpoint(arguments.work / arguments.layout, arguments.work / "hf", tp=tp, pp=pp)
    print(f"{model_bytes(config) / 1e9:.2f} GB in {config.num_hidden_layers} layers, {os.cpu_count()} cores")
    for mode in arguments.modes:
        measure(arguments.work, arguments.layout, mode, arguments.rounds, arguments.peers, arguments.results)


if __name__ == "__main__":
    main()
