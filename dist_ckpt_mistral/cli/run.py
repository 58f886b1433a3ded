"""The commands that run a model: generate and demo."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from dist_ckpt_mistral import libraries
from dist_ckpt_mistral.cli import options, output
from dist_ckpt_mistral.convert import ranks
from dist_ckpt_mistral.errors import LayoutError
from dist_ckpt_mistral.messages import command_line

if TYPE_CHECKING:
    from dist_ckpt_mistral.megatron.generate import Completion
    from dist_ckpt_mistral.megatron.hf_inference import Sampling


def add_generate(commands: options.Commands) -> None:
    """Declare ``generate``."""
    command = options.declare(
        commands, "generate", _generate, "Let a model write: it runs on Megatron.", on_all_ranks=True
    )
    command.add_argument("path", type=options.name, metavar="CKPT_OR_HF", help=options.CKPT_OR_HF)
    command.add_argument(
        "--prompt", action="append", required=True, metavar="TEXT", help="what to go on from; may be given repeatedly"
    )
    command.add_argument(
        "--max-new-tokens", type=options.positive, default=64, metavar="N", help="at most so many (default 64)"
    )
    for flag, kind, what in (
        ("temperature", options.positive_number, "divide the logits by it"),
        ("top-k", options.positive, "draw from the K likeliest tokens"),
        ("top-p", options.probability, "draw from the likeliest tokens that together have this probability"),
        ("seed", options.seed, "of the draws (default 0)"),
    ):
        help_text = f"{what}; any of the four turns sampling on, else the likeliest token follows"
        command.add_argument(f"--{flag}", type=kind, metavar=flag.rpartition("-")[2].upper()[:4], help=help_text)
    for axis, what in (("tp", "tensor"), ("pp", "pipeline")):
        help_text = f"{what} parallelism; needs torchrun with tp x pp ranks (default 1)"
        command.add_argument(f"--{axis}", type=options.positive, default=1, metavar="N", help=help_text)
    command.add_argument("--dtype", choices=options.WEIGHT_DTYPES, help="convert the weights (default: keep)")
    options.add_config(command)
    options.add_tokenizer(command)
    command.add_argument("--json", action="store_true", help="print JSON")


def _generate(arguments: argparse.Namespace) -> int:
    """Generate on all ranks, and print the texts on the first."""
    with libraries.needed("generate", "torch", "megatron.core", "transformers", extra="inference"):
        _require_ranks(arguments)
        completions = _completions(arguments)
    is_first = ranks.from_environment().is_first
    if is_first and arguments.json:
        output.say_json([completion.to_json() for completion in completions], letters=True)
    elif is_first:
        for completion in completions:
            output.say_text(completion.text)
    return options.EXIT_DONE


def _completions(arguments: argparse.Namespace) -> list[Completion]:
    with libraries.quiet():
        from dist_ckpt_mistral.megatron.generate import complete  # noqa: PLC0415  (--help must not wait for torch and Megatron)
        from dist_ckpt_mistral.model.layout.layout import ParallelLayout  # noqa: PLC0415

        return list(
            complete(
                arguments.path,
                arguments.prompt,
                layout=ParallelLayout(tp=arguments.tp, pp=arguments.pp),
                max_new_tokens=arguments.max_new_tokens,
                sampling=_sampling(arguments),
                config=options.given_config(arguments),
                tokenizer=arguments.tokenizer,
                dtype=arguments.dtype,
            )
        )


def _require_ranks(arguments: argparse.Namespace) -> None:
    """Refuse to start unless torchrun started one process for every rank of the layout."""
    wanted, found = arguments.tp * arguments.pp, ranks.world_size()
    if wanted != found:
        command = ["torchrun", "--nproc-per-node", str(wanted), "-m", "dist_ckpt_mistral", *arguments.words]
        raise LayoutError(
            f"--tp {arguments.tp} --pp {arguments.pp} needs {wanted} ranks, and there are {found}. "
            f"Start them with: {command_line(command)}"
        )


def _sampling(arguments: argparse.Namespace) -> Sampling | None:
    """What the sampling options ask for, or None if none was given."""
    from dist_ckpt_mistral.megatron.hf_inference import Sampling  # noqa: PLC0415  (--help must not wait)

    given = {name: getattr(arguments, name) for name in ("temperature", "top_k", "top_p", "seed")}
    given = {name: value for name, value in given.items() if value is not None}
    return Sampling(**given) if given else None


def add_demo(commands: options.Commands) -> None:
    """Declare ``demo``."""
    command = options.declare(commands, "demo", _demo, "Show it all on a small model made on the spot, offline.")
    command.add_argument("--keep", type=options.path, metavar="DIR", help="work in DIR and leave everything there")


def _demo(arguments: argparse.Namespace) -> int:
    """Tell the story as it happens: it takes a while, also through a pipe."""
    from dist_ckpt_mistral.cli import demo  # noqa: PLC0415  (--help must not wait for numpy)

    demo.run(arguments.keep, say=output.say_text)
    return options.EXIT_DONE
