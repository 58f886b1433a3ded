"""The command line: its commands, its exit codes, and its one voice for errors.

Exit codes: 0 done, 1 a problem with the data (one line on stderr), 2 wrong usage, 3 ``verify`` found a difference.
Progress and notes go to stderr, results to stdout.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Final

from dist_ckpt_mistral import libraries
from dist_ckpt_mistral.commands import (
    demo,
    from_hf,
    generate,
    inspect,
    megatron_args,
    migrate,
    plan,
    reshard,
    to_hf,
    verify,
)
from dist_ckpt_mistral.commands.options import EXIT_DATA, EXIT_DONE, is_first_rank
from dist_ckpt_mistral.errors import DistCkptMistralError, LostRankError, printable
from dist_ckpt_mistral.package_version import VERSION

_COMMANDS: Final = (from_hf, to_hf, plan, reshard, migrate, inspect, verify, generate, megatron_args, demo)
_EXIT_INTERRUPTED: Final = 130
#: More than imports make. After every 700, Python's default, the cyclic collector would walk them again and again.
_COLLECT_AFTER_OBJECTS: Final = 100_000


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    gc.set_threshold(_COLLECT_AFTER_OBJECTS)
    arguments = _parser().parse_args(argv)
    level = logging.INFO if is_first_rank() else logging.ERROR
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Printable("%(message)s"))
    logging.basicConfig(handlers=[handler], level=max(level, logging.WARNING))
    logging.getLogger("dist_ckpt_mistral").setLevel(level)  # what other libraries note is not about what the user does
    signal.signal(signal.SIGTERM, _interrupt)  # so that an unpublished output is removed
    try:
        return _run(arguments)
    except DistCkptMistralError as error:
        return _fail(error, debug=arguments.debug)
    except BrokenPipeError:  # whoever reads has seen enough, as in "inspect ... | head"
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_DONE
    except OSError as error:
        return _fail(error, debug=arguments.debug)
    except MemoryError as error:
        error.args = (f"out of memory ({error}): lower --workers or --memory.",)
        return _fail(error, debug=arguments.debug)
    except KeyboardInterrupt as error:
        print("interrupted:", _notes(error) or "Nothing was published.", file=sys.stderr)
        return _EXIT_INTERRUPTED


class _Printable(logging.Formatter):
    """Notes may hold names that files gave."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def _run(arguments: argparse.Namespace) -> int:
    if not (arguments.on_all_ranks or is_first_rank()):
        return EXIT_DONE
    if arguments.with_numpy:
        libraries.import_numpy()
    command: Callable[[argparse.Namespace], int] = arguments.command
    code = command(arguments)
    sys.stdout.flush()
    return code


def _interrupt(number: int, frame: FrameType | None) -> None:  # noqa: ARG001  (the signature of a signal handler)
    raise KeyboardInterrupt


def _fail(error: Exception, *, debug: bool) -> int:
    if debug:
        raise error
    if is_first_rank() or isinstance(error, LostRankError):  # the ranks of a job fail together, with one voice
        notes = _notes(error)
        print("error:", printable(f"{_said(error).rstrip('.')}. {notes}" if notes else _said(error)), file=sys.stderr)
    return EXIT_DATA


def _said(error: Exception) -> str:
    """The message; those of Python's own for the operating system begin with a number, which tells nobody anything."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"cannot use {error.filename}: {error.strerror}"
    return str(error)


def _notes(error: BaseException) -> str:
    """What was added to the error on its way: how to go on."""
    return " ".join(getattr(error, "__notes__", ()))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dist-ckpt-mistral",
        description="Mistral checkpoints between Megatron's distributed format and Hugging Face.",
        epilog="Exit codes: 0 done, 1 a problem with the data, 2 wrong usage, 3 verify found a difference.",
    )
    version = f"%(prog)s {VERSION}"
    parser.add_argument("--version", action="version", version=version, help="show the version and exit")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.add(commands)
    return parser
