"""``migrate``."""

from __future__ import annotations

import argparse

from dist_ckpt_mistral.commands import options
from dist_ckpt_mistral.convert.ranks import from_environment


def add(commands: options.Commands) -> None:
    """Declare the command."""
    summary = "Write a legacy zarr checkpoint as torch_dist, the format of every later Megatron."
    command = options.declare(commands, "migrate", run, summary, on_all_ranks=True, with_numpy=True)
    command.add_argument("checkpoint", metavar="OLD", type=options.path, help="zarr checkpoint: root or iteration")
    command.add_argument("output", metavar="CKPT", type=options.path, help="checkpoint to create")
    options.add_file_size(command)
    options.add_output(command)


def run(arguments: argparse.Namespace) -> int:
    """Migrate, and say what was written, or would be."""
    from dist_ckpt_mistral.convert import migrate  # noqa: PLC0415  (--help must not wait for numpy)

    ranks = from_environment()
    with options.effort("migrating", arguments, ranks) as effort:
        done = migrate.migrate(
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
