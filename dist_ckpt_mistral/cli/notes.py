"""Log records as notes on standard error. Apart from the rest, because ``--help`` needs no ``logging``."""

from __future__ import annotations

import logging
from typing import Final

from dist_ckpt_mistral.cli import output


class _NoteHandler(logging.Handler):
    """Prints each different note once: a command may read the same file several times."""

    def __init__(self) -> None:
        """Start without printed notes."""
        super().__init__()
        self.printed: dict[str, int] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Print one note, unless it was printed before."""
        line = self.format(record)
        if line not in self.printed:
            self.printed[line] = record.levelno
            output.say_on_stderr(line)


#: The handler of the running command.
_SHOWING: Final[list[_NoteHandler]] = []


def warnings() -> list[str]:
    """The warnings that the running command has printed."""
    return [line for each in _SHOWING for line, level in each.printed.items() if level == logging.WARNING]


def say(line: str) -> None:
    """Print a note, unless it was printed before or only errors are shown."""
    logging.getLogger(__name__).info("%s", line)


def show(*, only_errors: bool, quiet: bool) -> None:
    """Print the notes, warnings and errors of this package: ``quiet`` no notes, ``only_errors`` no warnings either.

    Notes of other libraries are not shown.
    """
    level = logging.ERROR if only_errors else logging.WARNING if quiet else logging.INFO
    _SHOWING[:] = [_NoteHandler()]
    logging.basicConfig(format="%(message)s", handlers=_SHOWING, level=max(level, logging.WARNING))
    logging.getLogger("dist_ckpt_mistral").setLevel(level)
