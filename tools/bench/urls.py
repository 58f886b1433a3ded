"""Compare conversions from bucket to bucket with a plain copy of the same bytes through the same client.

``AWS_ENDPOINT_URL=... python tools/bench/urls.py s3://bucket/bench --work DIR --size 0.5GB --rounds 3``
makes a model in DIR, puts it into the bucket, and prints wall and processor time of each command in ratio to the copy.
Whole processes are timed, with start-up; rounds are interleaved. With a server on the same machine its work counts in
the wall time of both.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from itertools import islice
from pathlib import Path

from models import config_of_size, make_hf_model

from dist_ckpt_mistral.storage.remote_path import RemotePath, as_path
from dist_ckpt_mistral.storage.store import pool

_BLOCK_BYTES = 8 << 20
_AHEAD = 4


def copy_object(source: str, target: str) -> None:
    """Copy one object by ranged reads, a few ahead, into an upload of parts, three in flight."""
    here, there = remote(source), remote(target)
    store, key, size = here.snapshot.store, here.key, here.stat().st_size

    def read(at: int) -> Future[memoryview]:
        return pool().submit(store.read, key, at, min(size, at + _BLOCK_BYTES), None)

    def blocks() -> Iterator[memoryview]:
        starts = iter(range(0, size, _BLOCK_BYTES))
        reads = deque(read(at) for at in islice(starts, _AHEAD))
        while reads:
            yield reads.popleft().result()
            reads.extend(read(at) for at in islice(starts, 1))

    there.snapshot.store.upload(there.key, blocks(), _BLOCK_BYTES, 3)


def remote(url: str) -> RemotePath:
    """The path of a URL."""
    path = as_path(url)
    if not isinstance(path, RemotePath):
        raise SystemExit(f"{url} is no URL of a store")
    return path


def put(file: Path, url: str) -> None:
    """Put a local file into the bucket."""
    target = remote(url)
    with file.open("rb") as opened:
        target.snapshot.store.upload(target.key, iter(lambda: opened.read(_BLOCK_BYTES), b""), _BLOCK_BYTES)


def timed(*command: str) -> tuple[float, float]:
    """Wall and processor time of a process, in seconds."""
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run([sys.executable, *command], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.monotonic() - begun, processor


def main() -> None:
    """Run the rounds and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--size", type=float, default=1.0, help="GB of the model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--copy", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--commands", nargs="*", default=["from-hf", "from-hf-tp8", "to-hf"])
    options = parser.parse_args()
    if options.copy:
        copy_object(*options.copy)
        return
    hf, url = options.work / "hf", options.url
    if not hf.exists():
        make_hf_model(hf, config_of_size(int(options.size * 1e9)), 1)
        for file in hf.iterdir():
            put(file, f"{url}/hf/{file.name}")
    cli = ("-m", "dist_ckpt_mistral")
    copy = (__file__, url, "--work", str(options.work), "--copy", f"{url}/hf/model.safetensors", f"{url}/copy")
    commands = {
        "from-hf": (*cli, "from-hf", f"{url}/hf", f"{url}/ckpt", "--overwrite", "-q"),
        "from-hf-tp8": (*cli, "from-hf", f"{url}/hf", f"{url}/ckpt8", "--tp", "8", "--overwrite", "-q"),
        "to-hf": (*cli, "to-hf", f"{url}/ckpt", f"{url}/hf2", "--overwrite", "-q"),
    }
    ratios: dict[str, list[tuple[float, float]]] = {}
    for _ in range(options.rounds):
        reference = timed(*copy)
        print(f"copy: {reference[0]:.2f} s, processor {reference[1]:.2f} s", flush=True)
        for name in options.commands:
            wall, processor = timed(*commands[name])
            ratios.setdefault(name, []).append((wall / reference[0], processor / reference[1]))
            print(f"{name}: {wall:.2f} s, processor {processor:.2f} s", flush=True)
    for name, found in ratios.items():
        walls, processors = zip(*found, strict=True)
        row = [f"{min(each):.2f} / {statistics.median(each):.2f}" for each in (walls, processors)]
        print(f"{name}: wall {row[0]}, processor {row[1]} of the copy (minimum / median, n = {len(found)})")


if __name__ == "__main__":
    main()
