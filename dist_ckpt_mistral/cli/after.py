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
    if arguments.json:
        following = [] if seconds is None else [step.line for step in after.steps]
        answer = {**content, "dry_run": seconds is None, "seconds": seconds, "next": following}
        output.say_json(answer, letters=True)
        return
    output.say(line)
    if seconds is None:
        for name, num_bytes in files.items():
            output.say(f"  {name}  {human_bytes(num_bytes)}")
    elif not arguments.quiet:
        where = [after.where] if after.where else []
        for more in [*where, *(f"{step.purpose}: {step.line}" for step in after.steps)]:
            output.say(more)


def imported(root: Path, iteration: int | None, done: Conversion) -> After:
    """After from-hf: the folders, and the flags to train with."""
    folder = root / checkpoint_directory.iteration_name(iteration)
    small = folder / small_files.ASSETS_FOLDER
    where = f"{folder} has the weights, {small} the small files that came with them"
    if done.is_adapter:
        return After(where=where, steps=(_command("look at it with", "inspect", root),))
    return After(where=where, steps=(_command("train it with the flags of", "megatron-args", root),))


def exported(checkpoint: Path, done: Conversion) -> After:
    """After to-hf: how to load it, and how to compare it with what it was made of."""
    compared = _command("compare it with", "verify", checkpoint, done.output)
    if isinstance(done.output, RemotePath):
        return After(steps=(compared,))
    if done.is_adapter:
        return After(steps=(_python("load it with", f"peft.PeftModel.from_pretrained(model, {str(done.output)!r})"),))
    loaded = _python("load it with", f"transformers.AutoModelForCausalLM.from_pretrained({str(done.output)!r})")
    return After(steps=(loaded, compared))


def resharded(layout: ParallelLayout, done: Conversion) -> After:
    """After reshard: the flags to train with at that layout."""
    if done.is_adapter:
        return After(steps=(_command("look at it with", "inspect", done.output),))
    return After(steps=(_command("train it with the flags of", "megatron-args", done.output, *layout.options),))


def migrated(done: Conversion) -> After:
    """After migrate: how to look at it, and to export it."""
    return After(
        steps=(
            _command("look at it with", "inspect", done.output),
            _command("export it with", "to-hf", done.output, _NEW_HF),
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
