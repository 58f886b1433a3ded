"""What every store does, whatever it keeps its objects in: one suite that all of them pass."""

from __future__ import annotations

import itertools
import socket
from collections.abc import Iterator
from pathlib import Path

import object_servers
import pytest
from emulators import Emulator, azurite, gcs, moto
from object_servers import S3Server, free_ports, s3_for_tests, seaweedfs

from dist_ckpt_mistral.errors import FormatError, SourceError
from dist_ckpt_mistral.storage.buckets import BucketStore, Where
from dist_ckpt_mistral.storage.folder import FolderStore
from dist_ckpt_mistral.storage.memory import MemoryStore
from dist_ckpt_mistral.storage.msc import BucketsInKeys
from dist_ckpt_mistral.storage.remote_path import store_of
from dist_ckpt_mistral.storage.store import Info, ObjectExistsError, Range, Store, commit, read_many

_NUMBERS = itertools.count()
_MIB = 1 << 20


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """An S3 server for all tests of this module."""
    with s3_for_tests(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(scope="module")
def moto_s3() -> Iterator[Emulator]:
    """Another S3 server."""
    with moto("contract") as server:
        yield server


@pytest.fixture(scope="module")
def google() -> Iterator[Emulator]:
    """A server for GCS's client."""
    with gcs("google") as server:
        yield server


@pytest.fixture(scope="module")
def azure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Emulator]:
    """A server for Azure's client."""
    with azurite("contract", tmp_path_factory.mktemp("azurite")) as server:
        yield server


@pytest.fixture(params=["memory", "folder", "s3", "moto", "gs", "az", "folder in a bucket", "buckets in keys"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """A store of each kind."""
    kind = request.param
    if kind == "memory":
        return MemoryStore()
    if kind == "folder":
        return FolderStore(tmp_path)
    if kind == "s3":
        return store_of(request.getfixturevalue("s3").url)
    if kind == "buckets in keys":
        return BucketsInKeys("memory://profile", MemoryStore)
    server = request.getfixturevalue({"gs": "google", "az": "azure"}.get(kind, "moto_s3"))
    url = f"{server.url}/some/folder" if kind == "folder in a bucket" else server.url
    return BucketStore(url, Where(url=url, options=server.where.options))


@pytest.fixture
def top(store: Store) -> str:
    """A folder that no other test uses."""
    return "bucket/" * store.bucket_parts + f"test-{next(_NUMBERS)}"


def read_all(store: Store, key: str) -> bytes:
    """The content of an object as it is now."""
    info = store.info(key)
    assert info is not None
    return bytes(store.read(key, 0, info.num_bytes, info.version))


def test_reads_back_what_it_wrote_with_size_and_version(store: Store, top: str) -> None:
    """An object has the bytes, the size and the version with which it was written."""
    version = store.write(f"{top}/a/b", b"0123456789")
    assert store.info(f"{top}/a/b") == Info(10, version)
    assert read_all(store, f"{top}/a/b") == b"0123456789"
    assert bytes(store.read(f"{top}/a/b", 2, 5, version)) == b"234"


def test_lists_a_folder_and_all_below_it(store: Store, top: str) -> None:
    """A listing names objects with size and version, and folders; a prefix that is no folder has no part in it."""
    for key in ("one", "folder/two", "folder/deep/three", "folderx"):
        store.write(f"{top}/{key}", key.encode())
    listing = store.children(top)
    assert (sorted(listing.files), sorted(listing.folders)) == (["folderx", "one"], ["folder"])
    assert listing.files["one"] == store.info(f"{top}/one")
    below = store.below(f"{top}/folder")
    assert [*below] == [f"{top}/folder/deep/three", f"{top}/folder/two"]
    assert below[f"{top}/folder/two"] == store.info(f"{top}/folder/two")
    assert not store.children(f"{top}/absent").files
    assert not store.below(f"{top}/absent")


def test_another_version_is_refused(store: Store, top: str) -> None:
    """Who reads a version that is there no more gets an error and no bytes of another."""
    first = store.write(f"{top}/a", b"first")
    second = store.write(f"{top}/a", b"other")
    assert first != second
    with pytest.raises(SourceError, match="changed while it was read"):
        store.read(f"{top}/a", 0, 5, first)
    assert bytes(store.read(f"{top}/a", 0, 5, second)) == b"other"


def test_what_is_absent_or_too_short_is_an_error_of_the_source(store: Store, top: str) -> None:
    """No object is read as empty, and no range is cut short. The error says nothing of a damaged format."""
    assert store.info(f"{top}/absent") is None
    with pytest.raises(SourceError) as caught:
        store.read(f"{top}/absent", 0, 1, None)
    assert not isinstance(caught.value, FormatError)


def test_only_new_creates_once(store: Store, top: str) -> None:
    """The second of two that create an object is refused, and changes nothing."""
    store.write(f"{top}/a", b"mine", only_new=True)
    with pytest.raises(ObjectExistsError):
        store.write(f"{top}/a", b"theirs", only_new=True)
    assert read_all(store, f"{top}/a") == b"mine"


def test_many_ranges_at_once(store: Store, top: str) -> None:
    """Ranges come in the order in which they were asked for, longer ones than a request reads too."""
    data = bytes(range(256)) * (10 * _MIB // 256)
    version = store.upload(f"{top}/a", iter([data[: 8 * _MIB], data[8 * _MIB :]]), 8 * _MIB)
    ranges = [Range(5, 9), Range(0, 10 * _MIB), Range(3 * _MIB, 3 * _MIB + 7)]
    assert [bytes(each) for each in read_many(store, f"{top}/a", ranges, version)] == [data[a:b] for a, b in ranges]


@pytest.mark.parametrize("sizes", [[], [3], [5 * _MIB, 7], [5 * _MIB, 5 * _MIB, 1]])
def test_uploads_parts_in_order(store: Store, top: str, sizes: list[int]) -> None:
    """An object is its parts one after the other; none at all make an empty one."""
    parts = [bytes([number]) * size for number, size in enumerate(sizes)]
    version = store.upload(f"{top}/a", iter(parts), 5 * _MIB, in_flight=2)
    assert store.info(f"{top}/a") == Info(sum(sizes), version)
    assert sum(sizes) == 0 or read_all(store, f"{top}/a") == b"".join(parts)


def test_a_failing_upload_publishes_nothing(store: Store, top: str) -> None:
    """The error of whoever makes the parts is raised as it is, and there is no object, not even a part of one."""

    def parts() -> Iterator[bytes]:
        yield b"x" * (5 * _MIB)
        yield b"y" * (5 * _MIB)
        raise RuntimeError("out of parts")

    with pytest.raises(RuntimeError, match="out of parts"):
        store.upload(f"{top}/a", parts(), 5 * _MIB)
    assert not store.below(top)


def test_deletes_what_is_there_and_ignores_the_rest(store: Store, top: str) -> None:
    """After a deletion nothing is left, and what was never there is no error."""
    store.write(f"{top}/a", b"1")
    store.write(f"{top}/folder/b", b"2")
    store.delete([f"{top}/a", f"{top}/absent", f"{top}/folder/b"])
    store.delete([])
    assert not store.below(top)


def test_commits_in_order(store: Store, top: str) -> None:
    """What is committed last is there last: it was written after all others."""
    commit(store, [(f"{top}/first", b"1"), (f"{top}/last", b"2")])
    assert {key: read_all(store, key) for key in store.below(top)} == {f"{top}/first": b"1", f"{top}/last": b"2"}


def test_a_server_whose_port_is_taken_starts_on_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the choice of ports and the start of a server someone else may take one: that does not fail a test."""
    with socket.socket() as other:
        (taken,) = free_ports(1)
        other.bind(("127.0.0.1", taken + 10_000))  # where its volume server would answer gRPC
        other.listen()
        master, _, filer, s3 = free_ports(4)
        draws = iter([[master, taken, filer, s3], free_ports(4)])
        monkeypatch.setattr(object_servers, "free_ports", lambda _: next(draws))
        with seaweedfs(tmp_path) as server:
            assert server.endpoint not in {f"http://127.0.0.1:{port}" for port in (taken, s3)}
