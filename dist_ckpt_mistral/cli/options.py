"""What commands share: how they are declared, options that mean the same everywhere, and how progress is shown."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from dist_ckpt_mistral.convert.ranks import Ranks, works_here
from dist_ckpt_mistral.gather import dtypes

if TYPE_CHECKING:
    from dist_ckpt_mistral.convert.output import Output
    from dist_ckpt_mistral.gather.execute import Effort
    from dist_ckpt_mistral.model.config.mistral_config import GivenConfig
    from dist_ckpt_mistral.model.layout.layout import ParallelLayout

EXIT_DONE: Final = 0
EXIT_DATA: Final = 1
EXIT_DIFFERENT: Final = 3
#: Help texts of arguments that several commands take.
CKPT: Final = "Megatron checkpoint: its root, or one iter_* or release directory in it"
CKPT_OR_HF: Final = "checkpoint, Hugging Face directory or hub id"
WEIGHT_DTYPES: Final = dtypes.WEIGHT_DTYPES
#: Megatron-LM's option for the layers of a stage at either end, the field of a layout that it sets, and which end.
_END_COUNTS: Final = (
    ("--decoder-first-pipeline-num-layers", "num_layers_in_first_pipeline_stage", "first"),
    ("--decoder-last-pipeline-num-layers", "num_layers_in_last_pipeline_stage", "last"),
)
#: Python itself refuses to read 4300.
_MOST_DIGITS: Final = 40

#: What ``add_subparsers`` gives: argparse keeps the type private.
Commands: TypeAlias = Any


def declare(
    commands: Commands,
    name: str,
    run: Callable[[argparse.Namespace], int],
    summary: str,
    *,
    on_each_node: bool = False,
    on_all_ranks: bool = False,
    with_numpy: bool = False,
) -> argparse.ArgumentParser:
    """A new command ``name`` that ``run`` carries out; ``run`` returns the exit code.

    Under torchrun the first rank alone runs it, unless ``on_each_node`` (that node's first rank) or ``on_all_ranks``.
    ``with_numpy`` says that it needs numpy, which is then imported first, as cheaply as can be.
    ``arguments.wrong_usage(message)`` ends the program as argparse does.
    """
    command: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=summary)
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    runs_here = on_all_ranks or (works_here() if on_each_node else is_first_rank())
    command.set_defaults(command=run, runs_here=runs_here, with_numpy=with_numpy, wrong_usage=command.error)
    return command


def add_output(command: argparse.ArgumentParser) -> None:
    """Options of every command that writes an output."""
    help_text = "leave it to the operating system when data reach the disk; a power cut may then cost the output"
    command.add_argument("--no-sync", action="store_true", help=help_text)
    help_text = "leave out integrity.json, by which verify finds damage (it takes some 0.6 s of a core for each GB)"
    command.add_argument("--no-manifest", action="store_true", help=help_text)
    add_effort(command)
    command.add_argument(
        "--overwrite", action="store_true", help="replace an existing output, once the new one is complete"
    )
    help_text = "go on with what a run that was killed, stopped or failed has copied, after checking it"
    command.add_argument("--resume", action="store_true", help=help_text)
    help_text = "check everything that can be checked before the first byte is written, and say what would be written"
    command.add_argument("--dry-run", action="store_true", help=help_text)


def given_output(arguments: argparse.Namespace) -> Output:
    """How the output is written that the options of ``add_output`` and ``add_file_size`` describe."""
    from dist_ckpt_mistral.convert.output import DEFAULT_OUTPUT, Output  # noqa: PLC0415  (--help must not wait)

    return Output(
        overwrite=arguments.overwrite,
        resume=arguments.resume,
        dry_run=arguments.dry_run,
        manifest=not arguments.no_manifest,
        durable=not arguments.no_sync,
        max_file_bytes=getattr(arguments, "max_file_size", DEFAULT_OUTPUT.max_file_bytes),
    )


def add_allow_lossy(command: argparse.ArgumentParser) -> None:
    """The option that lets a conversion of element types destroy values."""
    help_text = (
        "with --dtype: accept that values become infinite or zero, which is refused otherwise; a warning counts them"
    )
    command.add_argument("--allow-lossy", action="store_true", help=help_text)


def add_file_size(command: argparse.ArgumentParser) -> None:
    """The option that cuts an output into files."""
    help_text = "of one file, unless one tensor or chunk is larger (default 5GB)"
    command.add_argument("--max-file-size", type=size, default="5GB", metavar="SIZE", help=help_text)


def add_effort(command: argparse.ArgumentParser) -> None:
    """Options that bound what of the machine is used."""
    command.add_argument(
        "--workers", type=positive, default=0, metavar="N", help="threads (default: one a core, at most 8)"
    )
    command.add_argument(
        "--memory", type=size, default="32MiB", metavar="SIZE", help="of all copy buffers together (default 32MiB)"
    )


def add_config(command: argparse.ArgumentParser) -> None:
    """The option for checkpoints that lost their configuration."""
    command.add_argument(
        "--config",
        type=name,
        metavar="DIR_OR_JSON",
        help="config.json, or a Hugging Face directory or hub id whose small files come along too",
    )
    help_text = "go by --config even where the model's own descriptions contradict it; what differs is listed"
    command.add_argument("--override-config", action="store_true", help=help_text)


def add_tokenizer(command: argparse.ArgumentParser) -> None:
    """The option for models that no tokenizer came with."""
    help_text = "Hugging Face directory or hub id that has the tokenizer (default: the one that came with the model)"
    command.add_argument("--tokenizer", type=name, metavar="DIR", help=help_text)


def add_layout(command: argparse.ArgumentParser, what: str) -> None:
    """The options of a parallel layout; ``what`` ends the help texts of its axes: what the layout is for.

    What is not one of this program's short axes has the name that Megatron-LM's own option has.
    """
    group = command.add_argument_group(
        "layout", "in Megatron's terms; stages hold the same number of layers by default"
    )
    for axis, name in (("tp", "tensor"), ("pp", "pipeline"), ("cp", "context"), ("ep", "expert")):
        group.add_argument(f"--{axis}", type=positive, default=1, metavar="N", help=f"{name} parallelism {what}")
    group.add_argument("--etp", type=positive, metavar="N", help="expert-tensor parallelism (default: as --tp)")
    group.add_argument("--dp", type=positive, metavar="N", help="data parallelism (default: the least that fits)")
    group.add_argument("--vpp", type=positive, metavar="N", help=f"model chunks per pipeline stage {what}")
    order = "from the axis that counts fastest (default tp-cp-ep-dp-pp; --use-tp-pp-dp-mapping is tp-cp-ep-pp-dp)"
    group.add_argument("--order", metavar="AXES", help=order)
    group.add_argument("--pp-layers", type=_layer_counts, metavar="N,N,...", help="layers of every pipeline stage")
    for option, field, end in _END_COUNTS:
        group.add_argument(option, dest=field, type=positive, metavar="N", help=f"layers of the {end} pipeline stage")
    for end in ("embedding", "loss"):
        option = f"--account-for-{end}-in-pipeline-split"
        group.add_argument(option, action="store_true", help=f"the {end} takes the place of a layer")
    example = "layers of every stage and chunk, as in 'Et*3|(tt|)*2,tL'"
    group.add_argument("--pipeline-model-parallel-layout", metavar="TEXT", help=example)


def given_layout(arguments: argparse.Namespace) -> ParallelLayout:
    """The layout that the options of ``add_layout`` describe. Raises LayoutError if they contradict each other."""
    from dist_ckpt_mistral.model.layout.layout import ParallelLayout  # noqa: PLC0415  (--help must not wait)

    given = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(ParallelLayout)}
    return ParallelLayout(**{name: value for name, value in given.items() if value is not None})


def given_config(arguments: argparse.Namespace) -> GivenConfig | None:
    """What ``--config`` names, if it was given, as an override where that was asked for."""
    if not arguments.override_config:
        return arguments.config  # type: ignore[no-any-return]  # a text, or None
    if arguments.config is None:
        arguments.wrong_usage("--override-config goes with --config")
    from dist_ckpt_mistral.model.config.mistral_config import ConfigOverride  # noqa: PLC0415  (--help must not wait)

    return ConfigOverride(arguments.config)


def name(text: str) -> str:
    """A path or hub id. An empty text, as of a variable that is not set, would mean the current directory."""
    if not text:
        raise argparse.ArgumentTypeError("expected a path, got an empty text")
    return text


def path(text: str) -> Path:
    """The same of arguments that are paths."""
    return Path(name(text))


def is_first_rank() -> bool:
    """Whether this is the only process or torchrun's first, which speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def positive(text: str) -> int:
    """A whole number of at least 1."""
    number = not_negative(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return number


def positive_number(text: str) -> float:
    """A number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return number


def probability(text: str) -> float:
    """A number above 0 and at most 1."""
    number = positive_number(text)
    if number > 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0 and at most 1, got {text!r}")
    return number


def _layer_counts(text: str) -> tuple[int, ...]:
    """``3,5`` as layer counts."""
    return tuple(not_negative(count) for count in text.split(","))


def not_negative(text: str) -> int:
    """A whole number of at least 0. How large it may be, what takes it says."""
    if not text.isdecimal() or len(text) > _MOST_DIGITS:
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r:.500}")
    return int(text)


def seed(text: str) -> int:
    """What torch's generators take: a whole number of at most 64 bits."""
    number = not_negative(text)
    if number >= 1 << 64:
        raise argparse.ArgumentTypeError(f"expected a whole number below 2^64, got {text!r}")
    return number


def size(text: str) -> int:
    """``5GB`` (decimal) or ``5GiB`` (binary) in bytes."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?)\s*([KMGT]?)(i?)B?", text, re.IGNORECASE)
    num_bytes = 0
    if match:
        power = " KMGT".index(match[2].upper() or " ")
        num_bytes = int(float(match[1]) * (1024 if match[3] else 1000) ** power)
    if num_bytes < 1:
        raise argparse.ArgumentTypeError(f"expected a size such as 5GB or 500MB, got {text!r}")
    return num_bytes


@contextlib.contextmanager
def effort(what: str, arguments: argparse.Namespace, ranks: Ranks) -> Iterator[Effort]:
    """The effort that was asked for, with a progress bar in bytes on stderr if that is a terminal."""
    from dist_ckpt_mistral.gather.execute import Effort  # noqa: PLC0415  (--help must not wait for numpy)

    asked = Effort(workers=arguments.workers, memory_bytes=arguments.memory)
    if not (ranks.is_first and sys.stderr.isatty()):
        yield asked
        return
    from tqdm import tqdm  # noqa: PLC0415  (slow, and only a terminal shows it)

    with tqdm(desc=what, unit="B", unit_scale=True, leave=False, file=sys.stderr) as bar:
        yield dataclasses.replace(asked, progress=bar.update)
