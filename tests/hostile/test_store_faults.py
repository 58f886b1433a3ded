"""Faults of servers and networks, kills and interrupts: either the bytes are right, or there is one error."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from command_line import run
from fault_proxy import Fault, FaultProxy
from object_servers import BUCKET, S3Server, s3_for_tests
from plain_models import save_model
from remote_folders import files_of, get_folder, put_folder, remote

import dist_ckpt_mistral as dcm
from dist_ckpt_mistral.storage.remote_path import forget_stores
from dist_ckpt_mistral.storage.retries import VARIABLE

pytest.importorskip("obstore")
pytestmark = pytest.mark.slow

_EFFORT = dcm.Effort(workers=2)
_READING = [
    *(Fault(kind=kind) for kind in ("reset", "truncated", "short", "SlowDown", "InternalError")),
    *(Fault(kind=kind, every=4, most=2) for kind in ("stalled", "silent")),
]
_WRITING = [
    Fault(kind="SlowDown", method="PUT", every=4),
    Fault(kind="silent", method="PUT|POST", every=5, most=2),
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
    monkeypatch.setattr("dist_ckpt_mistral.storage.buckets._READ_TIMEOUT", timedelta(seconds=3))
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


def uploads_left(s3: S3Server, prefix: str = "") -> list[str]:
    """The keys of multipart uploads that were begun and not ended."""
    boto3 = pytest.importorskip("boto3")
    client = boto3.client("s3", endpoint_url=s3.endpoint)
    found = client.list_multipart_uploads(Bucket=BUCKET, Prefix=prefix).get("Uploads", [])
    return [each["Key"] for each in found]


@pytest.mark.parametrize("fault", _READING, ids=lambda fault: fault.kind)
def test_reads_the_right_bytes_through_faults(
    fault: Fault, proxy: FaultProxy, s3: S3Server, hf: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    """Answers are broken, shorter than asked, refusals that pass, or do not come: the requests are made again."""
    url = put_folder(hf, f"{s3.url}/reading/{fault.kind.lower()}")
    proxy.faults = [fault]
    dcm.from_hf(url, tmp_path / "out", effort=_EFFORT)
    assert files_of(tmp_path / "out") == expected
    assert proxy.done[fault.kind] > 0


@pytest.mark.parametrize("fault", _WRITING, ids=lambda fault: fault.kind)
def test_writes_whole_objects_through_faults(
    fault: Fault, proxy: FaultProxy, s3: S3Server, hf: Path, expected: dict[str, bytes]
) -> None:
    """Refused and broken uploads of parts, and an upload that is not completed although the status says so."""
    url = f"{s3.url}/writing/{fault.kind.lower()}"  # object_store takes an answer with the word SlowDown for an error
    proxy.faults = [fault]
    dcm.from_hf(hf, url, effort=_EFFORT)
    assert proxy.done[fault.kind] > 0
    proxy.faults = []
    assert get_folder(url) == expected
    assert not uploads_left(s3)


@pytest.mark.parametrize(("fault", "says"), [
    (Fault(kind="SlowDown", method="PUT", match="partNumber=2", every=1), r"fewer requests \(SlowDown\)"),
    (Fault(kind="error-in-200", method="POST", match="uploadId", every=1), r"the server fails \(InternalError\)"),
], ids=lambda value: getattr(value, "kind", ""))  # fmt: skip
def test_a_fault_that_stays_is_one_error(
    fault: Fault, says: str, proxy: FaultProxy, s3: S3Server, hf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the time for retries there is an error; nothing is published and nothing left."""
    monkeypatch.setenv(VARIABLE, "2")
    forget_stores()
    proxy.faults = [fault]
    begun_s = time.monotonic()
    with pytest.raises(dcm.OutputError, match=rf"cannot write s3://bucket/stays/.*{says}, although it was tried again"):
        dcm.from_hf(hf, f"{s3.url}/stays", effort=_EFFORT)
    assert time.monotonic() - begun_s < 30
    proxy.faults = []
    assert not get_folder(f"{s3.url}/stays")
    assert not uploads_left(s3)


@pytest.mark.parametrize("kind", ["silent", "stalled", "short"])
def test_a_source_that_never_answers_rightly(
    kind: str, proxy: FaultProxy, s3: S3Server, hf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither no answer, nor a piece of one, is taken for data: after the time for retries there is one error."""
    url = put_folder(hf, f"{s3.url}/never/{kind}")
    monkeypatch.setattr("dist_ckpt_mistral.storage.buckets._READ_TIMEOUT", timedelta(seconds=0.5))
    monkeypatch.setenv(VARIABLE, "1")
    forget_stores()
    proxy.faults = [Fault(kind=kind, match="model.safetensors", every=1)]
    begun_s = time.monotonic()
    with pytest.raises(dcm.SourceError, match=r"cannot read s3://bucket/never/\w+/model\.safetensors: "):
        dcm.inspect(url)
    assert time.monotonic() - begun_s < 20


#: What is refused for good -> what the error says.
_FOR_GOOD = {
    "ExpiredToken": "the credentials have expired. Renew them",
    "InvalidAccessKeyId": "the credentials are refused. Check AWS_PROFILE",
    "AccessDenied": "permission denied. The credentials must allow to list, read and",
    "PermanentRedirect": "the bucket is in another region. Set AWS_REGION",
    "AuthorizationHeaderMalformed": "the bucket is in another region. Set AWS_REGION=eu-west-1",
    "NoSuchBucket": "there is no such bucket or container",
}


@pytest.mark.parametrize("code", _FOR_GOOD)
def test_what_will_not_pass_is_said_at_once(code: str, proxy: FaultProxy, s3: S3Server, hf: Path) -> None:
    """Where a listing or an upload is refused for good, one line says why and what to do; nothing is tried again."""
    url = put_folder(hf, f"{s3.url}/refused/{code}")
    for fault, words in (
        (Fault(kind=code, match="list-type", every=1), ("inspect", url)),
        (Fault(kind=code, method="PUT", match="partNumber=2", every=1), ("from-hf", url, f"{s3.url}/refused/out")),
    ):
        forget_stores()
        proxy.done.clear()
        proxy.faults = [fault]
        begun_s = time.monotonic()
        outcome = run(*words)
        assert time.monotonic() - begun_s < 10
        proxy.faults = []
        (line,) = outcome.err
        assert (outcome.code, proxy.done[code]) == (1, 1), line
        assert _FOR_GOOD[code] in line
    assert not get_folder(f"{s3.url}/refused/out")
    assert not uploads_left(s3)


@pytest.mark.parametrize("code", ["ExpiredToken", "PermanentRedirect"])
def test_an_answer_without_a_reason(code: str, proxy: FaultProxy, s3: S3Server, hf: Path) -> None:
    """A HEAD request is refused by its status alone, which is worded too."""
    proxy.faults = [Fault(kind=code, method="HEAD", every=1)]
    outcome = run("from-hf", hf, f"{s3.url}/head")
    (line,) = outcome.err
    assert "AWS_REGION" in line
    assert proxy.done[code] <= 3


def test_what_cannot_be_read_is_no_damage(
    proxy: FaultProxy, s3: S3Server, hf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Verify of a store that answers nothing is an error, and not a finding about the files in it."""
    url = put_folder(hf, f"{s3.url}/unreadable")
    monkeypatch.setenv(VARIABLE, "1")
    forget_stores()
    proxy.faults = [Fault(kind="SlowDown", match="model.safetensors", every=1)]
    with pytest.raises(dcm.SourceError, match=r"cannot read s3://bucket/unreadable/model\.safetensors: .*SlowDown"):
        dcm.check(url)


def started(hf: str, url: str, *options: str) -> subprocess.Popen[str]:
    """A run of its own."""
    command = [sys.executable, "-m", "dist_ckpt_mistral", "from-hf", hf, url, *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def until(what: str, proxy: FaultProxy) -> None:
    """Wait until a fault of the kind ``what`` has happened."""
    end = time.monotonic() + 120
    while not proxy.done[what]:
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize(("fault", "source", "is_left"), [
    (Fault(kind="slow", method="PUT", match="partNumber", every=1), "local", False),
    (Fault(kind="stalled", match="model.safetensors", every=4), "remote", False),
    (Fault(kind="silent", method="PUT", match="partNumber", every=1), "local", True),
], ids=lambda value: getattr(value, "kind", ""))  # fmt: skip
def test_interrupted(
    fault: Fault, source: str, is_left: bool, proxy: FaultProxy, s3: S3Server, hf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupt ends the run in seconds, whatever the server does, and no part is left on it.

    Only if it answers none of the parts, the upload cannot be aborted, and that is said.
    """
    url = f"{s3.url}/interrupted/{fault.kind}"
    where = put_folder(hf, f"{url}/hf") if source == "remote" else str(hf)
    before = uploads_left(s3)
    monkeypatch.setattr(proxy, "slow_s", 0.3)  # an interrupted run waits for 1.3 s, and the machine may be slow, too
    proxy.faults = [fault]
    with started(where, f"{url}/out") as process:
        until(fault.kind, proxy)
        begun_s = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        took_s = time.monotonic() - begun_s
    assert process.returncode == 130, err
    said = err.splitlines()[-1]
    assert said.startswith("interrupted: ")
    assert said.endswith("Nothing was published.")
    assert ("Parts of uploads may be left" in said) == is_left
    assert took_s < 10  # two, and what a busy machine adds; the server would be waited for for 30
    proxy.faults = []
    assert not get_folder(f"{url}/out")
    assert (uploads_left(s3) != before) == is_left


def imports(hf: Path, url: str, environment: dict[str, str]) -> None:
    """Import into two files, in a process of its own."""
    os.environ.update(environment)
    dcm.from_hf(hf, url, tp=2, effort=_EFFORT)


#: Processes that begin with everything imported, and without a client.
_SPAWN = multiprocessing.get_context("forkserver")
_SPAWN.set_forkserver_preload(
    ["dist_ckpt_mistral.convert.from_hf", "dist_ckpt_mistral.storage.buckets", "obstore.store"]
)


def test_killed_at_every_write(proxy: FaultProxy, s3: S3Server, hf: Path, tmp_path: Path) -> None:
    """Killed at any request that writes, part or object, a run has published nothing or all; --resume ends it.

    At most the uploads that were under way are left.
    """
    dcm.from_hf(hf, tmp_path / "local", tp=2)
    expected, environment = files_of(tmp_path / "local"), {"AWS_ENDPOINT_URL": proxy.address}
    for number in itertools.count(1):
        url = f"{s3.url}/every/{number}"
        proxy.done.clear()
        proxy.seen.clear()
        proxy.faults = [Fault(kind="silent", method="PUT|POST", every=number, most=1)]
        process = _SPAWN.Process(target=imports, args=(hf, url, environment))
        process.start()
        while process.is_alive() and not proxy.done:
            time.sleep(0.002)
        process.kill()
        process.join()
        proxy.faults = []
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        present = get_folder(url)
        if "latest_checkpointed_iteration.txt" in present:
            assert present.items() >= expected.items()
        if ".incomplete/run.json" in present:
            with pytest.raises(dcm.OutputError, match="or was killed"):
                dcm.from_hf(hf, url, tp=2)
        dcm.from_hf(hf, url, tp=2, effort=_EFFORT, output=dcm.Output(resume=True))
        assert get_folder(url) == expected
        assert len(uploads_left(s3, f"every/{number}/")) <= 2
    assert number > 20  # parts, objects, records, commit names
    assert get_folder(url) == expected


def test_two_runs_at_once(proxy: FaultProxy, s3: S3Server, hf: Path, tmp_path: Path) -> None:
    """Of two processes that begin together one is refused by the server, and the other's bytes are right."""
    dcm.from_hf(hf, tmp_path / "local", tp=2)
    proxy.faults = [Fault(kind="slow", method="PUT", match="partNumber", every=1)]
    arguments = (hf, f"{s3.url}/at-once", {"AWS_ENDPOINT_URL": proxy.address})
    processes = [_SPAWN.Process(target=imports, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert sorted(process.exitcode or 0 for process in processes) == [0, 1]
    assert get_folder(f"{s3.url}/at-once") == files_of(tmp_path / "local")


def test_a_source_that_is_written_again(proxy: FaultProxy, s3: S3Server, hf: Path) -> None:
    """A source object that is replaced while it is read fails the run at once, and nothing is published."""
    url = put_folder(hf, f"{s3.url}/again/hf")
    proxy.faults = [Fault(kind="slow", match="model.safetensors", every=1)]
    process = _SPAWN.Process(target=imports, args=(url, f"{s3.url}/again/out", {"AWS_ENDPOINT_URL": proxy.address}))
    process.start()
    until("slow", proxy)
    data = (hf / "model.safetensors").read_bytes()
    remote(url).snapshot.store.write("again/hf/model.safetensors", data[:-1] + b"x")
    process.join()
    assert process.exitcode == 1
    proxy.faults = []
    assert "latest_checkpointed_iteration.txt" not in get_folder(f"{s3.url}/again/out")
    assert not uploads_left(s3, "again/")
