"""Outputs that cannot be written: refused before the first byte, and by ``--dry-run`` in the same words."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from command_line import Outcome, refusal, run, tree, without_time
from failing_writes import at_write, full
from genuine import folder
from plain_models import contents, save_model

import dist_ckpt_mistral as dcm
from dist_ckpt_mistral.messages import human_bytes
from dist_ckpt_mistral.storage import local
from dist_ckpt_mistral.storage.staging import Staging

COMMANDS: Final = ("from-hf", "to-hf", "reshard", "migrate")
#: What Python reports of calls that change a file system.
_CHANGES: Final = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink", "os.utime")
_seen: list[tuple[str, Any]] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if writes or event in _CHANGES:
        _seen.append((event, arguments[0]))


sys.addaudithook(_audit)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What each command reads, under the name of the command."""
    where = tmp_path_factory.mktemp("sources")
    save_model(where / "from-hf", max_shard_size=6000)
    dcm.from_hf(where / "from-hf", where / "to-hf", tp=2)
    shutil.copytree(where / "to-hf", where / "reshard")
    shutil.copytree(folder("zarr_ckpt") / "checkpoint", where / "migrate")
    return where


@pytest.fixture
def sources(pristine: Path, tmp_path: Path) -> Path:
    """The same, to spoil."""
    return shutil.copytree(pristine, tmp_path / "sources", copy_function=shutil.copy)


def make_directory(output: Path) -> None:
    """Somebody's directory."""
    output.mkdir()
    (output / "precious").write_text("old")


def make_training(output: Path) -> None:
    """A root of several iterations."""
    (output / "iter_0000001").mkdir(parents=True)
    (output / "iter_0000002").mkdir()


def make_aside(output: Path) -> None:
    """What a run leaves that is killed while it replaces an old output."""
    make_directory(output.with_name(f".{output.name}.replaced"))


def linked(output: Path, make: Callable[[Path], object]) -> Path:
    """What ``make`` makes, somewhere else, and a link to it."""
    place = output.parent / "elsewhere" / "there"
    place.parent.mkdir()
    make(place)
    output.symlink_to(place)
    return place


#: Per case: where the output shall be, what is made there before, further options, and what the refusal says.
PLACES: Final[dict[str, tuple[str, Callable[[Path], object], tuple[str, ...], str]]] = {
    "directory": ("out", make_directory, (), "exists. Choose another name or give --overwrite"),
    "file": ("out", Path.touch, (), "exists. Choose another name or give --overwrite"),
    "file to replace": ("out", Path.touch, ("--overwrite",), "--overwrite replaces only directories"),
    "link to a device": ("out", lambda out: out.symlink_to("/dev/null"), ("--overwrite",), "is not a directory"),
    "link to a file": ("out", lambda out: out.symlink_to(__file__), ("--overwrite",), "is not a directory"),
    "pipe to replace": ("out", os.mkfifo, ("--overwrite",), "--overwrite replaces only directories"),
    "broken link": (
        "out",
        lambda out: out.symlink_to("nowhere"),
        (),
        "exists: it is a link to nowhere, where nothing is",
    ),
    "broken link to replace": ("out", lambda out: out.symlink_to("nowhere"), ("--overwrite",), "Make that directory"),
    "link to a training": (
        "out",
        lambda out: linked(out, make_training),
        ("--overwrite",),
        "/there) holds 2 checkpoints",
    ),
    "link in a ring": ("out/a", lambda out: out.parent.symlink_to("out"), (), "out/a"),
    "device": ("/dev/null", lambda _: None, (), "exists"),
    "device to replace": ("/dev/null", lambda _: None, ("--overwrite",), "is not a directory"),
    "below a device": ("/dev/null/a/b", lambda _: None, (), "cannot create /dev/null/a/b: Not a directory"),
    "below a file": ("out/a/b", lambda out: out.parents[1].touch(), (), "out/a/b: Not a directory"),
    "no file system for files": ("/proc/x", lambda _: None, (), "are needed, 0 are free"),
    "deep in it": ("/proc/x/y/z", lambda _: None, (), "are needed, 0 are free"),
    "long name": ("o" * 250, lambda _: None, (), "File name too long"),
    "long name of a parent": (f"a/{'o' * 256}/b", lambda _: None, (), "File name too long"),
    "file system": ("/proc", lambda _: None, ("--overwrite",), "the output /proc is a mount point"),
    "mount point inside": ("/", lambda _: None, ("--overwrite",), "the output / "),
    "training": ("out", make_training, ("--overwrite",), "holds 2 checkpoints (iter_0000001 to iter_0000002)"),
    "moved aside": ("out", make_aside, (), "out exists. Choose another name or give --overwrite"),
    "held": ("out", lambda out: Staging(out).hold(overwrite=False, resume=False), (), "another run is writing"),
    "URL": ("ftp://host/out", lambda _: None, (), "is a URL of a kind that cannot be written"),
}


def untouched(*arguments: object) -> Outcome:
    """What a dry run says, which must not even try to change anything."""
    _seen.clear()
    outcome = run(*arguments, "--dry-run")
    assert [each for each in _seen if "lock" not in str(each[1])] == []  # whether it is held, asking tells
    return outcome


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("case", PLACES)
def test_a_place_that_is_refused(case: str, command: str, pristine: Path, tmp_path: Path) -> None:
    """In one line that says why, the same with --dry-run; nothing is copied, made or removed."""
    place, make, options, expected = PLACES[case]
    output = place if "://" in place else tmp_path / place
    make(Path(output))
    before = tree(tmp_path)
    dry = untouched(command, pristine / command, output, *options)
    assert tree(tmp_path) == before
    wet = run(command, pristine / command, output, *options)
    assert (dry.code, dry.out, wet.code, wet.out) == (1, [], 1, [])
    assert [line for line in wet.err if line.startswith("error: ")] == [wet.err[-1]]
    assert wet.err[-1].startswith(dry.err[-1])
    assert expected in dry.err[-1]
    assert case == "moved aside" or tree(tmp_path) == before


@pytest.mark.parametrize("command", COMMANDS)
def test_a_link_to_a_directory(command: str, pristine: Path, tmp_path: Path) -> None:
    """The link stays and its target is replaced, with --overwrite or if that is empty: it may be on a larger disk."""
    output = tmp_path / "out"
    place = linked(output, make_directory)
    line = refusal(tmp_path, command, pristine / command, output)
    assert line.endswith(f"the output {output} (a link to {place}) exists. Choose another name or give --overwrite.")
    for options in (("--overwrite",), ()):
        assert run(command, pristine / command, output, *options).code == 0
        assert output.readlink() == place
        assert "precious" not in contents(place)
        assert {path.name for path in (*tmp_path.iterdir(), *place.parent.iterdir())} == {"out", "elsewhere", "there"}
        assert len(contents(place)) > 1
        shutil.rmtree(place)
        place.mkdir()


def unreadable(path: Path) -> None:
    """Put something in the place of a file that cannot be opened, for root neither."""
    path.unlink()
    path.symlink_to(path)


#: What is wrong with the source of each command, further options, and what the refusal says.
SOURCES: Final[dict[str, tuple[str, Callable[[Path], object], tuple[object, ...], str]]] = {
    "truncated model": ("from-hf", lambda at: os.truncate(at / "model-00002-of-00004.safetensors", 3000), (), "trunc"),
    "alias": ("from-hf", lambda at: (at / "config.json").write_text("{}"), (), "config.json"),
    "layout": ("from-hf", lambda _: None, ("--tp", 7), "not divisible by tp=7"),
    "iteration": ("from-hf", lambda _: None, ("--iteration", 10**18), "expected a whole number from 0 to"),
    "missing shard": ("to-hf", lambda at: (at / "release/__1_0.distcp").unlink(), (), "missing: __1_0.distcp"),
    "common state": ("reshard", lambda at: unreadable(at / "release/common.pt"), (), "common.pt"),
    "stray file": ("reshard", lambda at: unreadable(at / "release/metadata.json"), (), "metadata.json"),
    "layout to cut": ("reshard", lambda _: None, ("--pp", 10**18), "pp: a layout may have 1048576 ranks at most"),
    "chunk": ("migrate", lambda at: unreadable(next(at.rglob("*.weight/0.0"))), (), "0.0"),
    "other format": ("migrate", lambda at: (at / "metadata.json").write_text('{"sharded_backend": "x"}'), (), "x"),
}


@pytest.mark.parametrize("case", SOURCES)
def test_a_source_that_is_refused(case: str, sources: Path, tmp_path: Path) -> None:
    """The dry run finds what the real run finds in its sources, also what is only copied."""
    command, spoil, options, expected = SOURCES[case]
    spoil(sources / command)
    dry = untouched(command, sources / command, tmp_path / "out", *options)
    wet = run(command, sources / command, tmp_path / "out", *options)
    assert dry == wet
    assert (wet.code, wet.out) == (1, [])
    assert expected in wet.err[-1]


@pytest.mark.parametrize("command", COMMANDS)
def test_what_would_be_written(command: str, pristine: Path, tmp_path: Path) -> None:
    """Every command lists the data files with the sizes that they then have, and makes no directory for it."""
    output = tmp_path / "a" / "b" / "out"
    dry = untouched(command, pristine / command, output)
    assert (dry.code, list(tmp_path.iterdir())) == (0, [])
    wet = run(command, pristine / command, output)
    assert wet.code == 0
    assert dry.out[0] == without_time(wet.out[0]).replace("wrote", "would write")
    data = [path for path in output.rglob("*") if path.suffix in {".distcp", ".safetensors"}]
    assert dry.out[1:] == [f"  {path.relative_to(output)}  {human_bytes(path.stat().st_size)}" for path in sorted(data)]
    assert len(dry.out) > 1


@pytest.mark.parametrize("command", COMMANDS)
def test_no_space(command: str, pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Space is counted before anything is made; what a killed run left counts as free."""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    dry = untouched(command, pristine / command, tmp_path / "out")
    assert "1000 are free" in dry.err[-1]
    assert dry == run(command, pristine / command, tmp_path / "out")
    left = tmp_path / ".out.incomplete"
    left.mkdir()
    (left / "left").write_bytes(bytes(4 << 20))
    assert untouched(command, pristine / command, tmp_path / "out").code == 0
    assert (left / "left").exists()
    assert run(command, pristine / command, tmp_path / "out").code == 0


def test_what_cannot_be_resumed(pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --resume, the dry run says whether the real one could go on, and leaves what is there."""
    arguments = "from-hf", pristine / "from-hf", tmp_path / "out"
    with monkeypatch.context() as patch:
        at_write(20, full, patch)
        assert run(*arguments, "--workers", 1).code == 1
    before = tree(tmp_path)
    assert untouched(*arguments, "--resume").code == 0
    dry = untouched(*arguments, "--resume", "--dtype", "float32")
    assert "cannot resume" in dry.err[0]
    assert dry == run(*arguments, "--resume", "--dtype", "float32")
    assert tree(tmp_path) == before
    assert run(*arguments, "--resume").code == 0


@pytest.fixture
def strangers() -> Iterator[Path]:
    """A directory in which this process, for a while nobody if it is root's, may only look."""
    place = Path(tempfile.mkdtemp())
    (place / "old").mkdir()
    (place / "old" / "precious").touch()
    (place / "old").chmod(0o555)
    place.chmod(0o555)
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(65534)
        yield place
    finally:
        os.seteuid(user)
        place.chmod(0o755)
        (place / "old").chmod(0o755)
        shutil.rmtree(place)


def test_a_directory_of_somebody_else(strangers: Path) -> None:
    """Where nothing can be made or replaced, that is known at once."""
    for output, options in (
        (strangers / "out", ()),
        (strangers / "a" / "out", ()),
        (strangers / "old", ("--overwrite",)),
    ):
        source = folder("zarr_ckpt") / "checkpoint"
        dry = untouched("migrate", source, output, *options)
        assert dry == run("migrate", source, output, *options)
        assert dry.err == [f"error: cannot create {output}: Permission denied"]


def test_an_input_by_another_name(pristine: Path, tmp_path: Path) -> None:
    """An output in, at or around the input is refused, also where a bind mount gives that a second name."""
    source = shutil.copytree(pristine / "to-hf", tmp_path / "at" / "ckpt", symlinks=True)
    before = tree(source)
    line = "import sys; from dist_ckpt_mistral.cli.main import main; sys.exit(main())"
    outputs = ("again/ckpt", "again/ckpt/release", "again/ckpt/new/out", "again", "release/out")
    script = f"""
        cd '{tmp_path}' && mkdir again release || exit 1
        mount --bind at again && mount --bind at/ckpt/release release || exit 77
        for output in {" ".join(outputs)}; do
            '{sys.executable}' -c '{line}' to-hf at/ckpt $output --overwrite
        done; true
    """
    in_namespace = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script]
    done = subprocess.run(in_namespace, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("no mount namespaces here")
    for output, said in zip(outputs, done.stderr.splitlines(), strict=True):
        assert f"the output {output} and the input at/ckpt" in said
        assert said.endswith("must lie apart. Choose another output.")
    assert tree(source) == before


def test_a_mount_point_of_the_same_device(pristine: Path, tmp_path: Path) -> None:
    """A directory that cannot be renamed, or that holds one, is refused before the first byte, not after the last."""
    for name in ("volume", "with blank/volume"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "with blank" / "precious").touch()
    (tmp_path / "elsewhere").mkdir()
    line = "import sys; from dist_ckpt_mistral.cli.main import main; sys.exit(main())"
    script = f"""
        cd '{tmp_path}' && mount --bind elsewhere volume && mount --bind elsewhere 'with blank/volume' || exit 77
        for output in volume 'with blank/volume' 'with blank'; do
            '{sys.executable}' -c '{line}' from-hf '{pristine / "from-hf"}' "$output" --overwrite $DRY
        done; true
    """
    in_namespace = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script]
    for dry in ("", "--dry-run"):
        done = subprocess.run(in_namespace, capture_output=True, text=True, env=os.environ | {"DRY": dry}, check=False)
        if done.returncode:
            pytest.skip("no mount namespaces here")
        assert done.stderr.splitlines() == [
            "error: the output volume is a mount point, which cannot be renamed. Choose a directory in it.",
            "error: the output with blank/volume is a mount point, which cannot be renamed. Choose a directory in it.",
            f"error: the output with blank holds the mount point {tmp_path}/with blank/volume. Choose another name.",
        ]


def test_mount_points_are_read_as_the_kernel_writes_them() -> None:
    """The file systems that df knows are among them."""
    told = subprocess.run(["df", "--output=target", "/proc", "/"], capture_output=True, text=True, check=True)
    assert {*map(Path, told.stdout.splitlines()[1:])} <= {*local.mount_points()}


def test_the_current_directory(pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``.`` and ``..`` are the directories that they name, with their contents: no mount points."""
    (tmp_path / "here" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "below")
    for output in (".", "../below", "./"):
        assert untouched("to-hf", pristine / "to-hf", output).code == 0
    for output in ("..", "../../here", "../below/.."):
        line = refusal(tmp_path, "to-hf", pristine / "to-hf", output)
        assert f"the output {Path(output)} exists. Choose another name or give --overwrite." in line
    shutil.copytree(pristine / "to-hf", tmp_path / "here" / "ckpt")
    monkeypatch.chdir(tmp_path / "here")
    assert "the output . and the input ckpt must lie apart" in refusal(tmp_path, "to-hf", "ckpt", ".")
    assert "must lie apart" in refusal(tmp_path, "to-hf", ".", "ckpt/..", "--overwrite")
    monkeypatch.chdir(tmp_path / "here" / "below")
    assert run("to-hf", pristine / "to-hf", "../below").code == 0
    assert contents(tmp_path / "here" / "below") == contents(pristine / "from-hf")


def test_where_directories_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mkdir that answers ENOENT, as in /proc, ends the run, and so does a lock that is always gone."""
    monkeypatch.setattr(os, "mkdir", lambda *_: (_ for _ in ()).throw(FileNotFoundError(errno.ENOENT, "No such file")))
    with pytest.raises(dcm.OutputError, match=f"cannot create {tmp_path / 'out'}: No such file"):
        Staging(tmp_path / "out").hold(overwrite=False, resume=False)
    monkeypatch.undo()
    monkeypatch.setattr(fcntl, "flock", lambda *_: (tmp_path / ".out.incomplete" / "lock").unlink())
    with pytest.raises(dcm.OutputError, match="other runs that write it"):
        Staging(tmp_path / "out").hold(overwrite=False, resume=False)
