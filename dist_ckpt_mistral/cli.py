"""The command line: arguments, exit codes, and everything that is printed.

Exit codes: 0 done, 1 a problem with the data (one line on stderr), 2 wrong usage, 3 ``verify`` found a difference.
Progress and notes go to stderr, results to stdout.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Final

from dist_ckpt_mistral.errors import DistCkptMistralError
from dist_ckpt_mistral.ranks import Ranks, from_environment

if TYPE_CHECKING:
    from dist_ckpt_mistral.convert import Conversion
    from dist_ckpt_mistral.gather.executor import Effort

EXIT_DONE: Final = 0
EXIT_DATA: Final = 1
EXIT_DIFFERENT: Final = 3
_EXIT_INTERRUPTED: Final = 130
_WEIGHT_DTYPES: Final = ("bfloat16", "float16", "float32")
#: The width of tables where there is no terminal to fit into.
_PAGE_COLUMNS: Final = 160
_CKPT: Final = "Megatron checkpoint: its root, or one iter_* or release directory in it"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = _parser().parse_args(argv)
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=level)
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
        return _fail(MemoryError(f"out of memory ({error}): lower --workers or --memory"), debug=arguments.debug)
    except KeyboardInterrupt:
        print("interrupted: nothing was published", file=sys.stderr)
        return _EXIT_INTERRUPTED


def _run(arguments: argparse.Namespace) -> int:
    command: Callable[[argparse.Namespace], int] = arguments.command
    code = command(arguments)
    sys.stdout.flush()
    return code


def _interrupt(number: int, frame: FrameType | None) -> None:  # noqa: ARG001  (the signature of a signal handler)
    raise KeyboardInterrupt


def _fail(error: Exception, *, debug: bool) -> int:
    if debug:
        raise error
    if os.environ.get("RANK", "0") == "0":  # the ranks of a job fail together, with one voice
        print("error: " + " ".join(str(error).split("\n")), file=sys.stderr)
    return EXIT_DATA


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dist-ckpt-mistral",
        description="Mistral checkpoints between Megatron's distributed format and Hugging Face.",
        epilog="Exit codes: 0 done, 1 a problem with the data, 2 wrong usage, 3 verify found a difference.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_from_hf(commands)
    _add_to_hf(commands)
    _add_inspect(commands)
    _add_verify(commands)
    _add_demo(commands)
    return parser


class _Version(argparse.Action):
    """``--version``, which alone needs importlib.metadata: half of the time that ``--help`` takes."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib import metadata  # noqa: PLC0415  (slow)

        try:
            print(f"dist-ckpt-mistral {metadata.version('dist-ckpt-mistral')}")
        except metadata.PackageNotFoundError:
            print("dist-ckpt-mistral, not installed")
        parser.exit()


def _command(
    commands: Any,  # noqa: ANN401  (argparse keeps the type private)
    name: str,
    run: Callable[[argparse.Namespace], int],
    summary: str,
) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=summary)
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    command.set_defaults(command=run)
    return command


def _add_writing_options(command: argparse.ArgumentParser) -> None:
    _add_no_sync(command)
    command.add_argument("--dtype", choices=_WEIGHT_DTYPES, help="convert the weights (default: keep)")
    _add_effort(command)
    command.add_argument(
        "--overwrite", action="store_true", help="replace an existing output, once the new one is complete"
    )


def _add_effort(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--workers", type=_positive, default=0, metavar="N", help="threads (default: one a core, at most 8)"
    )
    command.add_argument(
        "--memory", type=_size, default="32MiB", metavar="SIZE", help="of all copy buffers together (default 32MiB)"
    )


def _add_no_sync(command: argparse.ArgumentParser) -> None:
    help_text = "leave it to the operating system when data reach the disk; a power cut may then cost the output"
    command.add_argument("--no-sync", action="store_true", help=help_text)


def _add_from_hf(commands: Any) -> None:  # noqa: ANN401  (argparse keeps the type private)
    command = _command(commands, "from-hf", _from_hf, "Import a Hugging Face model into a Megatron checkpoint.")
    command.add_argument("hf", metavar="HF", help="Hugging Face directory or hub id")
    command.add_argument("checkpoint", metavar="CKPT", type=Path, help="checkpoint root to create")
    for axis, what in (("tp", "tensor"), ("pp", "pipeline"), ("ep", "expert")):
        help_text = f"cut the stored chunks for this {what} parallelism; any other loads too (default 1)"
        command.add_argument(f"--{axis}", type=_positive, default=1, metavar="N", help=help_text)
    command.add_argument(
        "--iteration", type=_not_negative, metavar="N", help="store as this iteration (default: a release)"
    )
    _add_writing_options(command)


def _add_to_hf(commands: Any) -> None:  # noqa: ANN401  (argparse keeps the type private)
    command = _command(commands, "to-hf", _to_hf, "Export a Megatron checkpoint to a Hugging Face directory.")
    command.add_argument("checkpoint", metavar="CKPT", type=Path, help=_CKPT)
    command.add_argument("hf", metavar="HF", type=Path, help="directory to create")
    _add_config(command)
    command.add_argument("--max-file-size", type=_size, default="5GB", metavar="SIZE", help="of one file (default 5GB)")
    command.add_argument("--dry-run", action="store_true", help="check everything and say what would be written")
    _add_writing_options(command)


def _add_config(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--config",
        metavar="DIR_OR_JSON",
        help="config.json, or a Hugging Face directory whose small files come along too",
    )


def _add_inspect(commands: Any) -> None:  # noqa: ANN401  (argparse keeps the type private)
    command = _command(commands, "inspect", _inspect, "Say what is in a checkpoint or a Hugging Face directory.")
    command.add_argument("path", metavar="CKPT_OR_HF", type=Path, help="what to look at")
    _add_config(command)
    command.add_argument("--json", action="store_true", help="print JSON")
    command.add_argument("--html", type=Path, metavar="FILE", help="write a page instead")


def _add_verify(commands: Any) -> None:  # noqa: ANN401  (argparse keeps the type private)
    command = _command(commands, "verify", _verify, "Compare two models bit for bit, whatever they are stored as.")
    command.add_argument("a", metavar="A", type=Path, help="checkpoint or Hugging Face directory")
    command.add_argument("b", metavar="B", type=Path, help="checkpoint or Hugging Face directory")
    _add_config(command)
    _add_effort(command)
    command.add_argument("--json", action="store_true", help="print JSON")


def _add_demo(commands: Any) -> None:  # noqa: ANN401  (argparse keeps the type private)
    command = _command(commands, "demo", _demo, "Show it all on a small model made on the spot, offline.")
    command.add_argument("--keep", type=Path, metavar="DIR", help="work in DIR and leave everything there")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _not_negative(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}")
    return int(text)


def _size(text: str) -> int:
    """``5GB`` (decimal) or ``5GiB`` (binary) in bytes."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?)\s*([KMGT]?)(i?)B?", text, re.IGNORECASE)
    num_bytes = 0
    if match:
        power = " KMGT".index(match[2].upper() or " ")
        num_bytes = int(float(match[1]) * (1024 if match[3] else 1000) ** power)
    if num_bytes < 1:
        raise argparse.ArgumentTypeError(f"expected a size such as 5GB or 500MB, got {text!r}")
    return num_bytes


def _from_hf(arguments: argparse.Namespace) -> int:
    from dist_ckpt_mistral import convert  # noqa: PLC0415  (--help must not wait for numpy)

    ranks = from_environment()
    with _effort("importing", arguments, ranks) as effort:
        done = convert.from_hf(
            arguments.hf,
            arguments.checkpoint,
            tp=arguments.tp,
            pp=arguments.pp,
            ep=arguments.ep,
            dtype=arguments.dtype,
            iteration=arguments.iteration,
            overwrite=arguments.overwrite,
            effort=effort,
            ranks=ranks,
        )
    if ranks.is_first:
        print(_sentence("wrote", done))
    return EXIT_DONE


def _to_hf(arguments: argparse.Namespace) -> int:
    from dist_ckpt_mistral import convert  # noqa: PLC0415  (--help must not wait for numpy)

    ranks = from_environment()
    with _effort("exporting", arguments, ranks) as effort:
        done = convert.to_hf(
            arguments.checkpoint,
            arguments.hf,
            config=arguments.config,
            dtype=arguments.dtype,
            max_file_bytes=arguments.max_file_size,
            overwrite=arguments.overwrite,
            dry_run=arguments.dry_run,
            effort=effort,
            ranks=ranks,
        )
    if ranks.is_first:
        print(_sentence("would write" if arguments.dry_run else "wrote", done))
    if ranks.is_first and arguments.dry_run:
        for name, num_bytes in done.files.items():
            print(f"  {name}  {num_bytes} bytes")
    return EXIT_DONE


def _sentence(verb: str, done: Conversion) -> str:
    from dist_ckpt_mistral.report import human_bytes  # noqa: PLC0415  (--help must not wait for numpy)

    ignored = f"; {len(done.ignored)} stored entries are not weights and stayed behind" if done.ignored else ""
    size = human_bytes(done.num_bytes)
    return f"{verb} {done.num_tensors} tensors ({size}) in {len(done.files)} files to {done.output}{ignored}"


def _inspect(arguments: argparse.Namespace) -> int:
    from dist_ckpt_mistral import report  # noqa: PLC0415  (--help must not wait for numpy)

    found = report.inspect(arguments.path, config=_given_config(arguments))
    if arguments.html is not None:
        report.save_html(found, arguments.html)
        print(f"wrote {arguments.html}")
    elif arguments.json:
        print(json.dumps(found.to_json(), indent=2))
    else:
        from rich.console import Console  # noqa: PLC0415  (only tables need rich)

        Console(width=None if sys.stdout.isatty() else _PAGE_COLUMNS, highlight=False, markup=False, emoji=False).print(
            report.render(found)
        )
    return EXIT_DATA if found.problems else EXIT_DONE


def _verify(arguments: argparse.Namespace) -> int:
    from dist_ckpt_mistral import verify  # noqa: PLC0415  (--help must not wait for numpy)
    from dist_ckpt_mistral.report import human_bytes  # noqa: PLC0415

    with _effort("comparing", arguments, Ranks()) as effort:
        outcome = verify.compare(arguments.a, arguments.b, config=arguments.config, effort=effort)
    if arguments.json:
        print(json.dumps(outcome.to_json(), indent=2))
    else:
        for difference in outcome.differences:
            print(f"{difference.hf_name}: {difference.what}")
        verdict = "equal" if outcome.is_equal else f"DIFFERENT in {len(outcome.differences)} tensors"
        print(f"{verdict}: {outcome.num_tensors} tensors, {human_bytes(outcome.num_bytes)} compared bit for bit")
    return EXIT_DONE if outcome.is_equal else EXIT_DIFFERENT


def _demo(arguments: argparse.Namespace) -> int:
    from dist_ckpt_mistral import demo  # noqa: PLC0415  (--help must not wait for numpy)

    demo.run(arguments.keep, say=functools.partial(print, flush=True))  # it takes a while, also through a pipe
    return EXIT_DONE


def _given_config(arguments: argparse.Namespace) -> Any:  # noqa: ANN401  (MistralConfig | None, imported late)
    if arguments.config is None:
        return None
    from dist_ckpt_mistral.model.config import MistralConfig  # noqa: PLC0415  (--help must not wait for numpy)

    return MistralConfig.from_hf(arguments.config)


@contextlib.contextmanager
def _effort(what: str, arguments: argparse.Namespace, ranks: Ranks) -> Iterator[Effort]:
    """The effort that was asked for, with a progress bar in bytes on stderr if that is a terminal."""
    from tqdm import tqdm  # noqa: PLC0415  (--help must not wait for it)

    from dist_ckpt_mistral.gather.executor import Effort  # noqa: PLC0415  (--help must not wait for numpy)

    hidden = None if ranks.is_first else True
    with tqdm(desc=what, unit="B", unit_scale=True, disable=hidden, leave=False, file=sys.stderr) as bar:
        durable = not getattr(arguments, "no_sync", False)
        yield Effort(workers=arguments.workers, memory_bytes=arguments.memory, durable=durable, progress=bar.update)
