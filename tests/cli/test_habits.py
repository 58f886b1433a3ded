"""Habits that users bring from other tools: JSON from every command, examples, completion, common options anywhere."""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import pytest
from command_line import Outcome, run
from genuine import folder
from plain_models import save_model

from dist_ckpt_mistral.cli import main as cli
from dist_ckpt_mistral.cli.usage import JSON_FIRST, JSON_LAST, Parser

COMMANDS: Final = tuple(cli._COMMANDS)  # noqa: SLF001
#: Command -> words that make it answer in JSON, in a directory with the model ``hf`` and its checkpoint ``ckpt``.
ANSWERS: Final = {
    "from-hf": "from-hf hf new",
    "to-hf": "to-hf ckpt out",
    "to-hf, dry": "to-hf ckpt dry --dry-run",
    "reshard": "reshard ckpt cut --tp 2",
    "describe": "describe hf root",
    "plan": "plan ckpt --tp 2",
    "index": "index ckpt",
    "index, checked": "index ckpt --check",
    "inspect": "inspect ckpt",
    "verify": "verify ckpt",
    "verify, two": "verify hf ckpt",
    "megatron-args": "megatron-args ckpt",
    "demo": "demo",
    "migrate": f"migrate {folder('zarr_ckpt') / 'checkpoint'} migrated",
}


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model and its checkpoint."""
    where = tmp_path_factory.mktemp("habits")
    save_model(where / "hf")
    (where / "root").mkdir()
    assert run("from-hf", where / "hf", where / "ckpt", "-q").code == 0
    return where


def documented(command: str) -> dict[str, str]:
    """The fields that a command's --help says ``--json`` prints, each with its meaning."""
    text = "\n".join(run(command, "--help").out)
    table = text[text.index("--json prints one object") :].partition("\n\n")[0]
    rows = re.findall(r"^  (\w[\w, ]*?)  +(\S.*(?:\n {5,}.*)*)", table, re.MULTILINE)
    return {name: " ".join(meaning.split()) for names, meaning in rows for name in names.split(", ")}


@pytest.mark.parametrize("case", ANSWERS)
def test_every_command_answers_in_json(
    case: str, where: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Standard output is one object, with the fields that --help names and no others; notes are elsewhere."""
    monkeypatch.chdir(where)
    if case == "demo":
        monkeypatch.setattr("dist_ckpt_mistral.libraries.missing", lambda *modules: [*modules])
    told = run(*shlex.split(ANSWERS[case]), "--json")
    assert told.code == 0, told
    content = json.loads("\n".join(told.out))
    fields = documented(ANSWERS[case].split()[0])
    assert [*content][:: len(content) - 1] == [*JSON_FIRST, *JSON_LAST]
    assert content.keys() <= fields.keys()
    if "," not in case and case != "verify":
        assert content.keys() == fields.keys()
    check = globals().get(f"_check_{re.sub('[^a-z]+', '_', case)}")
    assert check is not None, request.node.name
    check(content, where)


def _check_from_hf(content: Mapping[str, Any], where: Path) -> None:
    files = {str(path.relative_to(where / "new")): path.stat().st_size for path in where.glob("new/release/*.distcp")}
    assert (content["files"], content["output"], content["dry_run"]) == (files, "new", False)
    assert content["num_bytes"] <= sum(files.values())
    assert content["next"] == ["dist-ckpt-mistral megatron-args new"]
    assert 0 < content["seconds"] < 100


def _check_to_hf(content: Mapping[str, Any], where: Path) -> None:
    assert content["files"] == {path.name: path.stat().st_size for path in where.glob("out/*.safetensors")}
    assert content["next"][1] == "dist-ckpt-mistral verify ckpt out"


def _check_to_hf_dry(content: Mapping[str, Any], where: Path) -> None:
    assert (content["dry_run"], content["seconds"], content["next"]) == (True, None, [])
    assert content["files"]
    assert not (where / "dry").exists()


def _check_reshard(content: Mapping[str, Any], where: Path) -> None:
    assert {*content["files"]} == {str(path.relative_to(where / "cut")) for path in where.glob("cut/release/*.distcp")}
    assert content["next"] == ["dist-ckpt-mistral megatron-args cut --tp 2"]


def _check_describe(content: Mapping[str, Any], where: Path) -> None:
    assert (content["output"], content["compared"]) == ("root/hf", None)
    assert content["files"]["config.json"] == (where / "root" / "hf" / "config.json").stat().st_size
    assert content["warnings"] == ["root holds no checkpoint yet: there is nothing to compare the model with"]


def _check_plan(content: Mapping[str, Any], where: Path) -> None:  # noqa: ARG001
    assert len(content["ranks"]) == 2


def _check_migrate(content: Mapping[str, Any], where: Path) -> None:
    assert sum(content["files"].values()) >= content["num_bytes"] > 0
    assert all((where / "migrated" / name).is_file() for name in content["files"])


def _check_index(content: Mapping[str, Any], where: Path) -> None:  # noqa: ARG001
    assert "hf/model.norm.weight" in content["names"]


def _check_index_checked(content: Mapping[str, Any], where: Path) -> None:  # noqa: ARG001
    assert (content["up_to_date"], content["problems"]) == (True, [])


def _check_inspect(content: Mapping[str, Any], where: Path) -> None:  # noqa: ARG001
    assert content["problems"] == []


def _check_verify(content: Mapping[str, Any], where: Path) -> None:  # noqa: ARG001
    assert content["sound"] is True


def _check_verify_two(content: Mapping[str, Any], where: Path) -> None:  # noqa: ARG001
    assert content["equal"] is True


def _check_megatron_args(content: Mapping[str, Any], where: Path) -> None:  # noqa: ARG001
    assert "--num-layers" in content["flags"]


def _check_demo(content: Mapping[str, Any], where: Path) -> None:  # noqa: ARG001
    assert content["commands"][0] == "dist-ckpt-mistral from-hf original checkpoint"
    assert content["checked"] == ["the export equals the original"]
    assert (content["output"], content["missing"]) == (None, ["torch", "megatron.core", "transformers"])


def test_an_error_leaves_standard_output_empty(tmp_path: Path) -> None:
    """With --json an error is one line on standard error, as always, and no half of an object."""
    outcome = run("to-hf", tmp_path / "nowhere", tmp_path / "out", "--json")
    assert (outcome.code, outcome.out, len(outcome.err)) == (1, [], 1)


def lines_of_examples(command: str | None = None) -> Iterator[str]:
    """The examples in a help."""
    text = "\n".join(run(*([command] if command else []), "--help").out)
    yield from re.findall(r"^  (\S.*)$", text[text.index("\nexamples:\n") :].partition("\n\n")[0], re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_are_understood(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every --help has examples that fit in 80 columns or are torchrun's; the parser takes each as it stands."""
    taken: list[tuple[str, ...]] = []

    def take(arguments: argparse.Namespace) -> int:
        taken.append(arguments.words)
        return 0

    monkeypatch.setattr(cli, "_run", take)
    examples = [*lines_of_examples(command)]
    assert 1 < len(examples) < 5
    for example in examples:
        words = re.split("dist[-_]ckpt[-_]mistral ", example)[1].partition(" | ")[0]
        given = shlex.split(words)
        assert given[0] == command
        assert len(example) <= 78 or example.startswith("torchrun")
        assert run(*given) == Outcome(code=0, out=[], err=[])
        assert taken.pop() == tuple(given)


def test_examples_of_the_program() -> None:
    """The first help has examples too, with commands that there are, and every help has the exit codes."""
    assert [example.split()[1] for example in lines_of_examples()][:2] == ["from-hf", "to-hf"]
    for command in ((), *((name,) for name in COMMANDS)):
        assert "130 interrupted." in " ".join(run(*command, "--help").out)


@pytest.mark.parametrize("command", COMMANDS)
def test_common_options_of_every_command(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """-q, --debug, --no-progress and --json are taken before every command and behind it."""
    example = shlex.split(next(iter(lines_of_examples(command))))[1:]
    taken = []

    def note(arguments: Any) -> int:  # noqa: ANN401
        taken.append((arguments.quiet, arguments.debug, arguments.no_progress, arguments.json))
        return 0

    monkeypatch.setattr(cli, "_run", note)
    options = ("-q", "--debug", "--no-progress", "--json")
    assert run(*options, *example).code == run(*example, *options).code == run(*example).code == 0
    assert taken == [(True,) * 4, (True,) * 4, (False,) * 4]


def test_help_is_a_command_too() -> None:
    """``help`` and ``help COMMAND`` are what ``--help`` is."""
    assert run("help") == run("--help")
    assert run("help", "plan") == run("plan", "--help")


HAS_SHTAB = importlib.util.find_spec("shtab") is not None
needs_shtab = pytest.mark.skipif(not HAS_SHTAB, reason="this environment is older than the dependency shtab")
#: What a shell does for TAB: sets the words and calls the function that completes them.
TAB: Final = """
source ./script
COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
COMP_LINE="${{COMP_WORDS[*]}}"; COMP_POINT=${{#COMP_LINE}}
$(complete -p dist-ckpt-mistral | sed 's/.*-F \\([^ ]*\\) .*/\\1/') dist-ckpt-mistral
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@needs_shtab
@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("to-", {"to-hf"}),
        ("megatron-args --ove", {"--override-config"}),
        ("to-hf ckpt out --dty", {"--dtype"}),
        ("to-hf ckpt out --dtype b", {"bfloat16"}),
        ("to-hf ckp", {"ckpt"}),
        ("from-hf hf new --base hf/conf", {"hf/config.json"}),
        ("plan ckpt --json --w", {"--weights-only"}),
    ],
)
def test_bash_completes(typed: str, completed: set[str], where: Path) -> None:
    """A real bash completes commands, options, choices, files and directories with the printed script."""
    script = subprocess.run(
        [sys.executable, "-m", "dist_ckpt_mistral", "--print-completion", "bash"],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert script.stderr == ""
    (where / "script").write_text(script.stdout)
    words = ["dist-ckpt-mistral", *typed.split()]
    done = subprocess.run(
        ["bash", "--norc", "-c", TAB.format(words=shlex.join(words))],
        capture_output=True, text=True, check=True, cwd=where, timeout=60,
    )  # fmt: skip
    assert {*done.stdout.split()} == completed


@needs_shtab
@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_other_shells_get_a_script(shell: str) -> None:
    """The scripts of zsh and tcsh name every command."""
    text = "\n".join(run("--print-completion", shell).out)
    assert [name for name in COMMANDS if name not in text] == []


def test_all_parsers_are_ours() -> None:
    """No command is declared past the class that adds examples, fields and exit codes."""
    actions = cli._parser(())._actions  # noqa: SLF001
    (commands,) = (action.choices for action in actions if isinstance(action.choices, dict))
    assert {name: type(command) for name, command in dict(commands).items()} == dict.fromkeys(COMMANDS, Parser)
