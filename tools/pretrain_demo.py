"""From Hugging Face through Megatron-LM and back with no flags: ``python tools/pretrain_demo.py [--keep DIR]``.

The demo makes a small Hugging Face model with tokenizer and chat template and imports it with ``from-hf``. Megatron-LM
loads it at TP2 x PP2, trains two steps and saves. It loads that at TP1, trains one more step and saves. ``to-hf``
exports the last save with no flags, and transformers loads model, tokenizer and chat template. Loading and saving are
Megatron-LM's own ``load_checkpoint`` and ``save_checkpoint``. Needs ``pip install -e '.[demo]'`` and megatron-core
0.19, whose wheels have ``megatron.training``.
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
from typing import Final

import transformers
from resume_demo import make_model, quiet_and_tidy
from resume_runs import LAYOUTS, WORLD_SIZE
from tokenizers import Tokenizer, models

from dist_ckpt_mistral.analysis.pretrain_command import megatron_args
from dist_ckpt_mistral.cli.processes import run_ranks
from dist_ckpt_mistral.convert.from_hf import from_hf
from dist_ckpt_mistral.convert.to_hf import to_hf

#: The layouts of the two trainings, and their numbers of steps.
TRAININGS: Final = (("TP2 x PP2", 2), ("TP1 x DP4", 1))
CHAT: Final = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
_RANKS: Final = Path(__file__).with_name("pretrain_ranks.py")
_TIMEOUT_S: Final = 570


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo and print what happens."""
    parser = argparse.ArgumentParser(description="From Hugging Face through Megatron-LM and back, on a CPU.")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep model and checkpoints in this new directory")
    options = parser.parse_args(arguments)
    with contextlib.ExitStack() as stack:
        stack.enter_context(quiet_and_tidy())
        folder = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        losses = train(folder)
        for number, loss in enumerate(losses, 1):
            print(f"step {number}: loss {loss:.4f}")
        done = to_hf(folder / "root", folder / "out")
        print(f"to-hf of {folder / 'root'}: configuration from {done.config_from}")
        model = transformers.AutoModelForCausalLM.from_pretrained(folder / "out")
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "out")
        said = tokenizer.apply_chat_template([{"role": "user", "content": "a b"}], tokenize=False)
        print(f"transformers loads {type(model).__name__}, and the chat template says {said!r}")
    return 0


def train(folder: Path) -> list[float]:
    """Make and import a model, and train it. Returns the loss of each step. All is in ``folder`` afterwards."""
    hf, root = folder / "hf", folder / "root"
    make_model(hf)
    words = Tokenizer(models.WordLevel({"?": 0, "a": 1, "b": 2}, "?"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?")  # noqa: S106  (no secret)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(hf)
    from_hf(hf, root)
    trainings, begun = [], 0
    for layout, steps in TRAININGS:
        flags = [*megatron_args(root, layout=LAYOUTS[layout]).flags, "--save", str(root)]
        if begun:  # what is loaded was not imported, but saved: it has optimizer and iteration
            flags = [flag for flag in flags if flag not in {"--finetune", "--no-load-optim", "--no-load-rng"}]
            flags += ["--no-load-rng"]
        trainings.append({"layout": layout, "flags": flags, "begun": begun, "steps": steps})
        begun += steps
    (folder / "job.json").write_text(json.dumps({"hf": str(hf), "trainings": trainings}))
    run_ranks([[sys.executable, _RANKS, folder, str(os.getpid())]] * WORLD_SIZE, folder, timeout_s=_TIMEOUT_S)
    losses: list[float] = json.loads((folder / "rank0.json").read_text())
    return losses


if __name__ == "__main__":
    sys.exit(main())
