"""The commands that only ask: inspect, plan, verify, megatron-args."""

from __future__ import annotations

import argparse
import logging

from dist_ckpt_mistral import libraries
from dist_ckpt_mistral.cli import options, output
from dist_ckpt_mistral.convert.ranks import Ranks

_LOG = logging.getLogger(__name__)


def add_inspect(commands: options.Commands) -> None:
    """Declare ``inspect``."""
    command = options.declare(commands, "inspect", _inspect, "Say what is in a checkpoint or a Hugging Face directory.")
    command.add_argument("path", metavar="CKPT_OR_HF", type=options.path, help=options.CKPT_OR_HF)
    options.add_config(command)
    command.add_argument("--json", action="store_true", help="print JSON")
    command.add_argument("--html", type=options.path, metavar="FILE", help="write a page instead")


def _inspect(arguments: argparse.Namespace) -> int:
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


def add_plan(commands: options.Commands) -> None:
    """Declare ``plan``."""
    command = options.declare(
        commands, "plan", _plan, "Say what every rank of a layout would read of a checkpoint.", with_numpy=True
    )
    command.add_argument("checkpoint", metavar="CKPT", type=options.path, help=options.CKPT)
    options.add_layout(command, "to load with")
    options.add_config(command)
    command.add_argument("--weights-only", action="store_true", help="leave optimizer state out")
    command.add_argument("--json", action="store_true", help="print JSON, with every rank")
    command.add_argument("--svg", type=options.path, metavar="FILE", help="draw, too, which chunk goes to which rank")


def _plan(arguments: argparse.Namespace) -> int:
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


def add_verify(commands: options.Commands) -> None:
    """Declare ``verify``."""
    summary = "Compare two models, whatever they are stored as; or look for damage in one."
    command = options.declare(commands, "verify", _verify, summary, on_all_ranks=True, with_numpy=True)
    command.add_argument("a", metavar="A", type=options.path, help=options.CKPT_OR_HF)
    help_text = "another, to compare bit for bit; without it, A is held against its own checksums and integrity.json"
    command.add_argument("b", metavar="B", type=options.path, nargs="?", help=help_text)
    options.add_config(command)
    options.add_effort(command)
    command.add_argument("--json", action="store_true", help="print JSON")
    help_text = "compare all that two Megatron checkpoints store, by its keys, of any model: optimizer state, objects"
    command.add_argument("--stored", action="store_true", help=help_text)
    help_text = "compare what they compute instead of their bits: transformers runs the one, Megatron the other"
    command.add_argument("--logits", action="store_true", help=help_text)
    help_text = "with --logits: compare on this text; may be given repeatedly (default: two random prompts)"
    command.add_argument("--prompt", action="append", default=[], metavar="TEXT", help=help_text)
    options.add_tokenizer(command)
    help_text = "with --logits: of the random prompts (default 0)"
    command.add_argument("--seed", type=options.seed, default=0, metavar="N", help=help_text)
    help_text = "with --logits: the largest difference to accept (default 1e-4)"
    command.add_argument("--tolerance", type=options.positive_number, default=1e-4, metavar="X", help=help_text)


def _verify(arguments: argparse.Namespace) -> int:
    """Compare, and list the differences. Under torchrun all ranks take part in running models, one reads bits."""
    if arguments.logits and arguments.b is None:
        arguments.wrong_usage("--logits compares two models: give B")
    if arguments.stored and (arguments.b is None or arguments.logits or arguments.config):
        arguments.wrong_usage("--stored compares two checkpoints: give B, and neither --logits nor --config")
    if arguments.logits:
        return _compare_logits(arguments)
    if arguments.prompt or arguments.tokenizer:
        arguments.wrong_usage("--prompt and --tokenizer go with --logits")
    if not options.is_first_rank():
        return options.EXIT_DONE
    return _check(arguments) if arguments.b is None else _compare_bits(arguments)


def _check(arguments: argparse.Namespace) -> int:
    from dist_ckpt_mistral.analysis import damage  # noqa: PLC0415  (--help must not wait for numpy)

    with options.effort("checking", arguments, Ranks()) as effort:
        outcome = damage.check(arguments.a, config=options.given_config(arguments), effort=effort)
    if arguments.json:
        output.say_json(outcome.to_json())
    else:
        for finding in outcome.findings:
            output.say(str(finding))
        for what, notes in (("checked", outcome.checked), ("not checked", outcome.not_checked)):
            for note in notes:
                output.say(f"{what}: {note}")
        verdict = "no damage found" if outcome.is_sound else f"DAMAGED, {len(outcome.findings)} findings"
        output.say(f"{verdict}: {outcome.directory}")
    return options.EXIT_DONE if outcome.is_sound else options.EXIT_DIFFERENT


def _compare_bits(arguments: argparse.Namespace) -> int:
    from dist_ckpt_mistral.analysis import compare  # noqa: PLC0415  (--help must not wait for numpy)
    from dist_ckpt_mistral.messages import human_bytes  # noqa: PLC0415

    with options.effort("comparing", arguments, Ranks()) as effort:
        if arguments.stored:
            outcome = compare.compare_stored(arguments.a, arguments.b, effort=effort)
        else:
            outcome = compare.compare(arguments.a, arguments.b, config=options.given_config(arguments), effort=effort)
    if arguments.json:
        output.say_json(outcome.to_json())
    else:
        for difference in outcome.differences:
            output.say(f"{difference.name}: {difference.what}")
        for disagreement in outcome.configurations:
            output.say(f"the configurations of A and B differ in {disagreement}")
        for note in outcome.not_compared:
            output.say(f"not compared: {note}")
        what = "entries" if arguments.stored else "tensors"
        verdict = "equal" if outcome.is_equal else f"DIFFERENT in {len(outcome.differences)} {what}"
        if not (outcome.is_equal or outcome.differences):
            verdict = "DIFFERENT in configuration, which reads the same bits as other weights"
        output.say(f"{verdict}: {outcome.num_tensors} tensors, {human_bytes(outcome.num_bytes)} compared bit for bit")
    return options.EXIT_DONE if outcome.is_equal else options.EXIT_DIFFERENT


def _compare_logits(arguments: argparse.Namespace) -> int:
    needs = ("torch", "megatron.core", "transformers")
    with libraries.needed("verify --logits", *needs, extra="inference"), libraries.quiet():
        from dist_ckpt_mistral.megatron.logits import compare_logits  # noqa: PLC0415  (slow)

        outcome = compare_logits(
            arguments.a,
            arguments.b,
            config=options.given_config(arguments),
            prompts=arguments.prompt,
            tokenizer=arguments.tokenizer,
            seed=arguments.seed,
            tolerance=arguments.tolerance,
        )
    code = options.EXIT_DONE if outcome.agree else options.EXIT_DIFFERENT
    if not options.is_first_rank():
        return code
    if arguments.json:
        output.say_json(outcome.to_json(), letters=True)
    else:
        for prompt in outcome.prompts:
            what = "random prompt" if prompt.prompt is None else repr(prompt.prompt)
            same = "the same" if prompt.same_tokens else "OTHER"
            output.say(
                f"{what}, {prompt.num_tokens} tokens: largest difference {prompt.largest_difference:.2e} "
                f"of logits up to {prompt.largest_logit:.1f}; {same} tokens are likeliest"
            )
        verdict = "agree" if outcome.agree else "DIFFER"
        output.say(
            f"the logits {verdict}: largest difference {outcome.largest_difference:.2e}, tolerance "
            f"{outcome.tolerance:.2e} (float32; transformers on {outcome.in_transformers}, "
            f"Megatron on {outcome.in_megatron})"
        )
    return code


def add_megatron_args(commands: options.Commands) -> None:
    """Declare ``megatron-args``."""
    summary = "Print the flags with which Megatron-LM's pretrain_gpt.py trains a model on."
    command = options.declare(commands, "megatron-args", _megatron_args, summary)
    command.add_argument("path", metavar="CKPT_OR_HF", type=options.path, help=options.CKPT_OR_HF)
    options.add_config(command)
    options.add_layout(command, "to train with (default 1)")
    command.add_argument("--json", action="store_true", help="print JSON: the flags as a list, and the args they set")


def _megatron_args(arguments: argparse.Namespace) -> int:
    """Print one text that can be pasted behind ``pretrain_gpt.py``."""
    from dist_ckpt_mistral.analysis.pretrain_command import megatron_args  # noqa: PLC0415  (--help must not wait for numpy)

    command = megatron_args(
        arguments.path, config=options.given_config(arguments), layout=options.given_layout(arguments)
    )
    _LOG.info("configuration: %s", command.config_from)
    if arguments.json:
        output.say_json(command.to_json())
    else:
        output.say_text(command.text)
    return options.EXIT_DONE
