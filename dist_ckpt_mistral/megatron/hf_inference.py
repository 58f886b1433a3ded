"""What Hugging Face knows of inference: tokenizers, where to stop, how to sample, and the forward pass to compare with.

All of it is transformers' own; nothing is fetched from the network but a tokenizer that is given by its hub id.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from dist_ckpt_mistral.errors import ConfigError, DistCkptMistralError
from dist_ckpt_mistral.formats import small_files
from dist_ckpt_mistral.formats.places import Kind, what_is
from dist_ckpt_mistral.mapping.source import ModelSource
from dist_ckpt_mistral.storage import documents, hub
from dist_ckpt_mistral.views.lazy import LazyCheckpoint

if TYPE_CHECKING:
    import torch

_GENERATION_FILE: Final = "generation_config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are drawn; the draws of one ``seed`` are those of transformers after ``torch.manual_seed(seed)``.

    ``temperature`` divides the logits; ``top_k`` keeps the likeliest tokens, ``top_p`` the likeliest that together have
    this probability; None leaves a step out.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what there is nothing to draw from."""
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
        """Draws the next token from the tokens so far ``[tokens]`` and the logits ``[vocab_size]`` of the next one."""
        import torch  # noqa: PLC0415  (who does not sample needs neither)
        from transformers import (  # noqa: PLC0415
            LogitsProcessorList,
            TemperatureLogitsWarper,
            TopKLogitsWarper,
            TopPLogitsWarper,
        )

        steps = LogitsProcessorList([TemperatureLogitsWarper(self.temperature)])
        if self.top_k is not None:
            steps.append(TopKLogitsWarper(self.top_k))
        if self.top_p is not None:
            steps.append(TopPLogitsWarper(self.top_p))
        generator = torch.Generator().manual_seed(self.seed)

        def draw(tokens: torch.Tensor, logits: torch.Tensor) -> int:
            probabilities = steps(tokens[None], logits[None]).softmax(dim=-1)
            return int(torch.multinomial(probabilities, num_samples=1, generator=generator))

        return draw


def tokenizer_directories(tokenizer: str | Path | None, *others: Path | None) -> list[Path]:
    """Where to look for a tokenizer: in ``tokenizer`` alone if given, else in ``others`` in this order.

    Raises ConfigError if ``tokenizer`` is given and is no directory.
    """
    if tokenizer is None:
        return [each for each in others if each is not None]
    directory = hub.local_directory(str(tokenizer), weights=False)
    if not directory.is_dir():
        raise ConfigError(f"the tokenizer {tokenizer} is not a directory. Give the one that holds its files.")
    return [directory]


def load_tokenizer(directories: Iterable[Path]) -> Any:  # noqa: ANN401  (transformers is untyped)
    """The tokenizer in the first of ``directories`` that has one. Raises ConfigError where none has."""
    from transformers import AutoTokenizer  # noqa: PLC0415  (slow)

    looked = list(directories)
    for directory in looked:
        if small_files.has_tokenizer(directory):
            try:
                return AutoTokenizer.from_pretrained(directory, local_files_only=True)
            except (OSError, ValueError, KeyError, ImportError) as error:
                reason = str(error).strip().partition("\n")[0]
                raise ConfigError(f"transformers cannot read the tokenizer in {directory}: {reason}") from error
    where = ", ".join(map(str, looked)) or "the checkpoint"
    raise ConfigError(f"no tokenizer in {where}. Give the Hugging Face directory that has it with --tokenizer.")


def stop_tokens(
    source: ModelSource,
    tokenizer: Any,  # noqa: ANN401  (transformers is untyped)
    directories: Iterable[Path | None],
) -> frozenset[int]:
    """The tokens that end a text: of generation_config.json, else of config.json, else the tokenizer's own.

    The first of ``directories`` that has a generation_config.json counts.
    """
    paths = [directory / _GENERATION_FILE for directory in directories if directory is not None]
    path = next((path for path in paths if path.is_file()), None)
    generation = {} if path is None else documents.read_json(path)
    for told in (generation.get("eos_token_id"), source.config.to_hf().get("eos_token_id"), tokenizer.eos_token_id):
        if told is not None:
            found = told if isinstance(told, list) else [told]
            if not all(isinstance(token, int) for token in found):
                raise ConfigError(
                    f"eos_token_id of {source.path}: expected numbers, got {json.dumps(told)}. "
                    f"Correct it in {_GENERATION_FILE}, else in config.json."
                )
            return frozenset(found)
    return frozenset()


def load_hf_model(source: ModelSource) -> Any:  # noqa: ANN401  (transformers is untyped)
    """The transformers model of a stored one, in float32 on the CPU.

    A checkpoint is exported in memory, and so are FP8 weights: transformers wants accelerate for them.
    """
    import torch  # noqa: PLC0415  (slow)
    import transformers  # noqa: PLC0415

    name = source.config.architecture
    kind: Any = getattr(transformers, name, None)  # AutoModelForCausalLM does not know them all
    if kind is None:
        raise ConfigError(f"transformers {transformers.__version__} has no {name}, which runs this model. Update it.")
    options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager"}
    if what_is(source.path).kind is Kind.HF and not source.quantized.weights:
        return kind.from_pretrained(source.path, local_files_only=True, **options).eval()
    with LazyCheckpoint(source) as stored:
        weights: Mapping[str, torch.Tensor] = {name: stored[name].float() for name in stored}
    told = dict(source.config.to_hf())
    config = transformers.AutoConfig.for_model(told.pop("model_type"), **told)
    model, found = kind.from_pretrained(None, config=config, state_dict=weights, output_loading_info=True, **options)
    wrong = [
        f"{what.replace('_', ' ')}: {', '.join(sorted(map(str, names)))}" for what, names in found.items() if names
    ]
    if wrong:
        raise DistCkptMistralError(
            f"transformers {transformers.__version__} did not take the weights of {source.path}: {'; '.join(wrong)}. "
            "Update transformers."
        )
    return model.eval()
