"""``demo``."""

from __future__ import annotations

import argparse

from dist_ckpt_mistral.commands import options, output


def add(commands: options.Commands) -> None:
    """Declare the command."""
    command = options.declare(commands, "demo", run, "Show it all on a small model made on the spot, offline.")
    command.add_argument("--keep", type=options.path, metavar="DIR", help="work in DIR and leave everything there")


def run(arguments: argparse.Namespace) -> int:
    """Tell the story as it happens: it takes a while, also through a pipe."""
    from dist_ckpt_mistral import demo  # noqa: PLC0415  (--help must not wait for numpy)

    demo.run(arguments.keep, say=output.say_text)
    return options.EXIT_DONE
