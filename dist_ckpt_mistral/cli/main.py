"""The command line: its commands, its exit codes, and one format for all errors.

Exit codes: 0 done, 1 a problem with the data (one line on stderr), 2 wrong usage, 3 ``verify`` found a difference.
Progress and notes go to stderr, results to stdout.
"""

from __future__ import annotations

import argparse
import gc
import logging
import signal
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Final, NoReturn

from dist_ckpt_mistral import libraries
from dist_ckpt_mistral._version import __version__
from dist_ckpt_mistral.cli import convert, examine, output, run
from dist_ckpt_mistral.cli.options import EXIT_DATA, EXIT_DONE, is_first_rank
from dist_ckpt_mistral.errors import DistCkptMistralError, LostRankError
from dist_ckpt_mistral.messages import printable

#: What declares the commands, in the order of --help.
_COMMANDS: Final = (
    convert.add_from_hf,
    convert.add_to_hf,
    examine.add_plan,
    convert.add_reshard,
    convert.add_migrate,
    examine.add_inspect,
    examine.add_verify,
    run.add_generate,
    examine.add_megatron_args,
    run.add_demo,
)
_EXIT_INTERRUPTED: Final = 130
#: More than imports make. After every 700, Python's default, the cyclic collector would walk them again and again.
_COLLECT_AFTER_OBJECTS: Final = 100_000


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    gc.set_threshold(_COLLECT_AFTER_OBJECTS)
    output.open_standard_streams()
    arguments = argparse.Namespace(words=tuple(sys.argv[1:] if argv is None else argv), debug=False)
    try:
        _parser().parse_args(arguments.words, arguments)
        return _run(arguments)
    except KeyboardInterrupt as error:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)  # whoever sends another wants no more clearing up
        output.complain(f"interrupted: {_notes(error) or 'Nothing was published.'}")
        return _EXIT_INTERRUPTED
    except (DistCkptMistralError, ImportError, OSError, MemoryError) as error:
        return _fail(error, arguments)


class _Parser(argparse.ArgumentParser):
    """Also tells of wrong usage in one printable line, on streams as they are."""

    def error(self, message: str) -> NoReturn:
        """End with the usage and what is wrong with it."""
        super().error(printable(message))

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """End, after --help and --version too."""
        if message:
            output.complain(message.rstrip("\n"))
        output.finish()
        sys.exit(status)


class _NoteHandler(logging.Handler):
    """Prints each note once, however often a command reads what it is about. Notes may hold names that files gave."""

    def __init__(self) -> None:
        """Nothing has been printed."""
        super().__init__()
        self._printed: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Print one line."""
        line = self.format(record)
        if line not in self._printed:
            self._printed.add(line)
            output.complain(line)


def _run(arguments: argparse.Namespace) -> int:
    if not arguments.runs_here:
        return EXIT_DONE
    level = logging.INFO if is_first_rank() else logging.ERROR
    logging.basicConfig(format="%(message)s", handlers=[_NoteHandler()], level=max(level, logging.WARNING))
    logging.getLogger("dist_ckpt_mistral").setLevel(level)  # what other libraries note is not about what the user does
    for number in (signal.SIGINT, signal.SIGTERM):  # so that an unpublished output is removed, or can be resumed
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _interrupt)
    if arguments.with_numpy:
        libraries.import_numpy()
    command: Callable[[argparse.Namespace], int] = arguments.command
    code = command(arguments)
    output.finish()
    return code


def _interrupt(number: int, frame: FrameType | None) -> None:  # noqa: ARG001  (the signature of a signal handler)
    raise KeyboardInterrupt


def _fail(error: Exception, arguments: argparse.Namespace) -> int:
    if arguments.debug:
        raise error
    if is_first_rank() or isinstance(error, LostRankError):  # the ranks of a job fail together, with one voice
        said, notes = _said(error, arguments), _notes(error)
        output.complain(f"error: {said.rstrip('.')}. {notes}" if notes else f"error: {said}")
    return EXIT_DATA


def _said(error: Exception, arguments: argparse.Namespace) -> str:
    """The message; those of Python's own for the operating system begin with a number, which tells nobody anything."""
    if isinstance(error, OSError) and error.strerror is not None:
        return error.strerror if error.filename is None else f"cannot use {error.filename}: {error.strerror}"
    if isinstance(error, MemoryError):
        remedy = "Lower --workers or --memory." if "workers" in arguments else "Run it where more memory is allowed."
        return f"out of memory ({error}). {remedy}" if str(error) else f"out of memory. {remedy}"
    return str(error)


def _notes(error: BaseException) -> str:
    """What was added to the error on its way: how to go on."""
    return " ".join(getattr(error, "__notes__", ()))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="dist-ckpt-mistral",
        description="Mistral checkpoints between Megatron's distributed format and Hugging Face.",
        epilog="Exit codes: 0 done, 1 a problem with the data, 2 wrong usage, 3 verify found a difference.",
    )
    version = f"%(prog)s {__version__}"
    parser.add_argument("--version", action="version", version=version, help="show the version and exit")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for declare in _COMMANDS:
        declare(commands)
    return parser
