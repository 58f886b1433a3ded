"""The commands that others advise, and name as the next step: they run as they are and do what was promised."""

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


def next_steps(*arguments: object) -> list[str]:
    """The commands and lines of Python that a command names at its end."""
    outcome = run(*arguments, "--json", "--no-sync")
    assert outcome.code == 0, outcome
    steps: list[str] = json.loads("\n".join(outcome.out))["next"]
    return steps


def commands(steps: list[str]) -> list[str]:
    """Those of them that are commands."""
    return [step for step in steps if step.startswith("dist-ckpt-mistral ")]


@pytest.mark.parametrize("case", ["mlm_0161", "td_0192"])
def test_the_comparison_with_an_export(case: str, tmp_path: Path) -> None:
    """It takes the configuration of the export: without it there is none, or one with the rows that pad it."""
    given = ("--config", folder(case) / "config.json", "--override-config")
    (command,) = commands(next_steps("to-hf", folder(case) / "checkpoint", tmp_path / "hf", *given))
    assert obey(command).out[-1].startswith("equal: 39 tensors, ")


def test_an_export_of_other_bits_is_not_compared(tmp_path: Path) -> None:
    """Other dtypes and master weights differ by intention: nothing names a command that would find fault with them."""
    case = folder("opt_plain_0161")
    for number, options in enumerate((("--weights", "master"), ("--dtype", "float32"))):
        steps = next_steps("to-hf", case / "checkpoint", tmp_path / str(number), "--config", case, *options)
        assert [step.partition("(")[0] for step in steps] == ["transformers.AutoModelForCausalLM.from_pretrained"]


def test_after_a_reshard(tmp_path: Path) -> None:
    """The flags to train with, with the configuration that the output lacks as its source did, if Megatron loads it."""
    case, name = folder("td_0192"), "iter_0000005"
    given = ("--tp", 4, "--config", case)
    (command,) = commands(next_steps("reshard", case / "checkpoint", tmp_path / name, *given))
    assert "--tensor-model-parallel-size 4 " in " ".join(obey(command).out)
    (command,) = commands(next_steps("reshard", case / "checkpoint", tmp_path / "weights", *given))
    assert shlex.split(command)[1] == "inspect"
    assert obey(command).out


def test_after_a_migration(tmp_path: Path) -> None:
    """Both steps have the configuration, which a checkpoint of zarr has in no other place."""
    case = folder("zarr_ckpt")
    first, second = commands(next_steps("migrate", case / "checkpoint", tmp_path / "ckpt", "--config", case))
    assert obey(first).out
    assert obey(second, HF_DIR=tmp_path / "hf").out
    assert run("verify", case / "checkpoint", tmp_path / "hf", "--config", case).code == 0


def test_after_an_output_in_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shell stays in the directory that was replaced, where it sees nothing: the first step leads into the new."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    outcome = run("from-hf", save_model(tmp_path / "hf"), ".")
    assert (outcome.code, outcome.err) == (0, [])
    assert outcome.out[2] == "the output took the place of the current directory; enter it with: cd ."
    assert (tmp_path / "here" / "release").is_dir()
    monkeypatch.chdir(tmp_path)
    assert not any("cd ." in line for line in run("from-hf", tmp_path / "hf", tmp_path / "else").out)
