"""Two stored models by what they compute: transformers runs the one, Megatron the other, in float32 on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch

from dist_ckpt_mistral.analysis.compare import open_pair
from dist_ckpt_mistral.errors import TensorMismatchError
from dist_ckpt_mistral.formats.places import Kind, what_is
from dist_ckpt_mistral.mapping.source import ModelSource, completed
from dist_ckpt_mistral.megatron.generate import forward, require_tokens
from dist_ckpt_mistral.megatron.hf_inference import load_hf_model, load_tokenizer, tokenizer_directories
from dist_ckpt_mistral.megatron.load_model import load_source
from dist_ckpt_mistral.model.config.mistral_config import GivenConfig, MistralConfig, chosen_config, given_directory
from dist_ckpt_mistral.model.layout.layout import ParallelLayout

#: Float32 on both sides leaves rounding; anything that is computed differently is orders of magnitude above this.
TOLERANCE: Final = 1e-4
_RANDOM_PROMPTS: Final = 2
#: Random prompts have some tokens, or as many as reach behind a window or YaRN's original context if not many.
_FEW_TOKENS: Final = 64
_MANY_TOKENS: Final = 512
_CPU: Final = torch.device("cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptLogits:
    """How far the logits of one prompt lie apart, at most; ``largest_logit`` is the largest magnitude among them.

    ``prompt`` is None for random tokens. ``same_tokens`` says whether both find the same token likeliest everywhere.
    """

    prompt: str | None
    num_tokens: int
    largest_difference: float
    largest_logit: float
    same_tokens: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitsComparison:
    """The outcome: transformers ran the weights of ``in_transformers``, Megatron those of ``in_megatron``."""

    in_transformers: Path
    in_megatron: Path
    tolerance: float
    prompts: tuple[PromptLogits, ...]

    @property
    def largest_difference(self) -> float:
        """Over all prompts; not a number if any logit is none."""
        return float(torch.tensor([prompt.largest_difference for prompt in self.prompts]).max())

    @property
    def agree(self) -> bool:
        """Whether no logit differs by more than the tolerance."""
        return self.largest_difference <= self.tolerance

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        paths = {"in_transformers": str(self.in_transformers), "in_megatron": str(self.in_megatron)}
        return {"agree": self.agree, "largest_difference": self.largest_difference, **asdict(self), **paths}


def compare_logits(
    a: str | Path,
    b: str | Path,
    *,
    config: GivenConfig | None = None,
    prompts: Sequence[str] = (),
    tokenizer: str | Path | None = None,
    seed: int = 0,
    tolerance: float = TOLERANCE,
) -> LogitsComparison:
    """Compare the logits of two models, each a Megatron checkpoint or a Hugging Face directory.

    transformers runs A if that is a Hugging Face directory or neither is one (then A is exported in memory), else B.
    Megatron runs the other. Without ``prompts`` the prompts are random tokens drawn from ``seed``. Raises
    DistCkptMistralError if either cannot be read or run, or if their vocabularies differ.
    """
    source_a, source_b = open_pair(Path(a), Path(b), config=chosen_config(config))
    if source_a.config.vocab_size != source_b.config.vocab_size:
        sizes = f"{source_a.config.vocab_size} in {a}, {source_b.config.vocab_size} in {b}"
        raise TensorMismatchError(f"the vocabularies differ: {sizes}. Their logits cannot be compared.")
    theirs, ours = source_a, source_b
    if what_is(source_b.path).kind is Kind.HF and what_is(source_a.path).kind is not Kind.HF:
        theirs, ours = ours, theirs
    if prompts:
        words = load_tokenizer(tokenizer_directories(tokenizer, *source_a.assets, *source_b.assets))
        tokens = [_tokens(words(prompt)["input_ids"], source_a.config) for prompt in prompts]
    else:
        tokens = _random_tokens(theirs.config, seed)
    theirs = completed(theirs, given_directory(config, vision=True))
    expected, actual = _in_transformers(theirs, tokens), _in_megatron(ours, tokens)
    names: Sequence[str | None] = list(prompts) or [None] * len(tokens)
    return LogitsComparison(
        in_transformers=theirs.path,
        in_megatron=ours.path,
        tolerance=tolerance,
        prompts=tuple(map(_compared, names, expected, actual)),
    )


def _compared(prompt: str | None, expected: torch.Tensor, actual: torch.Tensor) -> PromptLogits:
    return PromptLogits(
        prompt=prompt,
        num_tokens=expected.shape[1],
        largest_difference=float((expected - actual).abs().max()),
        largest_logit=float(expected.abs().max()),
        same_tokens=torch.equal(expected.argmax(-1), actual.argmax(-1)),
    )


def _tokens(ids: Sequence[int], config: MistralConfig) -> torch.Tensor:
    """A prompt ``[1, n]``."""
    require_tokens(ids, config.vocab_size)
    return torch.tensor([ids])


def _random_tokens(config: MistralConfig, seed: int) -> list[torch.Tensor]:
    """Random prompts ``[1, n]``, long enough for whatever depends on the length if that is not too long."""
    reach = [
        _FEW_TOKENS,
        config.sliding_window or 0,
        config.yarn.original_max_position_embeddings if config.yarn else 0,
    ]
    length = max(each for each in reach if each <= _MANY_TOKENS - _FEW_TOKENS // 2) + _FEW_TOKENS // 2
    length = min(length, config.max_position_embeddings)
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(config.vocab_size, (1, length), generator=generator) for _ in range(_RANDOM_PROMPTS)]


@torch.no_grad()
def _in_transformers(source: ModelSource, prompts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    model = load_hf_model(source)
    return [model(tokens).logits for tokens in prompts]


def _in_megatron(source: ModelSource, prompts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    model = load_source(source, ParallelLayout(), dtype=torch.float32, device=_CPU)
    found = (forward(model, tokens, vocab_size=source.config.vocab_size) for tokens in prompts)
    return [logits for logits in found if logits is not None]  # a single stage gives them all
