"""More servers of objects on this machine: moto for S3, moto as it answers GCS's client, and Azurite for Azure.

GCS's XML interface is that of S3 but for its conditions and tokens, and obstore's client uses nothing else. So moto
serves it, once a condition and the authorization are translated. fake-gcs-server answers uploads of this client with
400.
"""

from __future__ import annotations

import base64
import contextlib
import email.utils
import hashlib
import hmac
import json
import logging
import os
import shutil
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest
from object_servers import client_environment, free_ports

from dist_ckpt_mistral.storage.buckets import Where, gcs_emulator

_START_TIMEOUT_S: Final = 90
#: Azurite's own account, which its documentation gives to everyone.
AZURE_ACCOUNT: Final = "devstoreaccount1"
AZURE_KEY: Final = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
#: What moto takes for the signature of someone who may do everything.
_SIGNED: Final = "AWS4-HMAC-SHA256 Credential=any/20260101/us-east-1/s3/aws4_request"


@dataclass(frozen=True, kw_only=True)
class Emulator:
    """A running server: its address, where its bucket is for obstore, and the environment in which clients find it."""

    endpoint: str
    where: Where
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        """The URL of its bucket."""
        return self.where.url


@contextlib.contextmanager
def moto(bucket: str) -> Iterator[Emulator]:
    """An S3 server in this process, with one bucket."""
    with _moto_at(bucket) as endpoint:
        environment = client_environment(endpoint)
        options = {
            "endpoint": endpoint,
            "access_key_id": environment["AWS_ACCESS_KEY_ID"],
            "secret_access_key": environment["AWS_SECRET_ACCESS_KEY"],
            "region": "us-east-1",
        }
        where = Where(url=f"s3://{bucket}", options=options)
        yield Emulator(endpoint=endpoint, where=where, environment=environment)


@contextlib.contextmanager
def gcs(bucket: str) -> Iterator[Emulator]:
    """A server for GCS's client in this process, with one bucket."""
    with _moto_at(bucket, _as_gcs) as endpoint:
        where = Where(url=f"gs://{bucket}", options=gcs_emulator(endpoint))
        yield Emulator(endpoint=endpoint, where=where, environment={"STORAGE_EMULATOR_HOST": endpoint})


def _as_gcs(request: dict[str, Any]) -> None:
    """Turn a request for GCS into one for S3: its condition that there is no object yet, and its token."""
    if request.get("HTTP_X_GOOG_IF_GENERATION_MATCH") == "0":
        request["HTTP_IF_NONE_MATCH"] = "*"
    request["HTTP_AUTHORIZATION"] = _SIGNED


@contextlib.contextmanager
def _moto_at(bucket: str, translate: Callable[[dict[str, Any]], None] = lambda _: None) -> Iterator[str]:
    server = pytest.importorskip("moto.server", reason="moto is not installed: pip install 'moto[server]'")
    from werkzeug.serving import make_server  # noqa: PLC0415  (moto's)

    application = server.DomainDispatcherApplication(server.create_backend_app)

    def answer(request: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        translate(request)
        answered: Iterable[bytes] = application(request, start)
        return answered

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    running = make_server("127.0.0.1", 0, answer, threaded=True)
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    endpoint = f"http://127.0.0.1:{running.server_port}"
    try:
        _put(f"{endpoint}/{bucket}", {"Authorization": _SIGNED})
        yield endpoint
    finally:
        running.shutdown()
        running.server_close()
        thread.join()


def _put(url: str, headers: Mapping[str, str]) -> None:
    request = urllib.request.Request(url, method="PUT", headers=dict(headers))  # noqa: S310  (of this machine)
    urllib.request.urlopen(request).close()  # noqa: S310


@contextlib.contextmanager
def azurite(container: str, folder: Path) -> Iterator[Emulator]:
    """Azurite with one container. Skips the test where it, or node, is not installed."""
    program = shutil.which("azurite-blob")
    if program is None or shutil.which("node") is None:
        pytest.skip("Azurite is not installed: npm install -g azurite")
    (port,) = free_ports(1)
    words = ["--blobPort", str(port), "--inMemoryPersistence", "--skipApiVersionCheck", "--disableTelemetry"]
    with (folder / "azurite.log").open("wb") as log:
        process = subprocess.Popen([program, *words], stdout=log, stderr=log, cwd=folder)
    try:
        _wait_for(port, process)
        _create_container(port, container)
        endpoint = f"http://127.0.0.1:{port}"
        account = {"account_name": AZURE_ACCOUNT, "account_key": AZURE_KEY}
        where = Where(url=f"az://{container}", options={**account, "endpoint": f"{endpoint}/{AZURE_ACCOUNT}"})
        environment = {"AZURE_STORAGE_USE_EMULATOR": "true", "AZURITE_BLOB_STORAGE_URL": endpoint}
        yield Emulator(endpoint=endpoint, where=where, environment=environment)
    finally:
        process.kill()
        process.wait()


def _wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + _START_TIMEOUT_S
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return
        if process.poll() is not None or time.monotonic() > end:
            pytest.fail("the server did not start")
        time.sleep(0.1)


def _create_container(port: int, container: str) -> None:
    """Create a container, by a request signed with the account's key (Azure's SharedKey)."""
    headers = {"x-ms-date": email.utils.formatdate(usegmt=True), "x-ms-version": "2021-08-06"}
    signed = ["PUT", *[""] * 11, *(f"{key}:{value}" for key, value in headers.items())]
    signed += [f"/{AZURE_ACCOUNT}/{AZURE_ACCOUNT}/{container}", "restype:container"]
    digest = hmac.new(base64.b64decode(AZURE_KEY), "\n".join(signed).encode(), hashlib.sha256).digest()
    headers["Authorization"] = f"SharedKey {AZURE_ACCOUNT}:{base64.b64encode(digest).decode()}"
    _put(f"http://127.0.0.1:{port}/{AZURE_ACCOUNT}/{container}?restype=container", headers)


def msc_configuration(folder: Path, profiles: Mapping[str, Mapping[str, Any]]) -> Path:
    """A configuration of the Multi-Storage Client with some profiles."""
    path = folder / f"msc-{os.urandom(4).hex()}.yaml"
    path.write_text(json.dumps({"profiles": profiles}))  # JSON is YAML
    return path
