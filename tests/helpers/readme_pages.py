"""The README pages of this repository: their blocks of code, and what their authors say about how these are run.

HTML comments right above a block say it, which readers do not see:

- ``given: NAME, ...``: what the test puts beside the block first, see ``GIVEN`` in ``tests/cli/test_readme.py``;
- ``needs: MODULE, ...``: modules that the block needs without importing them; it is then run by itself;
- ``ranks: N``: it is run on N ranks of Megatron;
- ``run by: FILE``: another test runs it;
- ``not run: REASON``: nothing runs it, its names and options are checked;
- ``command: NAME``: ``.ci/run`` runs it in a fresh environment.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

from dist_ckpt_mistral.libraries import public_modules

ROOT: Final = Path(__file__).parents[2]
#: Languages of blocks that are run; others show what files and folders look like.
LANGUAGES: Final = ("sh", "console", "python")
_COMMENT: Final = re.compile(r"<!-- (given|needs|ranks|run by|not run|command): (.+) -->")
_SIGN: Final = "$ "
#: Times, rates, and what else differs from run to run, in a line that a command prints.
_VARYING: Final = re.compile(r"\d+(?:\.\d+)? (?:ms|s|min|[kMG]?B/s)\b|(?<=\"seconds\": )\d+(?:\.\d+)?")
#: A line that stands for any number of lines.
_AND_SO_ON: Final = "..."


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A fenced block: the line of its first line, counted from 1, its language, content, section, and its comments."""

    page: Path
    line: int
    language: str
    text: str
    section: str
    comments: Mapping[str, str]

    @property
    def name(self) -> str:
        """Where it stands, in words."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def is_run_by_its_page(self) -> bool:
        """Whether the block is run as it stands, and not by a test of its own or by nothing."""
        return not {"run by", "not run", "command"} & set(self.comments)

    def listed(self, comment: str) -> list[str]:
        """The names that a comment lists."""
        return [name.strip() for name in self.comments.get(comment, "").split(",") if name.strip()]

    def commands(self) -> Iterator[tuple[str, list[str]]]:
        """Each command and the lines that are shown below it; a block of the language sh shows no output."""
        text = self.text.replace("\\\n", " ") if self.language == "sh" else self.text
        lines = text.splitlines()
        if self.language == "sh":
            yield from ((line, []) for line in lines if line.strip())
            return
        starts = [number for number, line in enumerate(lines) if line.startswith(_SIGN)]
        for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
            yield lines[start].removeprefix(_SIGN), lines[start + 1 : end]


@cache
def pages() -> tuple[Path, ...]:
    """All README pages; what lies in hidden or ignored folders is not ours."""
    places = (ROOT, *(ROOT / name for name in ("dist_ckpt_mistral", "tests", "tools")))
    found = {page for place in places for page in (place.glob("README.md") if place == ROOT else place.rglob("*.md"))}
    return tuple(sorted(page for page in found if page.name == "README.md" and "/." not in str(page.relative_to(ROOT))))


@cache
def blocks(page: Path) -> tuple[Block, ...]:
    """The fenced blocks of a page, in order."""
    found, comments, section = [], dict[str, str](), ""
    lines = page.read_text().splitlines()
    number = 0
    while number < len(lines):
        line = lines[number]
        if fence := re.fullmatch(r"( *)```(\w*)", line):
            end = lines.index(f"{fence[1]}```", number + 1)
            inside = "\n".join(each.removeprefix(fence[1]) for each in lines[number + 1 : end])
            found.append(
                Block(
                    page=page,
                    line=number + 2,
                    language=fence[2],
                    text=inside,
                    section=section,
                    comments=dict(comments),
                )
            )
            number = end
            comments.clear()
        elif comment := _COMMENT.fullmatch(line.strip()):
            comments[comment[1]] = comment[2]
        else:
            comments.clear()
            section = line.lstrip("# ") if line.startswith("#") else section
        number += 1
    return tuple(found)


def all_blocks(*languages: str) -> list[Block]:
    """The blocks of these languages in all pages."""
    return [block for page in pages() for block in blocks(page) if block.language in languages]


def is_shown(expected: list[str], actual: list[str]) -> bool:
    """Whether a page shows these lines: times and rates may differ, and ``...`` stands for any number of lines."""
    if not expected or not actual:
        return expected in (actual, [_AND_SO_ON])
    if expected[0] == _AND_SO_ON:
        return is_shown(expected[1:], actual) or is_shown(expected, actual[1:])
    return _steady(expected[0]) == _steady(actual[0]) and is_shown(expected[1:], actual[1:])


def _steady(line: str) -> str:
    return _VARYING.sub("N", line)


def rewritten(expected: list[str], actual: list[str]) -> list[str]:
    """What a page should show: ``actual``, cut where ``expected`` has ``...``; lines that are right stay."""
    if _AND_SO_ON in expected:
        before = expected.index(_AND_SO_ON)
        after = len(expected) - before - 1
        return [*actual[:before], _AND_SO_ON, *actual[len(actual) - after :]]
    old = {_steady(line): line for line in expected}
    return [old.get(_steady(line), line) for line in actual]


def rewrite(block: Block, outputs: list[list[str]]) -> None:
    """Put ``outputs`` below the commands of a block in its page."""
    parts = (
        [f"{_SIGN}{command}", *rewritten(shown, actual)]
        for (command, shown), actual in zip(block.commands(), outputs, strict=True)
    )
    text = "\n".join(line for part in parts for line in part)
    page = block.page.read_text()
    if page.count(f"\n{block.text}\n") != 1:
        raise ValueError(f"{block.name}: cannot tell which block this is")
    block.page.write_text(page.replace(f"\n{block.text}\n", f"\n{text}\n"))


@cache
def modules_of_names() -> Mapping[str, str]:
    """Public name of the package -> the module that defines it, relative to the package."""
    return public_modules()
