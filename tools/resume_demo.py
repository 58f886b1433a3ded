"""Stop a training at one parallel layout and resume it at others: ``python tools/resume_demo.py [--png FILE]``.

The demo makes a small Hugging Face model with random weights and imports it with ``from-hf``. It trains the model with
Megatron on four CPU processes, saves a checkpoint, and resumes it at six layouts. It exports the result with ``to-hf``.
A table, and with ``--png`` or ``--svg`` a picture, compares the losses with those of the training that never stopped.
Needs ``pip install -e '.[demo]'``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from resume_picture import draw
from resume_runs import (
    BEGUN_AT,
    EXPORTED_AT,
    LAYOUTS,
    OPTIMIZERS,
    OTHERS,
    PARTS,
    RESHARDED_AT,
    SAVED_AFTER,
    STEPS,
    TOLERANCE,
    WORLD_SIZE,
    Story,
    batch,
    never_stopped,
    resharded_to,
    resumed_at,
    resumed_without,
    runs,
)

from dist_ckpt_mistral.cli.processes import run_forked_ranks
from dist_ckpt_mistral.convert.from_hf import from_hf
from dist_ckpt_mistral.convert.to_hf import to_hf

#: A small Mistral model. No layout pads its vocabulary, because padding takes part in Megatron's loss.
_SIZES: Final = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "sliding_window": None,
    "tie_word_embeddings": False,
}
_TIMEOUT_S: Final = 900
_COLUMN: Final = 33


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo and print its tables. Returns 1 if a loss is off by more than TOLERANCE, else 0."""
    parser = argparse.ArgumentParser(description="Resume a training at other parallel layouts, on a CPU.")
    parser.add_argument(
        "--optimizer", nargs="+", choices=OPTIMIZERS, default=["distributed"], help="Megatron's optimizers"
    )
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw a picture as PNG")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw a picture as SVG")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep models and checkpoints in this new directory")
    options = parser.parse_args(arguments)
    with contextlib.ExitStack() as stack:
        stack.enter_context(quiet_and_tidy())
        folder = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stories = [report(story) for story in train(folder, options.optimizer)]
        for picture in filter(None, (options.png, options.svg)):
            draw(stories, picture)
    return 0 if all(story.is_good for story in stories) else 1


@contextlib.contextmanager
def quiet_and_tidy() -> Iterator[None]:
    """Within the block libraries print no warnings and progress bars, and SIGTERM also ends the ranks."""
    on_terminate = signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.utils.logging.enable_progress_bar()
        logging.disable(logging.NOTSET)
        signal.signal(signal.SIGTERM, on_terminate)


def train(folder: Path, optimizers: Sequence[str]) -> list[Story]:
    """Import a model, do all runs, and export the results. Models and checkpoints are in ``folder`` afterwards."""
    hf, checkpoint = folder / "hf", folder / "checkpoint"
    make_model(hf)
    from_hf(hf, checkpoint)
    planned = runs(optimizers, checkpoint, folder)
    (folder / "job.json").write_text(json.dumps({"hf": str(hf), "runs": [asdict(run) for run in planned]}))
    run_forked_ranks("resume_ranks", [folder], WORLD_SIZE, folder, timeout_s=_TIMEOUT_S)
    measured = results(folder)[0]
    stories = []
    for optimizer in optimizers:
        exported = folder / optimizer / "hf"
        to_hf(folder / optimizer / "ended", exported, config=hf)
        by_name = {run.name: measured[run.key] for run in planned if run.optimizer == optimizer}
        stories.append(
            Story(
                optimizer=optimizer,
                losses={
                    name: {int(step): loss for step, loss in run["losses"].items()} for name, run in by_name.items()
                },
                megatron_loss=by_name[resumed_at(EXPORTED_AT)]["float32_loss"],
                hf_loss=hugging_face_loss(exported),
            )
        )
    return stories


def results(folder: Path) -> list[dict[str, Any]]:
    """The measurements of each rank, by the key of the run."""
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(WORLD_SIZE)]


def hugging_face_loss(directory: Path) -> float:
    """The mean loss in nats on the batch after the last step, computed by transformers in float32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokens = torch.tensor(batch(STEPS, model.config.vocab_size))
    with torch.no_grad():
        return float(model(tokens, labels=tokens).loss)


def make_model(directory: Path) -> None:
    """Save a bfloat16 model with random weights, the same in each run of the demo."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.MistralForCausalLM(transformers.MistralConfig(**_SIZES))
    model.to(torch.bfloat16).save_pretrained(directory)


def report(story: Story) -> Story:
    """Print the table of the runs with one optimizer, and what it shows."""
    steps = range(SAVED_AFTER + 1, STEPS + 1)
    print(f"\n{OPTIMIZERS[story.optimizer]}: losses in nats, checkpoint after step {SAVED_AFTER}\n")
    print(f"{'step':>{_COLUMN}}{''.join(f'{step:>8}' for step in steps)}   largest difference")
    names = [never_stopped(BEGUN_AT), "", *map(resumed_at, LAYOUTS), resharded_to(RESHARDED_AT), ""]
    names += [*map(never_stopped, OTHERS), "", *map(resumed_without, PARTS)]
    for name in names:
        print(_line(name, story, steps) if name else "")
    print(
        f"\nResumed at {len(LAYOUTS)} layouts, the losses go on as if training had not stopped: they differ by at most "
        f"{story.resumed:.5f} (tolerance {TOLERANCE}).\n"
        f"Trainings that never stopped differ between layouts by up to {story.unstopped:.5f}, because sums are rounded "
        f"in another order.\nA lost part of the state makes a difference of at least {story.lost:.5f}.\n"
        f"The model trained to the end at {EXPORTED_AT} and exported with to-hf has the loss {story.hf_loss:.6f} in "
        f"transformers, and {story.megatron_loss:.6f} in Megatron (float32)."
    )
    return story


def _line(name: str, story: Story, steps: range) -> str:
    """One line of the table: the losses of a run, and the largest difference."""
    losses = "".join(f"{story.losses[name][step]:>8.4f}" for step in steps)
    difference = "" if name == never_stopped(BEGUN_AT) else f"{story.difference(name):>12.5f}"
    return f"{name:>{_COLUMN}}{losses}{difference}"


if __name__ == "__main__":
    sys.exit(main())
