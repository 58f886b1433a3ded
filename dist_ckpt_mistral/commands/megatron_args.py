"""``megatron-args``."""

from __future__ import annotations

import argparse
import logging

from dist_ckpt_mistral.commands import options, output


def add(commands: options.Commands) -> None:
    """Declare the command."""
    summary = "Print the flags with which Megatron-LM's pretrain_gpt.py trains a model on."
    command = options.declare(commands, "megatron-args", run, summary)
    command.add_argument("path", metavar="CKPT_OR_HF", type=options.path, help=options.CKPT_OR_HF)
    options.add_config(command)
    options.add_layout(command, "to train with (default 1)")
    command.add_argument("--json", action="store_true", help="print JSON: the flags as a list, and the args they set")


def run(arguments: argparse.Namespace) -> int:
    """Print one text that can be pasted behind ``pretrain_gpt.py``."""
    from dist_ckpt_mistral.analysis.pretrain_command import megatron_args  # noqa: PLC0415  (--help must not wait for numpy)

    command = megatron_args(
        arguments.path, config=options.given_config(arguments), layout=options.given_layout(arguments)
    )
    logging.getLogger(__name__).info("configuration: %s", command.config_from)
    if arguments.json:
        output.say_json(command.to_json())
    else:
        output.say_text(command.text)
    return options.EXIT_DONE
