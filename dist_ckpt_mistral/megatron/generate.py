"""Generate text with a stored model: Megatron runs the model, transformers provides tokenizer and sampling."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.inference.contexts import StaticInferenceContext

from dist_ckpt_mistral.convert import ranks
from dist_ckpt_mistral.errors import ConfigError, LayoutError
from dist_ckpt_mistral.formats.small_files import tokenizer_directories
from dist_ckpt_mistral.mapping.source import ModelSource, open_source
from dist_ckpt_mistral.megatron.build_model import Model, as_chunks
from dist_ckpt_mistral.megatron.hf_inference import Sampling, load_tokenizer, stop_tokens
from dist_ckpt_mistral.megatron.load_model import load_source
from dist_ckpt_mistral.megatron.runtime import default_device, initialize_megatron
from dist_ckpt_mistral.model.config.mistral_config import GivenConfig, chosen_config, given_directory
from dist_ckpt_mistral.model.layout.layout import ParallelLayout

if TYPE_CHECKING:
    from megatron.core.models.gpt.gpt_model import GPTModel

#: What decoders write for bytes that are no whole character.
_NOT_WHOLE: Final = "\N{REPLACEMENT CHARACTER}"
#: Chooses the next token: (previous tokens ``[tokens]``, float32 logits of the next token ``[vocab_size]``) -> its id.
Choose: TypeAlias = Callable[[torch.Tensor, torch.Tensor], int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A prompt and its continuation by the model.

    ``text`` is the prompt with its continuation, without special tokens. ``ended`` says whether the last new token is
    a stop token.
    """

    prompt: str
    text: str
    continuation: str
    prompt_tokens: tuple[int, ...]
    new_tokens: tuple[int, ...]
    ended: bool

    def to_json(self) -> dict[str, Any]:
        """The fields as plain values."""
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
    stream: Callable[[str], None] | None = None,
) -> Iterator[Completion]:
    """Yield the completion of each prompt. Every rank of ``layout`` makes the same call and gets the same texts.

    The model runs on CUDA if available, else on the CPU.

    Args:
        path: A Megatron checkpoint, a Hugging Face directory or a hub id.
        prompts: The texts to complete.
        layout: The parallel layout.
        max_new_tokens: Maximum number of tokens that are generated for each prompt.
        sampling: How tokens are drawn; by default the likeliest token is chosen.
        config: Configuration of a checkpoint that has none.
        tokenizer: Directory or hub id of the tokenizer; by default the directory ``config``, else the model's own.
        dtype: Torch name of the dtype to convert the weights to. Destroyed values are only a warning.
        stream: Gets each text piece by piece, as its tokens are generated: the prompt first, and the whole of it
            before its completion is yielded.

    Raises:
        DistCkptMistralError: The model cannot be read or run, or it has no tokenizer. Raised on all ranks.
    """
    device = default_device()
    layout = initialize_megatron(layout, device=device)

    def prepare() -> tuple[ModelSource, Any, frozenset[int]]:
        source = open_source(path, config=chosen_config(config))
        if max_new_tokens > source.config.max_position_embeddings:  # generation allocates memory for all of them first
            most = f"max_position_embeddings={source.config.max_position_embeddings}"
            raise ConfigError(f"max_new_tokens: expected at most {most}, got {max_new_tokens}")
        loaded = load_tokenizer(tokenizer_directories(tokenizer, given_directory(config), *source.tokenizer_places))
        return source, loaded, stop_tokens(source, loaded, [*map(given_directory, (tokenizer, config)), *source.assets])

    source, loaded_tokenizer, stop = ranks.from_environment().each(prepare)
    model = load_source(source, layout, dtype=dtype, device=device, allow_lossy=True)
    for prompt in prompts:
        tokens = tuple(loaded_tokenizer(prompt)["input_ids"])
        pieces = _Pieces(partial(loaded_tokenizer.decode, skip_special_tokens=True), stream)
        pieces.show([*tokens])
        new: list[int] = []
        for token in generate(
            model,
            tokens,
            vocab_size=source.config.vocab_size,
            max_new_tokens=max_new_tokens,
            stop_tokens=stop,
            choose=greedy if sampling is None else sampling.chooser(),
        ):
            new.append(token)
            pieces.show([*tokens, *new])
        yield Completion(
            prompt=prompt,
            text=pieces.end([*tokens, *new]),
            continuation=loaded_tokenizer.decode(new, skip_special_tokens=True),
            prompt_tokens=tokens,
            new_tokens=tuple(new),
            ended=bool(new) and new[-1] in stop,
        )


class _Pieces:
    """Passes a growing text on in pieces, of which none is taken back."""

    def __init__(self, decode: Callable[[list[int]], str], stream: Callable[[str], None] | None) -> None:
        """Decode tokens with ``decode``; without ``stream`` only at the end."""
        self._decode, self._stream, self._shown = decode, stream, ""

    def show(self, tokens: list[int]) -> None:
        """Pass on what ``tokens`` add, unless the last character is not whole yet."""
        if self._stream is not None:
            text = self._decode(tokens)
            if text.startswith(self._shown) and not text.endswith(_NOT_WHOLE):
                self._pass_on(text)

    def end(self, tokens: list[int]) -> str:
        """Pass on the rest, and return the whole text. If it has become another one, it is passed on again."""
        text = self._decode(tokens)
        if not text.startswith(self._shown) and self._stream is not None:
            self._stream("\n")
            self._shown = ""
        self._pass_on(text)
        return text

    def _pass_on(self, text: str) -> None:
        if self._stream is not None and len(text) > len(self._shown):
            self._stream(text[len(self._shown) :])
            self._shown = text


def greedy(tokens: torch.Tensor, logits: torch.Tensor) -> int:  # noqa: ARG001  (the signature of Choose)
    """The token with the largest logit; the first of them if several are equal."""
    return int(logits.argmax())


def generate(
    model: Model,
    prompt: Sequence[int],
    *,
    vocab_size: int,
    max_new_tokens: int,
    stop_tokens: Collection[int] = (),
    choose: Choose = greedy,
) -> Iterator[int]:
    """Yield up to ``max_new_tokens`` tokens that continue ``prompt``, the same on all ranks.

    A token in ``stop_tokens`` is the last one. ``choose`` is called on one rank of the last pipeline stage.
    ``vocab_size`` excludes the rows that only pad the vocabulary. The modules of the model are in evaluation mode
    meanwhile; the modes that they had before are restored afterwards.

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
            f"a prompt needs tokens of 0 to {vocab_size - 1}, got {outside[:5] or 'no tokens'}. "
            "Give a prompt that is not empty, and the tokenizer of this model."
        )


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
    """Choose a token on one rank of the last stage and return it on all ranks.

    ``choose`` is None on ranks of the other stages.
    """
    tp_source = parallel_state.get_tensor_model_parallel_src_rank()
    tp_group = parallel_state.get_tensor_model_parallel_group()
    chosen = choose() if choose is not None and dist.get_rank() == tp_source else -1
    device = "cuda" if dist.get_backend(tp_group) == "nccl" else "cpu"
    token = torch.tensor([chosen], device=device)
    if choose is not None:
        dist.broadcast(token, tp_source, group=tp_group)
    last = parallel_state.get_pipeline_model_parallel_last_rank()
    dist.broadcast(token, last, group=parallel_state.get_pipeline_model_parallel_group())
    return int(token)


@torch.no_grad()
def forward(
    model: Model, tokens: torch.Tensor, *, vocab_size: int, context: StaticInferenceContext | None = None
) -> torch.Tensor | None:
    """Run the model on ``tokens`` ``[1, n]``. Every rank makes the same call.

    With a ``context``, ``tokens`` continue the tokens of earlier calls with it. Dropout is off during the call. Raises
    LayoutError with context parallelism, which would cut the prompt.

    Returns:
        On ranks of the last pipeline stage the float32 logits ``[1, n, vocab_size]``; with a ``context`` they may be
        ``[1, 1, vocab_size]``, of the last token. None on other ranks.
    """
    if (cp := parallel_state.get_context_parallel_world_size()) > 1:
        raise LayoutError(f"inference takes whole prompts: expected cp=1, got cp={cp}. Load the model with cp=1.")
    chunks = as_chunks(model)
    with _evaluating(chunks):
        return _pipelined(chunks, tokens, vocab_size, context)


def _pipelined(
    chunks: Sequence[GPTModel], tokens: torch.Tensor, vocab_size: int, context: StaticInferenceContext | None
) -> torch.Tensor | None:
    """Run this rank's model chunks; receive hidden states from the previous stage and send them to the next one."""
    seen = 0 if context is None else context.sequence_len_offset
    is_on_cuda = any(parameter.is_cuda for chunk in chunks for parameter in chunk.parameters())
    device = torch.device("cuda", torch.cuda.current_device()) if is_on_cuda else torch.device("cpu")
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
        # Without a mask, Megatron makes a causal one with the width of the sliding window.
        result: torch.Tensor = chunk(tokens, positions, None, inference_context=context, runtime_gather_output=True)
        if last(**stage):
            return result[..., :vocab_size].float()
        dist.send(result.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())
    return None


@contextlib.contextmanager
def _evaluating(chunks: Sequence[GPTModel]) -> Iterator[None]:
    """Within the block all modules are in evaluation mode; afterwards their previous modes are restored."""
    training = [module for chunk in chunks for module in chunk.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
