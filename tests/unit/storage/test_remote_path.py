"""URLs as paths: their names, what a run sees of a store, and that local commands load no client of any store."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from plain_models import save_model

from dist_ckpt_mistral.errors import FormatError, SourceError
from dist_ckpt_mistral.storage import documents, paths
from dist_ckpt_mistral.storage.local import SourceFiles
from dist_ckpt_mistral.storage.memory import MemoryStore
from dist_ckpt_mistral.storage.remote_path import RemotePath, as_path, store_of
from dist_ckpt_mistral.storage.remote_reads import Wanted, coalesced
from dist_ckpt_mistral.storage.retries import may_pass, reason
from dist_ckpt_mistral.storage.sources import Sources, require_unchanged

pytestmark = pytest.mark.usefixtures("empty_stores")


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """The requests for bytes: key, start and stop."""
    seen: list[tuple[str, int, int]] = []
    read, lock = MemoryStore.read, threading.Lock()

    def noted(self: MemoryStore, key: str, start: int, stop: int, version: str | None) -> memoryview:
        with lock:
            seen.append((key, start, stop))
        return read(self, key, start, stop, version)

    monkeypatch.setattr(MemoryStore, "read", noted)
    return seen


def test_names_of_a_url() -> None:
    """A URL keeps both slashes of its scheme, and is taken apart and put together like a path."""
    path = as_path("s3://bucket/folder/ckpt/")
    assert isinstance(path, RemotePath)
    assert (str(path), path.base, path.key, path.name) == (
        "s3://bucket/folder/ckpt",
        "s3://bucket",
        "folder/ckpt",
        "ckpt",
    )
    assert str(path / "iter_1" / ".metadata") == "s3://bucket/folder/ckpt/iter_1/.metadata"
    assert [str(each) for each in path.parents] == ["s3://bucket/folder", "s3://bucket"]
    assert str((path / "a" / "b").relative_to(path)) == "a/b"
    assert path == as_path("s3://bucket/folder/ckpt")
    assert pickle.loads(pickle.dumps(path)) == path  # noqa: S301  (its own)
    assert paths.as_given(path) == str(path)


@pytest.mark.parametrize(
    "text", ["/x/y", "x/y", "hf://org/name", "https://huggingface.co/org/name", "s3:/x/y", "org/name@main"]
)
def test_what_is_no_url_of_a_store(text: str) -> None:
    """Local paths and names of the hub stay what they are."""
    assert not isinstance(as_path(text), RemotePath)


@pytest.mark.parametrize("text", ["s3://", "gs:///", "hf://", "file://"])
def test_a_url_without_a_place(text: str) -> None:
    """What an unset variable leaves of a URL is refused: it became a local directory of that name."""
    with pytest.raises(
        SourceError,
        match=f"^{text} is a URL without a place. Write it out, such as {text[:5].partition(':')[0]}://NAME/",
    ):
        as_path(text)


def test_the_operating_system_gets_no_url() -> None:
    """What would take a URL for a file of this machine fails, and does not look for a folder called ``s3:``."""
    with pytest.raises(TypeError, match="is a URL, not a path of the operating system"):
        os.stat(as_path("s3://bucket/ckpt"))  # noqa: PTH116  (what must not work)


def test_folders_and_files() -> None:
    """Folders are what has something below; listings are asked for once, and anew of a refreshed path."""
    store = store_of("memory://bucket")
    for key in ("top/a/one", "top/two", "top/a/deep/three"):
        store.write(key, b"1234")
    top = as_path("memory://bucket/top")
    assert [path.name for path in top.iterdir()] == ["a", "two"]
    assert [(top / name).is_dir() for name in ("a", "two", "absent")] == [True, False, False]
    assert [(top / name).is_file() for name in ("a", "two", "absent")] == [False, True, False]
    assert [str(path.relative_to(top)) for path in top.rglob("*")] == ["two", "a/one", "a/deep/three"]
    assert (top / "two").stat().st_size == 4
    store.write("top/new", b"")
    assert isinstance(top, RemotePath)
    assert ((top / "new").exists(), (top.refreshed() / "new").exists()) == (False, True)


def test_small_files_take_one_request(reads: list[tuple[str, int, int]]) -> None:
    """Every small read of a small file, by whoever, comes from the one request that got it whole."""
    store_of("memory://bucket").write("top/config.json", b'{"a": 1}')
    path = as_path("memory://bucket/top") / "config.json"
    assert documents.read_json(path) == {"a": 1}
    assert not documents.is_lfs_pointer(path)
    assert documents.read_bytes(path) == b'{"a": 1}'
    assert reads == [("top/config.json", 0, 8)]


def test_a_source_of_another_version() -> None:
    """A run reads the version that it has seen first, also through another listing, or fails."""
    store = store_of("memory://bucket")
    store.write("top/a", b"first" * 40_000)
    path = as_path("memory://bucket/top") / "a"
    with Sources() as inputs, SourceFiles([path]) as files:
        assert files.size_bytes(0) == 200_000
        store.write("top/a", b"other" * 40_000)
        with pytest.raises(SourceError, match="memory://bucket/top/a changed while it was read") as caught:
            files.read(0, 0, 150_000)
        assert not isinstance(caught.value, FormatError)
    with pytest.raises(SourceError, match="changed while it was read"):
        require_unchanged(inputs)
    store.delete(["top/a"])
    with pytest.raises(SourceError, match="vanished while it was read"):
        require_unchanged(inputs)


def test_reading_beyond_the_end() -> None:
    """An object that is shorter than something says is truncated, as a file is."""
    store_of("memory://bucket").write("a", b"1234")
    with (
        SourceFiles([as_path("memory://bucket/a")]) as files,
        pytest.raises(FormatError, match="expected at least 9 bytes, got 4"),
    ):
        files.read(0, 0, 9)


def test_ranges_are_fetched_together_and_shared_ones_once(reads: list[tuple[str, int, int]]) -> None:
    """Ranges with small gaps are one request; of shared rows, each is fetched once for all who want a piece."""
    data = bytes(range(251)) * 40_000
    store_of("memory://bucket").write("a", data)
    with SourceFiles([as_path("memory://bucket/a")]) as files:
        held = files.hold([Wanted(0, 100, 200), Wanted(0, 1000, 5000), Wanted(0, 9_000_000, 9_000_010)])
        buffers = bytearray(50), bytearray(4000), bytearray(10)
        held.read_into(0, 120, memoryview(buffers[0]))
        held.read_into(0, 1000, memoryview(buffers[1]))
        held.read_into(0, 9_000_000, memoryview(buffers[2]))
        assert [*map(bytes, buffers)] == [data[120:170], data[1000:5000], data[9_000_000:9_000_010]]
        assert sorted(reads) == [("a", 100, 5000), ("a", 9_000_000, 9_000_010)]
        reads.clear()
        files.share(8 << 20)
        for start in range(0, 1000, 100):  # every rank has a piece of each row
            held = files.hold([Wanted(0, 3_000_000 + start, 5_000_000 + start, is_shared=True)])
            buffer = bytearray(100)
            held.read_into(0, 4_000_000 + start, memoryview(buffer))
            assert buffer == data[4_000_000 + start : 4_000_100 + start]
        assert sum(stop - start for _, start, stop in reads) < 2_000_000 + 3 * (256 << 10)


def test_coalesced_ranges() -> None:
    """Ranges of one file grow together over gaps up to the limit, never over files."""
    wanted = [Wanted(1, 50, 60), Wanted(0, 10, 20), Wanted(0, 25, 30), Wanted(0, 100, 100), Wanted(0, 12, 40)]
    assert coalesced(wanted, gap_bytes=5) == [Wanted(0, 10, 40), Wanted(1, 50, 60)]


@pytest.mark.parametrize(("answer", "says", "passes"), [
    ("status code: 400 Bad Request: <Error><Code>ExpiredToken</Code></Error>", "credentials have expired", False),
    ("<Error><Code>PermanentRedirect</Code></Error>", "in another region", False),
    ("<Error><Code>AccessDenied</Code></Error>", "permission denied", False),
    ("Error performing PUT http://169.254.169.254/latest/api/token in 1 s", "there are no credentials", False),
    ("Server returned non-2xx status code: 403 Forbidden: ", "permission denied", False),
    ("Received redirect without LOCATION, this normally indicates an incorrectly configured region", "region", False),
    ("<Code>AuthorizationHeaderMalformed</Code><Region>eu-west-1</Region>", "Set AWS_REGION=eu-west-1", False),
    ("Server returned non-2xx status code: 400 Bad Request:", "without saying why, as for expired credentials", False),
    ("after 3 retries - HTTP error: error sending request", "the server does not answer, although", True),
    ("Server returned non-2xx status code: 503 Busy: <Error><Code>SlowDown</Code></Error>", "SlowDown", True),
    ("connection closed before message completed\nDebug source: ...", "closed before message completed", True),
])  # fmt: skip
def test_reasons_in_one_line(answer: str, says: str, passes: bool) -> None:
    """What servers answer is said in one line, with what to do; only what may pass is tried again."""
    error = RuntimeError(answer)
    assert says in reason(error)
    assert "\n" not in reason(error)
    assert may_pass(error) == passes


def test_local_commands_load_no_client(tmp_path: Path) -> None:
    """Neither --help nor a command over local paths imports obstore, boto3 or what finds their credentials."""
    hf = save_model(tmp_path / "hf")
    program = (
        "import sys; from dist_ckpt_mistral.cli.main import main\n"
        f"assert main(['from-hf', {str(hf)!r}, {str(tmp_path / 'ckpt')!r}]) == 0\n"
        f"assert main(['inspect', {str(tmp_path / 'ckpt')!r}]) == 0\n"
        "sys.exit(', '.join({'obstore', 'boto3', 'botocore'} & sys.modules.keys()) or 0)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
