"""What a command that wrote something says at its end: the result, what lies where, and what to do next."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from dist_ckpt_mistral.cli import output
from dist_ckpt_mistral.cli.usage import PROGRAM
from dist_ckpt_mistral.formats import checkpoint_directory, small_files
from dist_ckpt_mistral.messages import command_line, human_bytes
from dist_ckpt_mistral.storage.remote_path import RemotePath

if TYPE_CHECKING:
    from dist_ckpt_mistral.convert.conversion import Conversion
    from dist_ckpt_mistral.model.layout.layout import ParallelLayout

#: Stands for a name that the user chooses.
_NEW_HF: Final = "HF_DIR"


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What to do next: ``purpose`` in words, and the ``line`` of a shell or of Python that does it."""

    purpose: str
    line: str


@dataclass(frozen=True, slots=True, kw_only=True)
class After:
    """What follows a command: ``where`` what lies, in words, and what to do next."""

    where: str = ""
    steps: tuple[Step, ...] = ()


def answer(
    arguments: argparse.Namespace,
    line: str,
    content: Mapping[str, object],
    files: Mapping[str, int],
    after: After,
    *,
    seconds: float | None,
) -> None:
    """Print ``content`` as JSON, or else ``line``, and below it the ``files`` of a dry run or what comes ``after``.

    ``seconds`` is how long it took; None for a dry run, after which nothing comes.
    """
    steps = (*_steps_into_output(), *after.steps)
    if arguments.json:
        following = [] if seconds is None else [step.line for step in steps]
        answer = {**content, "dry_run": seconds is None, "seconds": seconds, "next": following}
        output.say_json(answer, letters=True)
        return
    output.say(line)
    if seconds is None:
        for name, num_bytes in files.items():
            output.say(f"  {name}  {human_bytes(num_bytes)}")
    elif not arguments.quiet:
        where = [after.where] if after.where else []
        for more in [*where, *(f"{step.purpose}: {step.line}" for step in steps)]:
            output.say(more)


def _steps_into_output() -> tuple[Step, ...]:
    """What a shell does whose current directory the output replaced: it is in the old one, which was removed."""
    try:
        Path.cwd()
    except FileNotFoundError:
        return (Step(purpose="the output took the place of the current directory; enter it with", line="cd ."),)
    return ()


def imported(root: Path, iteration: int | None, done: Conversion) -> After:
    """After from-hf: the folders, and the flags to train with."""
    folder = root / checkpoint_directory.iteration_name(iteration)
    small = folder / small_files.ASSETS_FOLDER
    where = f"{folder} has the weights, {small} the small files that came with them"
    if done.is_adapter:
        return After(where=where, steps=(_command("look at it with", "inspect", root),))
    return After(where=where, steps=(_command("train it with the flags of", "megatron-args", root),))


def exported(checkpoint: Path, config: Sequence[str], done: Conversion, *, are_same_bits: bool) -> After:
    """After to-hf: how to load it, and if the bits are those of the checkpoint, how to compare it with that.

    ``config`` are the options that gave the configuration: without them, the comparison would take another one.
    """
    compared = (_command("compare it with", "verify", checkpoint, done.output, *config),) if are_same_bits else ()
    if isinstance(done.output, RemotePath):
        return After(steps=compared)
    if done.is_adapter:
        return After(steps=(_python("load it with", f"peft.PeftModel.from_pretrained(model, {str(done.output)!r})"),))
    loaded = _python("load it with", f"transformers.AutoModelForCausalLM.from_pretrained({str(done.output)!r})")
    return After(steps=(loaded, *compared))


def resharded(layout: ParallelLayout, config: Sequence[str], done: Conversion) -> After:
    """After reshard: the flags to train with at that layout, if Megatron-LM can load what has this name.

    ``config`` are the options that gave the configuration: the output has no more of it than the checkpoint had.
    """
    names = (done.output.name, *(name.partition("/")[0] for name in done.files))  # of an iteration, or of its root
    if done.is_adapter or not any(map(checkpoint_directory.iteration_of, names)):
        return After(steps=(_command("look at it with", "inspect", done.output, *config),))
    words = [done.output, *layout.options, *config]
    return After(steps=(_command("train it with the flags of", "megatron-args", *words),))


def migrated(config: Sequence[str], done: Conversion) -> After:
    """After migrate: how to look at it, and to export it, with the options that gave the configuration."""
    return After(
        steps=(
            _command("look at it with", "inspect", done.output, *config),
            _command("export it with", "to-hf", done.output, _NEW_HF, *config),
        )
    )


def described(root: Path) -> After:
    """After describe: the export that needs no --config now."""
    return After(steps=(_command("export an iteration with", "to-hf", root, _NEW_HF),))


def indexed(directory: Path, names: Sequence[str]) -> After:
    """After index: how TensorStore opens a weight."""
    if isinstance(directory, RemotePath) or not names:
        return After()
    place = f"file://{directory.absolute()}/|ocdbt:{names[0]}/|zarr3:"
    return After(steps=(_python("open a weight with", f"tensorstore.open({place!r}).result()"),))


def _command(purpose: str, *words: object) -> Step:
    return Step(purpose=purpose, line=command_line([PROGRAM, *map(str, words)]))


def _python(purpose: str, line: str) -> Step:
    return Step(purpose=purpose, line=line)
