"""What commands print: results on standard output, errors on standard error.

No text from outside (a name in a file, a path, a model's words) steers a terminal. A stream may be closed or full, or
its reader may have gone: none of these ends in a traceback.
"""

from __future__ import annotations

import io
import json
import os
import sys
import textwrap
import unicodedata
from typing import TYPE_CHECKING, Final, TextIO

from dist_ckpt_mistral.errors import OutputError
from dist_ckpt_mistral.messages import escaped, printable

if TYPE_CHECKING:
    from rich.console import RenderableType

#: The width of tables where there is no terminal to fit into.
_PAGE_COLUMNS: Final = 160
#: Unicode's categories of control characters and of halves of surrogate pairs.
_STEERING: Final = ("Cc", "Cs")
#: How much an error quotes of a text that could not be printed, in characters.
_MOST_QUOTED: Final = 200


def open_standard_streams() -> None:
    """Make all three standard streams usable: a closed one becomes the null device.

    The next file that is opened would otherwise get the number of the closed stream, and all text that is meant for it.
    A letter that the terminal's encoding lacks is escaped.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):  # by number: each gets the lowest free one
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
    """Print a text of any number of lines, in any script: exactly, or on a terminal with control characters escaped.

    Raises OutputError.
    """
    _print(escaped(text, is_harmless=_is_of_a_text) if sys.stdout.isatty() else text)


def _is_of_a_text(character: str) -> bool:
    return character in "\n\t" or unicodedata.category(character) not in _STEERING


def say_json(content: object, *, letters: bool = False) -> None:
    """Print JSON in ASCII, or with the ``letters`` of all scripts where the terminal has them. Raises OutputError."""
    has_letters = letters and (sys.stdout.encoding or "utf-8").lower() == "utf-8"
    text = json.dumps(content, indent=2, ensure_ascii=not has_letters)
    _print("".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text) if has_letters else text)


def show(content: RenderableType) -> None:
    """Print a sheet: as wide as the terminal, or as a page where there is none. Raises OutputError."""
    from rich.console import Console  # noqa: PLC0415  (only tables need rich)

    is_terminal, drawn = sys.stdout.isatty(), io.StringIO()
    console = Console(
        file=drawn, force_terminal=is_terminal, width=None if is_terminal else _PAGE_COLUMNS, highlight=False
    )
    console.print(content)
    _print("\n".join(line.rstrip() for line in drawn.getvalue().splitlines()))  # rich fills lines up with blanks


def complain(line: str) -> None:
    """Print one line on standard error, if anyone can read it there."""
    try:
        print(printable(line), file=sys.stderr, flush=True)
    except OSError:
        _silence(sys.stderr)


def finish() -> None:
    """Write out what other code has printed: Python itself would do so after ``main``. Raises OutputError."""
    try:
        sys.stderr.flush()
    except OSError:
        _silence(sys.stderr)
    _print("", end="")


def _print(text: str, end: str = "\n") -> None:
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:  # the reader has seen enough, as in "inspect ... | head": the exit code is the command's
        _silence(sys.stdout)
    except OSError as error:
        _silence(sys.stdout)
        lost = f" It is lost: {textwrap.shorten(text, _MOST_QUOTED)}" if text else ""
        raise OutputError(f"cannot write to standard output: {error.strerror}.{lost}") from error


def _silence(stream: TextIO) -> None:
    """Let what is still printed, and what lies in the stream's buffer, go nowhere."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)
