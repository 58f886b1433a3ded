"""Inference with a Megatron model at any tensor and pipeline parallelism: logits, and token after token.

Keys and values of earlier tokens are kept in Megatron's own ``StaticInferenceContext`` (the same in 0.16 and 0.19), one
prompt at a time. Hidden states go from stage to stage by plain point-to-point messages: Megatron's own helpers
(inference/communication_utils.py) insist on CUDA.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.inference.contexts import StaticInferenceContext

from dist_ckpt_mistral.errors import ConfigError, LayoutError
from dist_ckpt_mistral.megatron.build_model import Model, as_chunks

if TYPE_CHECKING:
    from megatron.core.models.gpt.gpt_model import GPTModel

#: Picks the next token: (the tokens so far ``[tokens]``, logits of the next one ``[vocab_size]``, float32) -> its id.
Choose: TypeAlias = Callable[[torch.Tensor, torch.Tensor], int]


def greedy(tokens: torch.Tensor, logits: torch.Tensor) -> int:  # noqa: ARG001  (the signature of Choose)
    """The likeliest token; of several the first."""
    return int(logits.argmax())


@torch.no_grad()
def forward(
    model: Model, tokens: torch.Tensor, *, vocab_size: int, context: StaticInferenceContext | None = None
) -> torch.Tensor | None:
    """Logits of ``tokens`` ``[1, n]``: ``[1, n, vocab_size]`` on ranks of the last stage, None on the others.

    Every rank makes the same call. With a ``context``, ``tokens`` come after those that it has seen, and there may be
    logits of the last of them alone. Dropout is off meanwhile. Raises LayoutError with context parallelism, which
    would cut the prompt.
    """
    if (cp := parallel_state.get_context_parallel_world_size()) > 1:
        raise LayoutError(f"inference takes whole prompts: expected cp=1, got cp={cp}. Load the model with cp=1.")
    chunks = as_chunks(model)
    with _evaluating(chunks):
        return _through(chunks, tokens, vocab_size, context)


def _through(
    chunks: Sequence[GPTModel], tokens: torch.Tensor, vocab_size: int, context: StaticInferenceContext | None
) -> torch.Tensor | None:
    seen = 0 if context is None else context.sequence_len_offset
    device = torch.device("cuda", torch.cuda.current_device()) if _is_on_cuda(chunks) else torch.device("cpu")
    tokens = tokens.to(device)
    positions = torch.arange(seen, seen + tokens.shape[1], device=device)[None]
    first, last = parallel_state.is_pipeline_first_stage, parallel_state.is_pipeline_last_stage
    for chunk in chunks:
        stage = {"ignore_virtual": False, "vp_stage": chunk.vp_stage}
        if not first(**stage):
            shape = (tokens.shape[1], 1, chunk.config.hidden_size)
            hidden = torch.empty(shape, dtype=chunk.config.pipeline_dtype, device=device)
            dist.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank())
            chunk.set_input_tensor(hidden)
        # Without a mask Megatron makes its own, causal and as wide as the window.
        result: torch.Tensor = chunk(tokens, positions, None, inference_context=context, runtime_gather_output=True)
        if last(**stage):
            return result[..., :vocab_size].float()
        dist.send(result.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())
    return None


def _is_on_cuda(chunks: Sequence[GPTModel]) -> bool:
    return any(parameter.is_cuda for chunk in chunks for parameter in chunk.parameters())


def generate(
    model: Model,
    prompt: Sequence[int],
    *,
    vocab_size: int,
    max_new_tokens: int,
    stop_tokens: Collection[int] = (),
    choose: Choose = greedy,
) -> Iterator[int]:
    """Yield the tokens that follow ``prompt`` as they come, at most ``max_new_tokens``, the same on all ranks.

    The first token among ``stop_tokens`` ends it and is yielded too. ``choose`` is asked on one rank of the last stage.
    ``vocab_size`` leaves out the rows that only pad the vocabulary.

    Dropout is off meanwhile; whether the model is in training mode afterwards is as it was before.

    Raises ConfigError if the prompt is empty or has tokens outside the vocabulary.
    """
    require_tokens(prompt, vocab_size)
    with _evaluating(as_chunks(model)):
        yield from _tokens(model, prompt, vocab_size, max_new_tokens, stop_tokens, choose)


def require_tokens(prompt: Sequence[int], vocab_size: int) -> None:
    """Raise ConfigError if ``prompt`` is empty or has tokens outside the vocabulary."""
    outside = [token for token in prompt if not 0 <= token < vocab_size]
    if not prompt or outside:
        raise ConfigError(
            f"a prompt needs tokens of 0 to {vocab_size - 1}, got {outside[:5] or 'none'}. "
            "Give a prompt that is not empty, and the tokenizer of this model."
        )


@contextlib.contextmanager
def _evaluating(chunks: Sequence[GPTModel]) -> Iterator[None]:
    """Within the block no module is in training mode; afterwards those are that were before."""
    training = [module for chunk in chunks for module in chunk.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _tokens(
    model: Model,
    prompt: Sequence[int],
    vocab_size: int,
    max_new_tokens: int,
    stop_tokens: Collection[int],
    choose: Choose,
) -> Iterator[int]:
    context = StaticInferenceContext(1, len(prompt) + max_new_tokens)
    tokens = torch.tensor([[*prompt]])
    seen = 0
    for _ in range(max_new_tokens):
        new = tokens[:, seen:]
        logits = forward(model, new, vocab_size=vocab_size, context=context)
        context.increment_sequence_len_offset(new.shape[1])
        seen = tokens.shape[1]
        token = _agree(None if logits is None else partial(choose, tokens[0], logits[0, -1].cpu()))
        tokens = torch.cat([tokens, torch.tensor([[token]])], dim=1)
        yield token
        if token in stop_tokens:
            return


def _agree(choose: Callable[[], int] | None) -> int:
    """The token that one rank of the last stage chooses, on every rank. ``choose`` is None before the last stage."""
    tp_source, tp_group = (
        parallel_state.get_tensor_model_parallel_src_rank(),
        parallel_state.get_tensor_model_parallel_group(),
    )
    chosen = choose() if choose is not None and dist.get_rank() == tp_source else -1
    device = "cuda" if dist.get_backend(tp_group) == "nccl" else "cpu"
    token = torch.tensor([chosen], device=device)
    if choose is not None:
        dist.broadcast(token, tp_source, group=tp_group)
    last = parallel_state.get_pipeline_model_parallel_last_rank()
    dist.broadcast(token, last, group=parallel_state.get_pipeline_model_parallel_group())
    return int(token)
