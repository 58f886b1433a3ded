"""The commands that write an output: from-hf, to-hf, reshard, migrate."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

from dist_ckpt_mistral.cli import options, output
from dist_ckpt_mistral.convert.ranks import Ranks, of_nodes

if TYPE_CHECKING:
    from dist_ckpt_mistral.convert.conversion import Conversion
    from dist_ckpt_mistral.convert.output import Output
    from dist_ckpt_mistral.gather.execute import Effort


def add_from_hf(commands: options.Commands) -> None:
    """Declare ``from-hf``."""
    command = options.declare(
        commands,
        "from-hf",
        _from_hf,
        "Import a Hugging Face model into a Megatron checkpoint.",
        on_each_node=True,
        with_numpy=True,
    )
    command.add_argument(
        "hf", type=options.name, metavar="HF", help="Hugging Face directory or hub id (org/name[@revision])"
    )
    command.add_argument("checkpoint", metavar="CKPT", type=options.path, help="checkpoint root to create")
    for axis, what in (("tp", "tensor"), ("pp", "pipeline"), ("ep", "expert")):
        help_text = f"cut the stored chunks for this {what} parallelism; any other loads too (default 1)"
        command.add_argument(f"--{axis}", type=options.positive, default=1, metavar="N", help=help_text)
    command.add_argument(
        "--iteration", type=options.not_negative, metavar="N", help="store as this iteration (default: a release)"
    )
    command.add_argument("--dtype", choices=options.WEIGHT_DTYPES, help="convert the weights (default: keep)")
    options.add_allow_lossy(command)
    options.add_output(command)


def _from_hf(arguments: argparse.Namespace) -> int:
    from dist_ckpt_mistral.convert.from_hf import from_hf  # noqa: PLC0415  (--help must not wait for numpy)

    def convert(output: Output, effort: Effort, ranks: Ranks) -> Conversion:
        return from_hf(
            arguments.hf,
            arguments.checkpoint,
            tp=arguments.tp,
            pp=arguments.pp,
            ep=arguments.ep,
            dtype=arguments.dtype,
            allow_lossy=arguments.allow_lossy,
            iteration=arguments.iteration,
            output=output,
            effort=effort,
            ranks=ranks,
        )

    return _write("importing", arguments, convert)


def add_to_hf(commands: options.Commands) -> None:
    """Declare ``to-hf``."""
    command = options.declare(
        commands,
        "to-hf",
        _to_hf,
        "Export a Megatron checkpoint to a Hugging Face directory.",
        on_each_node=True,
        with_numpy=True,
    )
    command.add_argument("checkpoint", metavar="CKPT", type=options.path, help=options.CKPT)
    command.add_argument("hf", metavar="HF", type=options.path, help="directory to create")
    options.add_config(command)
    help_text = "the weights themselves, or the optimizer's float32 master copy of them (default model)"
    command.add_argument("--weights", choices=("model", "master"), default="model", help=help_text)
    options.add_file_size(command)
    command.add_argument("--dtype", choices=options.WEIGHT_DTYPES, help="convert the weights (default: keep)")
    options.add_allow_lossy(command)
    options.add_output(command)


def _to_hf(arguments: argparse.Namespace) -> int:
    from dist_ckpt_mistral.convert.to_hf import to_hf  # noqa: PLC0415  (--help must not wait for numpy)

    def convert(output: Output, effort: Effort, ranks: Ranks) -> Conversion:
        return to_hf(
            arguments.checkpoint,
            arguments.hf,
            config=options.given_config(arguments),
            weights=arguments.weights,
            dtype=arguments.dtype,
            allow_lossy=arguments.allow_lossy,
            output=output,
            effort=effort,
            ranks=ranks,
        )

    return _write("exporting", arguments, convert)


def add_reshard(commands: options.Commands) -> None:
    """Declare ``reshard``."""
    summary = "Cut a Megatron checkpoint anew, so that every rank of a layout reads only whole chunks."
    command = options.declare(commands, "reshard", _reshard, summary, on_each_node=True, with_numpy=True)
    command.add_argument("checkpoint", metavar="CKPT", type=options.path, help=options.CKPT)
    command.add_argument("output", metavar="OUT", type=options.path, help="checkpoint to create")
    options.add_layout(command, "to cut for")
    options.add_config(command)
    command.add_argument("--weights-only", action="store_true", help="leave all optimizer state behind")
    options.add_output(command)


def _reshard(arguments: argparse.Namespace) -> int:
    from dist_ckpt_mistral.convert.reshard import reshard  # noqa: PLC0415  (--help must not wait for numpy)

    def convert(output: Output, effort: Effort, ranks: Ranks) -> Conversion:
        layout, config = options.given_layout(arguments), options.given_config(arguments)
        return reshard(
            arguments.checkpoint,
            arguments.output,
            layout,
            config=config,
            weights_only=arguments.weights_only,
            output=output,
            effort=effort,
            ranks=ranks,
        )

    return _write("resharding", arguments, convert)


def add_migrate(commands: options.Commands) -> None:
    """Declare ``migrate``."""
    summary = "Write a legacy zarr checkpoint as torch_dist, the format of every later Megatron."
    command = options.declare(commands, "migrate", _migrate, summary, on_each_node=True, with_numpy=True)
    command.add_argument("checkpoint", metavar="OLD", type=options.path, help="zarr checkpoint: root or iteration")
    command.add_argument("output", metavar="CKPT", type=options.path, help="checkpoint to create")
    options.add_file_size(command)
    options.add_output(command)


def _migrate(arguments: argparse.Namespace) -> int:
    from dist_ckpt_mistral.convert.migrate import migrate  # noqa: PLC0415  (--help must not wait for numpy)

    def convert(output: Output, effort: Effort, ranks: Ranks) -> Conversion:
        return migrate(arguments.checkpoint, arguments.output, output=output, effort=effort, ranks=ranks)

    return _write("migrating", arguments, convert)


def _write(what: str, arguments: argparse.Namespace, convert: Callable[[Output, Effort, Ranks], Conversion]) -> int:
    """Convert with the options of ``options.add_output``, and say on the first rank what was written, or would be."""
    from dist_ckpt_mistral.convert.conversion import conversion_line  # noqa: PLC0415  (--help must not wait for numpy)

    ranks = of_nodes()
    with options.effort(what, arguments, ranks) as effort:
        done = convert(options.given_output(arguments), effort, ranks)
    if ranks.is_first:
        output.say(conversion_line("would write" if arguments.dry_run else "wrote", done))
    if ranks.is_first and arguments.dry_run:
        for name, num_bytes in done.files.items():
            output.say(f"  {name}  {num_bytes} bytes")
    return options.EXIT_DONE
