"""Commands and functions over URLs give what they give for a copy in a directory: S3 by SeaweedFS, and a web server."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import genuine
import pytest
from command_line import run, without_time
from object_servers import S3Server, s3_for_tests
from plain_models import save_model
from remote_folders import files_of, get_folder, put_folder
from web_server import WebServer

import dist_ckpt_mistral as dcm
from dist_ckpt_mistral.storage.remote_path import forget_stores

pytest.importorskip("obstore")

#: Genuine checkpoints of several writers, with and without optimizer state.
_CASES = ("mlm_0161", "moe_seq_0192", "opt_fsms_0140")


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """An S3 server for all tests of this module."""
    with s3_for_tests(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def web() -> Iterator[WebServer]:
    """A web server for the folder that the test sets."""
    forget_stores()
    with WebServer(folder=Path("/nonexistent")).serving() as server:
        yield server


def _same(case: str, url: str, question: Callable[[str, str], Any]) -> None:
    """The answer for a URL is that for the directory, but for the names of the places."""
    folder = genuine.folder(case)
    local, config = str(folder / "checkpoint"), str(folder / "config.json")
    answers = [json.dumps(question(path, config), default=str).replace(path, "CKPT") for path in (local, url)]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("case", _CASES)
def test_questions_about_a_bucket(case: str, s3: S3Server) -> None:
    """inspect, check, plan, compare and megatron_args say of a bucket what they say of its copy."""
    url = put_folder(genuine.folder(case) / "checkpoint", f"{s3.url}/questions/{case}/checkpoint")
    layout = dcm.ParallelLayout(tp=2)
    _same(case, url, lambda path, config: dcm.inspect(path, config=config).to_json())
    _same(case, url, lambda path, config: dcm.check(path, config=config).to_json())
    _same(case, url, lambda path, config: dcm.plan_reading(path, layout, config=config).to_json())
    if genuine.GENUINE[case]:  # a root, as Megatron-LM's --load takes it
        _same(case, url, lambda path, config: dcm.megatron_args(path, config=config, layout=layout).to_json())
    local = genuine.folder(case) / "checkpoint"
    config = genuine.folder(case) / "config.json"
    assert dcm.compare(url, local, config=config).is_equal
    assert dcm.compare_stored(local, url).is_equal


@pytest.mark.parametrize("case", _CASES)
def test_conversions_from_bucket_to_bucket(case: str, s3: S3Server, tmp_path: Path) -> None:
    """to-hf, from-hf and reshard write into a bucket, byte for byte, what they write into a directory."""
    folder = genuine.folder(case)
    local, config = folder / "checkpoint", folder / "config.json"
    url, out = put_folder(local, f"{s3.url}/convert/{case}/ckpt"), f"{s3.url}/convert/{case}"
    dcm.to_hf(local, tmp_path / "hf", config=config)
    dcm.to_hf(url, f"{out}/hf", config=config)
    assert get_folder(f"{out}/hf") == files_of(tmp_path / "hf")
    dcm.from_hf(tmp_path / "hf", tmp_path / "imported", tp=2)
    dcm.from_hf(f"{out}/hf", f"{out}/imported", tp=2)
    assert get_folder(f"{out}/imported") == files_of(tmp_path / "imported")
    dcm.reshard(local, tmp_path / "cut", dcm.ParallelLayout(tp=2), config=config)
    dcm.reshard(url, f"{out}/cut", dcm.ParallelLayout(tp=2), config=config)
    assert get_folder(f"{out}/cut") == files_of(tmp_path / "cut")


def test_migrates_in_a_bucket(s3: S3Server, tmp_path: Path) -> None:
    """A legacy zarr checkpoint in a bucket becomes torch_dist there, byte for byte as in a directory."""
    local = genuine.folder("zarr_ckpt") / "checkpoint"
    url = put_folder(local, f"{s3.url}/migrate/old")
    dcm.migrate(local, tmp_path / "new")
    dcm.migrate(url, f"{s3.url}/migrate/new")
    assert get_folder(f"{s3.url}/migrate/new") == files_of(tmp_path / "new")


def test_the_command_line_takes_urls(s3: S3Server, tmp_path: Path) -> None:
    """Import, description, export and verification of a bucket by commands; the output is named by its URL."""
    hf = save_model(tmp_path / "hf")
    url = put_folder(hf, f"{s3.url}/commands/hf")
    done = run("from-hf", url, f"{s3.url}/commands/ckpt", "--pp", "2")
    assert done.code == 0, done
    assert without_time(done.out[0]).endswith(f"to {s3.url}/commands/ckpt")
    assert run("verify", url, f"{s3.url}/commands/ckpt").code == 0
    assert run("verify", f"{s3.url}/commands/ckpt").code == 0
    assert run("describe", url, f"{s3.url}/commands/ckpt", "--overwrite").code == 0
    assert run("to-hf", f"{s3.url}/commands/ckpt", tmp_path / "again").code == 0
    assert (tmp_path / "again/model.safetensors").read_bytes() == (hf / "model.safetensors").read_bytes()
    again = run("from-hf", url, f"{s3.url}/commands/ckpt")
    exists = f"error: the output {s3.url}/commands/ckpt exists. Choose another name or give --overwrite."
    assert (again.code, again.err) == (1, [exists])


def test_reads_lazily_from_a_bucket(s3: S3Server, tmp_path: Path) -> None:
    """A tensor of a checkpoint in a bucket has the bits that the model's file has."""
    pytest.importorskip("torch")
    hf = save_model(tmp_path / "hf")
    dcm.from_hf(hf, f"{s3.url}/lazy/ckpt", tp=2)
    with dcm.open_checkpoint(f"{s3.url}/lazy/ckpt") as ckpt, dcm.open_checkpoint(hf) as original:
        assert [*ckpt] == [*original]
        assert all(ckpt[name].equal(original[name]) for name in original)


@pytest.mark.parametrize(("url", "says"), [
    ("s3://no-such-bucket/ckpt", "there is no such bucket"),
    ("s3://bucket/absent", "there is nothing of this name"),
])  # fmt: skip
def test_what_is_not_there(url: str, says: str, s3: S3Server) -> None:  # noqa: ARG001  (it must run)
    """A missing bucket or name is one line that says so."""
    outcome = run("inspect", url)
    assert outcome.code == 1
    (line,) = outcome.err
    assert says in line


def test_wrong_keys_are_said_in_one_line(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Credentials that the server refuses are named as the reason."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    forget_stores()
    outcome = run("inspect", f"{s3.url}/anything")
    forget_stores()
    assert outcome.code == 1
    (line,) = outcome.err
    assert "credentials are refused" in line


def test_a_profile_alone(s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With nothing but AWS_PROFILE, keys, region and endpoint come from the user's files, through boto3."""
    hf = put_folder(save_model(tmp_path / "hf"), f"{s3.url}/profile/hf")
    environment = s3.environment
    keys = environment["AWS_ACCESS_KEY_ID"], environment["AWS_SECRET_ACCESS_KEY"]
    (tmp_path / "credentials").write_text(
        f"[training]\naws_access_key_id = {keys[0]}\naws_secret_access_key = {keys[1]}\n"
    )
    (tmp_path / "config").write_text(
        f"[profile training]\nregion = us-east-1\nendpoint_url = {environment['AWS_ENDPOINT_URL']}\n"
    )
    for name in environment:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_PROFILE", "training")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    forget_stores()
    assert not dcm.inspect(hf).problems
    forget_stores()


@pytest.mark.megatron
def test_generates_from_a_bucket(s3: S3Server, tmp_path: Path) -> None:
    """Megatron runs a model out of a bucket, tokenizer included, as it runs the copy."""
    pytest.importorskip("transformers")
    from small_models import MODELS, save_tokenizer, small_model  # noqa: PLC0415  (they need transformers)

    small_model(next(iter(MODELS))).save_pretrained(tmp_path / "hf")
    save_tokenizer(tmp_path / "hf")
    url = put_folder(tmp_path / "hf", f"{s3.url}/generate/hf")
    dcm.from_hf(url, f"{s3.url}/generate/ckpt", tp=2)
    options = ("--prompt", "hello", "--max-new-tokens", "6")
    expected = run("generate", tmp_path / "hf", *options)
    assert expected.code == 0
    assert run("generate", f"{s3.url}/generate/ckpt", *options).out == expected.out


@pytest.mark.parametrize("what", ["hf", "ckpt"])
def test_a_web_server_is_a_source(what: str, web: WebServer, tmp_path: Path) -> None:
    """A model and a checkpoint behind http:// are read by ranges, though a web server lists nothing."""
    hf = save_model(tmp_path / "hf")
    dcm.from_hf(hf, tmp_path / "ckpt", tp=2)
    web.folder = tmp_path
    url = f"{web.address}/{what}"
    assert dcm.compare(url, hf).is_equal
    if what == "hf":
        dcm.from_hf(url, tmp_path / "imported", tp=2)
        assert files_of(tmp_path / "imported") == files_of(tmp_path / "ckpt")
    else:
        dcm.to_hf(url, tmp_path / "exported")
        assert (tmp_path / "exported/model.safetensors").read_bytes() == (hf / "model.safetensors").read_bytes()
    assert ("GET", 206) in web.requests
    assert ("GET", 200) not in web.requests


def test_a_file_that_changes_on_a_web_server(web: WebServer, tmp_path: Path) -> None:
    """Every range is asked for in the version that was seen first."""
    web.folder = tmp_path
    hf = save_model(tmp_path / "hf", hidden_size=512)
    with dcm.open_checkpoint(f"{web.address}/hf") as ckpt:
        file = hf / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + b"x")
        with pytest.raises(dcm.SourceError, match="changed while it was read"):
            [ckpt[name] for name in ckpt]
