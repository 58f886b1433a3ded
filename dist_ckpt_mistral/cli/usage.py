"""How a command is declared, helped with and refused: the parser, ``--help``, exit codes, and what a slip was meant as.

``--help`` must be quick, so this module imports nothing that a declaration does not need.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, NoReturn, TypeAlias

from dist_ckpt_mistral.cli import output
from dist_ckpt_mistral.messages import printable

EXIT_DONE: Final = 0
EXIT_DATA: Final = 1
EXIT_USAGE: Final = 2
EXIT_DIFFERENT: Final = 3
EXIT_CODES: Final = (
    "Exit codes: 0 done, 1 a problem with the data, 2 wrong usage, 3 verify found a difference or damage, "
    "130 interrupted."
)
PROGRAM: Final = "dist-ckpt-mistral"
#: Fields that every object has which ``--json`` prints, before and behind those of its command.
JSON_FIRST: Final = {"json_version": "1; under the same number fields are only ever added"}
JSON_LAST: Final = {"warnings": "list of the warnings that also stand on standard error"}
#: Fields of every command that writes something.
OUTPUT_FIELDS: Final = {
    "output": "the directory that was written",
    "files": "name of each file in it -> size; of a model, the files of tensors",
    "dry_run": "whether nothing was written, because --dry-run was given",
    "seconds": "how long it took; null with --dry-run",
    "next": "list of lines that go on from here",
}
#: The beginning of argparse's message about options that no parser knows.
_UNRECOGNIZED: Final = "unrecognized arguments: "
#: Words that other tools have for commands and options of this one, which look unlike them.
_OTHER_WORDS: Final = {
    "convert": "from-hf or to-hf",
    "import": "from-hf",
    "export": "to-hf",
    "diff": "verify",
    "compare": "verify",
    "show": "inspect",
    "info": "inspect",
    "run": "generate",
    "--force": "--overwrite",
    "--tensor-parallel": "--tp",
    "--tensor-parallel-size": "--tp",
    "--tensor-model-parallel-size": "--tp",
    "--pipeline-parallel": "--pp",
    "--pipeline-parallel-size": "--pp",
    "--pipeline-model-parallel-size": "--pp",
    "--expert-parallel": "--ep",
    "--expert-model-parallel-size": "--ep",
    "--context-parallel-size": "--cp",
    "--hf-config": "--config",
    "--max-shard-size": "--max-file-size",
    "--torch-dtype": "--dtype",
    "--threads": "--workers",
    "--num-workers": "--workers",
    "--max-tokens": "--max-new-tokens",
    "--verbose": "--debug",
    "--silent": "--quiet",
}

#: The result of ``add_subparsers``; argparse keeps its type private.
Commands: TypeAlias = Any
#: Declares the options of a command.
AddOptions: TypeAlias = Callable[[argparse.ArgumentParser], None]


class Parser(argparse.ArgumentParser):
    """Escapes its messages for the terminal, and works on streams that are closed or full.

    ``add_options`` declares the options of a command when it is parsed: a process runs only one of the commands. Its
    help ends with ``examples``, the ``json_fields`` that ``--json`` prints, and the exit codes.
    """

    add_options: AddOptions | None = None
    examples: Sequence[str] = ()
    json_fields: Mapping[str, str] = {}

    def declare_options(self) -> None:
        """Declare the options, unless they are declared."""
        add_options, self.add_options = self.add_options, None
        if add_options is not None:
            add_options(self)

    def parse_known_args(  # type: ignore[override]  # the overloads of argparse, which agree with this
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Declare the options, and parse them."""
        self.declare_options()
        return super().parse_known_args(args, namespace)

    def format_help(self) -> str:
        """The help of argparse, and behind it what this class adds."""
        return "\n".join([super().format_help(), *self._sections(columns=_help_columns())])

    def _sections(self, columns: int) -> Iterator[str]:
        import textwrap

        if self.examples:
            yield "\n".join(["examples:", *(f"  {example}" for example in self.examples)]) + "\n"
        if self.json_fields:
            opening = "--json prints one object. Sizes (*_bytes, files) are bytes, times seconds, shapes elements:"
            yield textwrap.fill(opening, columns)
            fields = {**JSON_FIRST, **self.json_fields, **JSON_LAST}
            indent = max(map(len, fields)) + 4
            for name, text in fields.items():
                yield textwrap.fill(
                    text, columns, initial_indent=f"  {name:<{indent - 2}}", subsequent_indent=" " * indent
                )
            yield ""
        yield textwrap.fill(EXIT_CODES, columns) + "\n"

    def error(self, message: str) -> NoReturn:
        """Print what must be given, the message, what was probably meant and where all options stand; exit with 2."""
        output.say_on_stderr(self._short_usage())
        self.exit(EXIT_USAGE, f"{self.prog}: error: {printable(message)}{printable(self._hint(message))}\n")

    def _short_usage(self) -> str:
        """One line: the command, with the arguments and options that it needs."""
        needed = [
            " ".join((*action.option_strings[:1], str(action.metavar or action.dest)))
            for action in self._actions
            if action.required
        ]
        return " ".join(("usage:", self.prog, *needed, "[OPTIONS] (see --help)"))

    def _hint(self, message: str) -> str:
        """The known words most like the unknown ones in a message of argparse, as a question; empty without any."""
        import difflib

        known = [str(word) for action in self._actions for word in (*action.option_strings, *(action.choices or ()))]
        unknown = re.findall(r"invalid choice: '([^']*)'", message)
        if message.startswith(_UNRECOGNIZED):
            unknown = [word.partition("=")[0] for word in message.removeprefix(_UNRECOGNIZED).split()]
        meant = [_OTHER_WORDS[word] for word in unknown if {*_OTHER_WORDS.get(word, "").split(" or ")} <= {*known}]
        meant += [word for each in unknown for word in difflib.get_close_matches(each, known, n=1) if not meant]
        return f". Did you mean {', '.join(meant)}?" if meant else ""

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """Print ``message``, write out all streams and exit."""
        if message:
            output.say_on_stderr(message.rstrip("\n"))
        output.finish()
        sys.exit(status)


def _help_columns() -> int:
    """The width of help texts, as argparse has it."""
    import shutil

    return max(40, shutil.get_terminal_size().columns - 2)


class PrintCompletion(argparse.Action):
    """``--print-completion SHELL``: prints the shell's script that completes commands, options and paths."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,  # noqa: ARG002  (the signature of an action)
        values: Any,  # noqa: ANN401
        option_string: str | None = None,  # noqa: ARG002
    ) -> NoReturn:
        """Print the script and exit."""
        from dist_ckpt_mistral.cli import completion

        output.say_text(completion.script(parser, values))
        parser.exit()


def declare(
    commands: Commands,
    name: str,
    add_options: AddOptions,
    run: Callable[[argparse.Namespace], int],
    summary: str,
    details: str = "",
    *,
    examples: Sequence[str],
    json_fields: Mapping[str, str],
    on_each_node: bool = False,
    on_all_ranks: bool = False,
    with_numpy: bool = False,
) -> None:
    """Add the command ``name``, which calls ``run``; ``run`` returns the exit code.

    ``add_options`` declares its options. ``summary`` is shown in the list of commands, ``summary`` and ``details`` in
    the command's own help, with ``examples`` (what stands behind the program's name, or a whole line) and the
    ``json_fields`` that it prints with ``--json``, each with its meaning. Under torchrun only the first rank runs the
    command, unless ``on_each_node`` (the first rank of every node) or ``on_all_ranks``. ``with_numpy`` imports numpy
    first, without threads for linear algebra. ``arguments.wrong_usage(message)`` prints usage and message, and exits
    with 2.
    """
    command: Parser = commands.add_parser(name, help=summary, description=f"{summary} {details}")
    command.examples = [line if " " in line.partition(name)[0] else f"{PROGRAM} {line}" for line in examples]
    command.json_fields = json_fields

    def add_all(command: argparse.ArgumentParser) -> None:
        from dist_ckpt_mistral.convert.ranks import works_here

        add_options(command)
        group = command.add_argument_group("common")
        group.add_argument("--json", action="store_true", help="print one JSON object, and nothing else, as below")
        help_text = "print no notes, no next steps and no progress bar; results, warnings and errors stay"
        group.add_argument("-q", "--quiet", action="store_true", help=help_text)
        help_text = "show no progress bar; without a terminal there is none anyway"
        group.add_argument("--no-progress", action="store_true", help=help_text)
        group.add_argument("--debug", action="store_true", help="show the Python traceback of an error")
        runs_here = on_all_ranks or (works_here() if on_each_node else is_first_rank())
        command.set_defaults(command=run, runs_here=runs_here, with_numpy=with_numpy, wrong_usage=command.error)

    command.add_options = add_all


def is_first_rank() -> bool:
    """Whether this is the only process, or rank 0 under torchrun, which prints for all ranks."""
    return os.environ.get("RANK", "0") == "0"
