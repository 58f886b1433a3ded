"""An output in a store is whole or not there, whatever happens while it is written; and a run can be continued."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from plain_models import save_model
from rank_threads import on_ranks
from remote_folders import files_of, get_folder, put_folder, remote

from dist_ckpt_mistral.convert.from_hf import from_hf
from dist_ckpt_mistral.convert.output import Output
from dist_ckpt_mistral.convert.to_hf import to_hf
from dist_ckpt_mistral.errors import OutputError, SourceError
from dist_ckpt_mistral.formats.checkpoint_directory import commit_names
from dist_ckpt_mistral.gather.execute import Effort
from dist_ckpt_mistral.storage.memory import MemoryStore
from dist_ckpt_mistral.storage.paths import require_writable
from dist_ckpt_mistral.storage.remote_path import as_path, forget_stores

pytestmark = pytest.mark.usefixtures("empty_stores")

#: Whatever a method of the store takes and returns.
_Anything: TypeAlias = Any
_OUT = "memory://bucket/some/out"
_EFFORT = Effort(workers=1)


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model."""
    return save_model(tmp_path_factory.mktemp("model") / "hf")


@pytest.fixture(scope="module")
def expected(hf: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The import of the model into a local directory."""
    out = tmp_path_factory.mktemp("local") / "out"
    from_hf(hf, out, tp=2, effort=_EFFORT)
    return files_of(out)


def imported(hf: Path | str, **output: _Anything) -> None:
    """Import the model into the store."""
    from_hf(hf, _OUT, tp=2, effort=_EFFORT, output=Output(**output))


class Ended(BaseException):
    """Stands for the death of the process: no handler of errors cleans up after it."""


def failing_at(monkeypatch: pytest.MonkeyPatch, number: int, error: BaseException) -> list[str]:
    """Have the write of object ``number``, and everything after it, fail. Returns the keys that were written."""
    written: list[str] = []

    def counted(method: Callable[..., _Anything]) -> Callable[..., _Anything]:
        def call(self: MemoryStore, key: str, *arguments: _Anything, **options: _Anything) -> _Anything:
            if len(written) >= number:
                raise error
            written.append(key)
            return method(self, key, *arguments, **options)

        return call

    delete = MemoryStore.delete

    def deleted(self: MemoryStore, keys: Iterable[str]) -> None:
        if len(written) >= number:
            raise error
        delete(self, keys)

    monkeypatch.setattr(MemoryStore, "write", counted(MemoryStore.write))
    monkeypatch.setattr(MemoryStore, "delete", deleted)
    return written


def test_the_same_bytes_as_in_a_directory(hf: Path, expected: dict[str, bytes]) -> None:
    """A store gets the files that a directory gets, and nothing of the run is left."""
    imported(hf)
    assert get_folder(_OUT) == expected


def test_what_readers_open_first_comes_last(
    hf: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data, other files, and then .metadata, metadata.json and the tracker, in this order."""
    written: list[str] = []
    write = MemoryStore.write

    def noted(self: MemoryStore, key: str, *arguments: _Anything, **options: _Anything) -> str | None:
        written.append(key)
        return write(self, key, *arguments, **options)

    monkeypatch.setattr(MemoryStore, "write", noted)
    imported(hf)
    names = [key.removeprefix("some/out/") for key in written]
    last = [name for name in commit_names("release") if name in expected]
    assert names[0] == ".incomplete/run.json"
    assert (
        names[-len(last) :]
        == last
        == ["release/.metadata", "release/metadata.json", "latest_checkpointed_iteration.txt"]
    )
    data = [at for at, name in enumerate(names) if name.endswith(".distcp")]
    small = [at for at, name in enumerate(names) if name.startswith(("hf/", "release/hf/"))]
    assert max(data) < min(small)


def test_killed_at_any_write(hf: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed before any of its writes, a run leaves no commit names unless all else is there, and --resume ends it."""
    num_writes = len(expected) + 3  # its own file, and a record of each of two data files
    for number in range(num_writes):
        forget_stores()
        with monkeypatch.context() as broken:
            failing_at(broken, number, Ended())
            with pytest.raises(Ended):
                imported(hf)
        present = get_folder(_OUT)
        if "latest_checkpointed_iteration.txt" in present:
            assert present.items() >= expected.items()
        if number:
            with pytest.raises(OutputError, match="--resume continues it"):
                imported(hf)
        imported(hf, resume=True)
        assert get_folder(_OUT) == expected


def test_a_resumed_run_keeps_whole_objects(
    hf: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is whole and as it was left is not uploaded again; what has changed since is."""
    with monkeypatch.context() as broken:
        failing_at(broken, 5, Ended())  # behind two data files and their records
        with pytest.raises(Ended):
            imported(hf)
    store = remote(_OUT).snapshot.store
    store.write("some/out/release/__1_0.distcp", b"something else")
    uploads: list[str] = []
    upload = MemoryStore.upload

    def noted(
        self: MemoryStore, key: str, parts: Iterable[bytes], *arguments: _Anything, **options: _Anything
    ) -> str | None:
        uploads.append(key)
        return upload(self, key, parts, *arguments, **options)

    monkeypatch.setattr(MemoryStore, "upload", noted)
    imported(hf, resume=True)
    assert uploads == ["some/out/release/__1_0.distcp"]
    assert get_folder(_OUT) == expected


def test_an_error_leaves_nothing_or_what_can_be_resumed(hf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a whole object everything is removed; with one it is kept, and the next run may begin again or resume."""
    with monkeypatch.context() as broken:
        broken.setattr(MemoryStore, "upload", lambda *_, **__: (_ for _ in ()).throw(OutputError("full")))
        with pytest.raises(OutputError, match="full") as caught:
            imported(hf)
    assert caught.value.__notes__ == ["Nothing was published."]
    assert not get_folder(_OUT)
    with monkeypatch.context() as broken:
        broken.setattr(
            "dist_ckpt_mistral.convert.store_output.commit", lambda *_: (_ for _ in ()).throw(OutputError("full"))
        )
        with pytest.raises(OutputError, match="full") as caught:
            imported(hf)
    assert "--resume continues" in caught.value.__notes__[0]
    assert caught.value.__notes__[0].startswith("All data are written, and some may be seen.")
    imported(hf)  # the run that failed says that it has ended


def test_two_runs_at_once(hf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one run writes, another one is refused, and changes nothing."""
    seen: list[str] = []

    def second(*_: _Anything) -> None:
        for options in ({}, {"dry_run": True}):
            with pytest.raises(OutputError, match="another run is writing") as caught:
                imported(hf, **options)
            seen.append(str(caught.value))

    monkeypatch.setattr("dist_ckpt_mistral.storage.sources.require_unchanged", second)
    imported(hf)
    assert len(seen) == 2


def test_a_run_that_was_taken_over_commits_nothing(hf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If another run begins meanwhile, the first one finds out before it commits, and leaves all as it is."""
    other = json.dumps({"id": "another"}).encode()
    before: dict[str, bytes] = {}

    def takes_over(*_: _Anything) -> None:
        remote(_OUT).snapshot.store.write("some/out/.incomplete/run.json", other)
        before.update(get_folder(_OUT))

    monkeypatch.setattr("dist_ckpt_mistral.storage.sources.require_unchanged", takes_over)
    with pytest.raises(OutputError, match="taken") as caught:
        imported(hf)
    assert caught.value.__notes__ == ["Nothing was published."]
    assert get_folder(_OUT) == before
    assert before[".incomplete/run.json"] == other
    assert "latest_checkpointed_iteration.txt" not in before


def test_no_object_of_a_run_that_was_taken_over_appears(hf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was cut off, and goes on when another one has the output, gives up before its object is whole."""
    upload = MemoryStore.upload

    def taken_over(
        self: MemoryStore, key: str, parts: Iterable[bytes], *arguments: _Anything, **options: _Anything
    ) -> str | None:
        self.write("some/out/.incomplete/run.json", b"{}")
        return upload(self, key, parts, *arguments, **options)

    monkeypatch.setattr(MemoryStore, "upload", taken_over)
    with pytest.raises(OutputError, match="taken"):
        imported(hf)
    assert get_folder(_OUT) == {".incomplete/run.json": b"{}"}


@pytest.mark.parametrize("is_deleted", [False, True])
def test_data_that_something_else_has_touched(
    is_deleted: bool, hf: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A data object that was written again or deleted before the commit fails the run, and --resume mends it."""

    def spoils(*_: _Anything) -> None:
        store = remote(_OUT).snapshot.store
        if is_deleted:
            store.delete(["some/out/release/__0_0.distcp"])
        else:
            store.write("some/out/release/__0_0.distcp", b"another")

    with monkeypatch.context() as spoiled:
        spoiled.setattr("dist_ckpt_mistral.storage.sources.require_unchanged", spoils)
        with pytest.raises(OutputError, match=r"__0_0\.distcp was written or deleted by something else") as caught:
            imported(hf)
    assert caught.value.__notes__ == [f"Nothing was published. --resume continues what is kept in {_OUT}."]
    imported(hf, resume=True)
    assert get_folder(_OUT) == expected


def test_an_output_that_exists(hf: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused without --overwrite; with it, what readers open first is removed before anything else."""
    imported(hf)
    with pytest.raises(OutputError, match=r"exists\. Choose another name or give --overwrite"):
        imported(hf)
    remote(_OUT).snapshot.store.write("some/out/old", b"of another run")
    deleted: list[str] = []
    delete = MemoryStore.delete

    def noted(self: MemoryStore, keys: Iterable[str]) -> None:
        keys = [*keys]
        deleted.extend(keys)
        delete(self, keys)

    monkeypatch.setattr(MemoryStore, "delete", noted)
    imported(hf, overwrite=True)
    assert deleted[0] == "some/out/latest_checkpointed_iteration.txt"
    assert get_folder(_OUT) == expected


def test_other_options_do_not_continue_a_run(hf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--resume compares everything that determines the output, and says what differs."""
    with monkeypatch.context() as broken:
        failing_at(broken, 5, Ended())
        with pytest.raises(Ended):
            imported(hf)
    with pytest.raises(OutputError, match=r"the earlier run differs: --dtype was null, is .*float32"):
        from_hf(hf, _OUT, tp=2, dtype="float32", effort=_EFFORT, output=Output(resume=True))


def test_a_source_that_is_written_again(hf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A source object that gets another version during the run fails it, and nothing is committed."""
    url = put_folder(hf, "memory://bucket/hf")
    gather = MemoryStore.upload

    def rewriting(
        self: MemoryStore, key: str, parts: Iterable[bytes], *arguments: _Anything, **options: _Anything
    ) -> str | None:
        data = (hf / "model.safetensors").read_bytes()
        self.write("hf/model.safetensors", data[:-1] + b"x")
        return gather(self, key, parts, *arguments, **options)

    monkeypatch.setattr(MemoryStore, "upload", rewriting)
    with pytest.raises(SourceError, match=r"model.safetensors changed while it was read"):
        imported(url)
    assert "latest_checkpointed_iteration.txt" not in get_folder(_OUT)


def test_a_whole_bucket_and_a_web_server_are_no_outputs(hf: Path) -> None:
    """A bucket is never cleared, and a web server is only read."""
    with pytest.raises(OutputError, match="is a whole bucket"):
        from_hf(hf, "memory://bucket", output=Output(overwrite=True))
    with pytest.raises(OutputError, match="is on a web server"):
        require_writable(as_path("http://127.0.0.1:9/out"), overwrite=True)


def test_a_dry_run_writes_nothing(hf: Path) -> None:
    """It makes the same checks, and the store stays as it is."""
    imported(hf, dry_run=True)
    assert not get_folder(_OUT)


def test_parts_cut_values_and_checksums_are_those_of_the_whole(
    hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With parts of an odd number of bytes, which cut values that are converted, the files are the same."""
    from_hf(hf, tmp_path / "ckpt", effort=_EFFORT)
    to_hf(tmp_path / "ckpt", tmp_path / "hf", dtype="float32", effort=_EFFORT, output=Output(sha256=True))
    monkeypatch.setattr("dist_ckpt_mistral.gather.parts.part_bytes_of", lambda *_: 1001)
    to_hf(tmp_path / "ckpt", _OUT, dtype="float32", effort=_EFFORT, output=Output(sha256=True))
    assert get_folder(_OUT) == files_of(tmp_path / "hf")


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_write_what_one_process_writes(hf: Path, expected: dict[str, bytes], world_size: int) -> None:
    """Each rank uploads whole files, also where there are more ranks than files, and the first one commits."""
    errors = on_ranks(world_size, lambda ranks: from_hf(hf, _OUT, tp=2, effort=_EFFORT, ranks=ranks))
    assert errors == [None] * world_size
    assert get_folder(_OUT) == expected


def test_another_number_of_ranks_resumes(hf: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that fails fails all; what the others have uploaded is kept for one process that resumes."""
    uploads: list[str] = []
    upload = MemoryStore.upload

    def noted(
        self: MemoryStore, key: str, parts: Iterable[bytes], *arguments: _Anything, **options: _Anything
    ) -> str | None:
        uploads.append(key)
        if len(uploads) < 3 and key.endswith("__1_0.distcp"):
            raise OutputError("cannot write it")
        return upload(self, key, parts, *arguments, **options)

    monkeypatch.setattr(MemoryStore, "upload", noted)
    errors = on_ranks(2, lambda ranks: from_hf(hf, _OUT, tp=2, effort=_EFFORT, ranks=ranks))
    assert all("cannot write it" in str(error) for error in errors)
    assert "latest_checkpointed_iteration.txt" not in get_folder(_OUT)
    uploads[:] = ["", "", ""]
    imported(hf, resume=True)
    assert uploads[3:] == ["some/out/release/__1_0.distcp"]
    assert get_folder(_OUT) == expected


def test_a_small_file_of_several_parts(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer that is longer than a part is uploaded in parts."""
    put_folder(hf, "memory://bucket/hf")
    tokenizer = b"0123456789" * 1000
    remote("memory://bucket").snapshot.store.write("hf/tokenizer.model", tokenizer)
    monkeypatch.setattr("dist_ckpt_mistral.convert.store_output.PART_BYTES", 999)
    imported("memory://bucket/hf")
    assert get_folder(_OUT)["hf/tokenizer.model"] == tokenizer
    assert not [*tmp_path.iterdir()]
