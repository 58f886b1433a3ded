"""``migrate``."""

from __future__ import annotations

import argparse

from dist_ckpt_mistral.commands import options
from dist_ckpt_mistral.ranks import of_nodes


def add(commands: options.Commands) -> None:
    """Declare the command."""
    summary = "Write a legacy zarr checkpoint as torch_dist, the format of every later Megatron."
    command = options.declare(commands, "migrate", run, summary, on_each_node=True, with_numpy=True)
    command.add_argument("checkpoint", metavar="OLD", type=options.path, help="zarr checkpoint: root or iteration")
    command.add_argument("output", metavar="CKPT", type=options.path, help="checkpoint to create")
    options.add_file_size(command)
    options.add_output(command)


def run(arguments: argparse.Namespace) -> int:
    """Migrate, and say what was written, or would be."""
    from dist_ckpt_mistral import migration  # noqa: PLC0415  (--help must not wait for numpy)

    ranks = of_nodes()
    with options.effort("migrating", arguments, ranks) as effort:
        done = migration.migrate(
            arguments.checkpoint,
            arguments.output,
            max_file_bytes=arguments.max_file_size,
            manifest=not arguments.no_manifest,
            overwrite=arguments.overwrite,
            resume=arguments.resume,
            dry_run=arguments.dry_run,
            effort=effort,
            ranks=ranks,
        )
    options.tell_conversion(done, arguments, ranks)
    return options.EXIT_DONE
