"""``reshard``."""

from __future__ import annotations

import argparse

from dist_ckpt_mistral.commands import options
from dist_ckpt_mistral.ranks import of_nodes


def add(commands: options.Commands) -> None:
    """Declare the command."""
    summary = "Cut a Megatron checkpoint anew, so that every rank of a layout reads only whole chunks."
    command = options.declare(commands, "reshard", run, summary, on_each_node=True, with_numpy=True)
    command.add_argument("checkpoint", metavar="CKPT", type=options.path, help=options.CKPT)
    command.add_argument("output", metavar="OUT", type=options.path, help="checkpoint to create")
    options.add_layout(command, "to cut for")
    options.add_config(command)
    command.add_argument("--weights-only", action="store_true", help="leave all optimizer state behind")
    options.add_output(command)


def run(arguments: argparse.Namespace) -> int:
    """Reshard, and say what was written, or would be."""
    from dist_ckpt_mistral import resharding  # noqa: PLC0415  (--help must not wait for numpy)

    ranks = of_nodes()
    with options.effort("resharding", arguments, ranks) as effort:
        done = resharding.reshard(
            arguments.checkpoint,
            arguments.output,
            options.given_layout(arguments),
            config=options.given_config(arguments),
            weights_only=arguments.weights_only,
            manifest=not arguments.no_manifest,
            overwrite=arguments.overwrite,
            resume=arguments.resume,
            dry_run=arguments.dry_run,
            effort=effort,
            ranks=ranks,
        )
    options.tell_conversion(done, arguments, ranks)
    return options.EXIT_DONE
