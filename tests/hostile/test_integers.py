"""Integers that nothing can count with, wherever files hold any: one line or the right result, and no traceback."""

from __future__ import annotations

import dataclasses
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
from command_line import run
from genuine import folder
from torch_reading import read_metadata

from dist_ckpt_mistral.errors import FormatError
from dist_ckpt_mistral.formats.torch_dist.metadata import read_metadata as parsed

NUMBERS: Final = (2**63, 2**64, 2**200, 2**63 - 1, 2**62, 2**59 + 1, -1, -(2**63), -(2**200))
NAME: Final = "output_layer.weight"


def size(metadata: Any, number: int) -> None:  # noqa: ANN401  (torch's)
    """The shape of a tensor."""
    metadata.state_dict_metadata[NAME].size = (number, 64)


def product(metadata: Any, number: int) -> None:  # noqa: ANN401
    """A shape whose extents can be counted, and whose elements cannot."""
    metadata.state_dict_metadata[NAME].size = (abs(number) % 2**40 + 2**40,) * 3


def chunk(field: str) -> Callable[[Any, int], None]:
    """The offset or the sizes of a chunk, as it is described."""

    def change(metadata: Any, number: int) -> None:  # noqa: ANN401
        object.__setattr__(metadata.state_dict_metadata[NAME].chunks[0], field, (number, 64))

    return change


def index(metadata: Any, number: int) -> None:  # noqa: ANN401
    """The offset of a chunk, as it is stored."""
    at = next(at for at in metadata.storage_data if at.fqn == NAME)
    metadata.storage_data[dataclasses.replace(at, offset=(number, 0))] = metadata.storage_data.pop(at)


def place(field: str) -> Callable[[Any, int], None]:
    """Where an archive begins, or how long it is."""

    def change(metadata: Any, number: int) -> None:  # noqa: ANN401
        at = next(at for at in metadata.storage_data if at.fqn == NAME)
        setattr(metadata.storage_data[at], field, number)

    return change


WAYS: Final = {
    "size": size,
    "product": product,
    "chunk offsets": chunk("offsets"),
    "chunk sizes": chunk("sizes"),
    "index": index,
    "offset": place("offset"),
    "length": place("length"),
}


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("way", WAYS)
def test_integers_of_the_metadata(way: str, number: int) -> None:
    """Every kind of integer in ``.metadata`` is bounded where it is read, by one error that shows it."""
    metadata: Any = read_metadata(folder("td_0192") / "checkpoint")
    vars(metadata).pop("all_local_plans")
    WAYS[way](metadata, number)
    content = pickle.dumps(metadata)
    with pytest.raises(FormatError, match="is not sound torch_dist metadata"):
        parsed(lambda: content, "it")


@pytest.mark.parametrize("command", ["inspect", "to-hf", "plan", "verify", "reshard"])
@pytest.mark.parametrize("way", WAYS)
def test_every_command_says_so(way: str, command: str, tmp_path: Path) -> None:
    """In one line, whichever command reads the metadata."""
    case = shutil.copytree(folder("td_0192"), tmp_path / "case")
    metadata: Any = read_metadata(case / "checkpoint")
    vars(metadata).pop("all_local_plans")
    WAYS[way](metadata, 2**63)
    (case / "checkpoint" / ".metadata").write_bytes(pickle.dumps(metadata))
    more = {"to-hf": (tmp_path / "out", "--dry-run"), "reshard": (tmp_path / "out",)}.get(command, ())
    outcome = run(command, case / "checkpoint", *more, *(() if command == "inspect" else ("--config", case)))
    said = [line for line in (*outcome.out, *outcome.err) if "is not sound torch_dist metadata" in line]
    assert (outcome.code, len(said)) == (3 if command == "verify" else 1, 1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [*NUMBERS, 0, 1, 10**400])
@pytest.mark.parametrize("where", ["shape", "empty shape", "begin", "end"])
def test_integers_of_safetensors_headers(where: str, number: int, tmp_path: Path) -> None:
    """Commands that read a model say what is wrong with its header, in one line."""
    case = shutil.copytree(folder("td_0192"), tmp_path / "case")
    (case / "truth.safetensors").rename(case / "model.safetensors")
    content = (case / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header: dict[str, Any] = json.loads(content[8 : 8 + length])
    entry = next(entry for name, entry in header.items() if name != "__metadata__")
    if where == "shape":
        entry["shape"][0] = number
    elif where == "empty shape":
        header["empty"] = {"dtype": "F32", "shape": [0, number, number], "data_offsets": [0, 0]}
    else:
        entry["data_offsets"][where == "end"] = number
    text = json.dumps(header).encode()
    (case / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    for command in (["from-hf", case, tmp_path / "out", "--dry-run"], ["verify", case], ["megatron-args", case]):
        outcome = run(*command)
        assert outcome.code in (0, 1, 3)
        assert sum(line.startswith("error: ") for line in outcome.err) == (outcome.code == 1), outcome
        assert not any("Traceback" in line for line in (*outcome.out, *outcome.err))
