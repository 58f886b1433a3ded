"""The commands that run a model: generate and demo."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from dist_ckpt_mistral.cli import options, output
from dist_ckpt_mistral.errors import LayoutError
from dist_ckpt_mistral.libraries import needed, quiet
from dist_ckpt_mistral.messages import command_line

if TYPE_CHECKING:
    from dist_ckpt_mistral.megatron.generate import Completion


def add_generate(commands: options.Commands) -> None:
    """Declare ``generate``."""
    options.declare(
        commands,
        "generate",
        _add_generate_options,
        _generate,
        "Generate text with a model that runs on Megatron.",
        "Prints each prompt with its continuation.",
        on_all_ranks=True,
    )


def _add_generate_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("path", type=options.name, metavar="CKPT_OR_HF", help=options.CKPT_OR_HF)
    help_text = "text to continue; may be repeated"
    command.add_argument("--prompt", action="append", required=True, metavar="TEXT", help=help_text)
    help_text = "maximum number of tokens to generate for each prompt (default 64)"
    command.add_argument("--max-new-tokens", type=options.positive, default=64, metavar="N", help=help_text)
    options.add_config(command, "A directory or hub id also supplies the tokenizer.")
    command.add_argument("--tokenizer", type=options.name, metavar="DIR", help=options.TOKENIZER)
    options.add_dtype(command)
    command.add_argument("--json", action="store_true", help="print JSON")
    group = command.add_argument_group(
        "sampling", "Without these options the likeliest token always follows. Any of them turns sampling on."
    )
    for flag, kind, metavar, help_text in (
        ("temperature", options.positive_number, "T", "divide the logits by T"),
        ("top-k", options.positive, "K", "sample only from the K likeliest tokens"),
        ("top-p", options.probability, "P", "sample only from the likeliest tokens that together have probability P"),
        ("seed", options.seed, "N", "seed of the random number generator (default 0)"),
    ):
        group.add_argument(f"--{flag}", type=kind, metavar=metavar, help=help_text)
    group = command.add_argument_group("layout", "How the model is split. Needs torchrun with tp x pp ranks.")
    for axis, parallelism in (("tp", "tensor"), ("pp", "pipeline")):
        help_text = f"{parallelism}-parallel size (default 1)"
        group.add_argument(f"--{axis}", type=options.positive, default=1, metavar="N", help=help_text)


def _generate(arguments: argparse.Namespace) -> int:
    """Generate on all ranks, and print the texts on the first."""
    from dist_ckpt_mistral.convert.ranks import from_environment

    with needed("generate", "torch", "megatron.core", "transformers", extra="inference"):
        _require_ranks(arguments)
        completions = _completions(arguments)
    is_first = from_environment().is_first
    if is_first and arguments.json:
        output.say_json([completion.to_json() for completion in completions], letters=True)
    elif is_first:
        for completion in completions:
            output.say_text(completion.text)
    return options.EXIT_DONE


def _require_ranks(arguments: argparse.Namespace) -> None:
    """Raise LayoutError unless torchrun started one process for every rank of the layout."""
    from dist_ckpt_mistral.convert.ranks import world_size

    num_needed, num_started = arguments.tp * arguments.pp, world_size()
    if num_needed != num_started:
        command = ["torchrun", "--nproc-per-node", str(num_needed), "-m", "dist_ckpt_mistral", *arguments.words]
        raise LayoutError(
            f"--tp {arguments.tp} --pp {arguments.pp} needs {num_needed} ranks, and there are {num_started}. "
            f"Start them with: {command_line(command)}"
        )


def _completions(arguments: argparse.Namespace) -> list[Completion]:
    with quiet():
        from dist_ckpt_mistral.megatron.generate import complete
        from dist_ckpt_mistral.megatron.hf_inference import Sampling
        from dist_ckpt_mistral.model.layout.layout import ParallelLayout

        values = {name: getattr(arguments, name) for name in ("temperature", "top_k", "top_p", "seed")}
        values = {name: value for name, value in values.items() if value is not None}
        return list(
            complete(
                arguments.path,
                arguments.prompt,
                layout=ParallelLayout(tp=arguments.tp, pp=arguments.pp),
                max_new_tokens=arguments.max_new_tokens,
                sampling=Sampling(**values) if values else None,
                config=options.given_config(arguments),
                tokenizer=arguments.tokenizer,
                dtype=arguments.dtype,
            )
        )


def add_demo(commands: options.Commands) -> None:
    """Declare ``demo``."""
    options.declare(
        commands,
        "demo",
        _add_demo_options,
        _demo,
        "Convert a small random model to Megatron and back, and check every step.",
        "Works offline, without a GPU, and with nothing but this package. Where they are installed, Megatron loads the "
        "checkpoint in four processes, and transformers computes with the export.",
    )


def _add_demo_options(command: argparse.ArgumentParser) -> None:
    help_text = "work in DIR, which must be new or empty, and keep all files there (default: delete them at the end)"
    command.add_argument("--keep", type=options.path, metavar="DIR", help=help_text)


def _demo(arguments: argparse.Namespace) -> int:
    from dist_ckpt_mistral.cli import demo

    demo.run(arguments.keep, say=output.say_text)
    return options.EXIT_DONE
