"""The commands that write an output: from-hf, to-hf, reshard, migrate, describe, index."""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final

from dist_ckpt_mistral.cli import options, output
from dist_ckpt_mistral.messages import command_line, human_bytes

if TYPE_CHECKING:
    from dist_ckpt_mistral.convert.conversion import Conversion
    from dist_ckpt_mistral.mapping.read_plan import ReadingPlan

#: Options of from-hf that are not for the next run, and the abbreviations that argparse accepts.
_ONCE: Final = re.compile("--(dr|dry|dry-|dry-r|dry-ru|dry-run|r|re|res|resu|resum|resume)")
#: The end of every description.
_UNDER_TORCHRUN = "Needs neither torch nor Megatron nor a GPU. Under torchrun the ranks share the work."


def add_from_hf(commands: options.Commands) -> None:
    """Declare ``from-hf``."""
    _declare(
        commands,
        "from-hf",
        _add_from_hf_options,
        _from_hf,
        "Import a Hugging Face model into a new Megatron checkpoint.",
        "The checkpoint has the format torch_dist, and Megatron loads it at any parallel layout. The Hugging Face "
        "configuration and tokenizer are stored in it, for to-hf.",
    )


def _add_from_hf_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("hf", type=options.name, metavar="HF", help=options.HF)
    command.add_argument("checkpoint", metavar="CKPT", type=options.path, help="checkpoint root directory to create")
    group = command.add_argument_group(
        "layout", "The parallel layout to cut the stored chunks for. The checkpoint loads at any other layout, too."
    )
    for axis, parallelism in (("tp", "tensor"), ("pp", "pipeline"), ("ep", "expert")):
        help_text = f"{parallelism}-parallel size (default 1)"
        group.add_argument(f"--{axis}", type=options.positive, default=1, metavar="N", help=help_text)
    help_text = "store the weights as iteration N (default: as a release, Megatron's name for weights to start from)"
    command.add_argument("--iteration", type=options.not_negative, metavar="N", help=help_text)
    help_text = (
        "for a PEFT directory of a LoRA adapter: its model, as a config.json, a Hugging Face directory or a hub id "
        "(default: the model that adapter_config.json names)"
    )
    command.add_argument("--base", type=options.name, metavar="DIR_OR_JSON", help=help_text)
    options.add_dtype(command)
    options.add_allow_lossy(command)
    options.add_output(command)


def _from_hf(arguments: argparse.Namespace) -> int:
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
    return _write(arguments, convert)


def add_to_hf(commands: options.Commands) -> None:
    """Declare ``to-hf``."""
    _declare(
        commands,
        "to-hf",
        _add_to_hf_options,
        _to_hf,
        "Export a Megatron checkpoint to a new Hugging Face directory.",
        "transformers' from_pretrained loads the directory. A checkpoint that from-hf wrote gives back the original "
        "files byte for byte.",
    )


def _add_to_hf_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("checkpoint", metavar="CKPT", type=options.path, help=options.CKPT)
    command.add_argument("hf", metavar="HF", type=options.path, help="Hugging Face directory to create")
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
    group.add_argument("--base", type=options.name, metavar="HF_OR_CKPT", help=help_text)
    help_text = "alpha of the adapter, if nothing in the checkpoint says it"
    group.add_argument("--lora-alpha", type=options.positive_number, metavar="X", help=help_text)


def _to_hf(arguments: argparse.Namespace) -> int:
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
    return _write(arguments, convert)


def add_reshard(commands: options.Commands) -> None:
    """Declare ``reshard``."""
    _declare(
        commands,
        "reshard",
        _add_reshard_options,
        _reshard,
        "Rewrite a Megatron checkpoint so that every rank of a layout reads only whole chunks.",
        "Weights and optimizer state keep their keys, shapes and bits. The common state, all objects and the small "
        "files are copied byte for byte.",
    )


def _add_reshard_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("checkpoint", metavar="CKPT", type=options.path, help=options.CKPT)
    command.add_argument("output", metavar="OUT", type=options.path, help="checkpoint to create")
    options.add_layout(command, "to cut the stored chunks for")
    options.add_config(command)
    command.add_argument("--weights-only", action="store_true", help="leave out all optimizer state")
    options.add_output(command)


def _reshard(arguments: argparse.Namespace) -> int:
    from dist_ckpt_mistral.convert.reshard import reshard

    convert = partial(
        reshard,
        arguments.checkpoint,
        arguments.output,
        options.given_layout(arguments),
        config=options.given_config(arguments),
        weights_only=arguments.weights_only,
    )
    return _write(arguments, convert)


def add_migrate(commands: options.Commands) -> None:
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
    )


def _add_migrate_options(command: argparse.ArgumentParser) -> None:
    help_text = "checkpoint in such a format: its root directory, or one iter_* or release directory in it"
    command.add_argument("checkpoint", metavar="OLD", type=options.path, help=help_text)
    command.add_argument("output", metavar="CKPT", type=options.path, help="checkpoint to create")
    options.add_config(command, "Not needed for zarr.")
    options.add_output(command, has_file_size=True)


def _migrate(arguments: argparse.Namespace) -> int:
    from dist_ckpt_mistral.convert.migrate import migrate

    config = options.given_config(arguments)
    return _write(arguments, partial(migrate, arguments.checkpoint, arguments.output, config=config))


def add_describe(commands: options.Commands) -> None:
    """Declare ``describe``."""
    options.declare(
        commands,
        "describe",
        _add_describe_options,
        _describe,
        "Leave configuration and tokenizer of a model in a checkpoint root, for every iteration saved there.",
        "The folder ROOT/hf then has config.json, tokenizer, chat templates, generation config, the layout of the "
        "original files, and the vision tower that training drops from a multimodal model, so that to-hf needs no "
        "--config. Nothing is written if the model contradicts the latest iteration. Needs neither torch nor Megatron "
        "nor a GPU.",
        with_numpy=True,
    )


def _add_describe_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("hf", type=options.name, metavar="HF", help=options.HF)
    help_text = "checkpoint root directory, or an empty directory that training will save into"
    command.add_argument("root", metavar="ROOT", type=options.path, help=help_text)
    options.add_output(command)


def _describe(arguments: argparse.Namespace) -> int:
    from dist_ckpt_mistral.convert.describe import describe
    from dist_ckpt_mistral.convert.ranks import ALONE
    from dist_ckpt_mistral.messages import counted

    with options.effort(arguments, ALONE) as effort:
        done = describe(arguments.hf, arguments.root, output=options.given_output(arguments), effort=effort)
    verb = "would write" if arguments.dry_run else "wrote"
    agrees = "" if done.compared is None else f"; the model agrees with {done.compared.name}"
    output.say(f"{verb} {counted(len(done.files), 'file')} to {done.folder}{agrees}")
    if arguments.dry_run:
        for name, num_bytes in done.files.items():
            output.say(f"  {name}  {num_bytes} bytes")
    return options.EXIT_DONE


def add_index(commands: options.Commands) -> None:
    """Declare ``index``."""
    options.declare(
        commands,
        "index",
        _add_index_options,
        _index,
        "Write a small index beside the shards of a checkpoint, so that TensorStore opens every weight lazily.",
        "Nothing is converted: the index refers to byte ranges of the shards. TensorStore then opens "
        "file://ITERATION/|ocdbt:hf/NAME/|zarr3: by Hugging Face name and megatron/KEY by Megatron's key. The index "
        "holds for as long as the shards stay as they are. Needs neither torch nor Megatron nor TensorStore.",
        with_numpy=True,
    )


def _add_index_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("checkpoint", metavar="CKPT", type=options.path, help=options.CKPT)
    options.add_config(command)
    help_text = "write nothing: exit with 3 if the index that is there is out of date, and say why"
    command.add_argument("--check", action="store_true", help=help_text)
    help_text = "also write the index as references of kerchunk to FILE, for fsspec"
    command.add_argument("--kerchunk", type=options.path, metavar="FILE", help=help_text)


def _index(arguments: argparse.Namespace) -> int:
    from dist_ckpt_mistral.cli import notes
    from dist_ckpt_mistral.messages import counted, printable
    from dist_ckpt_mistral.views.tensorstore_index import index_problems, write_index

    if arguments.check:
        problems = index_problems(arguments.checkpoint)
        for problem in problems:
            output.say(printable(problem))
        output.say(f"the index is {'out of date: run index again' if problems else 'up to date, or there is none'}")
        return options.EXIT_DIFFERENT if problems else options.EXIT_DONE
    done = write_index(arguments.checkpoint, config=options.given_config(arguments), kerchunk=arguments.kerchunk)
    if done.was_stale:
        notes.say(f"the index that was there was out of date: {'; '.join(done.was_stale)}")
    for name, why in done.left_out.items():
        notes.say(f"left out: {name}: {why}")
    output.say(
        f"wrote an index of {counted(len(done.names), 'array')} ({human_bytes(done.num_bytes)}) to {done.directory}"
    )
    return options.EXIT_DONE


def _declare(
    commands: options.Commands,
    name: str,
    add_options: options.AddOptions,
    run: Callable[[argparse.Namespace], int],
    summary: str,
    details: str,
) -> None:
    """Declare a command that runs on all ranks and needs numpy."""
    details = f"{details} {_UNDER_TORCHRUN}"
    options.declare(commands, name, add_options, run, summary, details, on_each_node=True, with_numpy=True)


def _write(arguments: argparse.Namespace, convert: Callable[..., Conversion]) -> int:
    """Call ``convert`` with ``output``, ``effort`` and ``ranks``, and print a summary on the first rank."""
    from dist_ckpt_mistral.cli import notes
    from dist_ckpt_mistral.convert.conversion import conversion_line
    from dist_ckpt_mistral.convert.ranks import of_nodes

    ranks = of_nodes()
    begun_s = time.perf_counter()
    with options.effort(arguments, ranks) as effort:
        done = convert(output=options.given_output(arguments), effort=effort, ranks=ranks)
    if ranks.is_first:
        output.say(conversion_line(done, seconds=None if arguments.dry_run else time.perf_counter() - begun_s))
    if ranks.is_first and arguments.dry_run:
        for name, num_bytes in done.files.items():
            output.say(f"  {name}  {num_bytes} bytes")
    if done.costly_load is not None:
        notes.say(_advice(arguments, done.costly_load))
    return options.EXIT_DONE


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
