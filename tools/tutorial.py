"""A Mistral model goes through a training with Megatron-LM and back: ``python tools/tutorial.py [--keep DIR]``.

Read it from top to bottom: make a model, import it, train it at one parallel layout, resume the training at another,
export the result, verify it. All runs on four CPU processes, in a minute or two. In your work a training is a torchrun
of ``pretrain_gpt.py`` on GPUs; everything else is the same. Needs ``pip install -e '.[demo]'`` and megatron-core 0.19
(Python 3.12 or newer), whose wheels have ``megatron.training``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import dist_ckpt_mistral as dcm
from dist_ckpt_mistral.cli.processes import run_forked_ranks

SAVED_AT: Final = dcm.ParallelLayout(tp=2, pp=2)
RESUMED_AT: Final = dcm.ParallelLayout(dp=4)
_RANKS: Final = 4
_TIMEOUT_S: Final = 570


def tutorial(folder: Path) -> None:
    """Go the whole way; everything is in ``folder`` afterwards."""
    hf, root, out = folder / "hf", folder / "root", folder / "out"

    print("1. Make a Hugging Face model, with tokenizer and chat template. Yours is a directory or a hub id.")
    make_model(hf)

    print("2. Import it: $ dist-ckpt-mistral from-hf hf root")
    imported = dcm.from_hf(hf, root)
    print(
        f"   {imported.num_tensors} tensors, {imported.num_bytes} bytes. The root also describes the model, for step 5."
    )

    print(f"3. Train at {named(SAVED_AT)}, with the flags of: $ dist-ckpt-mistral megatron-args root --tp 2 --pp 2")
    losses = train(folder, root, SAVED_AT, steps=2)
    print(f"   Megatron-LM saved iteration 2. Losses: {listed(losses)}")

    print(f"4. Resume at {named(RESUMED_AT)}: only the flags of the layout are others. Megatron's load does the rest.")
    losses = train(folder, root, RESUMED_AT, steps=1)
    print(f"   Megatron-LM resumed with its optimizer, and saved iteration 3. Loss: {listed(losses)}")

    print("5. Export the last iteration: $ dist-ckpt-mistral to-hf root out")
    exported = dcm.to_hf(root, out)
    print(f"   The configuration is from {exported.config_from}.")

    print("6. Verify: $ dist-ckpt-mistral verify root out; dist-ckpt-mistral verify out")
    same, sound, trained = dcm.compare(root, out), dcm.check(out), dcm.compare(hf, out)
    if not (same.is_equal and sound.is_sound) or trained.is_equal:
        raise SystemExit(f"{out} is not what was trained: {same}, {sound}, {trained}")
    print(f"   {same.num_tensors} tensors equal those of the checkpoint, bit for bit, and no file is damaged.")
    print(f"   {say_something(out)}")


def make_model(hf: Path) -> None:
    """A small model with random weights, saved by transformers."""
    import resume_demo  # noqa: PLC0415  (imports transformers, which ranks do without)
    import transformers  # noqa: PLC0415  (likewise)
    from tokenizers import Tokenizer, models  # noqa: PLC0415  (likewise)

    resume_demo.make_model(hf)
    words = Tokenizer(models.WordLevel({"?": 0, "a": 1, "b": 2}, "?"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?")  # noqa: S106  (no secret)
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    )
    tokenizer.save_pretrained(hf)


def train(folder: Path, root: Path, layout: dcm.ParallelLayout, *, steps: int) -> list[float]:
    """Start a training as torchrun does, and wait for it. Returns the loss of each step, in nats."""
    flags = [*dcm.megatron_args(root, layout=layout).flags, "--save", str(root)]
    sizes = {"tp": layout.tp, "pp": layout.pp, "dp": layout.dp}
    job = {"flags": flags, "layout": sizes, "steps": steps, "hf": str(folder / "hf")}
    (folder / "job.json").write_text(json.dumps(job))
    slow = ("resume_cpu", "resume_training")  # import torch and Megatron
    run_forked_ranks("tutorial", ["--rank-of", folder], _RANKS, folder, imports=slow, timeout_s=_TIMEOUT_S)
    losses: list[float] = json.loads((folder / "losses.json").read_text())
    return losses


def pretrain(folder: Path) -> None:
    """One rank: what ``pretrain_gpt.py`` does with these flags, of Megatron-LM's own functions.

    ``Training`` is the GPTModel, optimizer and schedule that it builds, for a small text.
    """
    from resume_cpu import megatron_lm_on_cpu, megatron_lm_started  # noqa: PLC0415  (slow)
    from resume_training import Training, change_layout  # noqa: PLC0415  (slow)

    job = json.loads((folder / "job.json").read_text())
    with megatron_lm_on_cpu():
        layout = dcm.ParallelLayout(**job["layout"])
        change_layout(layout)
        megatron_lm_started(job["flags"])
        training = Training(dcm.MistralConfig.from_hf(job["hf"]), layout, "float16")
        parts: tuple[Any, ...] = (training.trained, training.optimizer, training.schedule)

        from megatron.training.checkpointing import load_checkpoint, save_checkpoint  # noqa: PLC0415  (slow)

        training.steps_done, _ = load_checkpoint(*parts)  # weights of the import, or everything of the last save
        losses = [training.step()[0] for _ in range(job["steps"])]
        save_checkpoint(training.steps_done, *parts, 0)
    if os.environ["RANK"] == "0":
        (folder / "losses.json").write_text(json.dumps(losses))


def say_something(out: Path) -> str:
    """What transformers makes of the export."""
    import transformers  # noqa: PLC0415  (as in make_model)

    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    said = tokenizer.apply_chat_template([{"role": "user", "content": "a b"}], tokenize=False)
    return f"transformers loads {type(model).__name__}, and the chat template says {said!r}."


def named(layout: dcm.ParallelLayout) -> str:
    """The layout in words."""
    return f"TP{layout.tp} x PP{layout.pp} x DP{layout.dp}"


def listed(losses: Sequence[float]) -> str:
    """The losses in words."""
    return ", ".join(f"{loss:.4f}" for loss in losses)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tutorial, or one of its ranks."""
    parser = argparse.ArgumentParser(description="From Hugging Face through Megatron-LM and back, on a CPU.")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep model and checkpoints in this new directory")
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.rank_of is not None:
        pretrain(options.rank_of)
        return 0
    from resume_demo import quiet_and_tidy  # noqa: PLC0415  (as in make_model)

    with contextlib.ExitStack() as stack:
        stack.enter_context(quiet_and_tidy())
        folder = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        tutorial(folder.absolute())
    return 0


if __name__ == "__main__":
    sys.exit(main())
