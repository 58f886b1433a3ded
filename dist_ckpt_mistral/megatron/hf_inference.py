"""The parts of inference that transformers does: tokenizer, stop tokens, sampling, and a forward pass for comparison.

The network is used only for a tokenizer that is given by its hub id.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import transformers

from dist_ckpt_mistral.errors import ConfigError, DistCkptMistralError
from dist_ckpt_mistral.formats import small_files
from dist_ckpt_mistral.formats.kinds import Kind
from dist_ckpt_mistral.formats.places import what_is
from dist_ckpt_mistral.mapping.source import ModelSource
from dist_ckpt_mistral.storage import documents
from dist_ckpt_mistral.storage.remote_path import RemotePath
from dist_ckpt_mistral.views.lazy import LazyCheckpoint

_GENERATION_FILE: Final = "generation_config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are drawn. A ``seed`` gives the tokens that transformers draws after ``torch.manual_seed(seed)``.

    ``temperature`` divides the logits. ``top_k`` keeps that many of the likeliest tokens. ``top_p`` keeps the fewest
    likeliest tokens whose probabilities add up to at least that. None leaves the step out.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise ConfigError for values that leave no token to draw."""
        problems = []
        if not self.temperature > 0:
            problems.append(f"temperature must be above 0, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            problems.append(f"top_k must be at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            problems.append(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if problems:
            raise ConfigError("; ".join(problems))

    def chooser(self) -> Callable[[torch.Tensor, torch.Tensor], int]:
        """A function that draws a token, given the previous tokens ``[tokens]`` and its logits ``[vocab_size]``."""
        steps = transformers.LogitsProcessorList([transformers.TemperatureLogitsWarper(self.temperature)])
        if self.top_k is not None:
            steps.append(transformers.TopKLogitsWarper(self.top_k))
        if self.top_p is not None:
            steps.append(transformers.TopPLogitsWarper(self.top_p))
        generator = torch.Generator().manual_seed(self.seed)

        def draw(tokens: torch.Tensor, logits: torch.Tensor) -> int:
            probabilities = steps(tokens[None], logits[None]).softmax(dim=-1)
            return int(torch.multinomial(probabilities, num_samples=1, generator=generator))

        return draw


def load_tokenizer(directories: Iterable[Path]) -> Any:  # noqa: ANN401  (transformers is untyped)
    """The tokenizer in the first of ``directories`` that has one. Raises ConfigError if none has, or it is damaged."""
    directory = small_files.tokenizer_directory(directories)
    try:
        with small_files.local_copy(directory) as local:
            return transformers.AutoTokenizer.from_pretrained(local, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"transformers cannot read the tokenizer in {directory}: {reason}") from error


def stop_tokens(
    source: ModelSource,
    tokenizer: Any,  # noqa: ANN401  (transformers is untyped)
    directories: Iterable[Path | None],
) -> frozenset[int]:
    """The token ids that end a text: ``eos_token_id`` of generation_config.json, of config.json, or of the tokenizer.

    The first of these that has the value counts, and the first of ``directories`` that has a generation_config.json.
    Raises ConfigError if the value is neither a number nor a list of numbers.
    """
    paths = [directory / _GENERATION_FILE for directory in directories if directory is not None]
    path = next((path for path in paths if path.is_file()), None)
    generation = {} if path is None else documents.read_json(path)
    values = (generation.get("eos_token_id"), source.config.to_hf().get("eos_token_id"), tokenizer.eos_token_id)
    value: Any = next((value for value in values if value is not None), [])
    tokens = value if isinstance(value, list) else [value]
    if not all(isinstance(token, int) for token in tokens):
        raise ConfigError(
            f"eos_token_id of {source.path}: expected numbers, got {json.dumps(value)}. "
            f"Correct it in {_GENERATION_FILE}, else in config.json."
        )
    return frozenset(tokens)


def load_hf_model(source: ModelSource) -> Any:  # noqa: ANN401  (transformers is untyped)
    """The transformers model with the weights of ``source``, in float32 on the CPU.

    Weights of a Megatron checkpoint are exported in memory. So are those behind a URL, and FP8 weights, which
    transformers reads only with accelerate. Raises ConfigError if the installed transformers does not have the
    architecture.
    """
    name = source.config.architecture
    kind: Any = getattr(transformers, name, None)  # AutoModelForCausalLM does not have all architectures
    if kind is None:
        raise ConfigError(f"transformers {transformers.__version__} has no {name}, which runs this model. Update it.")
    options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager"}
    is_local = not isinstance(source.path, RemotePath)
    if is_local and what_is(source.path).kind is Kind.HF and not source.quantized.weights:
        return kind.from_pretrained(source.path, local_files_only=True, **options).eval()
    with LazyCheckpoint(source) as stored:
        weights: Mapping[str, torch.Tensor] = {name: stored[name].float() for name in stored}
    fields = dict(source.config.to_hf())
    config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    model, report = kind.from_pretrained(None, config=config, state_dict=weights, output_loading_info=True, **options)
    wrong = [
        f"{what.replace('_', ' ')}: {', '.join(sorted(map(str, names)))}" for what, names in report.items() if names
    ]
    if wrong:
        raise DistCkptMistralError(
            f"transformers {transformers.__version__} did not take the weights of {source.path}: {'; '.join(wrong)}. "
            "Update transformers."
        )
    return model.eval()
