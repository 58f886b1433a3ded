"""What an attacker would hand over: whole directories, met by the command line in a process of its own.

Each is refused in one printable line, within seconds and little memory, and nothing outside the output is touched.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
from bounded import bounded, bounded_refusal
from command_line import run, tree
from genuine import folder

from dist_ckpt_mistral.errors import FormatError, LayoutError
from dist_ckpt_mistral.formats.hf_directory import FileSet, read_directory
from dist_ckpt_mistral.messages import grouped, listed, printable
from dist_ckpt_mistral.model.layout.layout import ParallelLayout
from dist_ckpt_mistral.storage.paths import leads_outside

CONFIG: Final[dict[str, Any]] = json.loads((folder("td_0161") / "config.json").read_bytes())
ENTRY: Final = {"dtype": "BF16", "shape": [64], "data_offsets": [0, 128]}


def hugging_face(where: Path, header: object = None, **config: object) -> Path:
    """A directory with the genuine configuration, changed, and a file of one tensor or of the header given."""
    where.mkdir()
    (where / "config.json").write_text(json.dumps(CONFIG | config))
    text = header if isinstance(header, bytes) else json.dumps(header or {"model.norm.weight": ENTRY}).encode()
    (where / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(128))
    return where


def checkpoint(where: Path) -> Path:
    """A genuine checkpoint; its configuration lies beside it."""
    shutil.copytree(folder("td_0161") / "checkpoint", where / "it")
    shutil.copy(folder("td_0161") / "config.json", where)
    return where / "it"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be at most 10000, got 1000000000"),
        ({"num_key_value_heads": 10**6, "num_attention_heads": 10**6}, "key heads and experts at most, got 4000000"),
        ({"vocab_size": 2**31}, "vocab_size must be a positive integer of at most 2147483647, got 2147483648"),
        ({"hidden_size": 10**4000}, "hidden_size must be a positive integer of at most 2147483647, got 1000"),
    ],
)  # fmt: skip
def test_absurd_sizes(config: dict[str, Any], expected: str, tmp_path: Path) -> None:
    """No table is made for sizes that no model has."""
    path = hugging_face(tmp_path / "hf", **config)
    for arguments in (("from-hf", path, tmp_path / "out"), ("megatron-args", path), ("verify", path, path)):
        assert expected in bounded_refusal(*arguments)


HEADERS: Final[dict[str, tuple[object, str]]] = {
    "a million brackets": (b'{"a":[' + b"[]," * 10**6 + b"[]]}", "more brackets than entries of its length need"),
    "escape sequences": ({"\x1b[2J\x1b]0;\x07\u202e\ud800\nx": ENTRY}, r"\x1b[2J\x1b]0;\x07\u202e\ud800 x [64]"),
    "a thousand numbers in a name": ({".".join(map(str, range(3000))): ENTRY}, "0.1.2.3.4"),
    "a number of five thousand digits": ({"9" * 5000: ENTRY}, "9999"),
    "an extent of 2 ** 63": ({"a": ENTRY | {"shape": [0, 2**63], "data_offsets": [0, 0]}, "b": ENTRY}, "too large"),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADERS)
def test_hostile_headers(name: str, tmp_path: Path) -> None:
    """Whatever a header says is told in one line that steers no terminal."""
    header, expected = HEADERS[name]
    path = hugging_face(tmp_path / "hf", header)
    line = bounded_refusal("from-hf", path, tmp_path / "out")
    assert expected in line
    assert line.rstrip("\n").isprintable()
    outcome = bounded("inspect", path)
    assert outcome.returncode == 1
    assert all(line.isprintable() for line in (outcome.stdout + outcome.stderr).splitlines())


def test_names_in_messages() -> None:
    """Names of too many or too long numbers are patterns of their own; others are still put together."""
    names = [f"layer {n}" for n in range(60)]
    assert listed(names) == "layer {0-59}"
    odd = [".".join(["7"] * 5000) + f".{n}" for n in range(60)] + ["9" * 5000 + f" {n}" for n in range(60)]
    assert list(grouped(odd))[:60] == odd[:60]
    assert listed([f"a{n} b{n}" for n in range(100_060)]).endswith(" and 60 more")
    assert printable("a\x1b[31m\ud800\u202eb\nc") == "a\\x1b[31m\\ud800\\u202eb c"
    assert len(str(FormatError("x" * 10**6))) < 21_000


@pytest.mark.parametrize("name", ["common.pt", "__0_0.distcp", ".metadata", "metadata.json", "config.json"])
@pytest.mark.parametrize("kind", ["pipe", "device", "directory"])
def test_what_is_no_file(name: str, kind: str, tmp_path: Path) -> None:
    """Nobody waits at a pipe or reads a device without end."""
    path = checkpoint(tmp_path)
    place = tmp_path / name if name == "config.json" else path / name
    place.unlink()
    makers: dict[str, Callable[[], None]] = {
        "pipe": lambda: os.mkfifo(place),
        "device": lambda: place.symlink_to("/dev/zero"),
        "directory": place.mkdir,
    }
    makers[kind]()
    assert name in bounded_refusal("to-hf", path, tmp_path / "out", "--config", tmp_path / "config.json")


def test_a_pipe_among_small_files(tmp_path: Path) -> None:
    """Resharding copies what lies beside the shards, but waits for nobody and follows no link to elsewhere."""
    path = checkpoint(tmp_path)
    os.mkfifo(path / "pipe")
    (tmp_path / "secret").write_text("none of your business")
    (path / "link").symlink_to(tmp_path / "secret")
    (path / "inner").symlink_to("metadata.json")
    (path / "note").write_text("kept")
    arguments = ("reshard", path, tmp_path / "out", "--config", tmp_path / "config.json", "--no-sync")
    outcome = bounded(*arguments)
    assert outcome.returncode == 0, outcome.stderr
    assert {"note", "inner"} <= tree(tmp_path / "out").keys()
    assert {"pipe", "link"}.isdisjoint(tree(tmp_path / "out"))
    assert "link is no file, or a link out of the checkpoint: it stays behind" in outcome.stderr


def test_links_of_the_hub_cache_are_followed(tmp_path: Path) -> None:
    """Snapshots are links into the blobs beside them; any other link out of a model's directory is not copied along."""
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "1", tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "abc").write_text("tokenizer")
    (tmp_path / "secret").write_text("none of your business")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/abc")
    (snapshot / "merges.txt").symlink_to("../../../secret")
    (snapshot / "vocab.txt").symlink_to("tokenizer.json")
    outside = {path.name: leads_outside(path, snapshot) for path in snapshot.iterdir()}
    assert outside == {"tokenizer.json": False, "merges.txt": True, "vocab.txt": False}


def test_small_files_that_are_links(tmp_path: Path) -> None:
    """An import and an export leave a link to elsewhere behind, and say so."""
    path = checkpoint(tmp_path)
    model = tmp_path / "hf"
    assert run("to-hf", path, model, "--config", tmp_path / "config.json", "--no-sync").code == 0
    (tmp_path / "secret").write_text("none of your business")
    (model / "tokenizer.json").symlink_to(tmp_path / "secret")
    outcome = run("from-hf", model, tmp_path / "out", "--no-sync")
    assert outcome.code == 0
    assert f"{model / 'tokenizer.json'} is a link out of its directory: it stays behind" in outcome.err
    assert not any(content and b"none of your" in content for content in tree(tmp_path / "out").values())


def test_bombs_of_zip_and_yaml(tmp_path: Path) -> None:
    """Packed records, directories of a terabyte, numbers of base 60 and deep lists are refused unread."""
    path = checkpoint(tmp_path)
    with zipfile.ZipFile(path / "common.pt", "w", zipfile.ZIP_DEFLATED) as zipped:
        zipped.writestr("archive/data.pkl", bytes(100 << 20))
    assert "is not stored plainly" in bounded_refusal("to-hf", path, tmp_path / "out")
    end = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 0, 0, 0, 0, 2**63, 2**63, 1 << 40, 0)
    end += struct.pack("<4sIQI", b"PK\6\7", 0, (1 << 41) - 98, 1)
    end += struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    with (path / "common.pt").open("wb") as file:
        file.seek((1 << 41) - len(end))
        file.write(end)
    assert "1099511627776 bytes of central directory" in bounded_refusal("to-hf", path, tmp_path / "out")
    (path / "common.pt").unlink()
    for text, expected in {
        "x: 1" + ":1" * 60_000: "a number of 120001 digits",
        "x: " + "[" * 100_000: "exceeded maximum nesting depth",
        "x: !!int ''": "invalid YAML",
        "x: !!bool maybe": "invalid YAML",
        "x: !!timestamp never": "invalid YAML",
        "x: 1\n" * 100_000: "too large: expected at most 131072 bytes",
    }.items():
        (path / "run_config.yaml").write_text(text)
        assert expected in bounded_refusal("to-hf", path, tmp_path / "out")


@pytest.mark.parametrize("levels", [100, 3000, 100_000])
def test_lists_in_lists(levels: int, tmp_path: Path) -> None:
    """A config.json of a hundred lists in each other is refused, however many this version of Python can parse."""
    path = hugging_face(tmp_path / "hf")
    text = (path / "config.json").read_text()
    (path / "config.json").write_text(text.replace("{", '{"x": ' + "[" * levels + "]" * levels + ",", 1))
    for arguments in (("from-hf", path, tmp_path / "out"), ("inspect", path)):
        assert "invalid JSON in" in bounded_refusal(*arguments)


def test_a_record_that_stands_twice(tmp_path: Path) -> None:
    """Readers differ about which of two records of a name holds: an archive with such is refused."""
    path = checkpoint(tmp_path)
    with zipfile.ZipFile(path / "common.pt", "w") as zipped:
        zipped.writestr("archive/data.pkl", b"\x80\2}.")
        with pytest.warns(UserWarning, match="Duplicate name"):
            zipped.writestr("archive/data.pkl", b"\x80\2}q\0.")
    assert "lists a record twice" in bounded_refusal("to-hf", path, tmp_path / "out")


def test_file_names_that_lead_elsewhere(tmp_path: Path) -> None:
    """Where an index or a remembered layout names files, only plain and printable names are files."""
    path = hugging_face(tmp_path / "hf")
    header: dict[str, Any] = {"headers": {}, "index_metadata": {}}
    for name in (
        "../x.safetensors",
        "/x.safetensors",
        "a\0.safetensors",
        "\x1b[2J.safetensors",
        "\ud800.safetensors",
        "x" * 300 + ".safetensors",
    ):
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(FormatError, match="expected the plain name of a"):
            read_directory(path)
        with pytest.raises(FormatError, match="expected the plain name of a"):
            FileSet.from_record(header | {"headers": {name: "{}"}}, "it")
    twice = json.dumps({"a": ENTRY})
    with pytest.raises(FormatError, match="has a tensor in two files"):
        FileSet.from_record(header | {"headers": {"a.safetensors": twice, "b.safetensors": twice}}, "it")


def test_absurd_layouts(tmp_path: Path) -> None:
    """A number of ranks that no machine has is refused before anyone lists them."""
    path = checkpoint(tmp_path)
    for option in ("--tp", "--pp", "--cp", "--dp", "--ep"):
        assert "ranks at most, got" in bounded_refusal(
            "plan", path, option, 10**9, "--config", tmp_path / "config.json"
        )
    with pytest.raises(LayoutError, match="has 99980001 layers: expected at most 100000"):
        ParallelLayout(pp=2, pipeline_model_parallel_layout="E|(t*9999)*9999L")


def test_links_in_a_circle(tmp_path: Path) -> None:
    """An output, or an input, that is a link to itself."""
    (tmp_path / "loop").symlink_to("loop")
    path = hugging_face(tmp_path / "hf")
    for output in (tmp_path / "loop", tmp_path / "loop" / "x"):
        assert "loop" in bounded_refusal("from-hf", path, output)
    assert "loop" in bounded_refusal("inspect", tmp_path / "loop")
