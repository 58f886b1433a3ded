"""Objects of a zarr checkpoint: all kinds of archives keep what they hold, and what would run something is refused."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import refusal, run
from torch_reading import objects
from zarr_checkpoints import (
    in_words,
    load_objects,
    new_checkpoint,
    numbered,
    save_objects,
    unlisted,
    write_array,
)

import dist_ckpt_mistral as dcm
from dist_ckpt_mistral.formats.torch_dist.archive import CENTRAL, END


def shared() -> dict[Any, Any]:
    """Tensors that share storages, views, and what else torch saves."""
    base = torch.arange(12.0)
    return {
        "base": base,
        "view": base[2:8].view(2, 3),
        "across": base.view(3, 4).T,
        "alone": torch.ones(3, dtype=torch.bfloat16),
        "empty": torch.empty(0, 4),
        "numbers": np.arange(5),
        "parameter": torch.nn.Parameter(torch.tensor(2.0)),
        (torch.float32, torch.bfloat16): [(1, None, True, 2.5, "text", b"bytes")],
    }


def test_objects_of_all_kinds(tmp_path: Path) -> None:
    """Objects keep values and what they share, nothing at all and megabytes alike, in whatever protocol is unframed."""
    old = new_checkpoint(tmp_path / "old")
    write_array(old / "a", numbered([4]), (2,))
    values: dict[str, Any] = {
        "shared/shard_0_1": shared(),
        "none/shard_0_1": None,
        "list/shard_0_1": [[], {}, ()],
        "bytes/shard_0_1": io.BytesIO(b"extra"),
        "large/shard_1.0_2.3": {"x": numbered([5 << 20]), "y": numbered([3])},
        "large/shard_1.2_2.3": numbered([1 << 20], torch.int64),
    }
    save_objects(old, values)
    save_objects(old, {"three/shard_0_1": shared()}, pickle_protocol=3)
    dcm.migrate(old, tmp_path / "new")
    found = unlisted(objects(tmp_path / "new"))
    assert in_words(found) == in_words(load_objects(old))
    for name in ("shared", "three"):
        again = found[f"{name}/shard_0_1"]
        again["base"][2] = 77
        assert float(again["view"][0, 0]) == float(again["across"][2, 0]) == 77
    assert run("verify", tmp_path / "new").code == 0


@pytest.mark.parametrize("protocol", [4, 5])
def test_framed_pickles_are_refused(protocol: int, tmp_path: Path) -> None:
    """Pickles in frames are none of ``torch.save``'s own; they are named, all of them."""
    old = new_checkpoint(tmp_path / "old")
    write_array(old / "a", numbered([4]), (2,))
    save_objects(old, {f"odd/shard_{i}_3": {"x": 1} for i in range(3)}, pickle_protocol=protocol)
    line = refusal(tmp_path, "migrate", old, tmp_path / "new")
    assert all(f"odd/shard_{i}_3.pt is not as torch.save writes it" in line for i in range(3))


def directory_first(path: Path) -> None:
    """Put the directory of an archive before the records."""
    archive = path.read_bytes()
    *fixed, num_bytes, begin, _ = END.unpack(archive[-END.size :])
    directory, at = bytearray(archive[begin : begin + num_bytes]), 0
    while at < num_bytes:
        entry = CENTRAL.unpack_from(directory, at)
        CENTRAL.pack_into(directory, at, *entry[:-1], entry[-1] + num_bytes)
        at += CENTRAL.size + sum(entry[10:13])
    path.write_bytes(directory + archive[:begin] + END.pack(*fixed, num_bytes, 0, 0))


def test_objects_behind_their_directory_are_refused(tmp_path: Path) -> None:
    """What would follow the directory would be left behind, so such archives, which torch does not read, are named."""
    old = new_checkpoint(tmp_path / "old")
    write_array(old / "a", numbered([4]), (2,))
    save_objects(old, {f"odd/shard_{i}_3": {"x": numbered([8])} for i in range(3)})
    for path in (old / "odd").iterdir():
        directory_first(path)
    line = refusal(tmp_path, "migrate", old, tmp_path / "new")
    assert all(f"odd/shard_{i}_3.pt is damaged: data.pkl does not end before its directory" in line for i in range(3))


def test_programs_are_refused(tmp_path: Path) -> None:
    """An archive that torch would take for TorchScript, and run, is no object, whatever else is in it."""
    old = new_checkpoint(tmp_path / "old")
    write_array(old / "a", numbered([4]), (2,))
    save_objects(old, {"odd/shard_0_1": {"x": 1}})
    with zipfile.ZipFile(old / "odd" / "shard_0_1.pt", "a") as archive:
        archive.writestr(f"{archive.namelist()[0].partition('/')[0]}/constants.pkl", pickle.dumps((), 2))
    assert "odd/shard_0_1.pt holds a program, TorchScript" in refusal(tmp_path, "migrate", old, tmp_path / "new")


class Hostile:
    """Unpickled, it makes a directory."""

    def __init__(self, path: Path) -> None:
        """Name the directory."""
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        """What the pickle asks for."""
        return os.mkdir, (str(self.path),)


def test_hostile_objects(tmp_path: Path) -> None:
    """An object that would execute something is named and stays where it is; nothing is executed."""
    old = new_checkpoint(tmp_path / "old")
    write_array(old / "a", numbered([4]), (2,))
    save_objects(old, {f"state/shard_{i}_2": {"x": [Hostile(tmp_path / "executed")]} for i in range(2)})
    line = refusal(tmp_path, "migrate", old, tmp_path / "new")
    for number in range(2):
        assert f"state/shard_{number}_2.pt is refused: its pickle asks for posix.mkdir" in line
    assert run("inspect", old).code == 1  # for want of a configuration
    assert not (tmp_path / "executed").exists()


def test_names_of_old_writers(tmp_path: Path) -> None:
    """Old writers lost the last number of an object's shape: as Megatron has it, that is one more than the last."""
    old = new_checkpoint(tmp_path / "old")
    write_array(old / "a", numbered([4]), (2,))
    for at in range(3):
        save_objects(old, {f"state/shard_0.{at}_1": {"at": at}})
    dcm.migrate(old, tmp_path / "new")
    assert unlisted(objects(tmp_path / "new")) == {f"state/shard_0.{at}_1.3": {"at": at} for at in range(3)}
