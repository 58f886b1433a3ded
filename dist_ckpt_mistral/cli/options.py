"""What commands share: their declaration, options with the same meaning everywhere, and value parsers."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeAlias

from dist_ckpt_mistral.cli import output
from dist_ckpt_mistral.messages import printable

if TYPE_CHECKING:
    from pathlib import Path

    from dist_ckpt_mistral.convert.output import Output
    from dist_ckpt_mistral.convert.ranks import Ranks
    from dist_ckpt_mistral.gather.execute import Effort
    from dist_ckpt_mistral.model.config.mistral_config import GivenConfig
    from dist_ckpt_mistral.model.layout.layout import ParallelLayout

EXIT_DONE: Final = 0
EXIT_DATA: Final = 1
EXIT_DIFFERENT: Final = 3
EXIT_CODES: Final = (
    "Exit codes: 0 done, 1 a problem with the data, 2 wrong usage, 3 verify found a difference or damage, "
    "130 interrupted."
)
#: Help texts of arguments that several commands take.
CKPT: Final = "Megatron checkpoint: its root directory, or one iter_* or release directory in it"
HF: Final = "Hugging Face directory, or hub id (org/name[@revision])"
CKPT_OR_HF: Final = "Megatron checkpoint (root, iter_* or release directory), Hugging Face directory, or hub id"
TOKENIZER: Final = "Hugging Face directory or hub id with the tokenizer (default: the tokenizer stored with the model)"
#: Megatron-LM's option for the number of layers in the first or last stage, its field in a layout, and the stage.
_END_COUNTS: Final = (
    ("--decoder-first-pipeline-num-layers", "num_layers_in_first_pipeline_stage", "first"),
    ("--decoder-last-pipeline-num-layers", "num_layers_in_last_pipeline_stage", "last"),
)
#: Python itself refuses to convert more than 4300 digits.
_MOST_DIGITS: Final = 40

#: The result of ``add_subparsers``; argparse keeps its type private.
Commands: TypeAlias = Any
#: Declares the options of a command.
AddOptions: TypeAlias = Callable[[argparse.ArgumentParser], None]


#: The beginning of argparse's message about options that no parser knows.
_UNRECOGNIZED: Final = "unrecognized arguments: "


class Parser(argparse.ArgumentParser):
    """Escapes its messages for the terminal, and works on streams that are closed or full.

    ``add_options`` declares the options of a command when it is parsed: a process runs only one of the commands.
    """

    add_options: AddOptions | None = None

    def parse_known_args(  # type: ignore[override]  # the overloads of argparse, which agree with this
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Declare the options, and parse them."""
        if self.add_options is not None:
            self.add_options(self)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Print usage, message and what was probably meant, and exit with 2."""
        super().error(printable(f"{message}{self._hint(message)}"))

    def _hint(self, message: str) -> str:
        """The known words most like the unknown ones in a message of argparse, as a question; empty without any."""
        import difflib

        known = [word for action in self._actions for word in (*action.option_strings, *(action.choices or ()))]
        unknown = re.findall(r"invalid choice: '([^']*)'", message)
        if message.startswith(_UNRECOGNIZED):
            unknown = [word.partition("=")[0] for word in message.removeprefix(_UNRECOGNIZED).split()]
        meant = [word for each in unknown for word in difflib.get_close_matches(each, map(str, known), n=1)]
        return f". Did you mean {', '.join(meant)}?" if meant else ""

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """Print ``message``, write out all streams and exit."""
        if message:
            output.say_on_stderr(message.rstrip("\n"))
        output.finish()
        sys.exit(status)


def declare(
    commands: Commands,
    name: str,
    add_options: AddOptions,
    run: Callable[[argparse.Namespace], int],
    summary: str,
    details: str = "",
    *,
    on_each_node: bool = False,
    on_all_ranks: bool = False,
    with_numpy: bool = False,
) -> None:
    """Add the command ``name``, which calls ``run``; ``run`` returns the exit code.

    ``add_options`` declares its options. ``summary`` is shown in the list of commands, ``summary`` and ``details`` in
    the command's own help. Under torchrun only the first rank runs the command, unless ``on_each_node`` (the first rank
    of every node) or ``on_all_ranks``. ``with_numpy`` imports numpy first, without threads for linear algebra.
    ``arguments.wrong_usage(message)`` prints usage and message, and exits with 2.
    """
    command: Parser = commands.add_parser(name, help=summary, description=f"{summary} {details}", epilog=EXIT_CODES)

    def add_all(command: argparse.ArgumentParser) -> None:
        from dist_ckpt_mistral.convert.ranks import works_here

        help_text = "print no notes and show no progress bar; results, warnings and errors stay"
        command.add_argument("-q", "--quiet", action="store_true", help=help_text)
        command.add_argument("--debug", action="store_true", help="show the Python traceback of an error")
        runs_here = on_all_ranks or (works_here() if on_each_node else is_first_rank())
        command.set_defaults(command=run, runs_here=runs_here, with_numpy=with_numpy, wrong_usage=command.error)
        add_options(command)

    command.add_options = add_all


def add_dtype(command: argparse.ArgumentParser) -> None:
    """Add ``--dtype``."""
    from dist_ckpt_mistral.gather import dtypes

    help_text = "convert all weights to this dtype (default: keep the dtype of each weight)"
    command.add_argument("--dtype", choices=dtypes.WEIGHT_DTYPES, help=help_text)


def add_allow_lossy(command: argparse.ArgumentParser) -> None:
    """Add ``--allow-lossy``, which lets ``--dtype`` destroy values."""
    help_text = (
        "with --dtype: accept values that become infinite or zero, and count them in a warning (default: refuse)"
    )
    command.add_argument("--allow-lossy", action="store_true", help=help_text)


def add_output(command: argparse.ArgumentParser, *, has_file_size: bool = False) -> None:
    """Add the options of every command that writes an output, with ``--max-file-size`` if ``has_file_size``."""
    group = command.add_argument_group("output")
    help_text = "replace an existing output; the old one stays until the new one is complete"
    group.add_argument("--overwrite", action="store_true", help=help_text)
    help_text = "resume an interrupted or failed run: keep the copied data whose checksums match, and copy the rest"
    group.add_argument("--resume", action="store_true", help=help_text)
    help_text = "write nothing: run all checks that need no tensor data, and list the files that would be written"
    group.add_argument("--dry-run", action="store_true", help=help_text)
    if has_file_size:
        help_text = (
            "maximum size of one file, e.g. 500MB or 2GiB (default 5GB); a larger tensor or chunk gets its own file"
        )
        group.add_argument("--max-file-size", type=size, default="5GB", metavar="SIZE", help=help_text)
    help_text = "do not write checksums.json, the CRC-32 of all files, with which verify finds damage"
    group.add_argument("--no-checksums", action="store_true", help=help_text)
    help_text = (
        "also write integrity.json, the SHA-256 of all files, which Megatron verifies, too; it takes about 0.6 s of a "
        "core per GB"
    )
    group.add_argument("--sha256", action="store_true", help=help_text)
    help_text = "do not wait until the data is on the disk; a power failure soon afterwards can then destroy the output"
    group.add_argument("--no-sync", action="store_true", help=help_text)
    add_effort(command)


def given_output(arguments: argparse.Namespace) -> Output:
    """How to write the output, from the options of ``add_output``."""
    from dist_ckpt_mistral.convert.output import DEFAULT_OUTPUT, Output

    return Output(
        overwrite=arguments.overwrite,
        resume=arguments.resume,
        dry_run=arguments.dry_run,
        checksums=not arguments.no_checksums,
        sha256=arguments.sha256,
        durable=not arguments.no_sync,
        max_file_bytes=getattr(arguments, "max_file_size", DEFAULT_OUTPUT.max_file_bytes),
    )


def add_effort(command: argparse.ArgumentParser) -> None:
    """Add the options that limit threads and memory, and ``--no-progress``."""
    help_text = "show no progress bar; without a terminal there is none anyway"
    command.add_argument("--no-progress", action="store_true", help=help_text)
    group = command.add_argument_group("resources")
    help_text = "number of threads that copy or compare (default: one per core, at most 8)"
    group.add_argument("--workers", type=positive, default=0, metavar="N", help=help_text)
    help_text = "total size of the buffers of all threads (default 32MiB; 256MiB where a URL is read or written)"
    group.add_argument("--memory", type=size, default=0, metavar="SIZE", help=help_text)
    help_text = "how long faults of a store (a URL) that may pass are retried, in seconds (default 180)"
    group.add_argument("--retry-time", type=positive_number, metavar="SECONDS", help=help_text)


def add_config(command: argparse.ArgumentParser, also: str = "") -> None:
    """Add ``--config`` and ``--override-config``; ``also`` says what else a directory is used for."""
    help_text = (
        "model configuration: a config.json, a Hugging Face directory or a hub id. Needed if the checkpoint has lost "
        f"its own; must agree with the configurations that it still has.{also and f' {also}'}"
    )
    command.add_argument("--config", type=name, metavar="DIR_OR_JSON", help=help_text)
    help_text = "use --config even where it contradicts the configurations stored with the model; list the differences"
    command.add_argument("--override-config", action="store_true", help=help_text)


def given_config(arguments: argparse.Namespace) -> GivenConfig | None:
    """The value of ``--config``, as a ``ConfigOverride`` with ``--override-config``; None without ``--config``."""
    if not arguments.override_config:
        return arguments.config  # type: ignore[no-any-return]  # a text, or None
    if arguments.config is None:
        arguments.wrong_usage("--override-config needs --config")
    from dist_ckpt_mistral.model.config.mistral_config import ConfigOverride

    return ConfigOverride(arguments.config)


def add_layout(command: argparse.ArgumentParser, purpose: str) -> None:
    """Add the options of a parallel layout; ``purpose`` completes the sentence "The parallel layout ...".

    The axes have short names. All other options have the names of Megatron-LM's own.
    """
    group = command.add_argument_group(
        "layout",
        f"The parallel layout {purpose}, in Megatron's terms. By default all pipeline stages have the same number of "
        "layers.",
    )
    for axis, parallelism in (("tp", "tensor"), ("pp", "pipeline"), ("cp", "context"), ("ep", "expert")):
        help_text = f"{parallelism}-parallel size (default 1)"
        group.add_argument(f"--{axis}", type=positive, default=1, metavar="N", help=help_text)
    group.add_argument("--etp", type=positive, metavar="N", help="expert-tensor-parallel size (default: as --tp)")
    group.add_argument("--dp", type=positive, metavar="N", help="data-parallel size (default: the smallest that fits)")
    help_text = "virtual pipeline size: number of model chunks per pipeline stage (default 1)"
    group.add_argument("--vpp", type=positive, metavar="N", help=help_text)
    help_text = (
        "order of the axes in the numbering of ranks, the axis that varies fastest first (default tp-cp-ep-dp-pp; "
        "Megatron-LM's --use-tp-pp-dp-mapping is tp-cp-ep-pp-dp)"
    )
    group.add_argument("--order", metavar="AXES", help=help_text)
    help_text = "number of layers of every pipeline stage, e.g. 3,5 for --pp 2"
    group.add_argument("--pp-layers", type=_layer_counts, metavar="N,N,...", help=help_text)
    for option, field, end in _END_COUNTS:
        help_text = f"number of layers of the {end} pipeline stage"
        group.add_argument(option, dest=field, type=positive, metavar="N", help=help_text)
    for end in ("embedding", "loss"):
        help_text = f"count the {end} as one layer when the layers are divided among the pipeline stages"
        group.add_argument(f"--account-for-{end}-in-pipeline-split", action="store_true", help=help_text)
    help_text = "content of every pipeline stage and model chunk in Megatron-LM's notation, e.g. 'Et*3|(tt|)*2,tL'"
    group.add_argument("--pipeline-model-parallel-layout", metavar="TEXT", help=help_text)


def given_layout(arguments: argparse.Namespace) -> ParallelLayout:
    """The layout from the options of ``add_layout``. Raises LayoutError if they contradict each other."""
    import dataclasses

    from dist_ckpt_mistral.model.layout.layout import ParallelLayout

    values = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(ParallelLayout)}
    return ParallelLayout(**{field: value for field, value in values.items() if value is not None})


def name(text: str) -> str:
    """Parse a path or hub id. An empty text, as of an unset shell variable, would mean the current directory."""
    if not text:
        raise argparse.ArgumentTypeError("expected a path, got an empty text")
    return text


def path(text: str) -> Path:
    """Parse a path or URL; an empty text is refused, as in ``name``."""
    from dist_ckpt_mistral.storage.remote_path import as_path

    return as_path(name(text))


def is_first_rank() -> bool:
    """Whether this is the only process, or rank 0 under torchrun, which prints for all ranks."""
    return os.environ.get("RANK", "0") == "0"


def not_negative(text: str) -> int:
    """Parse a whole number of at least 0. The user of the number checks its upper limit."""
    if not text.isdecimal() or len(text) > _MOST_DIGITS:
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r:.500}")
    return int(text)


def positive(text: str) -> int:
    """Parse a whole number of at least 1."""
    number = not_negative(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return number


def seed(text: str) -> int:
    """Parse a seed of torch's generators: a whole number of at most 64 bits."""
    number = not_negative(text)
    if number >= 1 << 64:
        raise argparse.ArgumentTypeError(f"expected a whole number below 2^64, got {text!r}")
    return number


def positive_number(text: str) -> float:
    """Parse a number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return number


def probability(text: str) -> float:
    """Parse a number above 0 and at most 1."""
    number = positive_number(text)
    if number > 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0 and at most 1, got {text!r}")
    return number


def size(text: str) -> int:
    """Parse a size in bytes: ``5GB`` (decimal) or ``5GiB`` (binary)."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?)\s*([KMGT]?)(i?)B?", text, re.IGNORECASE)
    num_bytes = 0
    if match:
        power = " KMGT".index(match[2].upper() or " ")
        num_bytes = int(float(match[1]) * (1024 if match[3] else 1000) ** power)
    if num_bytes < 1:
        raise argparse.ArgumentTypeError(f"expected a size such as 5GB or 500MB, got {text!r}")
    if match and not match[2] and not text.upper().endswith("B"):
        raise argparse.ArgumentTypeError(f"expected a size with its unit, such as {text}GB or {text}B, got {text!r}")
    return num_bytes


def _layer_counts(text: str) -> tuple[int, ...]:
    """Parse the numbers of layers of the pipeline stages: ``3,5``."""
    return tuple(not_negative(count) for count in text.split(","))


@contextlib.contextmanager
def effort(arguments: argparse.Namespace, ranks: Ranks) -> Iterator[Effort]:
    """The effort from the options of ``add_effort``; if standard error is a terminal, with a progress bar."""
    from dataclasses import replace

    from dist_ckpt_mistral.gather.execute import Effort
    from dist_ckpt_mistral.storage.retries import VARIABLE as RETRY_VARIABLE

    if arguments.retry_time is not None:
        os.environ[RETRY_VARIABLE] = str(arguments.retry_time)
    without_bar = Effort(workers=arguments.workers, memory_bytes=arguments.memory)
    if arguments.no_progress or arguments.quiet or not (ranks.is_first and sys.stderr.isatty()):
        yield without_bar
        return
    from dist_ckpt_mistral.cli.bar import ProgressBar

    with ProgressBar() as bar:
        yield replace(without_bar, progress=bar)
