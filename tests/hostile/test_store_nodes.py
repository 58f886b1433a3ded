"""One command under torchrun on several nodes writes into one bucket: agents on this machine stand for the nodes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from fault_proxy import Fault, FaultProxy
from object_servers import S3Server, free_ports, s3_for_tests
from plain_models import save_model
from rank_threads import on_ranks
from remote_folders import files_of, get_folder

import dist_ckpt_mistral as dcm

pytest.importorskip("obstore")
pytest.importorskip("torch")
pytestmark = [pytest.mark.slow, pytest.mark.ranks]

_SIZES = {"vocab_size": 500, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """An S3 server for all tests of this module."""
    with s3_for_tests(tmp_path_factory.mktemp("s3")) as server:
        yield server


@contextlib.contextmanager
def nodes(folder: Path, *command: str, **settings: str) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Run a command under torchrun on two nodes, each of which logs to ``folder``; none is left afterwards."""
    (port,) = free_ports(1)
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} | settings
    started = []
    try:
        for node in range(2):
            words = ["--nnodes", "2", "--node-rank", str(node), "--master-addr", "127.0.0.1"]
            words += ["--master-port", str(port), "--nproc-per-node", "1", "-m", "dist_ckpt_mistral", *command]
            with (folder / f"node{node}.log").open("wb") as log:
                process = subprocess.Popen(
                    [sys.executable, "-m", "torch.distributed.run", *words],
                    env=environment, stdout=log, stderr=log, start_new_session=True,
                )  # fmt: skip
            started.append(process)
        yield started
    finally:
        for process in started:
            kill(process)


def kill(node: subprocess.Popen[bytes]) -> None:
    """Kill an agent and its rank, which has a session of its own, as a node that goes down does."""
    ranks = Path(f"/proc/{node.pid}/task/{node.pid}/children")
    with contextlib.suppress(OSError):
        for rank in ranks.read_text().split():
            os.killpg(int(rank), signal.SIGKILL)
    with contextlib.suppress(OSError):
        os.killpg(node.pid, signal.SIGKILL)
    node.wait()


def data_objects(url: str) -> dict[str, object]:
    """When each data object was written."""
    import boto3  # noqa: PLC0415  (only the server's own client tells it)

    _, _, bucket, key = url.split("/", 3)
    found = boto3.client("s3").list_objects_v2(Bucket=bucket, Prefix=f"{key}/").get("Contents", [])
    return {each["Key"]: each["LastModified"] for each in found if each["Key"].endswith(".distcp")}


def recorded(url: str) -> set[str]:
    """The names of the data objects that a run has recorded as whole: these are kept."""
    records = [data for name, data in get_folder(url).items() if name.startswith(".incomplete/done-")]
    return {json.loads(record)["name"] for record in records}


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose checkpoint has four files of data."""
    return save_model(tmp_path_factory.mktemp("model") / "hf", **_SIZES)


@pytest.fixture(scope="module")
def expected(hf: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The import by one process into a directory."""
    out = tmp_path_factory.mktemp("local") / "out"
    dcm.from_hf(hf, out, tp=4)
    return files_of(out)


def test_two_nodes_write_what_one_process_writes(
    hf: Path, expected: dict[str, bytes], s3: S3Server, tmp_path: Path
) -> None:
    """The same command on both nodes: each uploads its share, one commits and speaks, and the bytes are the same."""
    url = f"{s3.url}/two"
    with nodes(tmp_path, "from-hf", str(hf), url, "--tp", "4") as started:
        assert [node.wait(timeout=100) for node in started] == [0, 0], (tmp_path / "node0.log").read_text()
    assert get_folder(url) == expected
    assert [(tmp_path / f"node{node}.log").read_text().count("wrote ") for node in (0, 1)] == [1, 0]


def test_a_node_dies_and_others_go_on(hf: Path, expected: dict[str, bytes], s3: S3Server, tmp_path: Path) -> None:
    """The node that commits dies half-way: the other one says so, and nothing is published.

    Three ranks go on: whole objects stay as they are, and the bytes are those of one process.
    """
    url = f"{s3.url}/dies"
    with FaultProxy(port=int(urlsplit(s3.endpoint).port or 0)).serving() as proxy:
        proxy.faults = [Fault(kind="silent", method="PUT", match="__0_0.distcp", every=1)]
        with nodes(tmp_path, "from-hf", str(hf), url, "--tp", "4", AWS_ENDPOINT_URL=proxy.address) as (first, second):
            end = time.monotonic() + 100
            while not (proxy.done["silent"] and len(recorded(url)) >= 2):
                assert time.monotonic() < end, (tmp_path / "node0.log").read_text()
                time.sleep(0.02)
            kill(first)
            assert second.wait(timeout=30) == 1
    said = (tmp_path / "node1.log").read_text()
    assert "error: node 1 of 2 lost the others: one has ended (" in said
    assert f"If {url} is not complete, --resume continues what is kept there." in said
    assert "latest_checkpointed_iteration.txt" not in get_folder(url)
    kept = {key: written for key, written in data_objects(url).items() if key.partition("/")[2] in recorded(url)}
    assert len(kept) >= 2
    resume = dcm.Output(resume=True)
    assert on_ranks(3, lambda ranks: dcm.from_hf(hf, url, tp=4, ranks=ranks, output=resume)) == [None] * 3
    assert get_folder(url) == expected
    assert data_objects(url).items() >= kept.items()
