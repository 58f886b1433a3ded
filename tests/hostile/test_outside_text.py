"""No text from outside is markup, and none steers a terminal: names of directories, files and tensors, and prompts."""

from __future__ import annotations

import json
import os
import pickle
import shlex
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
import torch
from command_line import Outcome, run
from genuine import folder, shards
from hf_models import random_model, saved
from pages import Page, Picture
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict_saver import save as save_dcp

from dist_ckpt_mistral.cli import output
from dist_ckpt_mistral.messages import command_line

#: matplotlib's formulas (one that does not parse), rich's markup, emoji and links, HTML, formats of Python's.
HARMLESS: Final = "$x^$ \\$ [red]b[/red] [link=file:///x]c[/link] :smile: <b>d</b> &amp; %s %(prog)s {0}"
#: What clears a screen, turns the writing round, begins another line, is no UTF-8, or steers as a C1 control.
STEERING: Final = "\x1b[2J\x1b]0;t\x07\u202e\n\udcff\x9b2J"
#: Of a directory; a slash would be two names.
NAME: Final = (HARMLESS + STEERING).replace("/", "|")


def readable(outcome: Outcome) -> str:
    """All that a command printed, after proving that each line is printable and can be encoded."""
    for line in (*outcome.out, *outcome.err):
        assert line.isprintable(), line
        line.encode("utf-8")
    return "\n".join((*outcome.out, *outcome.err))


def pieces(text: str) -> list[str]:
    """The words of a harmless text, which tables may fold."""
    return text.replace("/", "|").split()


def strings(value: object) -> Iterator[str]:
    """Every string in parsed JSON."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from strings(each)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a hostile name: in it a model, its checkpoint and a genuine checkpoint without configuration."""
    where = tmp_path_factory.mktemp("outside") / NAME
    where.mkdir()
    saved(random_model(), where / "hf")
    assert run("from-hf", where / "hf", where / NAME).code == 0
    shutil.copytree(folder("td_0161") / "checkpoint", where / "alone")
    return where


def test_directories(places: Path, tmp_path: Path) -> None:
    """Every command tells a hostile directory in printable lines, with its markup as it is; --json gives it exactly."""
    hf, ckpt = places / "hf", places / NAME
    commands: list[tuple[int, tuple[object, ...]]] = [
        (0, ("from-hf", hf, tmp_path / NAME / "new")),
        (0, ("to-hf", ckpt, tmp_path / NAME / "hf")),
        (0, ("to-hf", ckpt, tmp_path / NAME / "dry", "--dry-run")),
        (0, ("reshard", ckpt, tmp_path / NAME / "cut", "--tp", 2)),
        (0, ("plan", ckpt, "--tp", 2)),
        (0, ("inspect", ckpt)),
        (0, ("inspect", hf)),
        (1, ("inspect", places / "alone")),
        (0, ("inspect", hf, "--html", tmp_path / NAME / "page.html")),
        (0, ("verify", ckpt)),
        (1, ("migrate", ckpt, tmp_path / NAME / "migrated")),
        (1, ("to-hf", places / "alone", tmp_path / "x")),
        (1, ("to-hf", ckpt, hf)),
        (1, ("from-hf", places / "none", tmp_path / "x")),
        (1, ("plan", places / "none")),
        (1, ("verify", places / "none", hf)),
        (1, ("megatron-args", places / "none")),
        (1, ("inspect", places / "none", "--config", places / "none")),
        (2, ("inspect", hf, places)),
        (2, ("plan", ckpt, "--tp", places)),
    ]  # fmt: skip
    for code, command in commands:
        outcome = run(*command)
        assert outcome.code == code, (command, outcome)
        told = readable(outcome)
        assert all(piece in told for piece in pieces(HARMLESS)), (command, told)
    for command in (("inspect", ckpt), ("plan", ckpt), ("verify", ckpt), ("megatron-args", ckpt)):
        told = json.loads("\n".join(run(*command, "--json").out))
        assert any(str(places) in text for text in strings(told)), command


def test_pages_and_pictures(places: Path, tmp_path: Path) -> None:
    """A page and a picture show a hostile directory as text, and only as text."""
    assert run("inspect", places / "alone", "--html", tmp_path / "page.html").code == 1
    page = Page(tmp_path / "page.html")
    assert page.addresses == []
    assert all(piece in page.text for piece in pieces(HARMLESS))
    assert run("plan", places / NAME, "--tp", 2, "--svg", tmp_path / "plan.svg").code == 0
    texts = " ".join(Picture(tmp_path / "plan.svg").texts)
    assert all(piece in texts for piece in pieces(HARMLESS))
    assert "\\x1b[2J" in texts


@pytest.mark.parametrize("name", ["__0_0$x^$.distcp", "__0_0$$.distcp", "__0_0<&>.distcp", "[red]_0_0.distcp"])
def test_data_files(name: str, tmp_path: Path) -> None:
    """The name of a data file stands in the picture as it is, in ribbons and in a matrix."""
    from_to = {"__0_0.distcp": name}
    hf = saved(random_model(num_hidden_layers=3), tmp_path / "hf")
    assert run("from-hf", hf, tmp_path / "ckpt", "--pp", 3).code == 0
    iteration = tmp_path / "ckpt" / "release"
    metadata = pickle.loads((iteration / ".metadata").read_bytes())  # noqa: S301  (our own)
    for info in metadata.storage_data.values():
        info.relative_path = from_to.get(info.relative_path, info.relative_path)
    (iteration / ".metadata").write_bytes(pickle.dumps(metadata, protocol=4))
    (iteration / "__0_0.distcp").rename(iteration / name)
    (iteration / "checksums.json").unlink()
    for layout in ((), ("--tp", 2, "--dp", 2, "--pp", 3)):
        assert run("plan", tmp_path / "ckpt", *layout, "--svg", tmp_path / "plan.svg").code == 0
        assert name in Picture(tmp_path / "plan.svg").texts
    told = json.loads("\n".join(run("plan", tmp_path / "ckpt", "--json").out))
    assert name in told["total"]["files"]


def test_tensors(tmp_path: Path) -> None:
    """Names of tensors, of a model and of a checkpoint of any kind, are told in printable lines with all commands."""
    hf = saved(random_model(), tmp_path / "hf")
    tensors = load_file(hf / "model.safetensors")
    tensors[NAME.replace("\udcff", "")] = tensors.pop("model.norm.weight")
    save_file(tensors, hf / "model.safetensors")
    for value in (0, 1):
        state = {
            HARMLESS + STEERING.replace("\udcff", ""): torch.full((3,), value),
            "a\nequal: 1 tensors": torch.ones(2),
        }
        with warnings.catch_warnings(action="ignore"):  # that there is one process
            save_dcp(state, checkpoint_id=tmp_path / f"dcp{value}", no_dist=True)
        shutil.copy(shards("td_0161") / "metadata.json", tmp_path / f"dcp{value}")
    for command in (
        ("inspect", hf),
        ("from-hf", hf, tmp_path / "out"),
        ("verify", hf, hf),
        ("verify", "--stored", tmp_path / "dcp0", tmp_path / "dcp1"),
        ("inspect", tmp_path / "dcp0"),
    ):
        outcome = run(*command)
        assert outcome.code in {1, 3}, outcome
        assert all(piece.replace("|", "/") in readable(outcome).replace("|", "/") for piece in pieces(HARMLESS)), (
            outcome
        )
        assert not any(line.startswith("equal:") for line in outcome.out)


def test_texts_of_a_model(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A file gets a text exactly; on a terminal it keeps its lines, tabs and scripts, and what steers is escaped."""
    output.say_text("a\x1b[2J")
    assert capsys.readouterr().out == "a\x1b[2J\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    output.say_text("a\tb\nनमस्ते می‌خواهم 👩‍🚀 \xa0\u200fx" + STEERING)
    told = capsys.readouterr().out
    assert told.startswith("a\tb\nनमस्ते می‌خواهم 👩‍🚀 \xa0\u200fx\\x1b[2J\\x1b]0;t\\x07")
    assert told.endswith("\n\\udcff\\x9b2J\n")
    output.say_json({"text": "नमस्ते" + STEERING}, letters=True)
    told = capsys.readouterr().out
    assert json.loads(told)["text"] == "नमस्ते" + STEERING
    assert "नमस्ते" in told
    assert told.replace("\n", "").isprintable()


@pytest.mark.parametrize(
    "word",
    [
        "",
        "a b",
        "it's",
        NAME,
        "a\nb",
        "\\n",
        "é\u202e5",
        "$(touch x)",
        "`x`",
        "!!",
        "*",
        "~",
        "-c=1",
        "\x1b'\\",
        "\xa00",
    ],
)
def test_commands_to_paste(word: str, tmp_path: Path) -> None:
    """What a message shows for pasting is one printable line that bash reads as exactly the words it stands for."""
    words = ["printf", "%s\\0", word, "end"]
    line = command_line(words)
    assert line.isprintable()
    done = subprocess.run(["bash", "-c", line], capture_output=True, check=True, cwd=tmp_path, timeout=60)
    assert done.stdout == os.fsencode(word) + b"\0end\0"
    if word.isprintable():
        assert shlex.split(line) == words
