"""The entry point of the command line: the parser, the exit codes, and one format for all errors.

Exit codes: 0 done; 1 a problem with the data (one line on stderr); 2 wrong usage; 3 ``verify`` found a difference or
damage; 130 interrupted. Progress and notes go to stderr, results to stdout.
"""

from __future__ import annotations

import argparse
import gc
import signal
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Final

from dist_ckpt_mistral._version import __version__
from dist_ckpt_mistral.cli import beside, convert, examine, output, run
from dist_ckpt_mistral.cli.usage import EXIT_DATA, EXIT_DONE, PROGRAM, Parser, PrintCompletion, is_first_rank
from dist_ckpt_mistral.errors import DistCkptMistralError, LostRankError
from dist_ckpt_mistral.libraries import import_numpy

#: Command -> the function that declares it, in the order of --help.
_COMMANDS: Final = {
    "from-hf": convert.add_from_hf,
    "to-hf": convert.add_to_hf,
    "describe": beside.add_describe,
    "plan": examine.add_plan,
    "reshard": convert.add_reshard,
    "migrate": convert.add_migrate,
    "index": beside.add_index,
    "inspect": examine.add_inspect,
    "verify": examine.add_verify,
    "generate": run.add_generate,
    "megatron-args": examine.add_megatron_args,
    "demo": run.add_demo,
}
_EXAMPLES: Final = (
    f"{PROGRAM} from-hf mistralai/Mistral-7B-v0.3 ckpt",
    f"{PROGRAM} to-hf ckpt out",
    f'eval "$({PROGRAM} --print-completion bash)"',
)
EXIT_INTERRUPTED: Final = 130
#: Options of all commands, which may stand before the command too.
_ANYWHERE: Final = ("-q", "--quiet", "--debug", "--no-progress", "--json")
_SHELLS: Final = ("bash", "zsh", "tcsh")
#: More objects than imports make. With Python's default of 700, the cyclic collector would walk them many times.
_COLLECT_AFTER_OBJECTS: Final = 100_000


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in ``argv`` (default: ``sys.argv``) and return its exit code."""
    gc.set_threshold(_COLLECT_AFTER_OBJECTS)
    output.open_standard_streams()
    words = _command_first(sys.argv[1:] if argv is None else argv)
    arguments = argparse.Namespace(words=words, debug=False)
    try:
        _, unknown = _parser(arguments.words).parse_known_args(arguments.words, arguments)
        if unknown:
            arguments.wrong_usage(f"unrecognized arguments: {' '.join(unknown)}")
        return _run(arguments)
    except KeyboardInterrupt as error:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)  # a second signal ends the process at once
        output.say_on_stderr(f"interrupted: {_notes(error) or 'Nothing was published.'}")
        return EXIT_INTERRUPTED
    except (DistCkptMistralError, ImportError, OSError, MemoryError) as error:
        return _fail(error, arguments)


def _command_first(words: Sequence[str]) -> tuple[str, ...]:
    """``words`` with the options that every command has behind the command, where they stand before it.

    ``help`` and ``help COMMAND`` become ``--help`` and ``COMMAND --help``.
    """
    count = next((number for number, word in enumerate(words) if word not in _ANYWHERE), len(words))
    command, before, behind = words[count : count + 1], words[:count], words[count + 1 :]
    if [*command] == ["help"]:
        return (*behind[:1], "--help")
    return (*command, *before, *behind)


def _run(arguments: argparse.Namespace) -> int:
    if not arguments.runs_here:
        return EXIT_DONE
    from dist_ckpt_mistral.cli import notes

    notes.show(only_errors=not is_first_rank(), quiet=arguments.quiet)
    if arguments.with_numpy:
        import_numpy()  # before the next line: numpy turns an interrupt of its import into another error
    for number in (signal.SIGINT, signal.SIGTERM):  # the unpublished output is then removed, or kept for --resume
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _interrupt)
    command: Callable[[argparse.Namespace], int] = arguments.command
    code = command(arguments)
    output.finish()
    return code


def _interrupt(number: int, frame: FrameType | None) -> None:  # noqa: ARG001  (the signature of a signal handler)
    raise KeyboardInterrupt


def _fail(error: Exception, arguments: argparse.Namespace) -> int:
    if arguments.debug:
        raise error
    if is_first_rank() or isinstance(error, LostRankError):  # all ranks of a job fail; one prints the error
        message, notes = _message(error, arguments), _notes(error)
        output.say_on_stderr(f"error: {message.rstrip('.')}. {notes}" if notes else f"error: {message}")
    return EXIT_DATA


def _message(error: Exception, arguments: argparse.Namespace) -> str:
    """The message of an error, without the error number that Python puts before those of the operating system."""
    if isinstance(error, OSError) and error.strerror is not None:
        return error.strerror if error.filename is None else f"cannot use {error.filename}: {error.strerror}"
    if isinstance(error, MemoryError):
        remedy = "Lower --workers or --memory." if "workers" in arguments else "Run it where more memory is allowed."
        return f"out of memory ({error}). {remedy}" if str(error) else f"out of memory. {remedy}"
    return str(error)


def _notes(error: BaseException) -> str:
    """The notes that were added to an error, which say how to go on."""
    return " ".join(getattr(error, "__notes__", ()))


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of a command line: with the command that its first word names, or with all of them."""
    parser = Parser(
        prog=PROGRAM,
        description="Convert, inspect and verify checkpoints of Mistral models, between Megatron and Hugging Face.",
        epilog="Every command has its own --help, with examples.",
    )
    parser.examples = _EXAMPLES
    version = f"%(prog)s {__version__}"
    parser.add_argument("-V", "--version", action="version", version=version, help="show the version and exit")
    help_text = "print the script that completes commands, options and paths in this shell, and exit"
    parser.add_argument("--print-completion", action=PrintCompletion, choices=_SHELLS, help=help_text)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    asked_for = [declare for name, declare in _COMMANDS.items() if name == "".join(words[:1])]
    for declare in asked_for or _COMMANDS.values():
        declare(commands)
    return parser
