"""The demo: convert a small random model to Megatron and back, offline and without a GPU, and check every step."""

from __future__ import annotations

import contextlib
import filecmp
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from dist_ckpt_mistral import libraries
from dist_ckpt_mistral.analysis import compare, damage, report, report_table
from dist_ckpt_mistral.cli.demo_model import make_model
from dist_ckpt_mistral.cli.processes import run_forked_ranks
from dist_ckpt_mistral.convert import from_hf, reshard, to_hf
from dist_ckpt_mistral.convert.conversion import Conversion, conversion_line
from dist_ckpt_mistral.errors import DistCkptMistralError, OutputError
from dist_ckpt_mistral.formats import checkpoint_directory
from dist_ckpt_mistral.formats.checksums import CHECKSUMS_FILE
from dist_ckpt_mistral.messages import human_bytes, listed
from dist_ckpt_mistral.model.layout.layout import ParallelLayout
from dist_ckpt_mistral.storage.paths import as_given, is_url

#: Modules that load the checkpoint with Megatron, and modules that compute with the export.
_MEGATRON: Final = ("torch", "megatron.core")
_TRANSFORMERS: Final = ("torch", "transformers")
_EXTRA: Final = "demo"
_LAYOUT: Final = ParallelLayout(tp=2, pp=2)
_OTHER_TP: Final = 4
_TEXT: Final = "Mistral models on Megatron, and back."
#: Four processes that import Megatron start slowly on a machine with few cores and a cold disk.
_RANKS_TIMEOUT_S: Final = 600
#: Begins the lines that show a command.
_PROMPT: Final = "   $ "

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What the demo did.

    Args:
        output: The directory of its files; None if they are deleted.
        commands: The commands that do the same, in that directory.
        checked: What was found, in words.
        missing: Packages that would check more.
        seconds: How long it took.
    """

    output: Path | None
    commands: tuple[str, ...]
    checked: tuple[str, ...]
    missing: tuple[str, ...]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The content of ``demo --json``, in JSON types."""
        return asdict(self) | {"output": None if self.output is None else str(self.output)}


def run(keep: Path | None, say: Say) -> Outcome:
    """Run the demo and print its steps with ``say``. The files stay in ``keep`` (new or empty), or are deleted.

    Megatron and transformers check its files too, where they are installed. Raises DistCkptMistralError if a check
    fails.
    """
    if keep is not None and is_url(keep):
        raise OutputError(
            f"--keep {as_given(keep)} is a URL: the demo works on this machine. Give it a local directory."
        )
    commands: list[str] = []

    def say_and_note(line: str) -> None:
        commands.extend([line.removeprefix(_PROMPT)] * line.startswith(_PROMPT))
        tell(line)

    tell, say = say, say_and_note
    if keep is not None and keep.exists() and (not keep.is_dir() or any(keep.iterdir())):
        raise OutputError(f"{keep} is not an empty directory. Give --keep the name of a new one.")
    say("A Mistral model goes from Hugging Face to Megatron and back. This needs no GPU and no network.")
    say("Behind each $ stands the command that does the same.")
    with contextlib.ExitStack() as stack:
        folder = keep if keep is not None else Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        total_seconds = stack.enter_context(_timed())
        stack.enter_context(_quiet())
        original, checkpoint, resharded, export = (
            folder / name for name in ("original", "checkpoint", "resharded", "export")
        )
        _make(original, say)
        _import(original, checkpoint, say)
        _inspect(checkpoint, say)
        _reshard(checkpoint, resharded, say)
        _export(resharded, export, say)
        _compare(original, export, say)
        checked = ["the export equals the original"]
        checked += [*_with_megatron(original, checkpoint, say), *_with_transformers(original, export, say)]
    say(f"\nDone in {total_seconds():.1f} s: {', and '.join(checked)}.")
    missing = libraries.missing(*dict.fromkeys((*_MEGATRON, *_TRANSFORMERS)))
    if missing:
        say(f"Not checked with {listed(missing)}, not installed here. Run, and then the demo again:")
        say(f"  {libraries.install_command(_EXTRA)}")
    say(f"The files are in {keep}." if keep is not None else "The files are deleted; --keep DIR keeps them.")
    say("Next: dist-ckpt-mistral from-hf YOUR_MODEL CKPT, then train on it, then dist-ckpt-mistral to-hf CKPT OUT.")
    return Outcome(
        output=keep,
        commands=tuple(commands),
        checked=tuple(checked),
        missing=tuple(missing),
        seconds=total_seconds(),
    )


def _make(original: Path, say: Say) -> None:
    say("\n1. Make a small Mistral in Hugging Face's format: random weights in bfloat16, a tokenizer of bytes.")
    make_model(original)
    _say_files(original, say)


def _import(original: Path, checkpoint: Path, say: Say) -> None:
    say("\n2. Import it: from-hf writes a Megatron checkpoint. It copies bytes and does not need Megatron.")
    say("   $ dist-ckpt-mistral from-hf original checkpoint")
    with _timed() as seconds:
        done = from_hf.from_hf(original, checkpoint)
    _say_done(done, seconds(), say)
    _say_files(checkpoint, say)


def _inspect(checkpoint: Path, say: Say) -> None:
    say("\n3. Look into it, and check it for damage.")
    say("   $ dist-ckpt-mistral inspect checkpoint")
    found = report.inspect(checkpoint)
    if found.problems:
        raise DistCkptMistralError(f"{checkpoint} has problems: {'; '.join(found.problems)}")
    say(f"   {report_table.model_line(found.config or {})}; no problems")
    say("   $ dist-ckpt-mistral verify checkpoint")
    check = damage.check(checkpoint)
    if not check.is_sound:
        raise DistCkptMistralError(f"{checkpoint} is damaged: {check.findings}")
    for line in check.checked:
        say(f"   checked: {line}")


def _reshard(checkpoint: Path, resharded: Path, say: Say) -> None:
    say(f"\n4. Cut it for tensor parallel {_OTHER_TP}: reshard writes the chunks that its ranks read.")
    say(f"   $ dist-ckpt-mistral reshard checkpoint resharded --tp {_OTHER_TP}")
    with _timed() as seconds:
        done = reshard.reshard(checkpoint, resharded, layout=ParallelLayout(tp=_OTHER_TP))
    _say_done(done, seconds(), say)


def _export(checkpoint: Path, export: Path, say: Say) -> None:
    say("\n5. Export that: to-hf writes the Hugging Face files from the checkpoint.")
    say("   $ dist-ckpt-mistral to-hf resharded export")
    with _timed() as seconds:
        done = to_hf.to_hf(checkpoint, export)
    _say_done(done, seconds(), say)


def _compare(original: Path, export: Path, say: Say) -> None:
    say("\n6. Compare.")
    say("   $ dist-ckpt-mistral verify original export")
    outcome = compare.compare(original, export)
    if not outcome.is_equal:
        raise DistCkptMistralError(f"{export} differs from {original}: {outcome.differences}")
    say(f"   equal: {outcome.num_tensors} tensors, {human_bytes(outcome.num_bytes)}, bit for bit")
    names = sorted(path.name for path in original.iterdir())
    equal, *_ = filecmp.cmpfiles(original, export, names, shallow=False)
    added = {path.name for path in export.iterdir()} - {*names, CHECKSUMS_FILE}
    if sorted(equal) != names or added:
        differing = sorted(added | set(names) - set(equal))
        raise DistCkptMistralError(f"files differ between {original} and {export}: {differing}")
    say(f"   All {len(names)} files of the original are in the export, byte for byte.")


def _with_megatron(original: Path, checkpoint: Path, say: Say) -> Iterator[str]:
    """Load the checkpoint with Megatron if it is installed; yield what that showed."""
    if libraries.missing(*_MEGATRON):
        return
    versions = ", ".join(map(_with_version, ("megatron-core", "torch")))
    say(f"\nWith {versions}: load it at tensor parallel {_LAYOUT.tp} x pipeline parallel {_LAYOUT.pp}.")
    say(f"   In each of {_LAYOUT.world_size} processes Megatron's own dist_checkpointing.load fills the tensors of one")
    say("   rank. All of them are compared with their rows in the original files.")
    with _timed() as seconds:
        outcomes = _load_with_megatron(original, checkpoint / checkpoint_directory.iteration_name(None))
    for rank, outcome in enumerate(outcomes):
        say(f"   {_rank_line(rank, outcome)}")
    load_seconds = max(outcome["load_seconds"] for outcome in outcomes)
    durations = f"load {load_seconds:.1f} s, with Megatron's start {seconds():.0f} s"
    say(f"   All {_LAYOUT.world_size} hold the right rows, bit for bit ({durations}).")
    yield "Megatron loaded the checkpoint"


def _with_transformers(original: Path, export: Path, say: Say) -> Iterator[str]:
    """Compute logits with transformers if it is installed; yield what that showed."""
    if libraries.missing(*_TRANSFORMERS):
        return
    say(f"\nWith {_with_version('transformers')}: compute with the export.")
    with libraries.quiet():
        _compare_logits(original, export, say)
    yield "transformers computes the same from both"


def _with_version(package: str) -> str:
    with contextlib.suppress(
        metadata.PackageNotFoundError
    ):  # a module from a source tree, such as Megatron-LM's, has no version
        return f"{package} {metadata.version(package)}"
    return package


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence notes and warnings, this package's too, and keep libraries off the network."""
    offline = os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
        os.environ.pop("HF_HUB_OFFLINE")
        if offline is not None:
            os.environ["HF_HUB_OFFLINE"] = offline


@contextlib.contextmanager
def _timed() -> Iterator[Callable[[], float]]:
    """Measure a block. Yields a function that returns the duration in seconds after the block has ended."""
    started = time.perf_counter()
    ended: list[float] = []
    yield lambda: ended[0] - started
    ended.append(time.perf_counter())


def _say_done(done: Conversion, seconds: float, say: Say) -> None:
    """What the command prints, with the name of the output alone."""
    say(f"   {conversion_line(replace(done, output=Path(done.output.name)), seconds=seconds)}")


def _say_files(directory: Path, say: Say) -> None:
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            say(f"   {path.relative_to(directory.parent)!s:<52}{human_bytes(path.stat().st_size):>10}")


def _rank_line(rank: int, outcome: Mapping[str, Any]) -> str:
    coordinates, layers = _LAYOUT.coordinates(rank), outcome["layers"]
    return (
        f"rank {rank} (tensor {coordinates.tp}, pipeline {coordinates.pp}): {outcome['num_tensors']} tensors, "
        f"{human_bytes(outcome['num_bytes'])}: layers {layers[0]} to {layers[-1]}, {', '.join(outcome['others'])}"
    )


def _load_with_megatron(hf: Path, iteration: Path) -> list[dict[str, Any]]:
    """Run ``megatron.load_check`` on every rank of the layout, and return its report for each rank.

    Raises DistCkptMistralError if a rank fails or loads wrong rows.
    """
    check, count = "dist_ckpt_mistral.megatron.load_check", _LAYOUT.world_size
    layout = [f"--tp={_LAYOUT.tp}", f"--pp={_LAYOUT.pp}"]
    with tempfile.TemporaryDirectory() as reports:
        paths = [path.absolute() for path in (hf, iteration, Path(reports))]
        run_forked_ranks(check, [*layout, *paths], count, Path(reports), timeout_s=_RANKS_TIMEOUT_S)
        outcomes = [json.loads(Path(reports, f"rank{rank}.json").read_bytes()) for rank in range(count)]
    different = {rank: outcome["different"] for rank, outcome in enumerate(outcomes) if outcome["different"]}
    if different:
        raise DistCkptMistralError(f"Megatron loaded rows that differ from the original files, by rank: {different}")
    return outcomes


def _compare_logits(original: Path, export: Path, say: Say) -> None:
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(export)
    tokens = tokenizer(_TEXT)["input_ids"]
    logits = []
    for directory in (original, export):
        model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
        with torch.no_grad():
            logits.append(model(torch.tensor([tokens])).logits)
    if not torch.equal(*logits):
        raise DistCkptMistralError(f"transformers computes different logits from {export} and {original}")
    if _TEXT not in tokenizer.decode(tokens):
        raise DistCkptMistralError(f"the tokenizer in {export} does not decode its tokens to the text {_TEXT!r}")
    say(f"   transformers loads the export. Its tokenizer encodes {_TEXT!r} in {len(tokens)} tokens,")
    say(f"   and all {logits[0].numel():,} logits of them equal those of the original model.")
