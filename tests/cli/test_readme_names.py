"""Every README of this repository: that its commands, options, names, files and links exist, and its form."""

from __future__ import annotations

import ast
import inspect
import re
import shlex
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Final

import pytest
from command_line import run
from readme_pages import LANGUAGES, ROOT, Block, all_blocks, blocks, modules_of_names, pages

import dist_ckpt_mistral as dcm

_README: Final = ROOT / "README.md"
_CLI: Final = ROOT / "dist_ckpt_mistral" / "cli" / "README.md"
_PROGRAM: Final = "dist-ckpt-mistral"
_LONGEST_README: Final = 200
_WIDEST: Final = 120
#: Options in the pages that belong to other programs.
_FOREIGN_OPTIONS: Final = {
    "Megatron-LM": {"--use-checkpoint-args", "--norm-epsilon", "--bf16", "--window-size", "--ckpt-format"}
    | {
        "--use-legacy-models",
        "--load",
        "--hybrid-layer-pattern",
        "--use-torch-fsdp2",
        "--use-megatron-fsdp",
        "--disable-msc",
    },
    "tools/bench": {"--case", "--layers", "--tp", "--experts", "--chunks"},
}


def _words_of(block: Block) -> Iterator[list[str]]:
    for command, _ in block.commands():
        for part in re.split(r" (?:&&|;) ", command):
            words = shlex.split(part, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                words.pop(0)
            if words:
                yield words


@cache
def _help(command: str) -> str:
    outcome = run(command, "--help")
    assert outcome.code == 0, command
    return "\n".join(outcome.out)


@cache
def _commands() -> frozenset[str]:
    listed = "\n".join(run("--help").out)
    return frozenset(re.findall(r"^ {4}([a-z][a-z-]*)(?: |$)", listed, re.MULTILINE))


def _unknown_in_ours(words: list[str]) -> list[str]:
    """What a command line of ours names that does not exist; the first word is the command."""
    if words[0] not in _commands():
        return [words[0]]
    options = [word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)]
    return [option for option in options if not re.search(rf"(?<![\w-]){option}(?![\w-])", _help(words[0]))]


def _unknown(words: list[str]) -> list[str]:
    """What a command line names that does not exist."""
    line = " ".join(words)
    if match := re.search(rf"(?:^|/){_PROGRAM} (.*)|-m dist_ckpt_mistral (.*)", line):
        return _unknown_in_ours(shlex.split(match[1] or match[2]))
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    unknown = [extra for extra in re.findall(r"(?:\.|dist-ckpt-mistral)\[([\w,-]+)\]", line) if extra not in extras]
    scripts = [word for word in words if re.fullmatch(r"(tools|tests)/[\w/]+(\.py)?", word)]
    unknown += [script for script in scripts if not (ROOT / script).exists()]
    if scripts and scripts[0].startswith("tools/"):
        source = (ROOT / scripts[0]).read_text() if (ROOT / scripts[0]).is_file() else ""
        options = [word for word in words[words.index(scripts[0]) :] if word.startswith("--")]
        unknown += [option for option in options if f'"{option}"' not in source and 'f"--{' not in source]
    return unknown


@pytest.mark.parametrize("block", [pytest.param(block, id=block.name) for block in all_blocks("sh", "console")])
def test_commands_exist(block: Block) -> None:
    """Commands, options, extras, scripts and test files exist, also in blocks that another test runs, or none."""
    assert [unknown for words in _words_of(block) for unknown in _unknown(words)] == []


@pytest.mark.parametrize("block", [pytest.param(block, id=block.name) for block in all_blocks("python")])
def test_names_exist(block: Block) -> None:
    """Each ``dcm.`` name is public, and takes the keywords that it is given, also where an example is not run."""
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "dcm":
            assert node.attr in modules_of_names(), node.attr
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("dcm."):
            name = ast.unparse(node.func).removeprefix("dcm.")
            module = modules_of_names().get(name)
            if module is not None and node.keywords:  # else a method, or nothing to check
                assert {keyword.arg for keyword in node.keywords if keyword.arg} <= _keywords(module, name), name


@cache
def _keywords(module: str, name: str) -> set[str]:
    """The parameters of a function as its module has them, which need not be importable here, or of a class."""
    path = ROOT.joinpath("dist_ckpt_mistral", *module.split("."))
    source = path.with_suffix(".py") if path.with_suffix(".py").is_file() else path / "__init__.py"
    (found,) = (node for node in ast.parse(source.read_text()).body if getattr(node, "name", None) == name)
    if isinstance(found, ast.FunctionDef):
        return _names(found)
    return {*inspect.signature(getattr(dcm, name)).parameters}


def _names(function: ast.FunctionDef) -> set[str]:
    arguments = function.args
    return {each.arg for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)}


@pytest.mark.parametrize(
    "block", [pytest.param(block, id=block.name) for block in all_blocks(*LANGUAGES) if not block.is_run_by_its_page]
)
def test_what_is_run_elsewhere(block: Block) -> None:
    """The test that is said to run a block exists and names what the block starts; a reason not to is a sentence."""
    for comment in ("run by", "not run"):
        for file in re.findall(r"tests/[\w/]+\.py", block.comments.get(comment, "")):
            assert (ROOT / file).is_file(), file
    if "run by" in block.comments:
        source = (ROOT / block.comments["run by"]).read_text()
        started = {Path(word).stem for words in _words_of(block) for word in words if word.startswith("tools/")}
        assert all(name in source for name in started or {"works_here"}), started
    elif "not run" in block.comments:
        assert len(block.comments["not run"].split()) > 2


def test_prose() -> None:
    """Options and names of the package between backticks exist."""
    helps = "".join(map(_help, sorted(_commands())))
    foreign = set().union(*_FOREIGN_OPTIONS.values())
    for page in pages():
        prose = re.sub(r"^( *)```.*?^\1```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
        for code in re.findall(r"`([^`\n]+)`", prose):
            if match := re.search(rf"(?:^|-m ){_PROGRAM.replace('-', '[-_]')} (?=[a-z])(.*)", code):
                assert _unknown_in_ours(match[1].split()) == [], f"{page}: {code}"
            elif re.match(r"--[a-z]", code):
                option = re.split(r"[ =]", code)[0]
                assert option in foreign or re.search(rf"{option}(?![\w-])", helps), f"{page}: {code}"
            for name in re.findall(r"^dcm\.(\w+)", code):
                assert name in modules_of_names(), f"{page}: {code}"


# Links, length, and what .ci/run needs.


def _anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    text = re.sub(r"^( *)```.*?^\1```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", [pytest.param(page, id=str(page.relative_to(ROOT))) for page in pages()])
def test_links(page: Path) -> None:
    """Every relative link leads to a file that exists, and to a heading in it."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        assert file.exists(), target
        assert not anchor or anchor in _anchors(file), target


def test_the_first_page_is_short() -> None:
    """README.md has at most 200 lines, none of which is wider than an editor, but for tables and output."""
    lines = _README.read_text().splitlines()
    assert len(lines) <= _LONGEST_README
    outputs = {line for block in blocks(_README) if block.language == "console" for line in block.text.splitlines()}
    assert [line for line in lines if len(line) > _WIDEST and line not in outputs and not line.startswith("|")] == []


@pytest.mark.parametrize("name", ["demo", "full-demo", "test"])
def test_set_up_commands(name: str) -> None:
    """Each mark is followed by one line that installs the package, or an extra that exists; .ci/run runs it."""
    found = re.findall(rf"^<!-- command: {name} -->\n```sh\n(.*)\n```$", _README.read_text(), re.MULTILINE)
    assert len(found) == 1
    assert re.search(r"pip install -e (?:\.|'\.\[(\w+)\]') ", found[0])
    assert re.search(rf"(in_environment|from_wheel) 3\.1\d {name}$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)


def test_every_command_has_its_section() -> None:
    """The page of the commands has a section for each."""
    sections = set(re.findall(r"^## ([a-z][a-z-]*)$", _CLI.read_text(), re.MULTILINE))
    assert sections >= _commands()


def test_modules_of_the_views() -> None:
    """Every module in the table of the views exists."""
    page = ROOT / "dist_ckpt_mistral" / "views" / "README.md"
    modules = re.findall(r"\| `([\w./]+\.py)` \|", page.read_text())
    assert len(modules) == 7
    assert all((page.parent / module).is_file() for module in modules)
