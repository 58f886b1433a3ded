"""Damaged and hostile zarr checkpoints: each is refused in one line that names all, soon and in little memory."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from bounded import bounded, bounded_refusal
from command_line import refusal, run
from genuine import folder
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_reading import described, load_tensors
from zarr_checkpoints import copied, edit_array, new_checkpoint, numbered, read_arrays, write_array

from dist_ckpt_mistral.errors import FormatError
from dist_ckpt_mistral.formats import legacy_zarr
from dist_ckpt_mistral.formats.stored_checkpoint import open_stored
from dist_ckpt_mistral.gather import dtypes
from dist_ckpt_mistral.gather.boxes import require_tiling

CASE: Final = "zarr_ckpt"
CONFIG: Final = ("--config", folder(CASE) / "config.json")
FC2: Final = "decoder.layers.mlp.linear_fc2.weight"
HEAD: Final = "output_layer.weight"
STATE: Final = "decoder.layers.mlp.linear_fc2._extra_state"
KEYS: Final = (FC2, HEAD)
Spoil = Callable[[Path], object]


def in_place_of(path: Path, make: Callable[[Path], object]) -> None:
    """Put something else where a file was."""
    path.unlink()
    make(path)


def lengthened(path: Path, more: int) -> None:
    """A file with some bytes more, or fewer."""
    content = path.read_bytes()
    path.write_bytes(content[:more] if more < 0 else content + bytes(more))


def saved(path: Path) -> None:
    """An object, where none was."""
    path.parent.mkdir(exist_ok=True)
    torch.save(None, path)


def remove(folder: Path) -> Path:
    """A folder is gone."""
    shutil.rmtree(folder)
    return folder


def only_locks(folder: Path) -> None:
    """A folder is gone; the one in which its writers locked chunks is still there."""
    locks = remove(folder).with_name(f"{folder.name}.sync")
    locks.mkdir()
    (locks / ".zarray").touch()


def arrays(**members: Any) -> Spoil:  # noqa: ANN401  (JSON)
    """Both arrays say something else of themselves."""
    return lambda path: [edit_array(path / key, **members) for key in KEYS]


def written(text: str) -> Spoil:
    """Both arrays have another ``.zarray``."""
    return lambda path: [(path / key / ".zarray").write_text(text) for key in KEYS]


def without(member: str) -> Spoil:
    """Both arrays do not say something of themselves."""

    def spoil(path: Path) -> None:
        for key in KEYS:
            said = json.loads((path / key / ".zarray").read_bytes())
            del said[member]
            (path / key / ".zarray").write_text(json.dumps(said))

    return spoil


def both(change: Callable[[Path], object], *names: str) -> Spoil:
    """The same is done to files of the checkpoint."""
    return lambda path: [change(path / name) for name in names]


#: What is wrong -> how it comes about, and what the refusal says.
DAMAGED: Final[dict[str, tuple[Spoil, list[str]]]] = {
    "chunks have no file": (
        both(Path.unlink, f"{FC2}/1.0.1", f"{FC2}/2.0.0", f"{HEAD}/0.0"),
        [rf"{FC2}, which .* are missing: 1\.0\.1, 2\.0\.0\.", rf"{HEAD}, which .* are missing: 0\.0\."],
    ),
    "files of no chunk": (
        both(Path.touch, *(f"{FC2}/{name}" for name in ("9.0.1", "0.00.1", "0.0", ".1.0.0.x")), f"{HEAD}/\u0661.0"),
        [rf"{FC2}, which .* are unknown: \.1\.0\.0\.x, 0\.0, 0\.00\.1, 9\.0\.1\.", rf"{HEAD}.* unknown: \u0661\.0\."],
    ),
    "chunks without .zarray": (
        both(Path.unlink, f"{FC2}/.zarray", f"{HEAD}/.zarray"),
        [rf"{FC2} holds 0\.0\.0, .*3\.0\.1: expected \.zarray and its chunks, or obj", rf"{HEAD} holds 0\.0, 1\.0:"],
    ),
    "a .zarray that is no file": (
        both(lambda path: in_place_of(path, os.mkfifo), f"{FC2}/.zarray", f"{HEAD}/.zarray"),
        [rf"cannot read \S+{key}/\.zarray: it is not a regular file" for key in KEYS],
    ),
    "empty directories": (
        both(lambda path: remove(path).mkdir(), FC2, HEAD),
        [rf"directories in \S+ are empty: {FC2}, {HEAD}\. Copy the checkpoint again"],
    ),
    "links to elsewhere": (
        both(lambda path: in_place_of(path, lambda to: to.symlink_to("/etc/hostname")), f"{FC2}/1.0.1", f"{HEAD}/0.0"),
        [rf"links lead out of \S+, or nowhere: \S+{name}\." for name in (rf"{FC2}/1\.0\.1", rf"{HEAD}/0\.0")],
    ),
    "a folder elsewhere": (
        both(lambda path: path.symlink_to(path.rename(path.parents[1] / "elsewhere")), FC2),
        [rf"links lead out of \S+, or nowhere: \S+{FC2}\."],
    ),
    "links to nowhere": (
        both(lambda path: in_place_of(path, lambda to: to.symlink_to(to)), f"{FC2}/1.0.1", f"{STATE}/shard_0_4.pt"),
        [rf"links lead out of \S+, or nowhere: \S+{name}\." for name in (rf"{FC2}/1\.0\.1", rf"{STATE}/shard_0_4\.pt")],
    ),
    "keys that cannot be printed": (
        lambda path: [(path / FC2).rename(path / "a\x1b[31m"), (path / HEAD).rename(path / os.fsdecode(b"caf\xe9"))],
        [r"the key 'a\\x1b\[31m': expected a name that can be printed", r"the key 'caf\\udce9': expected"],
    ),
    "locks of no array": (both(only_locks, *KEYS), [rf"invalid JSON in \.zarray in \S+{key}\.sync: " for key in KEYS]),
    "no JSON": (written("{"), [rf"invalid JSON in \.zarray in \S+{key}: " for key in KEYS]),
    "no object": (written("[]"), [rf"\.zarray in \S+{key}: expected an object, got list" for key in KEYS]),
    "a member twice": (
        written('{"shape": [1], "shape": [2]}'),
        [rf"duplicate JSON keys 'shape' in \.zarray in \S+{key}\." for key in KEYS],
    ),
    "no order": (without("order"), [rf"order for \S+ in \S+{key}: expected 'C', got nothing" for key in KEYS]),
    "no shape": (without("shape"), [rf"shape for \S+ in \S+{key}: expected a list of sizes, got None" for key in KEYS]),
    "a size that is none": (
        lambda path: [edit_array(path / FC2, shape=[True, 64, 96]), edit_array(path / HEAD, chunks=[-1, 64])],
        [r"shape for .* expected a list of sizes, got \[True, 64, 96\]", r"chunks for .* sizes, got \[-1, 64\]"],
    ),
    "a size that is no number": (
        lambda path: [edit_array(path / FC2, shape=[float("nan")]), edit_array(path / HEAD, shape=[256.0, 64])],
        [r"list of sizes, got \[nan\]", r"list of sizes, got \[256\.0, 64\]"],
    ),
    "no sizes": (
        lambda path: [edit_array(path / FC2, shape="4"), edit_array(path / HEAD, shape=None)],
        [r"list of sizes, got '4'", r"list of sizes, got None"],
    ),
    "another number of chunks": (
        lambda path: [edit_array(path / FC2, chunks=[1, 64]), edit_array(path / HEAD, chunks=[0, 64])],
        [r"one for each axis of \[4, 64, 96\], got \[1, 64\]", r"for each axis of \[256, 64\], got \[0, 64\]"],
    ),
    "more axes than torch has": (
        arrays(shape=[1] * 65, chunks=[1] * 65),
        [r"list of sizes, got \[1, 1, 1, 1, 1, 1, \.\.\.\]"],
    ),
    "a size of 30 digits": (arrays(shape=[10**30], chunks=[1]), [r"\[1000+\] is more than any memory holds"]),
    "a size of 5000 digits": (
        written('{"shape": [1' + "0" * 5000 + "]}"),
        [r"invalid JSON in \.zarray in \S+: Exceeds the limit"],
    ),
    "a chunk beyond all numbers": (
        arrays(shape=[2**60], chunks=[2**60]),
        [r"\[1152921504606846976\] is more than any memory holds"],
    ),
    "more chunks than can be counted": (
        arrays(shape=[10**17], chunks=[1]),
        [rf"{FC2}, which holds an array \[1(0+)\] in chunks \[1\], are missing: \{{0-999\}}; unknown: 0\.0\.0, "],
    ),
    "as many on many axes": (
        arrays(shape=[512] * 6, chunks=[1] * 6),
        [r"are missing: 0\.0\.0\.0\.0\.\{0-511\}, 0\.0\.0\.0\.1\.\{0-487\}; unknown: 0\.0\.0, "],
    ),
    "objects of other names": (
        both(Path.touch, *(f"{STATE}/{name}" for name in ("shard_00_4.pt", "shard_0_4_.pt", "shard_\u0661_4.pt", "x"))),
        [rf"{STATE} holds shard_00_4\.pt, shard_0_4_\.pt, shard_\u0661_4\.pt, x: expected"],
    ),
    "an object outside of its shape": (
        both(Path.touch, f"{STATE}/shard_7_4.pt"),
        [rf"{STATE}/shard_7_4\.pt: the object has an index outside of its shape"],
    ),
    "an object of too many axes": (
        both(Path.touch, f"{STATE}/shard_0.0.0_4.pt"),
        [rf"{STATE}/shard_0\.0\.0_4\.pt: the object has an index outside"],
    ),
    "an object twice": (
        both(saved, "state/shard_0.1_1.pt", "state/shard_0.1_1.2.pt"),
        [r"state/shard_0\.1_1\.pt: the object is stored twice, also in shard_0\.1_1\.2\.pt"],
    ),
    "no array at all": (
        lambda path: [remove(array.parent) for array in path.glob("*/.zarray")],
        [r"old holds no arrays: it was not copied whole"],
    ),
}  # fmt: skip
#: Arrays of other kinds than Megatron's, of which nothing need be wrong.
FOREIGN: Final[dict[str, tuple[dict[str, Any], str]]] = {
    "compressed": ({"compressor": {"id": "zlib"}}, "compressor for {}: expected None, got {{'id': 'zlib'}}"),
    "filtered": ({"filters": [{"id": "delta"}]}, "filters for {}: expected None, got [{{'id': 'delta'}}]"),
    "in Fortran's order": ({"order": "F"}, "order for {}: expected 'C', got 'F'"),
    "of zarr 3": ({"zarr_format": 3}, "zarr_format for {}: expected 2, got 3"),
    "in folders": ({"dimension_separator": "/"}, "dimension_separator for {}: expected '.', got '/'"),
    "big-endian": ({"dtype": ">f4"}, "dtype for {}: expected one of <f8, <f4, <f2, bfloat16,"),
    "complex": ({"dtype": "<c8"}, "dtype for {}: expected one of"),
    "structured": ({"dtype": [["a", "<f4"]]}, "dtype for {}: expected one of"),
    "cut behind other axes": ({"shape": [4, 64, 95]}, "expected a multiple of the chunks [1, 64, 48] along axis 2"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_told(name: str, tmp_path: Path) -> None:
    """Conversions refuse what is damaged, and name all of it; ``verify`` finds it; time and memory are limited."""
    spoil, expected = DAMAGED[name]
    old = copied(CASE, tmp_path / "old")
    spoil(old)
    before = names(tmp_path)
    line = bounded_refusal("migrate", old, tmp_path / "new")
    assert [text for text in expected if not re.search(text, line)] == [], line
    assert line.rstrip("\n").isprintable()
    assert bounded_refusal("to-hf", old, tmp_path / "hf", *CONFIG) == line
    assert run("inspect", old, *CONFIG).code == 1
    outcome = run("verify", old, *CONFIG)
    assert (outcome.code, outcome.err) == (3, [])
    assert outcome.out[0] == line.removeprefix("error: ").rstrip("\n")
    assert names(tmp_path) == before


def names(where: Path) -> list[str]:
    """Everything that is under a folder."""
    return sorted(map(os.fsdecode, map(bytes, where.rglob("*"))))


@pytest.mark.parametrize("name", FOREIGN)
def test_other_arrays_are_refused_by_name(name: str, tmp_path: Path) -> None:
    """Arrays that Megatron never wrote are named with what is another; that is no damage."""
    members, expected = FOREIGN[name]
    old = copied(CASE, tmp_path / "old")
    edit_array(old / FC2, **members)
    for command in (("migrate", old, tmp_path / "new"), ("verify", old), ("inspect", old)):
        assert expected.format(f".zarray in {old / FC2}") in refusal(tmp_path, *command)


CHUNKS: Final = (f"{FC2}/1.0.1", f"{HEAD}/0.0")
SIZES: Final[dict[str, tuple[Spoil, str, str]]] = {
    "truncated": (both(lambda path: lengthened(path, -1), *CHUNKS), "truncated", "its file has 6143 bytes"),
    "empty": (both(lambda path: path.write_bytes(b""), *CHUNKS), "truncated", "its file has 0 bytes"),
    "too long": (both(lambda path: lengthened(path, 1), *CHUNKS), "too long", "its file has 6145 bytes"),
    "a pipe": (both(lambda path: in_place_of(path, os.mkfifo), *CHUNKS), "missing", "it is missing"),
    "a directory": (both(lambda path: in_place_of(path, Path.mkdir), *CHUNKS), "missing", "it is missing"),
}


@pytest.mark.parametrize("name", SIZES)
def test_chunk_files_are_whole(name: str, tmp_path: Path) -> None:
    """Chunk files of another size, or that are none, are all named, by ``verify`` with the tensor that they hold."""
    spoil, what, told = SIZES[name]
    old = copied(CASE, tmp_path / "old")
    spoil(old)
    for command in (("migrate", old, tmp_path / "new"), ("to-hf", old, tmp_path / "hf", *CONFIG)):
        line = bounded_refusal(*command)
        assert re.search(rf"files in \S+ are {what}: {FC2}/1\.0\.1\b.*, {HEAD}/0\.0\b", line), line
    inspected = run("inspect", old, *CONFIG)
    assert inspected.code == 1
    assert any(f"are {what}: {FC2}/1.0.1" in line for line in inspected.out)
    found = json.loads("\n".join(run("verify", old, *CONFIG, "--json").out))["findings"]
    assert [finding["file"] for finding in found] == [f"{FC2}/1.0.1", f"{HEAD}/0.0"]
    assert told in found[0]["what"]
    if what != "missing":
        assert [finding["tensor"] for finding in found] == [FC2, HEAD]
        names = [name for finding in found for name in finding["hf_names"]]
        assert names == ["model.layers.1.mlp.down_proj.weight", "lm_head.weight"]


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda path: lengthened(path, -1), "is not a torch.save archive, or it is truncated"),
        (lambda path: path.write_bytes(b""), "is not a torch.save archive, or it is truncated"),
        (lambda path: in_place_of(path, os.mkfifo), r"are missing: \S+shard_0_4\.pt"),
        (lambda path: in_place_of(path, Path.mkdir), r"are missing: \S+shard_0_4\.pt"),
    ],
)
def test_objects_are_whole(spoil: Spoil, expected: str, tmp_path: Path) -> None:
    """A spoiled object is named by ``migrate`` and ``verify``; an export, which needs none, is made."""
    old = copied(CASE, tmp_path / "old")
    for key in (STATE, STATE.replace("fc2", "fc1")):
        spoil(old / key / "shard_0_4.pt")
    line = bounded_refusal("migrate", old, tmp_path / "new")
    assert re.search(expected, line)
    assert all(f"{key}/shard_0_4.pt" in line for key in (STATE, STATE.replace("fc2", "fc1")))
    assert bounded("to-hf", old, tmp_path / "hf", *CONFIG).returncode == 0
    outcome = run("verify", old, *CONFIG)
    assert outcome.code == 3
    assert sum("shard_0_4" in line for line in outcome.out) == 2


def test_damage_after_migration_is_found(tmp_path: Path) -> None:
    """Bare chunks have no checksum; in the new checkpoint every bit has one."""
    old = copied(CASE, tmp_path / "old")
    assert run("migrate", old, tmp_path / "new").code == 0
    file = tmp_path / "new" / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    at = content.index((old / FC2 / "2.0.1").read_bytes())
    content[at + 5] ^= 4
    file.write_bytes(content)
    outcome = run("verify", tmp_path / "new", *CONFIG)
    assert outcome.code == 3
    assert f"__0_0.distcp: {FC2} (model.layers.2.mlp.down_proj.weight): bytes " in outcome.out[0]


def test_many_chunks(tmp_path: Path) -> None:
    """More chunk files than may be open at once are listed soon, and migrated in little memory."""
    old = new_checkpoint(tmp_path / "old")
    write_array(old / "a", numbered([8, 500, 2]), (1, 1, 2))
    start = time.process_time()
    open_stored(old)
    assert time.process_time() - start < 1
    script = (
        "import resource, sys; from dist_ckpt_mistral.cli.main import main; "
        "resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128)); sys.exit(main(sys.argv[1:]))"
    )
    for command in (("migrate", old, tmp_path / "new", "--workers", "4"), ("verify", tmp_path / "new")):
        done = subprocess.run([sys.executable, "-c", script, *command], check=False, capture_output=True, timeout=120)
        assert done.returncode == 0, done.stderr
    assert described(load_tensors(tmp_path / "new")) == described(read_arrays(old))


NUMBERS: Final = st.integers(-1, 5) | st.sampled_from([10**18, 2**63, 10**30, True, None, 1.5, "3"])
SAID: Final = st.fixed_dictionaries(
    {
        "zarr_format": st.just(2) | NUMBERS,
        "shape": st.lists(NUMBERS, max_size=4) | NUMBERS,
        "chunks": st.lists(NUMBERS, max_size=4) | NUMBERS,
        "dtype": st.sampled_from(["<f4", "bfloat16", "|b1", ">f4", "", None, []]),
        "compressor": st.none() | NUMBERS,
        "filters": st.none() | st.just([]),
        "order": st.sampled_from(["C", "C", "C", "F"]),
    },
    optional={"dimension_separator": st.sampled_from([".", "/"]), "fill_value": NUMBERS},
)
NAMES: Final = ("0", "1", "0.0", "0.1", "1.0", "1.1", "0.0.0", "0.0.1", "2", "00", ".zattrs", "shard_0_1.pt", "x")


@settings(max_examples=200)
@given(said=SAID, files=st.sets(st.sampled_from(NAMES), max_size=5))
def test_whatever_an_array_says(said: dict[str, Any], files: set[str]) -> None:
    """Any description beside any files is read, each file as a chunk of the grid, or refused: nothing else happens."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "key").mkdir()
        (directory / "key" / ".zarray").write_text(json.dumps(said))
        for each in files:
            (directory / "key" / each).touch()
        try:
            found = legacy_zarr.read_stored(directory)
        except FormatError:
            return
    tensor = found.tensors["key"]
    assert {*found.file_bytes} == {f"key/{each}" for each in files - {".zattrs"}}
    assert (tensor.global_shape, tensor.num_chunks) == (tuple(said["shape"]), len(found.file_bytes))
    require_tiling(*found.chunks("key")[:2], tensor.global_shape, "the chunks")
    assert {*found.file_bytes.values()} <= {math.prod(said["chunks"]) * dtypes.itemsize_bytes(tensor.dtype)}
