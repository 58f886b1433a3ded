"""Compare the logits of two stored models: one runs in transformers, the other in Megatron, in float32 on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch

from dist_ckpt_mistral.analysis.compare import open_pair
from dist_ckpt_mistral.errors import TensorMismatchError
from dist_ckpt_mistral.formats.kinds import Kind
from dist_ckpt_mistral.formats.places import what_is
from dist_ckpt_mistral.formats.small_files import tokenizer_directories
from dist_ckpt_mistral.mapping.source import ModelSource, require_model
from dist_ckpt_mistral.mapping.vision import completed
from dist_ckpt_mistral.megatron.generate import forward, require_tokens
from dist_ckpt_mistral.megatron.hf_inference import load_hf_model, load_tokenizer
from dist_ckpt_mistral.megatron.load_model import load_source
from dist_ckpt_mistral.model.config.mistral_config import GivenConfig, MistralConfig, chosen_config, given_directory
from dist_ckpt_mistral.model.layout.layout import ParallelLayout
from dist_ckpt_mistral.storage.remote_path import as_path

#: Largest accepted difference of two logits. Rounding in float32 stays below; another computation is far above.
TOLERANCE: Final = 1e-4
_RANDOM_PROMPTS: Final = 2
#: Random prompts are longer than this, than a sliding window and than YaRN's original context, but at most
#: ``_MANY_TOKENS`` tokens long: a window or context that would need more is ignored.
_FEW_TOKENS: Final = 64
_MANY_TOKENS: Final = 512
_CPU: Final = torch.device("cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptLogits:
    """The largest difference between the logits of both models for one prompt.

    ``prompt`` is None for random tokens. ``largest_logit`` is the largest magnitude of a logit in transformers.
    ``same_tokens`` says whether both models have the same likeliest token at every position.
    """

    prompt: str | None
    num_tokens: int
    largest_difference: float
    largest_logit: float
    same_tokens: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitsComparison:
    """The result: transformers ran the model ``in_transformers``, Megatron the model ``in_megatron``."""

    in_transformers: Path
    in_megatron: Path
    tolerance: float
    prompts: tuple[PromptLogits, ...]

    @property
    def largest_difference(self) -> float:
        """The largest difference over all prompts; NaN if any logit is NaN."""
        return float(torch.tensor([prompt.largest_difference for prompt in self.prompts]).max())

    @property
    def agree(self) -> bool:
        """Whether no logit differs by more than the tolerance."""
        return self.largest_difference <= self.tolerance

    def to_json(self) -> dict[str, Any]:
        """The result as plain values."""
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

    transformers runs B if only B is a Hugging Face directory, else A; it exports a Megatron checkpoint in memory.
    Megatron runs the other model. Without ``prompts`` the prompts are random tokens drawn with ``seed``. Raises
    DistCkptMistralError if a model cannot be read or run, or if the vocabularies differ.
    """
    source_a, source_b = map(require_model, open_pair(as_path(a), as_path(b), config=chosen_config(config)))
    if source_a.config.vocab_size != source_b.config.vocab_size:
        sizes = f"{source_a.config.vocab_size} in {a}, {source_b.config.vocab_size} in {b}"
        raise TensorMismatchError(f"the vocabularies differ: {sizes}. Their logits cannot be compared.")
    hf_side, megatron_side = source_a, source_b
    if what_is(source_b.path).kind is Kind.HF and what_is(source_a.path).kind is not Kind.HF:
        hf_side, megatron_side = megatron_side, hf_side
    if prompts:
        places = (*source_a.tokenizer_places, *source_b.tokenizer_places)
        loaded_tokenizer = load_tokenizer(tokenizer_directories(tokenizer, *places))
        tokens = [_tokens(loaded_tokenizer(prompt)["input_ids"], source_a.config) for prompt in prompts]
    else:
        tokens = _random_tokens(hf_side.config, seed)
    hf_side = completed(hf_side, given_directory(config))
    expected, actual = _in_transformers(hf_side, tokens), _in_megatron(megatron_side, tokens)
    names: Sequence[str | None] = list(prompts) or [None] * len(tokens)
    return LogitsComparison(
        in_transformers=hf_side.path,
        in_megatron=megatron_side.path,
        tolerance=tolerance,
        prompts=tuple(map(_compared, names, expected, actual)),
    )


def _compared(prompt: str | None, expected: torch.Tensor, actual: torch.Tensor) -> PromptLogits:
    """Compare the logits ``[1, n, vocab_size]`` of one prompt."""
    return PromptLogits(
        prompt=prompt,
        num_tokens=expected.shape[1],
        largest_difference=float((expected - actual).abs().max()),
        largest_logit=float(expected.abs().max()),
        same_tokens=torch.equal(expected.argmax(-1), actual.argmax(-1)),
    )


def _tokens(ids: Sequence[int], config: MistralConfig) -> torch.Tensor:
    """The token ids of a prompt as a tensor ``[1, n]``. Raises ConfigError for tokens outside the vocabulary."""
    require_tokens(ids, config.vocab_size)
    return torch.tensor([ids])


def _random_tokens(config: MistralConfig, seed: int) -> list[torch.Tensor]:
    """Random prompts ``[1, n]`` that exceed the sliding window and YaRN's original context where that is short."""
    original_context = config.yarn.original_max_position_embeddings if config.yarn else 0
    lengths = (_FEW_TOKENS, config.sliding_window or 0, original_context)
    beyond = _FEW_TOKENS // 2
    length = max(length for length in lengths if length <= _MANY_TOKENS - beyond) + beyond
    length = min(length, config.max_position_embeddings)
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(config.vocab_size, (1, length), generator=generator) for _ in range(_RANDOM_PROMPTS)]


@torch.no_grad()
def _in_transformers(source: ModelSource, prompts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Logits ``[1, n, vocab_size]`` of each prompt ``[1, n]``, from transformers."""
    model = load_hf_model(source)
    return [model(tokens).logits for tokens in prompts]


def _in_megatron(source: ModelSource, prompts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Logits ``[1, n, vocab_size]`` of each prompt ``[1, n]``, from Megatron."""
    model = load_source(source, ParallelLayout(), dtype=torch.float32, device=_CPU)
    outputs = (forward(model, tokens, vocab_size=source.config.vocab_size) for tokens in prompts)
    return [logits for logits in outputs if logits is not None]  # the only rank is in the last stage
