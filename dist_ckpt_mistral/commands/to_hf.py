"""``to-hf``."""

from __future__ import annotations

import argparse

from dist_ckpt_mistral.commands import options
from dist_ckpt_mistral.ranks import of_nodes


def add(commands: options.Commands) -> None:
    """Declare the command."""
    command = options.declare(
        commands,
        "to-hf",
        run,
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


def run(arguments: argparse.Namespace) -> int:
    """Export, and say what was written, or would be."""
    from dist_ckpt_mistral import convert  # noqa: PLC0415  (--help must not wait for numpy)

    ranks = of_nodes()
    with options.effort("exporting", arguments, ranks) as effort:
        done = convert.to_hf(
            arguments.checkpoint,
            arguments.hf,
            config=options.given_config(arguments),
            weights=arguments.weights,
            dtype=arguments.dtype,
            allow_lossy=arguments.allow_lossy,
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
