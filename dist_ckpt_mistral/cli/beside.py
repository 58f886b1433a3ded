"""The commands that leave small files beside a model: describe, index."""

from __future__ import annotations

import argparse
import time

from dist_ckpt_mistral.cli import options, output, usage, values
from dist_ckpt_mistral.messages import counted, human_bytes, human_seconds


def add_describe(commands: usage.Commands) -> None:
    """Declare ``describe``."""
    usage.declare(
        commands,
        "describe",
        _add_describe_options,
        _describe,
        "Leave configuration and tokenizer of a model in a checkpoint root, for every iteration saved there.",
        "The folder ROOT/hf then has config.json, tokenizer, chat templates, generation config, the layout of the "
        "original files, and the vision tower that training drops from a multimodal model, so that to-hf needs no "
        "--config. Nothing is written if the model contradicts the latest iteration. Needs neither torch nor Megatron "
        "nor a GPU.",
        examples=(
            "describe mistralai/Mistral-7B-v0.3 ckpt",
            "describe hf_dir new_root",
        ),
        json_fields=usage.OUTPUT_FIELDS | {"compared": "the iteration that agrees with the model, or null"},
        with_numpy=True,
    )


def _add_describe_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("hf", type=values.name, metavar="HF", help=options.HF)
    help_text = "checkpoint root directory, or an empty directory that training will save into"
    command.add_argument("root", metavar="ROOT", type=values.path, help=help_text)
    options.add_output(command)


def _describe(arguments: argparse.Namespace) -> int:
    from dist_ckpt_mistral.cli import after
    from dist_ckpt_mistral.convert.describe import describe
    from dist_ckpt_mistral.convert.ranks import ALONE

    begun_s = time.perf_counter()
    with options.effort(arguments, ALONE) as effort:
        done = describe(arguments.hf, arguments.root, output=options.given_output(arguments), effort=effort)
    seconds = None if arguments.dry_run else time.perf_counter() - begun_s
    verb = "would write" if seconds is None else "wrote"
    duration = "" if seconds is None else f" in {human_seconds(seconds)}"
    agrees = "" if done.compared is None else f"; the model agrees with {done.compared.name}"
    size = human_bytes(sum(done.files.values()))
    line = f"{verb} {counted(len(done.files), 'file')} ({size}) to {done.folder}{duration}{agrees}"
    follows = after.After() if done.compared is None else after.described(arguments.root)
    after.answer(arguments, line, done.to_json(), done.files, follows, seconds=seconds)
    return usage.EXIT_DONE


def add_index(commands: usage.Commands) -> None:
    """Declare ``index``."""
    usage.declare(
        commands,
        "index",
        _add_index_options,
        _index,
        "Write a small index beside the shards of a checkpoint, so that TensorStore opens every weight lazily.",
        "Nothing is converted: the index refers to byte ranges of the shards. TensorStore then opens "
        "file://ITERATION/|ocdbt:hf/NAME/|zarr3: by Hugging Face name and megatron/KEY by Megatron's key. The index "
        "holds for as long as the shards stay as they are. Needs neither torch nor Megatron nor TensorStore.",
        examples=(
            "index ckpt",
            "index ckpt --config hf_dir --kerchunk weights.json",
            "index ckpt --check",
        ),
        json_fields={
            "up_to_date": "whether the index that is there now holds",
            "problems": "list of the reasons why not",
            "output": "directory of the shards and the index; this and what follows is not there with --check",
            "names": "list of the arrays in it, hf/NAME and megatron/KEY",
            "num_bytes": "size of the index",
            "left_out": "Hugging Face name -> why the index cannot have this weight",
            "was_stale": "list of the reasons why an older index did not hold",
            "dry_run": "false",
            "seconds": "how long it took",
            "next": "list of lines that go on from here",
        },
        with_numpy=True,
    )


def _add_index_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("checkpoint", metavar="CKPT", type=values.path, help=options.CKPT)
    options.add_config(command)
    help_text = "write nothing: exit with 3 if the index that is there is out of date, and say why"
    command.add_argument("--check", action="store_true", help=help_text)
    help_text = "also write the index as references of kerchunk to FILE, for fsspec"
    command.add_argument("--kerchunk", type=values.path, metavar="FILE", help=help_text)


def _index(arguments: argparse.Namespace) -> int:
    from dist_ckpt_mistral.cli import after, notes
    from dist_ckpt_mistral.views.tensorstore_index import write_index

    if arguments.check:
        return _check_index(arguments)
    begun_s = time.perf_counter()
    done = write_index(arguments.checkpoint, config=options.given_config(arguments), kerchunk=arguments.kerchunk)
    seconds = time.perf_counter() - begun_s
    if done.was_stale:
        notes.say(f"the index that was there was out of date: {'; '.join(done.was_stale)}")
    for name, why in done.left_out.items():
        notes.say(f"left out: {name}: {why}")
    arrays = f"{counted(len(done.names), 'array')} ({human_bytes(done.num_bytes)})"
    line = f"wrote an index of {arrays} to {done.directory} in {human_seconds(seconds)}"
    content = {"up_to_date": True, "problems": [], **done.to_json()}
    after.answer(arguments, line, content, {}, after.indexed(done.directory, done.names), seconds=seconds)
    return usage.EXIT_DONE


def _check_index(arguments: argparse.Namespace) -> int:
    from dist_ckpt_mistral.views.tensorstore_index import index_problems

    problems = index_problems(arguments.checkpoint)
    if arguments.json:
        output.say_json({"up_to_date": not problems, "problems": list(problems)})
    else:
        for problem in problems:
            output.say(problem)
        output.say(f"the index is {'out of date: run index again' if problems else 'up to date, or there is none'}")
    return usage.EXIT_DIFFERENT if problems else usage.EXIT_DONE
