"""The commands that ``plan`` and ``from-hf`` advise: printed whole, they run as they are and do what was promised."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from command_line import Outcome, run
from genuine import folder
from plain_models import save_model

from dist_ckpt_mistral.convert import from_hf

#: Sizes that 8 ranks can share.
SIZES = {"num_attention_heads": 8, "num_key_value_heads": 8, "intermediate_size": 64, "vocab_size": 1024}


def planned(*arguments: object) -> Any:  # noqa: ANN401  (parsed JSON)
    """What ``plan --json`` prints."""
    outcome = run("plan", *arguments, "--json")
    assert outcome.code == 0, outcome
    return json.loads("\n".join(outcome.out))


def obey(command: str, **places: Path) -> Outcome:
    """Run an advised command, with its placeholders filled in."""
    program, *words = shlex.split(command)
    assert program == "dist-ckpt-mistral"
    outcome = run(*(places.get(word, word) for word in words))
    assert outcome.code == 0, outcome
    return outcome


@pytest.mark.parametrize(
    ("case", "options"),
    [
        ("td_0192", "--tp 4 --dp 2"),
        ("opt_fr_0192", "--tp 4 --pp 2 --order cp-tp-dp-pp --pp-layers 3,1"),
        ("opt_fr_0192", "--tp 4 --weights-only"),
        ("opt_dr_0161", "--tp 4 --pp 2 --decoder-first-pipeline-num-layers 1"),  # flat buffers, which reshard refuses
        ("opt_fsms_0140", "--tp 4 --pipeline-model-parallel-layout 'Ett|ttL' --pp 2"),
    ],
)
def test_the_plan_names_the_command_that_helps(case: str, options: str, tmp_path: Path) -> None:
    """The last line of the plan reshards for its layout, with its configuration; then nothing is left to advise."""
    words = shlex.split(options)
    checkpoint = tmp_path / f"a checkpoint with a long path, so that no line of {'a ' * 30}page holds it"
    checkpoint.symlink_to(folder(case) / "checkpoint")
    arguments = ("--config", folder(case), *words)
    printed = run("plan", checkpoint, *arguments).out
    command = printed[-1].strip()
    assert command == planned(checkpoint, *arguments)["remedy"]
    assert any("times what they need" in line for line in printed)
    obey(command, OUT=tmp_path / "new")
    after = planned(tmp_path / "new", *arguments)
    assert (after["remedy"], after["total"]["amplification"]) == (None, 1)


def test_a_little_more_is_no_reason(tmp_path: Path) -> None:
    """Vocabulary padding of another tensor parallelism makes ranks read a little more: the plan names no command."""
    hf = save_model(tmp_path / "hf", **SIZES | {"vocab_size": 600, "intermediate_size": 256})
    assert run("from-hf", hf, tmp_path / "ckpt", "--tp", 4).code == 0
    told = planned(tmp_path / "ckpt", "--tp", 2)
    assert 1 < told["total"]["amplification"] < 1.5
    assert told["remedy"] is None
    assert told["verdict"].endswith("times what they need; `dist-ckpt-mistral reshard` would make it 1.0.")


def advice(outcome: Outcome) -> str:
    """The one note of an import."""
    assert outcome.code == 0, outcome
    (line,) = outcome.err
    assert line.startswith("at tp=8 the ranks would read 7.9 times what they need (")
    return line[line.index("dist-ckpt-mistral from-hf") :]


def test_an_import_names_the_cut_that_helps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dry run and import of a large model name the same command with --tp, which then imports without a note."""
    hf, ckpt = save_model(tmp_path / "its weights", **SIZES), tmp_path / "$new"
    small = run("from-hf", hf, ckpt, "--dry-run")
    assert (small.code, small.err) == (0, [])
    monkeypatch.setattr(from_hf, "_LARGE_MODEL_PARAMETERS", 0)
    command = advice(run("from-hf", "--dry", hf, ckpt, "--dtype", "float32", "--no-sync"))
    words = ["from-hf", str(hf), str(ckpt), "--dtype", "float32", "--no-sync", "--tp", "8"]
    assert shlex.split(command)[1:] == words
    again = advice(run("from-hf", "--no-sync", "--tp=1", "--iteration", 7, "--", hf, ckpt))
    words = ["from-hf", "--no-sync", "--tp=1", "--iteration", "7", "--tp", "8", "--overwrite", "--", str(hf), str(ckpt)]
    assert shlex.split(again)[1:] == words
    assert planned(ckpt, "--tp", 8)["total"]["amplification"] > 7
    assert obey(again).err == []
    assert (ckpt / "iter_0000007").is_dir()
    assert planned(ckpt, "--tp", 8)["total"]["amplification"] == 1
