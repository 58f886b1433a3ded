"""The commands that write a model: from-hf, to-hf, reshard, migrate."""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Final, TypeAlias

from dist_ckpt_mistral.cli import options, usage, values
from dist_ckpt_mistral.messages import command_line, human_bytes

if TYPE_CHECKING:
    from dist_ckpt_mistral.cli.after import After
    from dist_ckpt_mistral.convert.conversion import Conversion
    from dist_ckpt_mistral.mapping.read_plan import ReadingPlan

#: Options of from-hf that are not for the next run, and the abbreviations that argparse accepts.
_ONCE: Final = re.compile("--(dr|dry|dry-|dry-r|dry-ru|dry-run|r|re|res|resu|resum|resume)")
#: What comes after a conversion.
WhatFollows: TypeAlias = "Callable[[Conversion], After]"
_FIELDS: Final = {
    **usage.OUTPUT_FIELDS,
    "config_from": "source of the model configuration, in words",
    "num_tensors": "number of tensors in the output",
    "num_bytes": "size of their data",
    "ignored": "list of name and reason: stored entries that are not in the output",
    "losses": "list of hf_names, dtype, num_values, overflowed, vanished: values that --dtype destroyed",
    "advice": "what a load would read more than it needs, and the command that avoids it; or null",
}
#: The end of every description.
_UNDER_TORCHRUN = "Needs neither torch nor Megatron nor a GPU. Under torchrun the ranks share the work."


def add_from_hf(commands: usage.Commands) -> None:
    """Declare ``from-hf``."""
    _declare(
        commands,
        "from-hf",
        _add_from_hf_options,
        _from_hf,
        "Import a Hugging Face model into a new Megatron checkpoint.",
        "The checkpoint has the format torch_dist, and Megatron loads it at any parallel layout. The Hugging Face "
        "configuration and tokenizer are stored in it, for to-hf.",
        examples=(
            "from-hf mistralai/Mistral-7B-v0.3 ckpt",
            "from-hf hf_dir ckpt --tp 8 --pp 2",
            "from-hf hf_dir ckpt --dtype bfloat16 --dry-run",
        ),
    )


def _add_from_hf_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("hf", type=values.name, metavar="HF", help=options.HF)
    command.add_argument("checkpoint", metavar="CKPT", type=values.path, help="checkpoint root directory to create")
    group = command.add_argument_group(
        "layout", "The parallel layout to cut the stored chunks for. The checkpoint loads at any other layout, too."
    )
    for axis, parallelism in (("tp", "tensor"), ("pp", "pipeline"), ("ep", "expert")):
        help_text = f"{parallelism}-parallel size (default 1)"
        group.add_argument(f"--{axis}", type=values.positive, default=1, metavar="N", help=help_text)
    help_text = "store the weights as iteration N (default: as a release, Megatron's name for weights to start from)"
    command.add_argument("--iteration", type=values.not_negative, metavar="N", help=help_text)
    help_text = (
        "for a PEFT directory of a LoRA adapter: its model, as a config.json, a Hugging Face directory or a hub id "
        "(default: the model that adapter_config.json names)"
    )
    command.add_argument("--base", type=values.name, metavar="DIR_OR_JSON", help=help_text)
    options.add_dtype(command)
    options.add_allow_lossy(command)
    options.add_output(command)


def _from_hf(arguments: argparse.Namespace) -> int:
    from dist_ckpt_mistral.cli import after
    from dist_ckpt_mistral.convert.from_hf import from_hf

    convert = partial(
        from_hf,
        arguments.hf,
        arguments.checkpoint,
        tp=arguments.tp,
        pp=arguments.pp,
        ep=arguments.ep,
        dtype=arguments.dtype,
        allow_lossy=arguments.allow_lossy,
        iteration=arguments.iteration,
        base=arguments.base,
    )
    return _write(arguments, convert, partial(after.imported, arguments.checkpoint, arguments.iteration))


def add_to_hf(commands: usage.Commands) -> None:
    """Declare ``to-hf``."""
    _declare(
        commands,
        "to-hf",
        _add_to_hf_options,
        _to_hf,
        "Export a Megatron checkpoint to a new Hugging Face directory.",
        "transformers' from_pretrained loads the directory. A checkpoint that from-hf wrote gives back the original "
        "files byte for byte.",
        examples=(
            "to-hf ckpt out",
            "to-hf ckpt/iter_0000500 out --config hf_dir",
            "to-hf adapter_ckpt merged --merge-adapter --base hf_dir",
        ),
    )


def _add_to_hf_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("checkpoint", metavar="CKPT", type=values.path, help=options.CKPT)
    command.add_argument("hf", metavar="HF", type=values.path, help="Hugging Face directory to create")
    options.add_config(
        command,
        "A directory or hub id also supplies the tokenizer and other small files, and the vision tower and projector "
        "that training in Megatron drops from a multimodal model.",
    )
    help_text = "export the model's weights, or the optimizer's float32 master copy of them (default: model)"
    command.add_argument("--weights", choices=("model", "master"), default="model", help=help_text)
    options.add_dtype(command)
    options.add_allow_lossy(command)
    _add_adapter_options(command)
    options.add_output(command, has_file_size=True)


def _add_adapter_options(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group(
        "adapter",
        "A checkpoint of a LoRA adapter (Megatron-Bridge, ms-swift) becomes a directory that PEFT loads: "
        "adapter_model.safetensors and adapter_config.json.",
    )
    help_text = (
        "export the model with the adapter merged: each adapted weight W becomes W + alpha/rank * B A, computed in "
        "float32 by numpy and rounded once to the dtype that is written"
    )
    group.add_argument("--merge-adapter", action="store_true", help=help_text)
    help_text = (
        "the model that the adapter belongs to: a Hugging Face directory, a hub id or a Megatron checkpoint. Needed to "
        "merge an adapter that was saved without it"
    )
    group.add_argument("--base", type=values.name, metavar="HF_OR_CKPT", help=help_text)
    help_text = "alpha of the adapter, if nothing in the checkpoint says it"
    group.add_argument("--lora-alpha", type=values.positive_number, metavar="X", help=help_text)


def _to_hf(arguments: argparse.Namespace) -> int:
    from dist_ckpt_mistral.cli import after
    from dist_ckpt_mistral.convert.to_hf import to_hf

    convert = partial(
        to_hf,
        arguments.checkpoint,
        arguments.hf,
        config=options.given_config(arguments),
        weights=arguments.weights,
        dtype=arguments.dtype,
        allow_lossy=arguments.allow_lossy,
        merge_adapter=arguments.merge_adapter,
        base=arguments.base,
        lora_alpha=arguments.lora_alpha,
    )
    are_same_bits = arguments.weights == "model" and arguments.dtype is None and not arguments.merge_adapter
    follows = partial(
        after.exported, arguments.checkpoint, options.config_words(arguments), are_same_bits=are_same_bits
    )
    return _write(arguments, convert, follows)


def add_reshard(commands: usage.Commands) -> None:
    """Declare ``reshard``."""
    _declare(
        commands,
        "reshard",
        _add_reshard_options,
        _reshard,
        "Rewrite a Megatron checkpoint so that every rank of a layout reads only whole chunks.",
        "Weights and optimizer state keep their keys, shapes and bits. The common state, all objects and the small "
        "files are copied byte for byte.",
        examples=(
            "reshard ckpt ckpt_tp4 --tp 4",
            "reshard ckpt/iter_0000500 weights --pp 2 --weights-only",
        ),
    )


def _add_reshard_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("checkpoint", metavar="CKPT", type=values.path, help=options.CKPT)
    command.add_argument("output", metavar="OUT", type=values.path, help="checkpoint to create")
    options.add_layout(command, "to cut the stored chunks for")
    options.add_config(command)
    command.add_argument("--weights-only", action="store_true", help="leave out all optimizer state")
    options.add_output(command)


def _reshard(arguments: argparse.Namespace) -> int:
    from dist_ckpt_mistral.cli import after
    from dist_ckpt_mistral.convert.reshard import reshard

    layout = options.given_layout(arguments)
    convert = partial(
        reshard,
        arguments.checkpoint,
        arguments.output,
        layout,
        config=options.given_config(arguments),
        weights_only=arguments.weights_only,
    )
    return _write(arguments, convert, partial(after.resharded, layout, options.config_words(arguments)))


def add_migrate(commands: usage.Commands) -> None:
    """Declare ``migrate``."""
    _declare(
        commands,
        "migrate",
        _add_migrate_options,
        _migrate,
        "Convert a checkpoint in one of Megatron's other formats (zarr, torch, torch_dcp) to torch_dist.",
        "A zarr checkpoint may be of any model that Megatron saved: all tensors, optimizer state included, keep their "
        "keys, shapes, chunks and bits. Of torch (mp_rank_*) and torch_dcp, the weights become a model of the Mistral "
        "family; optimizer and generator states stay behind.",
        examples=(
            "migrate old_zarr ckpt",
            "migrate old_torch ckpt --config hf_dir",
        ),
    )


def _add_migrate_options(command: argparse.ArgumentParser) -> None:
    help_text = "checkpoint in such a format: its root directory, or one iter_* or release directory in it"
    command.add_argument("checkpoint", metavar="OLD", type=values.path, help=help_text)
    command.add_argument("output", metavar="CKPT", type=values.path, help="checkpoint to create")
    options.add_config(command, "Not needed for zarr.")
    options.add_output(command, has_file_size=True)


def _migrate(arguments: argparse.Namespace) -> int:
    from dist_ckpt_mistral.cli import after
    from dist_ckpt_mistral.convert.migrate import migrate

    convert = partial(migrate, arguments.checkpoint, arguments.output, config=options.given_config(arguments))
    return _write(arguments, convert, partial(after.migrated, options.config_words(arguments)))


def _declare(
    commands: usage.Commands,
    name: str,
    add_options: usage.AddOptions,
    run: Callable[[argparse.Namespace], int],
    summary: str,
    details: str,
    *,
    examples: Sequence[str],
) -> None:
    """Declare a command that runs on all ranks and needs numpy."""
    usage.declare(
        commands,
        name,
        add_options,
        run,
        summary,
        f"{details} {_UNDER_TORCHRUN}",
        examples=examples,
        json_fields=_FIELDS,
        on_each_node=True,
        with_numpy=True,
    )


def _write(arguments: argparse.Namespace, convert: Callable[..., Conversion], follows: WhatFollows) -> int:
    """Call ``convert`` with ``output``, ``effort`` and ``ranks``, and print on the first rank what it did.

    ``follows`` gives, for the result, where what lies and what to do next.
    """
    from dist_ckpt_mistral.cli import after, notes
    from dist_ckpt_mistral.convert.conversion import conversion_line
    from dist_ckpt_mistral.convert.ranks import of_nodes

    ranks = of_nodes()
    begun_s = time.perf_counter()
    with options.effort(arguments, ranks) as effort:
        done = convert(output=options.given_output(arguments), effort=effort, ranks=ranks)
    seconds = None if arguments.dry_run else time.perf_counter() - begun_s
    advice = None if done.costly_load is None else _advice(arguments, done.costly_load)
    if ranks.is_first:
        line = conversion_line(done, seconds=seconds)
        content = {**done.to_json(), "advice": advice}
        after.answer(arguments, line, content, done.files, follows(done), seconds=seconds)
    if advice is not None:
        notes.say(advice)
    return usage.EXIT_DONE


def _advice(arguments: argparse.Namespace, load: ReadingPlan) -> str:
    """What ``load`` would read of an import without a layout, and the same command with chunks cut for that layout."""
    from dist_ckpt_mistral.mapping.read_plan import factor

    words = [word for word in arguments.words if not _ONCE.fullmatch(word)]
    end = words.index("--") if "--" in words else len(words)  # what follows "--" is no option
    overwrite = [] if arguments.overwrite or arguments.dry_run else ["--overwrite"]
    command = command_line(["dist-ckpt-mistral", *words[:end], *load.layout.options, *overwrite, *words[end:]])
    total, layout = load.total, load.layout.text
    read, needed = human_bytes(total.read_bytes), human_bytes(total.needed_bytes)
    experts = ", experts included," if "experts" in load.kinds else ""
    return (
        f"at {layout}{experts} the ranks would read {factor(total.amplification)} what they need ({read} instead of "
        f"{needed}), because Megatron reads stored chunks whole. Chunks cut for {layout} avoid it, and suit any "
        f"smaller tp and any pp and ep: {command}"
    )
