"""The commands that write no model: inspect, plan, verify, megatron-args."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from dist_ckpt_mistral.cli import options, output, usage, values
from dist_ckpt_mistral.libraries import needed, quiet
from dist_ckpt_mistral.messages import counted, human_bytes

if TYPE_CHECKING:
    from pathlib import Path

    from dist_ckpt_mistral.analysis.compare import Comparison
    from dist_ckpt_mistral.analysis.findings import Check
    from dist_ckpt_mistral.megatron.logits import LogitsComparison


def add_inspect(commands: usage.Commands) -> None:
    """Declare ``inspect``."""
    usage.declare(
        commands,
        "inspect",
        _add_inspect_options,
        _inspect,
        "Show the tensors, the configuration and the problems of a checkpoint or a Hugging Face directory.",
        "Reads no tensor data. Exits with 1 if there is a problem, such as a missing file or tensor.",
        examples=(
            "inspect ckpt",
            "inspect hf_dir --html report.html",
            "inspect ckpt --json | jq .problems",
        ),
        json_fields={
            "path": "what was looked at",
            "kind": "what that is, in words",
            "format": "its format and version, in words",
            "config_from": "source of the model configuration, in words; null if none was found",
            "config": "the configuration, in Hugging Face's names; or null",
            "tensors": "list of name, dtype, shape, num_chunks, num_bytes, hf_names (what it holds), ignored (why it "
            "is no weight, or null), kind, cut (pieces along each axis), files",
            "objects": "list of name, ignored: stored entries that are no tensors",
            "files": "name of each file -> size, null if the file is missing",
            "problems": "list of messages; if there are any the exit code is 1",
            "iterations": "the iterations in the root",
            "saved_at": "the layout that saved it (tp, pp, ...), or null",
        },
        with_numpy=True,
    )


def _add_inspect_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("path", metavar="CKPT_OR_HF", type=values.path, help=options.CKPT_OR_HF)
    options.add_config(command)
    help_text = "write the report to FILE, as one HTML page, instead of printing it"
    command.add_argument("--html", type=values.path, metavar="FILE", help=help_text)


def _inspect(arguments: argparse.Namespace) -> int:
    from dist_ckpt_mistral.analysis import report

    content = report.inspect(arguments.path, config=options.given_config(arguments))
    if arguments.html is not None:
        from dist_ckpt_mistral.analysis import page
        from dist_ckpt_mistral.cli import notes

        page.save_html(content, arguments.html)
        (notes if arguments.json else output).say(f"wrote {arguments.html}")
    if arguments.json:
        output.say_json(content.to_json())
    elif arguments.html is None:
        from dist_ckpt_mistral.analysis import report_table

        output.show(report_table.render(content))
    return usage.EXIT_DATA if content.problems else usage.EXIT_DONE


def add_plan(commands: usage.Commands) -> None:
    """Declare ``plan``."""
    usage.declare(
        commands,
        "plan",
        _add_plan_options,
        _plan,
        "Show what every rank of a parallel layout would read from a checkpoint.",
        "Tensors are stored in chunks. Megatron reads a chunk whole, even where a rank needs only a part of it. The "
        "table compares the bytes that ranks need with those they read. Only the checkpoint's metadata is used.",
        examples=(
            "plan ckpt --tp 8",
            "plan ckpt --tp 4 --pp 2 --svg reads.svg",
            "plan ckpt --tp 2 --ep 8 --weights-only --json",
        ),
        json_fields={
            "path": "what was planned",
            "config_from": "source of the model configuration, in words",
            "layout": "the layout: tp, pp, cp, ep, ...",
            "verdict": "the result in a sentence",
            "remedy": "the reshard command that helps, if the ranks read at least 1.5 times what they need; or null",
            "left_out": "why stored optimizer state is not planned, or null",
            "stored_bytes": "size of the planned tensors",
            "total": "amount of all ranks: needed_bytes, read_bytes, amplification (null if nothing is needed), "
            "num_reads, num_chunks, files (name -> bytes read), and the same under weights and optimizer (null if "
            "there is none)",
            "ranks": "list of every rank: rank, pipeline_stage, layers, reads_like (the first rank with the same "
            "boxes), and its amount",
        },
        with_numpy=True,
    )


def _add_plan_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("checkpoint", metavar="CKPT", type=values.path, help=options.CKPT)
    options.add_layout(command, "that would load the checkpoint")
    options.add_config(command)
    command.add_argument("--weights-only", action="store_true", help="leave out optimizer state")
    help_text = "also draw which chunk goes to which rank, as SVG, or as PNG if FILE ends in .png (needs matplotlib)"
    command.add_argument("--svg", type=_picture_path, metavar="FILE", help=help_text)


def _picture_path(text: str) -> Path:
    """Parse the path of a picture, whose ending says the format."""
    from dist_ckpt_mistral.analysis.picture import picture

    path = values.path(text)
    if path.suffix.lower() not in picture.FORMATS:
        raise argparse.ArgumentTypeError(f"expected a name that ends in .svg or .png, got {text!r:.500}")
    return path


def _plan(arguments: argparse.Namespace) -> int:
    from dist_ckpt_mistral.analysis import read_planner, read_table
    from dist_ckpt_mistral.analysis.picture import picture
    from dist_ckpt_mistral.cli import notes

    if arguments.svg is not None:
        picture.require_matplotlib()
    plan = read_planner.plan_reading(
        arguments.checkpoint,
        options.given_layout(arguments),
        config=options.given_config(arguments),
        weights_only=arguments.weights_only,
    )
    if arguments.svg is not None:
        picture.save_picture(plan, arguments.svg)
        notes.say(f"wrote {arguments.svg}")
    if arguments.json:
        output.say_json(plan.to_json())
    else:
        output.show(read_table.render(plan))
    return usage.EXIT_DONE


def add_verify(commands: usage.Commands) -> None:
    """Declare ``verify``."""
    usage.declare(
        commands,
        "verify",
        _add_verify_options,
        _verify,
        "Compare two models bit for bit, in whatever format they are stored, or check one for damage.",
        "With A and B, compares shapes, dtypes and bits of all tensors, by Hugging Face name. With A alone, "
        "compares its files with their checksums and checks that all tensors of the model are there. Exits with 3 if "
        "it finds a difference or damage.",
        examples=(
            "verify ckpt",
            "verify hf_dir ckpt",
            "verify ckpt resharded --stored",
            "verify hf_dir ckpt --logits --prompt 'The sky is'",
        ),
        json_fields={
            "sound": "of A alone: whether no damage was found",
            "directory, checked, not_checked": "of A alone: what was checked and what was not, in sentences",
            "findings": "of A alone: list of file, tensor, hf_names, what",
            "equal": "of A and B: whether they are the same model",
            "num_tensors, num_bytes": "of A and B: what was compared bit for bit",
            "differences": "of A and B: list of hf_name (with --stored: mcore_key), what",
            "configurations": "of A and B: list of name, first, second, of_weights (whether the value decides how "
            "stored rows are read)",
            "not_compared": "of A and B: what only one of two checkpoints holds, in sentences",
            "agree": "with --logits: whether no logits differ by more than the tolerance",
            "largest_difference, tolerance": "with --logits: of two logits",
            "in_transformers, in_megatron": "with --logits: what ran where",
            "prompts": "with --logits: list of prompt, num_tokens, largest_difference, largest_logit, same_tokens",
        },
        on_all_ranks=True,
        with_numpy=True,
    )


def _add_verify_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("a", metavar="A", type=values.path, help=options.CKPT_OR_HF)
    help_text = "the same, to compare with A; without B, A is checked against its own checksums and those beside it"
    command.add_argument("b", metavar="B", type=values.path, nargs="?", help=help_text)
    options.add_config(
        command, "A directory or hub id also supplies the vision tower and projector if only one side has them."
    )
    help_text = (
        "compare everything that two Megatron checkpoints of any model store, by Megatron key: weights, optimizer "
        "state, objects and common state"
    )
    command.add_argument("--stored", action="store_true", help=help_text)
    options.add_effort(command)
    group = command.add_argument_group("logits", "Compare what two models compute instead of their bits.")
    help_text = "compute logits of one model with transformers and of the other with Megatron, and compare them"
    group.add_argument("--logits", action="store_true", help=help_text)
    help_text = "text to compute logits of; may be repeated (default: two random prompts)"
    group.add_argument("--prompt", action="append", default=[], metavar="TEXT", help=help_text)
    group.add_argument("--tokenizer", type=values.name, metavar="DIR", help=options.TOKENIZER)
    help_text = "seed of the random prompts (default 0)"
    group.add_argument("--seed", type=values.seed, default=0, metavar="N", help=help_text)
    help_text = "largest difference of two logits to accept (default 1e-4)"
    group.add_argument("--tolerance", type=values.positive_number, default=1e-4, metavar="X", help=help_text)


def _verify(arguments: argparse.Namespace) -> int:
    """Under torchrun all ranks compute logits; only the first rank compares bits or looks for damage."""
    if arguments.logits and arguments.b is None:
        arguments.wrong_usage("--logits compares two models: give B")
    if arguments.stored and (arguments.b is None or arguments.logits or arguments.config):
        arguments.wrong_usage("--stored compares two checkpoints: give B, and neither --logits nor --config")
    if arguments.logits:
        return _compare_logits(arguments)
    if arguments.prompt or arguments.tokenizer:
        arguments.wrong_usage("--prompt and --tokenizer need --logits")
    if not usage.is_first_rank():
        return usage.EXIT_DONE
    return _check(arguments) if arguments.b is None else _compare_bits(arguments)


def _check(arguments: argparse.Namespace) -> int:
    from dist_ckpt_mistral.analysis import damage
    from dist_ckpt_mistral.convert.ranks import ALONE

    with options.effort(arguments, ALONE) as effort:
        check = damage.check(arguments.a, config=options.given_config(arguments), effort=effort)
    return _answer(arguments, check.to_json(), _check_lines(check), is_good=check.is_sound)


def _check_lines(check: Check) -> Iterator[str]:
    yield from map(str, check.findings)
    yield from (f"checked: {what}" for what in check.checked)
    yield from (f"not checked: {what}" for what in check.not_checked)
    verdict = "no damage found" if check.is_sound else f"DAMAGED, {counted(len(check.findings), 'finding')}"
    yield f"{verdict}: {check.directory}"


def _compare_bits(arguments: argparse.Namespace) -> int:
    from dist_ckpt_mistral.analysis import compare
    from dist_ckpt_mistral.convert.ranks import ALONE

    with options.effort(arguments, ALONE) as effort:
        if arguments.stored:
            outcome = compare.compare_stored(arguments.a, arguments.b, effort=effort)
        else:
            outcome = compare.compare(arguments.a, arguments.b, config=options.given_config(arguments), effort=effort)
    lines = _comparison_lines(outcome, ("entry", "entries") if arguments.stored else ("tensor", "tensors"))
    return _answer(arguments, outcome.to_json(), lines, is_good=outcome.is_equal)


def _comparison_lines(outcome: Comparison, things: tuple[str, str]) -> Iterator[str]:
    yield from (f"{difference.name}: {difference.what}" for difference in outcome.differences)
    yield from (f"the configurations of A and B differ in {each}" for each in outcome.configurations)
    yield from (f"not compared: {what}" for what in outcome.not_compared)
    if outcome.is_equal:
        verdict = "equal"
    elif outcome.differences:
        verdict = f"DIFFERENT in {counted(len(outcome.differences), *things)}"
    else:
        verdict = "DIFFERENT in configuration, which reads the same bits as other weights"
    tensors = counted(outcome.num_tensors, "tensor")
    yield f"{verdict}: {tensors}, {human_bytes(outcome.num_bytes)} compared bit for bit"


def _compare_logits(arguments: argparse.Namespace) -> int:
    modules = ("torch", "megatron.core", "transformers")
    with needed("verify --logits", *modules, extra="inference"):
        _require_models(arguments)
    with needed("verify --logits", *modules, extra="inference"), quiet():
        from dist_ckpt_mistral.megatron.logits import compare_logits

        outcome = compare_logits(
            arguments.a,
            arguments.b,
            config=options.given_config(arguments),
            prompts=arguments.prompt,
            tokenizer=arguments.tokenizer,
            seed=arguments.seed,
            tolerance=arguments.tolerance,
        )
    if not usage.is_first_rank():
        return usage.EXIT_DONE if outcome.agree else usage.EXIT_DIFFERENT
    return _answer(arguments, outcome.to_json(), _logits_lines(outcome), is_good=outcome.agree, letters=True)


def _require_models(arguments: argparse.Namespace) -> None:
    """Raise DistCkptMistralError for what can be seen without torch, whose import takes long, such as no model."""
    from dist_ckpt_mistral.analysis.compare import open_pair
    from dist_ckpt_mistral.formats import small_files
    from dist_ckpt_mistral.mapping.source import require_model
    from dist_ckpt_mistral.model.config.mistral_config import chosen_config

    given = options.given_config(arguments)
    pair = [*map(require_model, open_pair(arguments.a, arguments.b, config=chosen_config(given)))]
    if arguments.prompt:
        places = [place for source in pair for place in source.tokenizer_places]
        small_files.tokenizer_directory(small_files.tokenizer_directories(arguments.tokenizer, *places))


def _logits_lines(outcome: LogitsComparison) -> Iterator[str]:
    for prompt in outcome.prompts:
        text = "random prompt" if prompt.prompt is None else repr(prompt.prompt)
        same = "the same" if prompt.same_tokens else "OTHER"
        yield (
            f"{text}, {prompt.num_tokens} tokens: largest difference {prompt.largest_difference:.2e} "
            f"of logits up to {prompt.largest_logit:.1f}; {same} tokens are likeliest"
        )
    verdict = "agree" if outcome.agree else "DIFFER"
    yield (
        f"the logits {verdict}: largest difference {outcome.largest_difference:.2e}, tolerance "
        f"{outcome.tolerance:.2e} (float32; transformers on {outcome.in_transformers}, "
        f"Megatron on {outcome.in_megatron})"
    )


def _answer(
    arguments: argparse.Namespace,
    content: Mapping[str, object],
    lines: Iterable[str],
    *,
    is_good: bool,
    letters: bool = False,
) -> int:
    """Print ``content`` as JSON or the ``lines``, as ``--json`` asks, and return the exit code of ``verify``."""
    if arguments.json:
        output.say_json(content, letters=letters)
    else:
        for line in lines:
            output.say(line)
    return usage.EXIT_DONE if is_good else usage.EXIT_DIFFERENT


def add_megatron_args(commands: usage.Commands) -> None:
    """Declare ``megatron-args``."""
    usage.declare(
        commands,
        "megatron-args",
        _add_megatron_args_options,
        _megatron_args,
        "Print the flags with which Megatron-LM's pretrain_gpt.py trains a model.",
        "Paste them into a shell after pretrain_gpt.py. For a checkpoint, the flags also load it.",
        examples=(
            "megatron-args ckpt",
            "megatron-args ckpt --tp 4 --pp 2",
            "megatron-args mistralai/Mistral-7B-v0.3 --tp 8",
        ),
        json_fields={
            "config_from": "source of the model configuration, in words",
            "args": "the values of Megatron-LM's args that the flags set",
            "flags": "list of the flags and their values, as arguments of a program",
        },
        with_numpy=True,
    )


def _add_megatron_args_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("path", metavar="CKPT_OR_HF", type=values.path, help=options.CKPT_OR_HF)
    options.add_config(command)
    options.add_layout(command, "to train with")


def _megatron_args(arguments: argparse.Namespace) -> int:
    from dist_ckpt_mistral.analysis.pretrain_command import megatron_args
    from dist_ckpt_mistral.cli import notes

    command = megatron_args(
        arguments.path, config=options.given_config(arguments), layout=options.given_layout(arguments)
    )
    notes.say(f"configuration: {command.config_from}")
    if arguments.json:
        output.say_json(command.to_json())
    else:
        output.say_text(command.text)
    return usage.EXIT_DONE
