"""``plan``."""

from __future__ import annotations

import argparse
import logging

from dist_ckpt_mistral.commands import options, output

_LOG = logging.getLogger(__name__)


def add(commands: options.Commands) -> None:
    """Declare the command."""
    command = options.declare(
        commands, "plan", run, "Say what every rank of a layout would read of a checkpoint.", with_numpy=True
    )
    command.add_argument("checkpoint", metavar="CKPT", type=options.path, help=options.CKPT)
    options.add_layout(command, "to load with")
    options.add_config(command)
    command.add_argument("--weights-only", action="store_true", help="leave optimizer state out")
    command.add_argument("--json", action="store_true", help="print JSON, with every rank")
    command.add_argument("--svg", type=options.path, metavar="FILE", help="draw, too, which chunk goes to which rank")


def run(arguments: argparse.Namespace) -> int:
    """Plan, show, and draw if asked."""
    from dist_ckpt_mistral.analysis import read_planner, read_table  # noqa: PLC0415  (--help must not wait for numpy)
    from dist_ckpt_mistral.analysis.picture import picture  # noqa: PLC0415  (--help must not wait for numpy)

    if arguments.svg is not None:
        picture.require_matplotlib()
    found = read_planner.plan_reading(
        arguments.checkpoint,
        options.given_layout(arguments),
        config=options.given_config(arguments),
        weights_only=arguments.weights_only,
    )
    if arguments.svg is not None:
        picture.save_svg(found, arguments.svg)
        _LOG.info("wrote %s", arguments.svg)
    if arguments.json:
        output.say_json(found.to_json())
    else:
        output.show(read_table.render(found))
    return options.EXIT_DONE
