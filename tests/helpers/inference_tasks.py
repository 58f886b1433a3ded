"""What a rank does to try models and inference, beside the tasks of megatron_ranks.py: nothing is set up beforehand."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import torch
from gpt_stage import Stage
from safetensors.torch import load_file

from dist_ckpt_mistral.cli.main import main
from dist_ckpt_mistral.megatron.build_model import as_chunks
from dist_ckpt_mistral.megatron.generate import forward, generate
from dist_ckpt_mistral.megatron.load_model import load_model
from dist_ckpt_mistral.megatron.runtime import destroy_parallel_state
from dist_ckpt_mistral.model.config.mistral_config import MistralConfig
from dist_ckpt_mistral.model.layout.layout import ParallelLayout


def run_model(
    *, layout: dict[str, Any], path: str, config: str, truth: str, prompt: list[int], new_tokens: int
) -> dict[str, Any]:
    """Load the model in ``path`` as a user does, in float32; tell what it holds wrongly and what it says to ``prompt``.

    ``logits`` is None before the last stage.
    """
    destroy_parallel_state()
    uneven = layout.get("pp_layers")
    # Replicas are not told: they follow from the number of ranks.
    parallel = ParallelLayout(**layout | {"dp": None, "pp_layers": uneven and tuple(uneven)})
    model = load_model(path, layout=parallel, config=config, dtype=torch.float32)
    model_config = MistralConfig.from_hf(config)
    stage = Stage(model_config, parallel)
    stage.chunks = as_chunks(model)
    logits = forward(model, torch.tensor([prompt]), vocab_size=model_config.vocab_size)
    tokens = generate(model, prompt, vocab_size=model_config.vocab_size, max_new_tokens=new_tokens)
    return {
        "wrong": stage.differences({name: tensor.float() for name, tensor in load_file(truth).items()}),
        "logits": None if logits is None else logits[0].tolist(),
        "tokens": list(tokens),
    }


def run_command(*, layout: dict[str, Any], arguments: list[str]) -> dict[str, Any]:  # noqa: ARG001  (the job's)
    """Run a command of the command line; tell its exit code and what it prints."""
    destroy_parallel_state()
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = main(arguments)
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


def run_python(*, layout: dict[str, Any], code: str, folder: str) -> None:  # noqa: ARG001  (the job's)
    """Run an example of a README in a directory that has what it names; an exception fails the launch."""
    destroy_parallel_state()
    with contextlib.chdir(folder):
        exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})  # noqa: S102  (what a reader would paste)
