"""The whole story on a small model made on the spot: Hugging Face, Megatron, and back. Offline, without a GPU."""

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
from dist_ckpt_mistral.formats.integrity import MANIFEST_FILE
from dist_ckpt_mistral.messages import human_bytes
from dist_ckpt_mistral.model.layout.layout import ParallelLayout

#: What the demo needs beyond this package.
_NEEDED: Final = ("torch", "megatron.core", "transformers", "safetensors", "mistral_common")
#: Mistral's proportions in small: grouped queries, and heads whose dimension is not hidden / heads.
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
#: Starting four Pythons with megatron takes a while on a machine with few cores and a cold disk.
_RANKS_TIMEOUT_S: Final = 600

Say = Callable[[str], None]


def run(keep: Path | None, say: Say) -> None:
    """Tell and prove the story, line by line through ``say``; the files go to ``keep`` (new or empty) or vanish.

    Raises DistCkptMistralError if a package is missing or anything does not come out as it must.
    """
    libraries.require("the demo", *_NEEDED, extra="demo")
    if keep is not None and keep.exists() and (not keep.is_dir() or any(keep.iterdir())):
        raise OutputError(f"{keep} is not an empty directory. Give --keep the name of a new one.")
    versions = ", ".join(map(_with_version, ("megatron-core", "torch", "transformers")))
    say("A Mistral model goes from Hugging Face to Megatron and back. This needs no GPU and no network.")
    say(f"Here: {versions}.")
    with contextlib.ExitStack() as stack:
        folder = keep if keep is not None else Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        all_seconds = stack.enter_context(_timed())
        stack.enter_context(_quiet())
        original, checkpoint, export = folder / "original", folder / "checkpoint", folder / "export"
        _make(original, say)
        _import(original, checkpoint, say)
        _load(original, checkpoint, say)
        _export(checkpoint, export, say)
        _compare(original, checkpoint, export, say)
    say(f"\nDone in {all_seconds():.0f} s: what went in came out, and Megatron read it on the way.")
    say(f"The files are in {keep}." if keep is not None else "The files are gone again; --keep DIR leaves them.")
    say("Next: dist-ckpt-mistral from-hf YOUR_MODEL CKPT, then train on it, then dist-ckpt-mistral to-hf CKPT OUT.")


def _make(original: Path, say: Say) -> None:
    say("\n1. Make a small Mistral, as Hugging Face stores it: random weights in bfloat16, a real Mistral tokenizer.")
    _make_model(original)
    _say_files(original, say)


def _import(original: Path, checkpoint: Path, say: Say) -> None:
    say("\n2. Import it: from-hf writes a Megatron checkpoint. It copies bytes; Megatron takes no part in it.")
    with _timed() as seconds:
        done = from_hf.from_hf(original, checkpoint)
    say(f"   {done.num_tensors} tensors, {human_bytes(done.num_bytes)} in {seconds():.2f} s:")
    _say_files(checkpoint, say)


def _load(original: Path, checkpoint: Path, say: Say) -> None:
    layout = f"tensor parallel {_LAYOUT.tp} x pipeline parallel {_LAYOUT.pp}"
    say(f"\n3. Let Megatron load it at {layout}: in {_LAYOUT.world_size} processes Megatron's own")
    say("   dist_checkpointing.load fills what that rank holds; the result is compared with the rows of the original")
    say("   files that belong there.")
    with _timed() as seconds:
        outcomes = _load_with_megatron(original, checkpoint / checkpoint_directory.iteration_name(None))
    for rank, outcome in enumerate(outcomes):
        say(f"   {_rank_line(rank, outcome)}")
    load_seconds = max(outcome["load_seconds"] for outcome in outcomes)
    took = f"load {load_seconds:.1f} s, with Megatron's start {seconds():.0f} s"
    say(f"   All {_LAYOUT.world_size} hold the right rows, bit for bit ({took}).")


def _export(checkpoint: Path, export: Path, say: Say) -> None:
    say("\n4. Export it: to-hf gathers the Hugging Face files out of the checkpoint.")
    with _timed() as seconds:
        done = to_hf.to_hf(checkpoint, export)
    say(f"   {done.num_tensors} tensors, {human_bytes(done.num_bytes)} in {seconds():.2f} s.")


def _compare(original: Path, checkpoint: Path, export: Path, say: Say) -> None:
    say("\n5. Compare.")
    for other in (checkpoint, export):
        outcome = compare.compare(original, other)
        if not outcome.is_equal:
            raise DistCkptMistralError(f"{other} differs from {original}: {outcome.differences}")
        say(
            f"   original = {other.name}: {outcome.num_tensors} tensors, {human_bytes(outcome.num_bytes)}, bit for bit."
        )
    names = sorted(path.name for path in original.iterdir())
    same, *_ = filecmp.cmpfiles(original, export, names, shallow=False)
    more = {path.name for path in export.iterdir()} - {*names, MANIFEST_FILE}
    if sorted(same) != names or more:
        differing = sorted(more | set(names) - set(same))
        raise DistCkptMistralError(f"files differ between {original} and {export}: {differing}")
    say(f"   All {len(names)} files of the export equal the originals, byte for byte.")
    _compare_logits(original, export, say)


def _with_version(package: str) -> str:
    with contextlib.suppress(metadata.PackageNotFoundError):  # Megatron-LM's source tree on the path, for one
        return f"{package} {metadata.version(package)}"
    return package


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back all notes and warnings, our own too, and keep libraries off the network."""
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
    """Gives a function that tells how many seconds the block took."""
    started = time.perf_counter()
    ended: list[float] = []
    yield lambda: ended[0] - started
    ended.append(time.perf_counter())


def _make_model(directory: Path) -> None:
    """Save a random model and a tokenizer of Mistral's. Raises DistCkptMistralError if mistral-common brings none."""
    import torch  # noqa: PLC0415  (the demo only)
    import transformers  # noqa: PLC0415

    data = Path(str(resources.files("mistral_common"))) / "data"
    tokenizers = sorted(data.glob("tekken_*.json"))  # the oldest is Mistral Nemo's
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
                    parameter.normal_(1.0, 0.1)  # norms start as ones, which would hide a swap
    model.save_pretrained(directory, max_shard_size="20MB")
    shutil.copyfile(tokenizers[0], directory / "tekken.json")


def _say_files(directory: Path, say: Say) -> None:
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            say(f"   {path.relative_to(directory.parent)!s:<52}{human_bytes(path.stat().st_size):>10}")


def _rank_line(rank: int, outcome: Mapping[str, Any]) -> str:
    at = _LAYOUT.coordinates(rank)
    layers = outcome["layers"]
    held = f"layers {layers[0]} to {layers[-1]}, {', '.join(outcome['others'])}"
    return (
        f"rank {rank} (tensor {at.tp}, pipeline {at.pp}): {outcome['num_tensors']} tensors, "
        f"{human_bytes(outcome['num_bytes'])}: {held}"
    )


def _load_with_megatron(hf: Path, iteration: Path) -> list[dict[str, Any]]:
    """Run ``megatron.load_check`` on every rank of the layout; what each found. Nothing of it outlives this call."""
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
        raise DistCkptMistralError(f"Megatron loaded other rows than the original files hold, by rank: {different}")
    return outcomes


def _compare_logits(original: Path, export: Path, say: Say) -> None:
    import torch  # noqa: PLC0415  (the demo only)
    import transformers  # noqa: PLC0415

    tokenizer = transformers.AutoTokenizer.from_pretrained(export)
    tokens = tokenizer(_TEXT)["input_ids"]
    logits = []
    for directory in (original, export):
        model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
        with torch.no_grad():
            logits.append(model(torch.tensor([tokens])).logits)
    if not torch.equal(*logits):
        raise DistCkptMistralError(f"transformers computes other logits from {export} than from {original}")
    if _TEXT not in tokenizer.decode(tokens):
        raise DistCkptMistralError(f"the tokenizer in {export} does not give back the text {_TEXT!r}")
    say(f"   transformers loads the export; its tokenizer makes {len(tokens)} tokens of {_TEXT!r},")
    say(f"   and all {logits[0].numel():,} logits that they give are those of the original model.")
