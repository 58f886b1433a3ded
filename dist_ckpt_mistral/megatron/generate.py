"""Texts that a stored model writes: tokenizer and sampling are Hugging Face's, the model runs on Megatron."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dist_ckpt_mistral.convert import ranks
from dist_ckpt_mistral.errors import ConfigError
from dist_ckpt_mistral.hf_inference import Sampling, load_tokenizer, stop_tokens, tokenizer_directories
from dist_ckpt_mistral.mapping.source import ModelSource, open_source
from dist_ckpt_mistral.megatron.inference import generate, greedy
from dist_ckpt_mistral.megatron.load_model import load_source
from dist_ckpt_mistral.megatron.runtime import default_device, initialize_megatron
from dist_ckpt_mistral.model.config.mistral_config import GivenConfig, chosen_config, given_directory
from dist_ckpt_mistral.model.layout.layout import ParallelLayout


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
