"""``msc://profile/path``: a profile of NVIDIA's Multi-Storage Client is as good as the URL of what it names."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from command_line import run
from emulators import AZURE_ACCOUNT, AZURE_KEY, Emulator, azurite, gcs, moto, msc_configuration
from object_servers import environment
from plain_models import save_model
from remote_folders import files_of, get_folder

import dist_ckpt_mistral as dcm
from dist_ckpt_mistral.storage.buckets import BucketStore
from dist_ckpt_mistral.storage.msc import profile
from dist_ckpt_mistral.storage.remote_path import as_path, forget_stores

pytest.importorskip("obstore")
pytest.importorskip("multistorageclient")


@pytest.fixture(scope="module")
def s3() -> Iterator[Emulator]:
    """An S3 server."""
    with moto("training") as server:
        yield server


@pytest.fixture
def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The profiles of the configuration, which a test fills before it opens one of them."""
    profiles: dict[str, Any] = {}

    def read() -> None:
        monkeypatch.setenv("MSC_CONFIG", str(msc_configuration(tmp_path, profiles)))
        forget_stores()

    class Profiles(dict[str, Any]):
        def __setitem__(self, name: str, content: object) -> None:
            profiles[name] = content
            read()

    read()
    with environment({}, without=("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_PROFILE")):
        yield Profiles()
    forget_stores()


def s3_profile(server: Emulator, base_path: str, **more: object) -> dict[str, Any]:
    """A profile for the server with its keys."""
    keys = {"access_key": "admin", "secret_key": "not-a-secret"}
    options = {"base_path": base_path, "endpoint_url": server.endpoint, "region_name": "us-east-1", **more}
    return {
        "storage_provider": {"type": "s3", "options": options},
        "credentials_provider": {"type": "S3Credentials", "options": keys},
    }


def require_round_trip(url: str, folder: Path) -> Mapping[str, bytes]:
    """An import and an export below a URL are, byte for byte, those of directories. Returns the imported files."""
    hf = save_model(folder / "hf")
    dcm.from_hf(hf, folder / "ckpt", tp=2)
    dcm.from_hf(hf, f"{url}/ckpt", tp=2)
    imported = get_folder(f"{url}/ckpt")
    assert imported == files_of(folder / "ckpt")
    dcm.to_hf(folder / "ckpt", folder / "out")
    dcm.to_hf(f"{url}/ckpt", f"{url}/hf")
    assert get_folder(f"{url}/hf") == files_of(folder / "out")
    assert dcm.compare(f"{url}/hf", hf).is_equal
    return imported


def test_a_profile_of_a_folder_in_a_bucket(s3: Emulator, given: dict[str, Any], tmp_path: Path) -> None:
    """What is written lies in the folder that the profile names, as whoever reads the bucket sees it."""
    given["training"] = s3_profile(s3, "training/team/runs")
    imported = require_round_trip("msc://training/first", tmp_path)
    bucket = BucketStore(s3.url, s3.where)
    assert {*bucket.below("team/runs/first/ckpt")} == {f"team/runs/first/ckpt/{name}" for name in imported}


def test_a_profile_without_a_bucket(s3: Emulator, given: dict[str, Any], tmp_path: Path) -> None:
    """Where base_path is empty, paths begin with the bucket; a bucket alone is no output."""
    given["any"] = s3_profile(s3, "")
    require_round_trip("msc://any/training/second", tmp_path)
    refused = run("from-hf", tmp_path / "hf", "msc://any/training", "--overwrite")
    assert refused.code == 1
    assert "the output msc://any/training is a whole bucket" in refused.err[0]


def test_keys_from_a_file_and_from_the_environment(
    s3: Emulator, given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Credentials come from a file in the form of AWS's external processes, and from ${VARIABLES}."""
    hf = save_model(tmp_path / "hf")
    keys = tmp_path / "keys.json"
    keys.write_text(json.dumps({"Version": 1, "AccessKeyId": "admin", "SecretAccessKey": "not-a-secret"}))
    by_file = s3_profile(s3, "training/third")
    by_file["credentials_provider"] = {"type": "FileBasedCredentials", "options": {"credential_file_path": str(keys)}}
    given["by-file"] = by_file
    monkeypatch.setenv("FOLDER_FOR_TESTS", "third")
    given["by-variable"] = s3_profile(s3, "training/${FOLDER_FOR_TESTS}")
    dcm.from_hf(hf, "msc://by-file/ckpt")
    assert get_folder("msc://by-file/ckpt") == get_folder("msc://by-variable/ckpt")
    assert "release/.metadata" in get_folder("msc://by-file/ckpt")


def test_an_implicit_profile(s3: Emulator, given: dict[str, Any], tmp_path: Path) -> None:  # noqa: ARG001  (none)
    """``_s3-BUCKET`` needs no configuration: keys and endpoint are those of the environment."""
    hf = save_model(tmp_path / "hf")
    with environment(s3.environment):
        dcm.from_hf(hf, "msc://_s3-training/fourth")
        assert not dcm.inspect("msc://_s3-training/fourth").problems


def test_a_profile_of_a_directory_is_that_directory(given: dict[str, Any], tmp_path: Path) -> None:
    """A file provider is a local path, with all that it is good for; MSC's own client reads what was written."""
    import multistorageclient  # noqa: PLC0415  (optional)

    given["disk"] = {"storage_provider": {"type": "file", "options": {"base_path": str(tmp_path / "base")}}}
    hf = save_model(tmp_path / "hf")
    dcm.from_hf(hf, "msc://disk/ckpt")
    assert as_path("msc://disk/ckpt") == tmp_path / "base/ckpt"
    with multistorageclient.open("msc://disk/ckpt/latest_checkpointed_iteration.txt", "r") as file:
        assert file.read() == "release"
    assert as_path(f"msc://__filesystem__{hf}") == hf


def test_a_profile_of_azure(given: dict[str, Any], tmp_path: Path) -> None:
    """A connection string tells account, key and endpoint."""
    with azurite("models", tmp_path) as server:
        connection = (
            f"DefaultEndpointsProtocol=http;AccountName={AZURE_ACCOUNT};AccountKey={AZURE_KEY};"
            f"BlobEndpoint={server.endpoint}/{AZURE_ACCOUNT};"
        )
        given["azure"] = {
            "storage_provider": {"type": "azure", "options": {"base_path": "models/x", "endpoint_url": "unused"}},
            "credentials_provider": {"type": "AzureCredentials", "options": {"connection": connection}},
        }
        require_round_trip("msc://azure/first", tmp_path)


def test_a_profile_of_google(given: dict[str, Any], tmp_path: Path) -> None:
    """An endpoint without credentials is an emulator of GCS."""
    with gcs("models") as server:
        options = {"base_path": "models", "endpoint_url": server.endpoint, "project_id": "any"}
        given["google"] = {"storage_provider": {"type": "gcs", "options": options}}
        require_round_trip("msc://google/first", tmp_path)


@pytest.mark.parametrize(("content", "says"), [
    ({"storage_provider": {"type": "oci", "options": {"base_path": "a"}}}, "got oci. Copy the files"),
    (
        {
            "storage_provider": {"type": "s3", "options": {"base_path": "a"}},
            "metadata_provider": {"type": "manifest", "options": {}},
        },
        "its metadata_provider is not supported",
    ),
    (
        {
            "storage_provider": {"type": "s3", "options": {"base_path": "a"}},
            "credentials_provider": {"type": "AISCredentials", "options": {}},
        },
        "its credentials_provider AISCredentials is not supported",
    ),
    (
        {"storage_provider": {"type": "s3", "options": {"base_path": "a", "signature_version": "s3"}}},
        "its signature_version s3 is not supported",
    ),
    ({"storage_provider": {"type": "s3", "options": {"base_path": "${NOT_SET_HERE}"}}}, "NOT_SET_HERE"),
    (
        {
            "storage_provider": {"type": "s3", "options": {"base_path": "a"}},
            "credentials_provider": {"type": "S3Credentials", "options": {"access_key": "a"}},
        },
        "its profile has no secret_key",
    ),
    ({"nothing": 1}, "its configuration cannot be read"),
])  # fmt: skip
def test_what_a_profile_cannot_be(content: object, says: str, given: dict[str, Any]) -> None:
    """What other clients of MSC serve is refused by name, in one line, before anything is asked for."""
    given["other"] = content
    outcome = run("inspect", "msc://other/ckpt")
    assert outcome.code == 1
    (line,) = outcome.err
    assert line.startswith("error: cannot open msc://other: ")
    assert says in line


def test_a_profile_that_is_not_there(given: dict[str, Any]) -> None:
    """The error names the profiles that there are, and the file."""
    given["one"] = {"storage_provider": {"type": "file", "options": {"base_path": "/srv"}}}
    outcome = run("inspect", "msc://other/ckpt")
    assert outcome.code == 1
    assert "expected a profile of this name in" in outcome.err[0]
    assert outcome.err[0].endswith(", got one. Set MSC_CONFIG to the file that has it.")


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the package and the extra."""
    profile.cache_clear()
    monkeypatch.setitem(sys.modules, "multistorageclient", None)
    outcome = run("inspect", "msc://any/ckpt")
    assert outcome.code == 1
    assert "multi-storage-client, not installed here" in outcome.err[0]
    assert "[msc]" in outcome.err[0]
