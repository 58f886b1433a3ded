"""Texts that a stored model writes: tokenizer and sampling are Hugging Face's, the model runs on Megatron."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.inference.contexts import StaticInferenceContext

from dist_ckpt_mistral.convert import ranks
from dist_ckpt_mistral.errors import ConfigError, LayoutError
from dist_ckpt_mistral.mapping.source import ModelSource, open_source
from dist_ckpt_mistral.megatron.build_model import Model, as_chunks
from dist_ckpt_mistral.megatron.hf_inference import Sampling, load_tokenizer, stop_tokens, tokenizer_directories
from dist_ckpt_mistral.megatron.load_model import load_source
from dist_ckpt_mistral.megatron.runtime import default_device, initialize_megatron
from dist_ckpt_mistral.model.config.mistral_config import GivenConfig, chosen_config, given_directory
from dist_ckpt_mistral.model.layout.layout import ParallelLayout

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A prompt and what the model wrote after it; ``ended`` if the model ended the text itself.

    ``text`` is prompt and continuation without special tokens, ``continuation`` what was written alone.
    """

    prompt: str
    text: str
    continuation: str
    prompt_tokens: tuple[int, ...]
    new_tokens: tuple[int, ...]
    ended: bool

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def complete(
    path: str | Path,
    prompts: Sequence[str],
    *,
    layout: ParallelLayout,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    config: GivenConfig | None = None,
    tokenizer: str | Path | None = None,
    dtype: str | None = None,
) -> Iterator[Completion]:
    """Complete ``prompts`` one after the other; every rank of ``layout`` makes the same call and gets the same texts.

    ``path`` is a Megatron checkpoint, a Hugging Face directory or a hub id. The likeliest token follows unless
    ``sampling`` is given. The tokenizer is that of the directory ``tokenizer``, else of ``config``, else the one that
    came with the model. ``dtype`` (a torch name) converts the weights, with a warning where it destroys values. Runs on
    CUDA where there is any, else on a CPU.

    Raises DistCkptMistralError if the model cannot be read or run, or has no tokenizer; on all ranks alike.
    """
    device = default_device()
    layout = initialize_megatron(layout, device=device)

    def prepare() -> tuple[ModelSource, Any, frozenset[int]]:
        source = open_source(path, config=chosen_config(config))
        if max_new_tokens > source.config.max_position_embeddings:  # memory for all of them is taken at once
            most = f"max_position_embeddings={source.config.max_position_embeddings}"
            raise ConfigError(f"max_new_tokens: expected at most {most}, got {max_new_tokens}")
        words = load_tokenizer(tokenizer_directories(tokenizer, given_directory(config), *source.assets))
        return source, words, stop_tokens(source, words, [*map(given_directory, (tokenizer, config)), *source.assets])

    source, words, stop = ranks.from_environment().each(prepare)
    model = load_source(source, layout, dtype=dtype, device=device, allow_lossy=True)
    for prompt in prompts:
        tokens = tuple(words(prompt)["input_ids"])
        new = tuple(
            generate(
                model,
                tokens,
                vocab_size=source.config.vocab_size,
                max_new_tokens=max_new_tokens,
                stop_tokens=stop,
                choose=greedy if sampling is None else sampling.chooser(),
            )
        )
        yield Completion(
            prompt=prompt,
            text=words.decode([*tokens, *new], skip_special_tokens=True),
            continuation=words.decode(list(new), skip_special_tokens=True),
            prompt_tokens=tokens,
            new_tokens=new,
            ended=bool(new) and new[-1] in stop,
        )
