"""Faults of servers and networks, kills and interrupts: either the bytes are right, or there is one error."""

from __future__ import annotations

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
from object_servers import BUCKET, S3Server, s3_for_tests
from plain_models import save_model
from remote_folders import files_of, get_folder, put_folder

import dist_ckpt_mistral as dcm
from dist_ckpt_mistral.storage.remote_path import forget_stores
from dist_ckpt_mistral.storage.retries import VARIABLE

pytest.importorskip("obstore")
pytestmark = pytest.mark.slow

_EFFORT = dcm.Effort(workers=2)
_READING = [Fault(kind=kind) for kind in ("reset", "truncated", "short", "503")]
_WRITING = [
    Fault(kind="503", method="PUT", every=4),
    Fault(kind="reset-request", method="PUT", every=5),
    Fault(kind="error-in-200", method="POST", match="uploadId", every=1, most=1),
]


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """An S3 server for all tests of this module."""
    with s3_for_tests(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def proxy(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """A proxy in front of the server, through which all requests go; without faults at first."""
    with FaultProxy(port=int(urlsplit(s3.endpoint).port or 0)).serving() as between:
        monkeypatch.setenv("AWS_ENDPOINT_URL", between.address)
        forget_stores()
        yield between
        between.faults = []
    forget_stores()


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose checkpoint files take several parts each."""
    folder = tmp_path_factory.mktemp("model") / "hf"
    return save_model(folder, vocab_size=3000, hidden_size=512, intermediate_size=2048, num_hidden_layers=3)


@pytest.fixture(scope="module")
def expected(hf: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The import into a local directory."""
    out = tmp_path_factory.mktemp("local") / "out"
    dcm.from_hf(hf, out)
    return files_of(out)


def uploads_left(s3: S3Server) -> list[str]:
    """The keys of multipart uploads that were begun and not ended."""
    boto3 = pytest.importorskip("boto3")
    client = boto3.client("s3", endpoint_url=s3.endpoint)
    return [each["Key"] for each in client.list_multipart_uploads(Bucket=BUCKET).get("Uploads", [])]


@pytest.mark.parametrize("fault", _READING, ids=lambda fault: fault.kind)
def test_reads_the_right_bytes_through_faults(
    fault: Fault, proxy: FaultProxy, s3: S3Server, hf: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    """Every third answer is broken, or shorter than asked: the requests are made again."""
    url = put_folder(hf, f"{s3.url}/reading/{fault.kind}")
    proxy.faults = [fault]
    dcm.from_hf(url, tmp_path / "out", effort=_EFFORT)
    assert files_of(tmp_path / "out") == expected
    assert proxy.done[fault.kind] > 0


@pytest.mark.parametrize("fault", _WRITING, ids=lambda fault: fault.kind)
def test_writes_whole_objects_through_faults(
    fault: Fault, proxy: FaultProxy, s3: S3Server, hf: Path, expected: dict[str, bytes]
) -> None:
    """Refused and broken uploads of parts, and an upload that is not completed although the status says so."""
    proxy.faults = [fault]
    dcm.from_hf(hf, f"{s3.url}/writing/{fault.kind}", effort=_EFFORT)
    assert proxy.done[fault.kind] > 0
    proxy.faults = []
    assert get_folder(f"{s3.url}/writing/{fault.kind}") == expected
    assert not uploads_left(s3)


def test_a_fault_that_stays_is_one_error(
    proxy: FaultProxy, s3: S3Server, hf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the time for retries there is an error; nothing is published and nothing left."""
    monkeypatch.setenv(VARIABLE, "2")
    forget_stores()
    proxy.faults = [Fault(kind="503", method="PUT", match="partNumber=2", every=1)]
    begun_s = time.monotonic()
    with pytest.raises(dcm.OutputError, match=r"cannot write s3://bucket/stays/.*SlowDown"):
        dcm.from_hf(hf, f"{s3.url}/stays", effort=_EFFORT)
    assert time.monotonic() - begun_s < 60
    assert not get_folder(f"{s3.url}/stays")
    assert not uploads_left(s3)


def test_what_cannot_be_read_is_no_damage(
    proxy: FaultProxy, s3: S3Server, hf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Verify of a store that answers nothing is an error, and not a finding about the files in it."""
    url = put_folder(hf, f"{s3.url}/unreadable")
    monkeypatch.setenv(VARIABLE, "1")
    forget_stores()
    proxy.faults = [Fault(kind="503", match="model.safetensors", every=1)]
    with pytest.raises(dcm.SourceError, match=r"cannot read s3://bucket/unreadable/model\.safetensors: .*SlowDown"):
        dcm.check(url)


def started(hf: Path, url: str, *options: str) -> subprocess.Popen[str]:
    """A run of its own."""
    command = [sys.executable, "-m", "dist_ckpt_mistral", "from-hf", str(hf), url, *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def until(what: str, proxy: FaultProxy) -> None:
    """Wait until a fault of the kind ``what`` has happened."""
    end = time.monotonic() + 120
    while not proxy.done[what]:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_interrupted_while_it_uploads(proxy: FaultProxy, s3: S3Server, hf: Path) -> None:
    """An interrupt ends the run within two seconds, and no part is left on the server."""
    proxy.faults = [Fault(kind="slow", method="PUT", match="partNumber", every=1)]
    with started(hf, f"{s3.url}/interrupted") as run:
        until("slow", proxy)
        begun_s = time.monotonic()
        run.send_signal(signal.SIGINT)
        _, err = run.communicate(timeout=60)
        took_s = time.monotonic() - begun_s
    assert run.returncode == 130, err
    assert err.splitlines()[-1].startswith("interrupted: Nothing was published.")
    assert took_s < 3.5  # a second of it is the answer that is under way; the machine may be busy
    proxy.faults = []
    assert "latest_checkpointed_iteration.txt" not in get_folder(f"{s3.url}/interrupted")
    assert not uploads_left(s3)


def test_killed_while_it_uploads(proxy: FaultProxy, s3: S3Server, hf: Path, expected: dict[str, bytes]) -> None:
    """After a kill the next run is told of it; --resume gives the same bytes."""
    url = f"{s3.url}/killed"
    proxy.faults = [Fault(kind="slow", method="PUT", match="partNumber", every=1)]
    with started(hf, url) as run:
        until("slow", proxy)
        os.kill(run.pid, signal.SIGKILL)
    proxy.faults = []
    assert "latest_checkpointed_iteration.txt" not in get_folder(url)
    with pytest.raises(dcm.OutputError, match=r"another run is writing s3://bucket/killed, or was killed: process \d+"):
        dcm.from_hf(hf, url)
    dcm.from_hf(hf, url, output=dcm.Output(resume=True))
    assert get_folder(url) == expected
