"""The commands that run a model: generate and demo."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING, Final

from dist_ckpt_mistral.cli import options, output, usage, values
from dist_ckpt_mistral.errors import ConfigError, LayoutError
from dist_ckpt_mistral.libraries import needed, quiet
from dist_ckpt_mistral.messages import command_line, counted

if TYPE_CHECKING:
    from dist_ckpt_mistral.megatron.generate import Completion
    from dist_ckpt_mistral.model.layout.layout import ParallelLayout

#: What runs a model.
_MODULES: Final = ("torch", "megatron.core", "transformers")


def add_generate(commands: usage.Commands) -> None:
    """Declare ``generate``."""
    usage.declare(
        commands,
        "generate",
        _add_generate_options,
        _generate,
        "Generate text with a model that runs on Megatron.",
        "Prints each prompt with its continuation, token by token.",
        examples=(
            "generate hf_dir --prompt 'The sky is'",
            "generate ckpt --prompt 'The sky is' --temperature 0.7",
            "torchrun --nproc-per-node 2 -m dist_ckpt_mistral generate ckpt --tp 2 --prompt Hi",
        ),
        json_fields={
            "completions": "list of prompt, text (prompt and continuation), continuation, prompt_tokens, new_tokens, "
            "ended (whether the last new token ends the text)",
            "seconds": "how long it took, with the start of Megatron",
        },
        on_all_ranks=True,
        with_numpy=True,
    )


def _add_generate_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("path", type=values.name, metavar="CKPT_OR_HF", help=options.CKPT_OR_HF)
    help_text = "text to continue; may be repeated"
    command.add_argument("--prompt", action="append", required=True, metavar="TEXT", help=help_text)
    help_text = "maximum number of tokens to generate for each prompt (default 64)"
    command.add_argument("--max-new-tokens", type=values.positive, default=64, metavar="N", help=help_text)
    options.add_config(command, "A directory or hub id also supplies the tokenizer.")
    command.add_argument("--tokenizer", type=values.name, metavar="DIR", help=options.TOKENIZER)
    options.add_dtype(command)
    group = command.add_argument_group(
        "sampling", "Without these options the likeliest token always follows. Any of them turns sampling on."
    )
    for flag, kind, metavar, help_text in (
        ("temperature", values.positive_number, "T", "divide the logits by T"),
        ("top-k", values.positive, "K", "sample only from the K likeliest tokens"),
        ("top-p", values.probability, "P", "sample only from the likeliest tokens that together have probability P"),
        ("seed", values.seed, "N", "seed of the random number generator (default 0)"),
    ):
        group.add_argument(f"--{flag}", type=kind, metavar=metavar, help=help_text)
    group = command.add_argument_group("layout", "How the model is split. Needs torchrun with one process a rank.")
    for axis, parallelism in (("tp", "tensor"), ("pp", "pipeline"), ("ep", "expert")):
        help_text = f"{parallelism}-parallel size (default 1)"
        group.add_argument(f"--{axis}", type=values.positive, default=1, metavar="N", help=help_text)


def _generate(arguments: argparse.Namespace) -> int:
    """Generate on all ranks, and print on the first: the texts as they grow, or JSON at the end."""
    from dist_ckpt_mistral.convert.ranks import from_environment
    from dist_ckpt_mistral.model.layout.layout import ParallelLayout

    begun_s = time.perf_counter()
    layout = ParallelLayout(tp=arguments.tp, pp=arguments.pp, ep=arguments.ep)
    with needed("generate", *_MODULES, extra="inference"):
        _require_ranks(arguments, layout)
        _require_model(arguments, layout)
        completions = _completions(arguments, layout)
    if from_environment().is_first and arguments.json:
        content = {"completions": [each.to_json() for each in completions], "seconds": time.perf_counter() - begun_s}
        output.say_json(content, letters=True)
    return usage.EXIT_DONE


def _require_ranks(arguments: argparse.Namespace, layout: ParallelLayout) -> None:
    """Raise LayoutError unless torchrun started one process for every rank of the layout."""
    from dist_ckpt_mistral.convert.ranks import world_size

    num_needed, num_started = layout.world_size, world_size()
    if num_needed != num_started:
        command = ["torchrun", "--nproc-per-node", str(num_needed), "-m", "dist_ckpt_mistral", *arguments.words]
        sizes = " ".join(f"--{axis} {getattr(layout, axis)}" for axis in ("tp", "pp", "ep"))
        raise LayoutError(
            f"{sizes.removesuffix(' --ep 1')} needs {counted(num_needed, 'rank')}, and there "
            f"{'is' if num_started == 1 else 'are'} {num_started}. Start them with: {command_line(command)}"
        )


def _require_model(arguments: argparse.Namespace, layout: ParallelLayout) -> None:
    """Raise DistCkptMistralError for what can be seen without torch, whose import takes long: no model, no tokenizer.

    Also for a layout that does not fit, and for more tokens than the model takes.
    """
    from dist_ckpt_mistral.formats import small_files
    from dist_ckpt_mistral.mapping.source import open_source
    from dist_ckpt_mistral.model.config.mistral_config import chosen_config, given_directory

    given = options.given_config(arguments)
    source = open_source(arguments.path, config=chosen_config(given))
    layout.check(source.config)
    if arguments.max_new_tokens > source.config.max_position_embeddings:
        most = f"max_position_embeddings={source.config.max_position_embeddings}"
        raise ConfigError(f"--max-new-tokens: expected at most {most}, got {arguments.max_new_tokens}")
    places = small_files.tokenizer_directories(arguments.tokenizer, given_directory(given), *source.tokenizer_places)
    small_files.tokenizer_directory(places)


def _completions(arguments: argparse.Namespace, layout: ParallelLayout) -> list[Completion]:
    """The texts, which the first rank also prints as they grow, unless JSON is asked for."""
    with quiet():
        from dist_ckpt_mistral.megatron.generate import complete
        from dist_ckpt_mistral.megatron.hf_inference import Sampling

        given = {name: getattr(arguments, name) for name in ("temperature", "top_k", "top_p", "seed")}
        given = {name: value for name, value in given.items() if value is not None}
        prints = not arguments.json and usage.is_first_rank()
        completions = []
        for completion in complete(
            arguments.path,
            arguments.prompt,
            layout=layout,
            max_new_tokens=arguments.max_new_tokens,
            sampling=Sampling(**given) if given else None,
            config=options.given_config(arguments),
            tokenizer=arguments.tokenizer,
            dtype=arguments.dtype,
            stream=output.say_piece if prints else None,
        ):
            completions.append(completion)
            if prints:
                output.say_text("")
        return completions


def add_demo(commands: usage.Commands) -> None:
    """Declare ``demo``."""
    usage.declare(
        commands,
        "demo",
        _add_demo_options,
        _demo,
        "Convert a small random model to Megatron and back, and check every step.",
        "Works offline, without a GPU, and with nothing but this package. Where they are installed, Megatron loads the "
        "checkpoint in four processes, and transformers computes with the export.",
        examples=("demo", "demo --keep demo_files"),
        json_fields={
            "output": "the directory that has all files, or null if they are deleted",
            "commands": "list of the commands that do the same, in the directory of the files",
            "checked": "list of what was found, in words",
            "missing": "packages that would check more",
            "seconds": "how long it took",
        },
    )


def _add_demo_options(command: argparse.ArgumentParser) -> None:
    help_text = "work in DIR, which must be new or empty, and keep all files there (default: delete them at the end)"
    command.add_argument("--keep", type=values.path, metavar="DIR", help=help_text)


def _demo(arguments: argparse.Namespace) -> int:
    from dist_ckpt_mistral.cli import demo

    story = demo.run(arguments.keep, say=_say_nothing if arguments.json else output.say_text)
    if arguments.json:
        output.say_json(story.to_json())
    return usage.EXIT_DONE


def _say_nothing(text: str) -> None:
    """Leave out a line of the demo's story."""
