"""``MistralConfig``: the configuration of a Mistral model, and the ways in which callers give one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, TypeAlias

from dist_ckpt_mistral.arguments import require_types, wrong_types
from dist_ckpt_mistral.errors import ConfigError, FormatError, UnsupportedModelError
from dist_ckpt_mistral.formats.kinds import CONFIG_FILE, PARAMS_FILE
from dist_ckpt_mistral.formats.places import what_is
from dist_ckpt_mistral.gather import dtypes
from dist_ckpt_mistral.messages import concise_repr
from dist_ckpt_mistral.model.config.families import FAMILIES, MULTIMODAL_ARCHITECTURE
from dist_ckpt_mistral.model.config.hf_config import REQUIRED_SIZES, config_fields, config_json, tie_is_open, with_tie
from dist_ckpt_mistral.model.config.params_json import config_of_params
from dist_ckpt_mistral.model.config.parts import (
    MAX_LAYERS,
    MAX_PARTS,
    Experts,
    LatentAttention,
    Vision,
    is_positive_int,
    is_positive_number,
    not_a_size,
)
from dist_ckpt_mistral.model.config.quantization import described_method, is_readable, unquantized
from dist_ckpt_mistral.model.config.yarn import YarnScaling
from dist_ckpt_mistral.storage import documents, hub
from dist_ckpt_mistral.storage.paths import as_given

#: The values of ``layer_types`` in Hugging Face's config.json.
SLIDING: Final = "sliding_attention"
FULL: Final = "full_attention"
_KINDS: Final = frozenset({SLIDING, FULL})


@dataclass(frozen=True, slots=True, kw_only=True)
class MistralConfig:
    """The configuration of one model of the Mistral family, with Hugging Face's names.

    Args:
        model_type: Type of the language model: mistral, mixtral, ministral, ministral3 or mistral4.
        vocab_size: Rows of the embedding, without Megatron's padding.
        hidden_size: Features of a token between the layers.
        intermediate_size: Features between the two linear modules of the MLP.
        num_hidden_layers: Number of layers.
        num_attention_heads: Number of query heads, a multiple of ``num_key_value_heads``.
        num_key_value_heads: Number of key and value heads (Megatron: ``num_query_groups``).
        head_dim: Dimensions of a query or key head. It may differ from ``hidden_size / num_attention_heads`` (Nemo).
        rms_norm_eps: Epsilon of the RMS norms.
        rope_theta: Base of the rotary embeddings.
        max_position_embeddings: Longest context, in tokens.
        sliding_window: Number of tokens that a token sees, itself included; None for full attention.
        layer_types: ``"full_attention"`` or ``"sliding_attention"`` for each layer; None if all have the window.
        tie_word_embeddings: Whether the embedding is also the output layer.
        yarn: The YaRN scaling of rotary embeddings; None without one.
        llama_4_scaling_beta: Coefficient by which queries are scaled with their position; None without scaling.
        experts: The mixture of experts; None for an MLP in every layer.
        latent_attention: The sizes of multi-latent attention; None for grouped-query attention.
        vision: The sizes of vision tower and projector; None for a language model.
        dtype: Name of the weights' torch dtype, such as ``"bfloat16"``; None if the source gives none.
        hf_config: The content of the original config.json, which ``to_hf`` returns. It does not count in comparisons.

    Raises:
        ConfigError: A value has the wrong type or size, or contradicts another. The message lists all problems.

    Example:
        >>> sizes = dict(vocab_size=32768, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32)
        >>> config = MistralConfig(**sizes, num_attention_heads=32, num_key_value_heads=8, head_dim=128)
        >>> config.queries_per_group
        4
    """

    model_type: str = "mistral"

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    max_position_embeddings: int = 4096 * 32
    sliding_window: int | None = None
    layer_types: tuple[str, ...] | None = None
    tie_word_embeddings: bool = False
    yarn: YarnScaling | None = None
    llama_4_scaling_beta: float | None = None
    experts: Experts | None = None
    latent_attention: LatentAttention | None = None
    vision: Vision | None = None
    dtype: str | None = None
    hf_config: Mapping[str, Any] | None = field(default=None, repr=False, compare=False)

    __repr__ = concise_repr

    def __post_init__(self) -> None:
        """Check every size at once and report all problems together."""
        problems = [
            not_a_size(name, getattr(self, name))
            for name in (*REQUIRED_SIZES, "num_key_value_heads", "head_dim", "max_position_embeddings")
            if not is_positive_int(getattr(self, name))
        ]
        if self.sliding_window is not None and not is_positive_int(self.sliding_window):
            problems.append(f"sliding_window must be a positive integer or null, got {self.sliding_window!r}")
        problems += [
            f"{name} must be a positive number, got {getattr(self, name)!r}"
            for name in ("rms_norm_eps", "rope_theta")
            if not is_positive_number(getattr(self, name))
        ]
        tied: object = self.tie_word_embeddings  # from JSON: not yet known to be what the annotation says
        if not isinstance(tied, bool):
            problems.append(f"tie_word_embeddings must be true or false, got {tied!r}")
        others = ("model_type", "yarn", "experts", "latent_attention", "vision", "hf_config")
        problems += wrong_types(MistralConfig, {name: getattr(self, name) for name in others})
        if str(self.model_type) not in FAMILIES:
            problems.append(f"model_type must be one of {', '.join(FAMILIES)}, got {self.model_type!r}")
        if self.dtype is not None and self.dtype not in dtypes.KNOWN_DTYPES:
            problems.append(f"dtype must be one of {', '.join(dtypes.KNOWN_DTYPES)}, got {self.dtype!r}")
        if self.llama_4_scaling_beta is not None and not is_positive_number(self.llama_4_scaling_beta):
            problems.append(
                f"llama_4_scaling_beta must be a positive number or null, got {self.llama_4_scaling_beta!r}"
            )
        if not problems:
            problems += self._contradictions()
        if problems:
            raise ConfigError("the model configuration does not fit: " + "; ".join(problems))

    def _contradictions(self) -> Iterator[str]:
        experts = 0 if self.experts is None else self.experts.num_experts
        if self.num_hidden_layers > MAX_LAYERS:
            yield f"num_hidden_layers must be at most {MAX_LAYERS}, got {self.num_hidden_layers}"
        elif (parts := self.num_hidden_layers * (self.num_key_value_heads + experts)) > MAX_PARTS:
            yield f"all layers together may have {MAX_PARTS} key heads and experts at most, got {parts}"
        if self.num_attention_heads % self.num_key_value_heads:
            yield (
                f"num_attention_heads={self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.layer_types is None:
            return
        kinds: object = self.layer_types  # from JSON: not yet known to be what the annotation says
        if not isinstance(kinds, tuple) or len(kinds) != self.num_hidden_layers or not set(map(str, kinds)) <= _KINDS:
            yield f"layer_types must name one of {', '.join(sorted(_KINDS))} for every layer, got {kinds!r:.200}"
        elif SLIDING in kinds and self.sliding_window is None:
            yield f"layer_types name {SLIDING}, but sliding_window is null"

    @property
    def architecture(self) -> str:
        """The class of transformers that runs the model."""
        return FAMILIES[self.model_type].architecture if self.vision is None else MULTIMODAL_ARCHITECTURE

    @property
    def window_layers(self) -> tuple[bool, ...]:
        """For each layer, whether its attention has the window."""
        if self.layer_types is None or self.sliding_window is None:
            return (self.sliding_window is not None,) * self.num_hidden_layers
        return tuple(kind == SLIDING for kind in self.layer_types)

    @property
    def queries_per_group(self) -> int:
        """Query heads that share one key and value head."""
        return self.num_attention_heads // self.num_key_value_heads

    @property
    def window_size(self) -> tuple[int, int] | None:
        """Megatron's ``window_size``: (tokens before, tokens after) that a token sees besides itself; None for all.

        ``sliding_window`` counts the token itself, Megatron does not (proved by logits on megatron-core 0.16 and 0.19).
        """
        return None if self.sliding_window is None else (self.sliding_window - 1, 0)

    @property
    def left_open(self) -> str:
        """The questions that only stored tensors answer for sure, in words; empty if config.json answers all."""
        raw = self.hf_config or {}
        method = "" if is_readable(raw) else f"whether weights are quantized ({described_method(raw)})"
        return " and ".join(filter(None, ("whether embeddings are tied" if tie_is_open(raw) else "", method)))

    def as_stored(self, *, has_head: bool) -> MistralConfig:
        """This configuration with the ties of the stored tensors; ``has_head`` says whether these have a head too.

        The stored tensors decide only where config.json leaves it open. If the result differs, ``hf_config`` is
        changed too, so that every reader finds the same.
        """
        if self.hf_config is None or self.tie_word_embeddings is not has_head or not tie_is_open(self.hf_config):
            return self
        return replace(self, tie_word_embeddings=not has_head, hf_config=with_tie(self.hf_config, tied=not has_head))

    @classmethod
    def from_hf(
        cls, source: str | Path | Mapping[str, Any], *, where: str = "the given configuration"
    ) -> MistralConfig:
        """Read a Hugging Face config.json, or the params.json of Mistral AI's consolidated files.

        Args:
            source: A model directory or hub id, a config.json or params.json, or the parsed content of a config.json.
            where: The name of parsed content in errors and warnings.

        Returns:
            The configuration; its ``hf_config`` is the content of config.json.

        Raises:
            ConfigError: There is no configuration, sizes are missing, or values do not fit.
            UnsupportedModelError: The model has another architecture.

        Example:
            >>> MistralConfig.from_hf("mistralai/Mistral-7B-v0.3").num_key_value_heads  # doctest: +SKIP
            8
        """
        require_types(MistralConfig.from_hf, source=source, where=where)
        if isinstance(source, Mapping):
            return _from_hf_mapping(source, where)
        path = require_config_file(hub.model_directory(str(source)))
        raw = _content_of(path)
        return _from_hf_mapping(config_of_params(raw, str(path)) if path.name == PARAMS_FILE else raw, str(path))

    def to_hf(self) -> dict[str, Any]:
        """The content of config.json: the original if there is one, else one that transformers 4 and 5 both read.

        Returns:
            A new dict, without a description of quantization: this package writes no quantized weights.

        Raises:
            ConfigError: A multimodal model has no original config.json; its fields alone do not describe it.
        """
        if self.hf_config is not None:
            return unquantized(self.hf_config)
        if self.vision is not None:
            raise ConfigError(
                "a multimodal model needs its own config.json: a MistralConfig alone does not describe it."
            )
        return config_json({name: getattr(self, name) for name in self.__slots__})


def config_file(path: Path) -> Path:
    """The configuration file of a directory: config.json, else params.json. A file is returned unchanged."""
    if not path.is_dir():
        return path
    config, params = path / CONFIG_FILE, path / PARAMS_FILE
    return params if params.is_file() and not config.is_file() else config


def require_config_file(path: Path) -> Path:
    """The ``config_file`` of ``path``. Raises ConfigError if there is none."""
    file = config_file(path)
    if not file.is_file():
        place = path.parent if path.name in {CONFIG_FILE, PARAMS_FILE} else path
        raise ConfigError(
            f"no model configuration: there is no {CONFIG_FILE} at {as_given(place)} ({what_is(place).what}). Get that "
            "file, or give a directory that has it."
        )
    return file


def _content_of(path: Path) -> dict[str, Any]:
    """The content of a configuration file. Raises ConfigError if it is a file of another kind, such as of weights."""
    try:
        raw = documents.read_json(path)
    except FormatError as error:
        if path.suffix == ".json":
            raise
        raise _no_config(path) from error
    if path.name not in {CONFIG_FILE, PARAMS_FILE} and not raw.keys() & {"model_type", "architectures"}:
        raise _no_config(path)
    return raw


def _no_config(path: Path) -> ConfigError:
    beside = config_file(path.parent)
    advice = f"Give {as_given(beside)}." if beside.is_file() else f"Get {CONFIG_FILE}, or give a directory that has it."
    return ConfigError(
        f"{as_given(path)} is no model configuration, such as {CONFIG_FILE}: {what_is(path).what}. {advice}"
    )


@dataclass(frozen=True, slots=True)
class ConfigOverride:
    """A configuration that counts even where the model's own descriptions contradict it. Differences are logged.

    Args:
        config: A ``MistralConfig``, a config.json, or a directory or hub id with one.

    Example:
        >>> dist_ckpt_mistral.inspect("ckpt", config=ConfigOverride("hf_dir"))  # doctest: +SKIP
    """

    config: str | Path | MistralConfig

    def __post_init__(self) -> None:
        """Check what was given."""
        require_types(ConfigOverride, config=self.config)


#: A configuration as an argument: itself, a config.json, a directory or hub id with one, or an override with any.
GivenConfig: TypeAlias = str | Path | MistralConfig | ConfigOverride


@dataclass(frozen=True, slots=True, kw_only=True)
class ChosenConfig:
    """A configuration from a caller, the description of its source, and whether it overrides all others."""

    config: MistralConfig
    source: str
    overrides: bool = False


def chosen_config(given: GivenConfig | None) -> ChosenConfig | None:
    """The configuration of a caller, read if necessary; None without one. Raises as ``MistralConfig.from_hf``."""
    overrides, content = isinstance(given, ConfigOverride), _content(given)
    if content is None:
        return None
    if isinstance(content, MistralConfig):
        return ChosenConfig(config=content, source="the given configuration", overrides=overrides)
    path = config_file(hub.model_directory(str(content)))
    source = f"the given configuration {path}"
    return ChosenConfig(config=MistralConfig.from_hf(content), source=source, overrides=overrides)


def given_directory(given: GivenConfig | None) -> Path | None:
    """The directory that a caller gave as configuration, whose other small files can be copied; else None."""
    content = _content(given)
    if content is None or isinstance(content, MistralConfig):
        return None
    directory = hub.model_directory(str(content))
    return directory if directory.is_dir() else None


def _content(given: GivenConfig | None) -> str | Path | MistralConfig | None:
    return given.config if isinstance(given, ConfigOverride) else given


def _from_hf_mapping(raw: Mapping[str, Any], where: str) -> MistralConfig:
    try:
        return MistralConfig(**config_fields(raw, where))
    except (ConfigError, UnsupportedModelError) as error:
        named = str(error) if where in str(error) else f"{error} (in {where})"
        raise type(error)(named) from error
