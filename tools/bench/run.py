"""Compare conversions with ``cp`` of the same bytes: ``python tools/bench/run.py --work DIR [--rounds 5] ...``.

Commands run with their default options. Each round runs each command once, with a ``cp`` before and after it, because
the speed of a machine may drift. The summary has seconds and the ratio to the mean of the two ``cp``s, as minimum,
median and maximum, processor time a gigabyte of output and its ratio to that of ``cp`` (medians), and peak resident
memory including libraries. Each round is appended to a results file, one JSON object a line.

"warm" reads sources from the page cache. "cold" reads them from the disk: it drops the page cache before each command,
as root. Both end without waiting for the disk (``--no-sync``), like ``cp``. "durable" is warm and waits until the
output is on the disk, as commands do by default, also for ``cp`` (``sync -f``). "to-hf-sha256" measures what
``--sha256`` costs. "floor" is floor.c, compiled with ``cc``: two threads that only copy the same files. A name may end
in the value of ``--memory``, such as "to-hf@2MiB", to compare sizes of buffers.

A hypervisor takes idle memory back within seconds. Using it again costs seconds a gigabyte. So each output, also of
``cp``, stays until just before the next run, which gets its memory. The first ``cp`` of a mode is not counted. Python's
bytecode is cached in DIR/bytecode, as it is for installed modules.
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
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from models import CASES, config_of_size, model_bytes

from dist_ckpt_mistral.cli.values import size
from dist_ckpt_mistral.storage.documents import total_bytes

HERE = Path(__file__).parent
TOOL = [sys.executable, "-m", "dist_ckpt_mistral"]
#: torchrun starts two ranks, and the first one works with as many threads as alone. The difference is torchrun's start.
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "dist_ckpt_mistral"]
COMMANDS = ("to-hf", "to-hf-sha256", "from-hf", "verify", "reshard", "to-hf-2-ranks")
PEERS = ("dcp-full", "model", "floor")
#: The folder of all outputs, and of nothing else.
OUTPUTS = "bench-outputs"
#: Threads and bytes of a write of "floor", as conversions use them on two cores.
FLOOR = ("2", str(64 << 10))


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """The measurements of one command. Processor time includes that of its children."""

    seconds: float
    processor_s: float
    peak_mb: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Contest:
    """A command, its input and output, and the baseline that copies (or compares) the same ``moved_bytes``."""

    name: str
    command: list[str]
    source: Path
    output: Path
    baseline: list[str]
    moved_bytes: int


def timed(command: list[str], *, sync: Path | None = None) -> Run:
    """Run and measure a command; with ``sync``, until the file system of that path has written everything."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    _, status, usage = os.wait4(process.pid, 0)
    errors = process.stderr.read().decode() if process.stderr else ""
    if status != 0:
        raise SystemExit(f"{' '.join(command)} failed: {errors[-2000:]}")
    if sync is not None:
        subprocess.run(["sync", "-f", str(sync)], check=True)
    return Run(
        seconds=time.perf_counter() - start,
        processor_s=usage.ru_utime + usage.ru_stime,
        peak_mb=usage.ru_maxrss / 1024,
    )


def contests(work: Path, case: str, names: list[str], *, no_sync: bool) -> Iterator[Contest]:
    """Yield the named commands for the checkpoint ``case``. Their baseline copies what the command copies."""
    hf, checkpoint, copy = work / CASES[case].hf, work / case, work / OUTPUTS / "cp"
    tp, pp = CASES[case].tp, CASES[case].pp
    for full_name in names:
        name, _, memory = full_name.partition("@")
        extra = [*(["--no-sync"] if no_sync else []), *(["--memory", memory] if memory else [])]
        output = work / OUTPUTS / full_name
        if name == "floor":
            files = [str(file) for file in files_in(hf)]
            command, source = [str(work / "floor"), *FLOOR, *files, str(output)], hf
        elif name in PEERS:
            command, source = [sys.executable, str(HERE / "peers.py"), name, str(checkpoint), str(output)], checkpoint
        elif name == "from-hf":
            command = [*TOOL, name, str(hf), str(output), "--tp", str(tp), "--pp", str(pp), *extra]
            source = hf
        elif name == "verify":
            command, source = [*TOOL, name, str(checkpoint), str(hf)], checkpoint
        elif name == "reshard":
            command, source = [*TOOL, name, str(checkpoint), str(output), "--tp", "4", *extra], checkpoint
        elif name == "to-hf-2-ranks":
            command, source = [*TORCHRUN, "to-hf", str(checkpoint), str(output), *extra], checkpoint
        elif name == "to-hf-sha256":
            command, source = [*TOOL, "to-hf", str(checkpoint), str(output), "--sha256", *extra], checkpoint
        else:
            command, source = [*TOOL, name, str(checkpoint), str(output), *extra], checkpoint
        moved = checkpoint if name == "reshard" else hf
        baseline, moved_bytes = ["cp", "-r", str(moved), str(copy)], total_bytes(files_in(moved))
        if name == "verify":
            baseline = ["sh", "-c", 'for f in "$0"/*.safetensors; do cmp "$f" "$1/${f##*/}" || exit 1; done']
            baseline = [*baseline, str(hf), str(twin(hf))]
        yield Contest(
            name=full_name,
            command=command,
            source=source,
            output=output,
            baseline=baseline,
            moved_bytes=moved_bytes,
        )


def twin(hf: Path) -> Path:
    """The copy of the Hugging Face files for ``cmp``; made if it does not exist."""
    copy = hf.with_name(f"{hf.name}-twin")
    if not copy.exists():
        shutil.copytree(hf, copy)
    return copy


def files_in(folder: Path) -> list[Path]:
    """All files in a folder and its subfolders."""
    return [file for file in sorted(folder.rglob("*")) if file.is_file()]


def measure(work: Path, case: str, mode: str, rounds: int, names: list[str], results: Path) -> None:
    """Run all rounds of one mode, and print their summary."""
    sync = work if mode == "durable" else None
    runs: dict[str, list[tuple[Run, Run, float]]] = defaultdict(list)
    baseline(next(contests(work, case, names, no_sync=True)), work, mode)
    for number in range(rounds):
        for contest in contests(work, case, names, no_sync=mode != "durable"):
            before = baseline(contest, work, mode)
            prepare([contest.source], work, mode)
            run = timed(contest.command, sync=sync)
            base = mean_of(before, baseline(contest, work, mode))
            runs[contest.name].append((run, base, contest.moved_bytes / 1e9))
            fields = {"case": case, "mode": mode, "round": number, "command": contest.name}
            with results.open("a") as file:
                file.write(json.dumps(fields | asdict(run) | {"baseline": asdict(base)}) + "\n")
    for name, done in runs.items():
        ratios, seconds = [run.seconds / base.seconds for run, base, _ in done], [run.seconds for run, _, _ in done]
        print(
            f"{case:10}{mode:9}{name:15}{min(seconds):7.2f}{statistics.median(seconds):8.2f} s   ratio "
            f"{min(ratios):5.2f} min {statistics.median(ratios):5.2f} median {max(ratios):5.2f} max   "
            f"processor {statistics.median(run.processor_s / size_gb for run, _, size_gb in done):5.2f} s/GB, ratio "
            f"{statistics.median(run.processor_s / base.processor_s for run, base, _ in done):5.2f}   "
            f"{max(run.peak_mb for run, _, _ in done):6.0f} MB",
            flush=True,
        )


def mean_of(first: Run, second: Run) -> Run:
    """The mean of two runs."""
    return Run(
        seconds=(first.seconds + second.seconds) / 2,
        processor_s=(first.processor_s + second.processor_s) / 2,
        peak_mb=max(first.peak_mb, second.peak_mb),
    )


def baseline(contest: Contest, work: Path, mode: str) -> Run:
    """Run and measure the baseline of a command."""
    source, other = map(Path, contest.baseline[-2:])
    prepare([source, other] if contest.name == "verify" else [source], work, mode)
    return timed(contest.baseline, sync=work if mode == "durable" else None)


def prepare(sources: list[Path], work: Path, mode: str) -> None:
    """Bring the page cache into the state of ``mode``; delete outputs of runs before, whose memory comes next."""
    subprocess.run(["sync"], check=True)
    if mode == "cold":
        delete_outputs(work)
        Path("/proc/sys/vm/drop_caches").write_text("3")
        return
    files = [str(file) for source in sources for file in files_in(source)]
    subprocess.run(["cat", *files], stdout=subprocess.DEVNULL, check=True)
    delete_outputs(work)


def delete_outputs(work: Path) -> None:
    """Delete what runs have written."""
    shutil.rmtree(work / OUTPUTS, ignore_errors=True)
    (work / OUTPUTS).mkdir()


def compile_floor(work: Path) -> None:
    """Make the program of "floor"."""
    subprocess.run(["cc", "-O2", "-pthread", "-o", str(work / "floor"), str(HERE / "floor.c")], check=True)


def command_name(text: str) -> str:
    """Parse the name of a command, with a size of buffers or without."""
    name, _, memory = text.partition("@")
    if name not in (*COMMANDS, *PEERS):
        raise argparse.ArgumentTypeError(f"expected one of {', '.join((*COMMANDS, *PEERS))}, got {name!r}")
    if memory:
        size(memory)
    return text


def main() -> None:
    """Make the model and the checkpoint, measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="directory with room for about five times --size")
    parser.add_argument(
        "--size",
        type=size,
        default="4GB",
        help="size of the weights (default 4GB); the case optimizer has 7 times that",
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--case",
        choices=CASES,
        default="tp2pp2",
        help="layout and keys of the checkpoint, or number of files that it is exported to",
    )
    parser.add_argument("--modes", nargs="+", choices=("warm", "durable", "cold"), default=["warm", "durable"])
    parser.add_argument(
        "--commands",
        nargs="+",
        type=command_name,
        help=f"commands to run, of {', '.join((*COMMANDS, *PEERS))}; peers.py describes the last",
    )
    parser.add_argument("--results", type=Path, default=Path("results.jsonl"))
    arguments = parser.parse_args()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["PYTHONPYCACHEPREFIX"] = str(arguments.work.absolute() / "bytecode")
    case = CASES[arguments.case]
    names = arguments.commands or [name for name in COMMANDS if case.is_import or name != "verify"]
    config = config_of_size(arguments.size)
    # In another process: a child's peak memory includes what its parent had used before exec.
    make = [sys.executable, str(HERE / "models.py"), arguments.case, str(arguments.size), str(arguments.work)]
    subprocess.run(make, check=True)
    print(f"{model_bytes(config) / 1e9:.2f} GB in {config.num_hidden_layers} layers, {os.cpu_count()} cores")
    if any(name.partition("@")[0] == "floor" for name in names):
        compile_floor(arguments.work)
    for mode in arguments.modes:
        measure(arguments.work, arguments.case, mode, arguments.rounds, names, arguments.results)
    shutil.rmtree(arguments.work / OUTPUTS)


if __name__ == "__main__":
    main()
