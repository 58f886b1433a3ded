"""``verify``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from dist_ckpt_mistral.commands import options
from dist_ckpt_mistral.ranks import Ranks


def add(commands: options.Commands) -> None:
    """Declare the command."""
    command = options.declare(commands, "verify", run, "Compare two models bit for bit, whatever they are stored as.")
    command.add_argument("a", metavar="A", type=Path, help=options.CKPT_OR_HF)
    command.add_argument("b", metavar="B", type=Path, help=options.CKPT_OR_HF)
    options.add_config(command)
    options.add_effort(command)
    command.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """Compare, and list the differences."""
    from dist_ckpt_mistral import verify  # noqa: PLC0415  (--help must not wait for numpy)
    from dist_ckpt_mistral.report import human_bytes  # noqa: PLC0415

    with options.effort("comparing", arguments, Ranks()) as effort:
        outcome = verify.compare(arguments.a, arguments.b, config=arguments.config, effort=effort)
    if arguments.json:
        print(json.dumps(outcome.to_json(), indent=2))
    else:
        for difference in outcome.differences:
            print(f"{difference.hf_name}: {difference.what}")
        verdict = "equal" if outcome.is_equal else f"DIFFERENT in {len(outcome.differences)} tensors"
        print(f"{verdict}: {outcome.num_tensors} tensors, {human_bytes(outcome.num_bytes)} compared bit for bit")
    return options.EXIT_DONE if outcome.is_equal else options.EXIT_DIFFERENT
