"""The demo: convert a small random model to Megatron and back, offline and without a GPU, and check every step."""

from __future__ import annotations

import contextlib
import filecmp
import json
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata, resources
from pathlib import Path
from typing import Any, Final

from dist_ckpt_mistral import libraries
from dist_ckpt_mistral.analysis import compare
from dist_ckpt_mistral.cli.processes import run_ranks
from dist_ckpt_mistral.convert import from_hf, to_hf
from dist_ckpt_mistral.errors import DistCkptMistralError, OutputError
from dist_ckpt_mistral.formats import checkpoint_directory
from dist_ckpt_mistral.formats.checksums import CHECKSUMS_FILE
from dist_ckpt_mistral.messages import human_bytes
from dist_ckpt_mistral.model.layout.layout import ParallelLayout

#: Modules that the demo needs beyond this package.
_MODULES: Final = ("torch", "megatron.core", "transformers", "safetensors", "mistral_common")
#: A small Mistral, with grouped queries and a head dimension other than hidden_size / num_attention_heads.
_SIZES: Final = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "sliding_window": None,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LAYOUT: Final = ParallelLayout(tp=2, pp=2)
_TEXT: Final = "Mistral models on Megatron, and back."
#: Four processes that import Megatron start slowly on a machine with few cores and a cold disk.
_RANKS_TIMEOUT_S: Final = 600

Say = Callable[[str], None]


def run(keep: Path | None, say: Say) -> None:
    """Run the demo and print its steps with ``say``. The files stay in ``keep`` (new or empty), or are deleted.

    Raises DistCkptMistralError if a package is missing or a check fails.
    """
    libraries.require("the demo", *_MODULES, extra="demo")
    if keep is not None and keep.exists() and (not keep.is_dir() or any(keep.iterdir())):
        raise OutputError(f"{keep} is not an empty directory. Give --keep the name of a new one.")
    versions = ", ".join(map(_with_version, ("megatron-core", "torch", "transformers")))
    say("A Mistral model goes from Hugging Face to Megatron and back. This needs no GPU and no network.")
    say(f"Here: {versions}.")
    with contextlib.ExitStack() as stack:
        folder = keep if keep is not None else Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        total_seconds = stack.enter_context(_timed())
        stack.enter_context(_quiet())
        original, checkpoint, export = folder / "original", folder / "checkpoint", folder / "export"
        _make(original, say)
        _import(original, checkpoint, say)
        _load(original, checkpoint, say)
        _export(checkpoint, export, say)
        _compare(original, checkpoint, export, say)
    say(f"\nDone in {total_seconds():.0f} s: the export equals the original, and Megatron loaded the checkpoint.")
    say(f"The files are in {keep}." if keep is not None else "The files are deleted; --keep DIR keeps them.")
    say("Next: dist-ckpt-mistral from-hf YOUR_MODEL CKPT, then train on it, then dist-ckpt-mistral to-hf CKPT OUT.")


def _make(original: Path, say: Say) -> None:
    say("\n1. Make a small Mistral in Hugging Face's format: random weights in bfloat16, a real Mistral tokenizer.")
    _make_model(original)
    _say_files(original, say)


def _import(original: Path, checkpoint: Path, say: Say) -> None:
    say("\n2. Import it: from-hf writes a Megatron checkpoint. It copies bytes and does not need Megatron.")
    with _timed() as seconds:
        done = from_hf.from_hf(original, checkpoint)
    say(f"   {done.num_tensors} tensors, {human_bytes(done.num_bytes)} in {seconds():.2f} s:")
    _say_files(checkpoint, say)


def _load(original: Path, checkpoint: Path, say: Say) -> None:
    layout = f"tensor parallel {_LAYOUT.tp} x pipeline parallel {_LAYOUT.pp}"
    say(f"\n3. Load it with Megatron at {layout}: in each of {_LAYOUT.world_size} processes,")
    say("   Megatron's own dist_checkpointing.load fills the tensors of one rank. All of them are compared with their")
    say("   rows in the original files.")
    with _timed() as seconds:
        outcomes = _load_with_megatron(original, checkpoint / checkpoint_directory.iteration_name(None))
    for rank, outcome in enumerate(outcomes):
        say(f"   {_rank_line(rank, outcome)}")
    load_seconds = max(outcome["load_seconds"] for outcome in outcomes)
    durations = f"load {load_seconds:.1f} s, with Megatron's start {seconds():.0f} s"
    say(f"   All {_LAYOUT.world_size} hold the right rows, bit for bit ({durations}).")


def _export(checkpoint: Path, export: Path, say: Say) -> None:
    say("\n4. Export it: to-hf writes the Hugging Face files from the checkpoint.")
    with _timed() as seconds:
        done = to_hf.to_hf(checkpoint, export)
    say(f"   {done.num_tensors} tensors, {human_bytes(done.num_bytes)} in {seconds():.2f} s.")


def _compare(original: Path, checkpoint: Path, export: Path, say: Say) -> None:
    say("\n5. Compare.")
    for copy in (checkpoint, export):
        outcome = compare.compare(original, copy)
        if not outcome.is_equal:
            raise DistCkptMistralError(f"{copy} differs from {original}: {outcome.differences}")
        say(f"   original = {copy.name}: {outcome.num_tensors} tensors, {human_bytes(outcome.num_bytes)}, bit for bit.")
    names = sorted(path.name for path in original.iterdir())
    equal, *_ = filecmp.cmpfiles(original, export, names, shallow=False)
    added = {path.name for path in export.iterdir()} - {*names, CHECKSUMS_FILE}
    if sorted(equal) != names or added:
        differing = sorted(added | set(names) - set(equal))
        raise DistCkptMistralError(f"files differ between {original} and {export}: {differing}")
    say(f"   All {len(names)} files of the export equal the originals, byte for byte.")
    _compare_logits(original, export, say)


def _with_version(package: str) -> str:
    with contextlib.suppress(
        metadata.PackageNotFoundError
    ):  # a module from a source tree, such as Megatron-LM's, has no version
        return f"{package} {metadata.version(package)}"
    return package


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence all notes and warnings, this package's too, and keep libraries off the network."""
    offline = os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported
    logging.disable(logging.WARNING)
    try:
        with libraries.quiet():
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


def _make_model(directory: Path) -> None:
    """Save a random model and a real tokenizer. Raises DistCkptMistralError if mistral-common has no tekken file."""
    import torch
    import transformers

    data = Path(str(resources.files("mistral_common"))) / "data"
    tokenizers = sorted(data.glob("tekken_*.json"))  # the first and oldest is Mistral Nemo's
    if not tokenizers:
        raise DistCkptMistralError(f"the demo needs a tekken_*.json in {data}: this mistral-common has none.")
    vocabulary = json.loads(tokenizers[0].read_bytes())["config"]["default_vocab_size"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        config = transformers.MistralConfig(**_SIZES, vocab_size=vocabulary, tie_word_embeddings=False)
        model = transformers.MistralForCausalLM(config).to(torch.bfloat16)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.normal_(1.0, 0.1)  # norms are initialized to ones, which would hide swapped tensors
    model.save_pretrained(directory, max_shard_size="20MB")
    shutil.copyfile(tokenizers[0], directory / "tekken.json")


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
    check = [sys.executable, "-m", "dist_ckpt_mistral.megatron.load_check"]
    layout = [f"--tp={_LAYOUT.tp}", f"--pp={_LAYOUT.pp}", f"--parent={os.getpid()}"]
    with tempfile.TemporaryDirectory() as reports:
        paths = [path.absolute() for path in (hf, iteration, Path(reports))]
        ranks = range(_LAYOUT.world_size)
        run_ranks(
            [[*check, f"--rank={rank}", *layout, *paths] for rank in ranks], Path(reports), timeout_s=_RANKS_TIMEOUT_S
        )
        outcomes = [json.loads(Path(reports, f"rank{rank}.json").read_bytes()) for rank in ranks]
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
