"""Options that several commands take, with the same meaning everywhere."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from dist_ckpt_mistral.cli import values

if TYPE_CHECKING:
    from dist_ckpt_mistral.convert.output import Output
    from dist_ckpt_mistral.convert.ranks import Ranks
    from dist_ckpt_mistral.gather.execute import Effort
    from dist_ckpt_mistral.model.config.mistral_config import GivenConfig
    from dist_ckpt_mistral.model.layout.layout import ParallelLayout

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


def add_dtype(command: argparse.ArgumentParser) -> None:
    """Add ``--dtype``."""
    from dist_ckpt_mistral.gather import dtypes

    help_text = "convert all weights to this dtype (default: keep the dtype of each weight)"
    command.add_argument("--dtype", choices=dtypes.WEIGHT_DTYPES, help=help_text)


def add_allow_lossy(command: argparse.ArgumentParser) -> None:
    """Add ``--allow-lossy``, which lets ``--dtype`` destroy values."""
    help_text = (
        "with --dtype: accept values that become infinite or zero, and count them in a warning (default: refuse if a "
        "value becomes infinite, or more than one in 10,000 of a tensor become zero)"
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
        group.add_argument("--max-file-size", type=values.size, default="5GB", metavar="SIZE", help=help_text)
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
    """Add the options that limit threads and memory."""
    group = command.add_argument_group("resources")
    help_text = "number of threads that copy or compare (default: one per core, at most 8)"
    group.add_argument("--workers", type=values.positive, default=0, metavar="N", help=help_text)
    help_text = (
        "total size of the buffers of all threads (default 32MiB; 256MiB where a URL is read or written); the process "
        "as a whole takes more, the most where chunks cut for a large --tp go to a URL"
    )
    group.add_argument("--memory", type=values.size, default=0, metavar="SIZE", help=help_text)
    help_text = "how long faults of a store (a URL) that may pass are retried, in seconds (default 180)"
    group.add_argument("--retry-time", type=values.positive_number, metavar="SECONDS", help=help_text)


def add_config(command: argparse.ArgumentParser, also: str = "") -> None:
    """Add ``--config`` and ``--override-config``; ``also`` says what else a directory is used for."""
    help_text = (
        "model configuration: a config.json, a Hugging Face directory or a hub id. Needed if the checkpoint has lost "
        f"its own; must agree with the configurations that it still has.{also and f' {also}'}"
    )
    command.add_argument("--config", type=values.name, metavar="DIR_OR_JSON", help=help_text)
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


def config_words(arguments: argparse.Namespace) -> list[str]:
    """The options of ``add_config`` as they were given, for a command to run next."""
    given = [] if arguments.config is None else ["--config", arguments.config]
    return [*given, *(["--override-config"] if arguments.override_config else [])]


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
        group.add_argument(f"--{axis}", type=values.positive, default=1, metavar="N", help=help_text)
    group.add_argument(
        "--etp", type=values.positive, metavar="N", help="expert-tensor-parallel size (default: as --tp)"
    )
    group.add_argument(
        "--dp", type=values.positive, metavar="N", help="data-parallel size (default: the smallest that fits)"
    )
    help_text = "virtual pipeline size: number of model chunks per pipeline stage (default 1)"
    group.add_argument("--vpp", type=values.positive, metavar="N", help=help_text)
    help_text = (
        "order of the axes in the numbering of ranks, the axis that varies fastest first (default tp-cp-ep-dp-pp; "
        "Megatron-LM's --use-tp-pp-dp-mapping is tp-cp-ep-pp-dp)"
    )
    group.add_argument("--order", metavar="AXES", help=help_text)
    help_text = "number of layers of every pipeline stage, e.g. 3,5 for --pp 2"
    group.add_argument("--pp-layers", type=values.layer_counts, metavar="N,N,...", help=help_text)
    for option, field, end in _END_COUNTS:
        help_text = f"number of layers of the {end} pipeline stage"
        group.add_argument(option, dest=field, type=values.positive, metavar="N", help=help_text)
    for end in ("embedding", "loss"):
        help_text = f"count the {end} as one layer when the layers are divided among the pipeline stages"
        group.add_argument(f"--account-for-{end}-in-pipeline-split", action="store_true", help=help_text)
    help_text = "content of every pipeline stage and model chunk in Megatron-LM's notation, e.g. 'Et*3|(tt|)*2,tL'"
    group.add_argument("--pipeline-model-parallel-layout", metavar="TEXT", help=help_text)


def given_layout(arguments: argparse.Namespace) -> ParallelLayout:
    """The layout from the options of ``add_layout``. Raises LayoutError if they contradict each other."""
    import dataclasses

    from dist_ckpt_mistral.model.layout.layout import ParallelLayout

    given = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(ParallelLayout)}
    return ParallelLayout(**{field: value for field, value in given.items() if value is not None})


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
