"""README.md: every command, option, file and line of Python in it exists and works."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

import hf_models
import pytest

from dist_ckpt_mistral.cli.main import main

_ROOT = Path(__file__).parents[2]
_README = (_ROOT / "README.md").read_text()
_NOT_YET = _README[_README.index("Not there yet:") :].partition("\n\n")[0]
_TODAY = _README.replace(_NOT_YET, "")
_SNIPPETS = re.findall(r"```python\n(.*?)```", _README, re.DOTALL)


def _help(capsys: pytest.CaptureFixture[str], arguments: Sequence[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--help"])
    captured = capsys.readouterr()
    assert ended.value.code == 0, captured.err
    return captured.out


def _commands(capsys: pytest.CaptureFixture[str]) -> set[str]:
    listed = re.findall(r"^ {4}([a-z][a-z-]*)(?: |$)", _help(capsys, []), re.MULTILINE)
    return set(listed)


def test_commands_exist(capsys: pytest.CaptureFixture[str]) -> None:
    """What the README calls is a command with a help, and every command is in the README."""
    existing = _commands(capsys)
    assert set(re.findall(r"dist-ckpt-mistral ([a-z][a-z-]*)", _TODAY)) == existing
    for command in existing:
        assert command in _help(capsys, [command])


def test_options_exist(capsys: pytest.CaptureFixture[str]) -> None:
    """Every option in the README's prose is one of ours; Megatron's stand where Megatron-LM's are shown."""
    megatron = _TODAY[_TODAY.index("$ dist-ckpt-mistral megatron-args") : _TODAY.index("$ dist-ckpt-mistral to-hf")]
    ours = set(re.findall(r"`(?:(?!torchrun)[a-z-]+ )?(--[a-z-]+)", _TODAY.replace(megatron, "")))
    assert {"--dtype", "--config", "--dry-run", "--keep"} <= ours
    helps = "".join(_help(capsys, [command]) for command in _commands(capsys))
    assert {option for option in ours if option not in helps} == set()


def test_what_is_not_there_yet(capsys: pytest.CaptureFixture[str]) -> None:
    """The README does not deny what is there."""
    denied = set(re.findall(r"`([a-z][a-z-]*)", _NOT_YET))
    assert denied
    assert denied & (_commands(capsys) - {"verify"}) == set()


@pytest.mark.parametrize("name", ["demo", "full-demo", "test"])
def test_set_up_commands(name: str) -> None:
    """Each mark is followed by one line that installs the package, or an extra that exists; .ci/run runs it."""
    found = re.findall(rf"^<!-- command: {name} -->\n```sh\n(.*)\n```$", _README, re.MULTILINE)
    assert len(found) == 1
    extras = tomllib.loads((_ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    extra = re.search(r"pip install -e (?:\.|'\.\[(\w+)\]') ", found[0])
    assert extra is not None
    assert extra[1] in (None, *extras)
    assert re.search(rf"(in_environment|from_wheel) 3\.1\d {name}$", (_ROOT / ".ci" / "run").read_text(), re.MULTILINE)


def test_linked_files_exist() -> None:
    """Relative links lead somewhere."""
    targets = [target for target in re.findall(r"\]\(([^)]+)\)", _README) if "://" not in target]
    assert targets
    assert [target for target in targets if not (_ROOT / target).exists()] == []


def test_first_python_snippet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Import, export, compare and lazy reading, as the README has them."""
    model = hf_models.random_model()
    hf_models.saved(model, tmp_path / "hf_dir")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(_SNIPPETS[0], "README.md", "exec"), names)  # noqa: S102  (what a reader would paste)
    q = model.state_dict()["model.layers.0.self_attn.q_proj.weight"]
    assert names["q"].equal(q)  # type: ignore[attr-defined]


def test_second_python_snippet(tmp_path: Path) -> None:
    """The sharded state dict of rank 3, as the README has it; the load itself needs the other ranks."""
    hf_models.saved(hf_models.random_model(), tmp_path / "hf_dir")
    lines = _SNIPPETS[1].splitlines()
    assert lines.pop().startswith("loaded = dist_checkpointing.load(state, ")
    expected = next(line for line in lines if line.startswith("print(")).partition("# ")[2]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", "\n".join(lines)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(_ROOT), "CUDA_DEVICE_MAX_CONNECTIONS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == expected


def test_json_fields(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The table of ``inspect --json`` has the fields that there are."""
    main(["inspect", "--json", str(hf_models.saved(hf_models.random_model(), tmp_path / "hf"))])
    found = json.loads(capsys.readouterr().out)
    table = _README[_README.index("## `inspect --json`") :].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \| (.*) \|$", table, re.MULTILINE)
    described = {name: text for names, text in rows for name in re.findall(r"`(\w+)`", names)}
    assert described.keys() == found.keys()
    assert set(found["tensors"][0]) == set(re.findall(r"`(\w+)`", described["tensors"]))
