"""Shell completion, written by shtab from the parser. Apart from the rest, because no command needs it."""

from __future__ import annotations

import argparse

from dist_ckpt_mistral.cli import values
from dist_ckpt_mistral.cli.usage import Parser

#: What completes a word with one of these types: files, and directories on the way to them.
_PATHS = (values.name, values.path)


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The script with which ``shell`` completes what ``parser`` takes; its commands have not declared options yet."""
    import shtab

    for action in parser._actions:  # noqa: SLF001  (argparse has no public list of them, and shtab walks this one)
        if isinstance(action.choices, dict):
            for command in action.choices.values():
                if isinstance(command, Parser):
                    command.declare_options()
                    _complete_paths(command)
    return str(shtab.complete(parser, shell)).rstrip("\n")


def _complete_paths(parser: argparse.ArgumentParser) -> None:
    import shtab

    for action in parser._actions:  # noqa: SLF001
        if action.type in _PATHS:
            action.complete = shtab.FILE  # type: ignore[attr-defined]  # where shtab looks for it
