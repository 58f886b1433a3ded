"""Files of a checkpoint or a model that are missing or were cut short are named, wherever the cut is."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from command_line import refusal, run
from genuine import folder
from hypothesis import given, settings
from hypothesis import strategies as st


def test_missing_data_files(genuine: Path, tmp_path: Path) -> None:
    """All data files that are missing are named, and those that are cut as well."""
    arguments = ("to-hf", genuine, tmp_path / "out", "--config", tmp_path / "config.json")
    (genuine / "__1_0.distcp").unlink()
    line = refusal(tmp_path, *arguments)
    assert "missing: __1_0.distcp. Copy the checkpoint again, whole." in line
    (genuine / "__3_1.distcp").unlink()
    size = (genuine / "__2_0.distcp").stat().st_size
    os.truncate(genuine / "__2_0.distcp", size - 1)
    line = refusal(tmp_path, *arguments)
    assert "missing: __1_0.distcp, __3_1.distcp" in line
    assert f"truncated: __2_0.distcp (expected at least {size} bytes, got {size - 1})" in line
    outcome = run("inspect", genuine, "--config", tmp_path / "config.json")
    assert outcome.code == 1
    assert f"problem: files in {genuine} are missing: __1_0.distcp, __3_1.distcp; truncated: __2_0" in " ".join(
        outcome.out
    )


@pytest.fixture(scope="module")
def to_cut(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copies of everything for tests that cut files and mend them again."""
    where = shutil.copytree(pristine, tmp_path_factory.mktemp("cut") / "all", symlinks=True)
    for case in ("td_0123", "common_0192"):
        shutil.copytree(folder(case) / "checkpoint", where / case / "checkpoint")
        shutil.copy(folder(case) / "config.json", where / case)
    return where


@settings(max_examples=150)
@given(data=st.data())
def test_a_file_cut_short_anywhere(data: st.DataObject, to_cut: Path) -> None:
    """Every prefix of every file that is read is refused, and the file or what is wrong with it is named."""
    case = data.draw(st.sampled_from(["ckpt", "td_0123", "common_0192", "hf", "many"]))
    where = to_cut / case
    files = [path for path in where.rglob("*") if path.is_file() and str(path.relative_to(where)) not in NOT_READ]
    path = data.draw(st.sampled_from(sorted(files)))
    whole = path.read_bytes()
    end = len(whole.rstrip(b"\n") if path.suffix == ".json" else whole)
    size = data.draw(st.integers(0, end - 1) | st.integers(max(0, end - 70), end - 1))
    if case in ("hf", "many"):
        arguments: tuple[object, ...] = ("from-hf", where, to_cut / "out")
    elif case == "ckpt":
        arguments = ("to-hf", where, to_cut / "out")
    else:
        arguments = ("to-hf", where / "checkpoint", to_cut / "out", "--config", where)
    path.write_bytes(whole[:size])
    try:
        line = refusal(to_cut, *arguments)
    finally:
        path.write_bytes(whole)
        shutil.rmtree(to_cut / "out", ignore_errors=True)
    assert str(where) in line


#: Files that only travel along, or of which a part may say nothing wrong.
NOT_READ = (
    "release/run_config.yaml",
    "release/train_state.pt",
    "generation_config.json",
    "release/hf/generation_config.json",
    "release/hf/config.json",
    "hf/generation_config.json",
    "hf/config.json",  # a warning says that it cannot be compared
    "hf/dist_ckpt_mistral.json",
    "checkpoint/integrity.json",
    "release/checksums.json",
)


def test_a_damaged_config_that_travelled_along(ckpt: Path, tmp_path: Path) -> None:
    """A config.json inside the checkpoint that was cut short is not exported as if it were whole."""
    config = ckpt / "release" / "hf" / "config.json"
    config.write_bytes(config.read_bytes()[:-3])
    outcome = run("to-hf", ckpt, tmp_path / "out")
    assert outcome.code == 1
    assert outcome.err[-1].startswith(f"error: invalid JSON in {config}: ")
    assert not (tmp_path / "out").exists()
