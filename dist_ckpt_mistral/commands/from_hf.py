"""``from-hf``."""

from __future__ import annotations

import argparse

from dist_ckpt_mistral.commands import options
from dist_ckpt_mistral.ranks import of_nodes


def add(commands: options.Commands) -> None:
    """Declare the command."""
    command = options.declare(
        commands,
        "from-hf",
        run,
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


def run(arguments: argparse.Namespace) -> int:
    """Import, and say what was written, or would be."""
    from dist_ckpt_mistral import convert  # noqa: PLC0415  (--help must not wait for numpy)

    ranks = of_nodes()
    with options.effort("importing", arguments, ranks) as effort:
        done = convert.from_hf(
            arguments.hf,
            arguments.checkpoint,
            tp=arguments.tp,
            pp=arguments.pp,
            ep=arguments.ep,
            dtype=arguments.dtype,
            allow_lossy=arguments.allow_lossy,
            iteration=arguments.iteration,
            manifest=not arguments.no_manifest,
            overwrite=arguments.overwrite,
            resume=arguments.resume,
            dry_run=arguments.dry_run,
            effort=effort,
            ranks=ranks,
        )
    options.tell_conversion(done, arguments, ranks)
    return options.EXIT_DONE
