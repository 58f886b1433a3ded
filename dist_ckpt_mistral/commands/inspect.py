"""``inspect``."""

from __future__ import annotations

import argparse

from dist_ckpt_mistral.commands import options, output


def add(commands: options.Commands) -> None:
    """Declare the command."""
    command = options.declare(commands, "inspect", run, "Say what is in a checkpoint or a Hugging Face directory.")
    command.add_argument("path", metavar="CKPT_OR_HF", type=options.path, help=options.CKPT_OR_HF)
    options.add_config(command)
    command.add_argument("--json", action="store_true", help="print JSON")
    command.add_argument("--html", type=options.path, metavar="FILE", help="write a page instead")


def run(arguments: argparse.Namespace) -> int:
    """Look, and show; problems that were found are the exit code's business too."""
    from dist_ckpt_mistral.analysis import report  # noqa: PLC0415  (--help must not wait for it)

    found = report.inspect(arguments.path, config=options.given_config(arguments))
    if arguments.html is not None:
        report.save_html(found, arguments.html)
        output.say(f"wrote {arguments.html}")
    elif arguments.json:
        output.say_json(found.to_json())
    else:
        output.show(report.render(found))
    return options.EXIT_DATA if found.problems else options.EXIT_DONE
