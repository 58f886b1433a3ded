"""``MistralConfig``: the sizes of a Mistral model, whoever wrote them down."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeAlias

from dist_ckpt_mistral import dtypes, storage, strict_json
from dist_ckpt_mistral.errors import ConfigError, UnsupportedModelError
from dist_ckpt_mistral.model.checks import is_positive_int, is_positive_number
from dist_ckpt_mistral.model.quantization import require_readable, unquantized
from dist_ckpt_mistral.model.yarn import YarnScaling, rope_parameters, yarn_of

#: How callers give a configuration: itself, a config.json, or a directory with one.
GivenConfig: TypeAlias = "str | Path | MistralConfig"

#: HF ``model_type`` values that the tensor table knows.
MODEL_TYPES: Final = ("mistral",)

#: What transformers fills in for keys that config.json leaves out (MistralConfig, transformers 4.34 to 5.23), with one
#: exception: transformers also invents ``sliding_window=4096``, the value of Mistral 7B v0.1 and of no model since.
_HF_DEFAULTS: Final[Mapping[str, Any]] = {
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "max_position_embeddings": 4096 * 32,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
_REQUIRED_SIZES: Final = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class MistralConfig:
    """The sizes and constants of one dense Mistral model, in Hugging Face's names.

    ``head_dim`` may differ from ``hidden_size / num_attention_heads`` (Nemo); ``sliding_window`` is Hugging Face's W
    (a token sees itself and W - 1 before it) or None; ``yarn`` is None where rotary embeddings are not scaled;
    ``dtype`` is a torch name such as ``bfloat16`` or None where the source does not say. ``hf_config`` is the original
    config.json, kept whole so that nothing is lost on the way.
    """

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
    tie_word_embeddings: bool = False
    yarn: YarnScaling | None = None
    dtype: str | None = None
    hf_config: Mapping[str, Any] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check every size at once and report all problems together."""
        problems = [
            f"{name} must be a positive integer, got {getattr(self, name)!r}"
            for name in (*_REQUIRED_SIZES, "num_key_value_heads", "head_dim", "max_position_embeddings")
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
        if self.dtype is not None and self.dtype not in dtypes.KNOWN_DTYPES:
            problems.append(f"dtype must be one of {', '.join(dtypes.KNOWN_DTYPES)}, got {self.dtype!r}")
        if not problems and self.num_attention_heads % self.num_key_value_heads:
            problems.append(
                f"num_attention_heads={self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if problems:
            raise ConfigError("the model configuration does not fit: " + "; ".join(problems))

    @property
    def queries_per_group(self) -> int:
        """Query heads that share one key and value head."""
        return self.num_attention_heads // self.num_key_value_heads

    @property
    def window_size(self) -> tuple[int, int] | None:
        """Megatron's ``window_size``: (tokens before, tokens after) that a token sees besides itself.

        Hugging Face's W counts the token itself, Megatron's does not (proved by logits on megatron-core 0.16 and 0.19).
        """
        return None if self.sliding_window is None else (self.sliding_window - 1, 0)

    @classmethod
    def from_hf(cls, source: str | Path | Mapping[str, Any]) -> MistralConfig:
        """Read a Hugging Face configuration: a model directory, a config.json, or its parsed content.

        Raises ConfigError when sizes are missing or do not fit, UnsupportedModelError for another architecture.
        """
        if isinstance(source, Mapping):
            return _from_hf_mapping(source, "the given configuration")
        path = Path(source)
        if path.is_dir():
            path = path / "config.json"
        if not path.is_file():
            raise ConfigError(f"no model configuration: {path} does not exist. Give config.json or its directory.")
        return _from_hf_mapping(strict_json.loads_object(storage.read_bytes(path), str(path)), str(path))

    def to_hf(self) -> dict[str, Any]:
        """The content of config.json: the original if there was one, else one that transformers 4 and 5 both read.

        It says nothing of quantization: what this package writes is not quantized.
        """
        if self.hf_config is not None:
            return unquantized(self.hf_config)
        return {
            "architectures": ["MistralForCausalLM"],
            "model_type": "mistral",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            **({} if self.yarn is None else {"rope_scaling": self.yarn.to_hf()}),
            "sliding_window": self.sliding_window,  # null must be said: transformers takes a missing key for 4096
            "tie_word_embeddings": self.tie_word_embeddings,
            "torch_dtype": self.dtype,
        }


def given_config(config: GivenConfig | None) -> MistralConfig | None:
    """The configuration that a caller gave, whichever way, or None if none was. Raises as ``from_hf``."""
    return config if config is None or isinstance(config, MistralConfig) else MistralConfig.from_hf(config)


def given_directory(config: GivenConfig | None) -> Path | None:
    """The directory that a caller gave for its configuration, whose other small files may be wanted; else None."""
    if config is None or isinstance(config, MistralConfig):
        return None
    return Path(config) if Path(config).is_dir() else None


def _from_hf_mapping(raw: Mapping[str, Any], where: str) -> MistralConfig:
    model_type = raw.get("model_type")
    if model_type not in MODEL_TYPES:
        raise UnsupportedModelError(
            f"model_type {model_type!r} in {where} is not supported: the tensor table knows {', '.join(MODEL_TYPES)}."
        )
    _refuse_other_architectures(raw, where)
    require_readable(raw, where)
    missing = [name for name in _REQUIRED_SIZES if raw.get(name) is None]
    if missing:
        raise ConfigError(f"{where} lacks {', '.join(missing)}. Check that it is the model's own config.json.")
    values = {**_HF_DEFAULTS, **raw}
    if values["num_key_value_heads"] is None:
        values["num_key_value_heads"] = values["num_attention_heads"]
    try:
        return MistralConfig(
            **{name: values[name] for name in (*_REQUIRED_SIZES, "num_key_value_heads")},
            head_dim=_head_dim(values),
            rms_norm_eps=values["rms_norm_eps"],
            rope_theta=_rope_theta(values),
            max_position_embeddings=values["max_position_embeddings"],
            sliding_window=raw.get("sliding_window"),
            tie_word_embeddings=values["tie_word_embeddings"],
            yarn=yarn_of(raw, values["max_position_embeddings"]),
            dtype=_dtype(raw),
            hf_config=dict(raw),
        )
    except ConfigError as error:
        raise type(error)(f"{error} (in {where})") from error


def _refuse_other_architectures(raw: Mapping[str, Any], where: str) -> None:
    if raw.get("hidden_act", "silu") != "silu":
        raise UnsupportedModelError(f"hidden_act {raw['hidden_act']!r} in {where}: Mistral models use 'silu'.")


def _head_dim(values: Mapping[str, Any]) -> Any:  # noqa: ANN401  (whatever it is, MistralConfig checks it)
    if values.get("head_dim") is not None:
        return values["head_dim"]
    hidden, heads = values["hidden_size"], values["num_attention_heads"]
    if not (is_positive_int(hidden) and is_positive_int(heads)):
        return 1  # MistralConfig reports the sizes themselves
    if hidden % heads:
        raise ConfigError(
            f"hidden_size={hidden} is not a multiple of num_attention_heads={heads} and there is no head_dim"
        )
    return hidden // heads


def _rope_theta(values: Mapping[str, Any]) -> Any:  # noqa: ANN401  (whatever it is, MistralConfig checks it)
    """Transformers 5 moved ``rope_theta`` into ``rope_parameters``."""
    return rope_parameters(values).get("rope_theta", values["rope_theta"])


def _dtype(raw: Mapping[str, Any]) -> str | None:
    """Transformers 5 renamed ``torch_dtype`` to ``dtype``."""
    dtype = raw.get("dtype", raw.get("torch_dtype"))
    return dtype.removeprefix("torch.") if isinstance(dtype, str) else dtype
