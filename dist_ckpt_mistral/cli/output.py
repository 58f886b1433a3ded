"""Printing: results on standard output, errors and notes on standard error.

Text from outside (names in files, paths, the text of a model) is escaped, so that it cannot control the terminal. A
stream that is closed, full or without a reader never causes a traceback.
"""

from __future__ import annotations

import io
import json
import os
import sys
import textwrap
import unicodedata
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final, TextIO

from dist_ckpt_mistral.cli import bar
from dist_ckpt_mistral.errors import OutputError
from dist_ckpt_mistral.messages import escaped, printable

if TYPE_CHECKING:
    from rich.console import RenderableType

#: Under the same number, fields are only ever added to what ``--json`` prints.
JSON_VERSION: Final = 1
#: Width of tables if standard output is not a terminal: wider than any table, so that no line is broken.
_PAGE_COLUMNS: Final = 10_000
#: Unicode's categories of control characters and surrogates.
_CONTROL_CATEGORIES: Final = ("Cc", "Cs")
#: Characters that an error quotes of a text that could not be printed.
_MOST_QUOTED: Final = 200


def open_standard_streams() -> None:
    """Make all three standard streams usable: open a closed one on the null device.

    Otherwise the next opened file would get the descriptor of the closed stream, and all text that is printed there.
    Standard output escapes characters that its encoding lacks.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):  # in order: open takes the lowest free number
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(descriptor, True)
            setattr(sys, name, open(descriptor, mode, encoding="utf-8", closefd=False))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def say(line: str) -> None:
    """Print one line of a result. Raises OutputError."""
    _print(printable(line))


def say_text(text: str) -> None:
    """Print a text of any number of lines, unchanged; on a terminal, escape its control characters.

    Raises OutputError.
    """
    _print(escaped(text, is_harmless=_is_no_control) if sys.stdout.isatty() else text)


def _is_no_control(character: str) -> bool:
    return character in "\n\t" or unicodedata.category(character) not in _CONTROL_CATEGORIES


def say_piece(text: str) -> None:
    """Print a piece of a text at once, without an end of line; otherwise as ``say_text``. Raises OutputError."""
    _print(escaped(text, is_harmless=_is_no_control) if sys.stdout.isatty() else text, end="")


def say_json(content: Mapping[str, object], *, letters: bool = False) -> None:
    """Print the object of ``--json``: the version of its fields, ``content``, and the warnings so far.

    It is in ASCII, or with ``letters`` in UTF-8 if standard output has that encoding. Raises OutputError.
    """
    from dist_ckpt_mistral.cli import notes

    has_letters = letters and (sys.stdout.encoding or "utf-8").lower() == "utf-8"
    answer = {"json_version": JSON_VERSION, **content, "warnings": notes.warnings()}
    text = json.dumps(answer, indent=2, ensure_ascii=not has_letters)
    _print("".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text) if has_letters else text)


def show(content: RenderableType) -> None:
    """Print a table as wide as the terminal; if there is none, as wide as its content. Raises OutputError."""
    from rich.console import Console

    is_terminal, rendered = sys.stdout.isatty(), io.StringIO()
    console = Console(
        file=rendered, force_terminal=is_terminal, width=None if is_terminal else _PAGE_COLUMNS, highlight=False
    )
    console.print(content, crop=False)  # a line that may not wrap is to be copied whole
    _print("\n".join(line.rstrip() for line in rendered.getvalue().splitlines()))  # rich pads lines with blanks


def say_on_stderr(line: str) -> None:
    """Print one line on standard error. Errors are ignored: there is nowhere to report them."""
    try:
        with bar.hidden():
            print(printable(line), file=sys.stderr, flush=True)
    except OSError:
        _silence(sys.stderr)


def finish() -> None:
    """Flush both output streams, so that an error appears here and not when Python exits. Raises OutputError."""
    try:
        sys.stderr.flush()
    except OSError:
        _silence(sys.stderr)
    _print("", end="")


def _print(text: str, end: str = "\n") -> None:
    try:
        with bar.hidden():
            print(text, end=end, flush=True)
    except BrokenPipeError:  # the reader has ended, as in "inspect ... | head": that is no error of the command
        _silence(sys.stdout)
    except OSError as error:
        _silence(sys.stdout)
        lost = f" Lost output: {textwrap.shorten(text, _MOST_QUOTED)}" if text else ""
        raise OutputError(f"cannot write to standard output: {error.strerror}.{lost}") from error


def _silence(stream: TextIO) -> None:
    """Redirect the stream, with the content of its buffer, to the null device."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)
