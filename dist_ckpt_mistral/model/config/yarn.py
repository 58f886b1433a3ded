"""``YarnScaling``: rotary embeddings that YaRN stretches over a longer context, as Hugging Face configures them.

Meaning and defaults of every value: transformers 5.23, modeling_rope_utils.py (``_compute_yarn_parameters``,
``standardize_rope_params``).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final

from dist_ckpt_mistral.errors import ConfigError, UnsupportedModelError
from dist_ckpt_mistral.model.config.parts import is_positive_int, is_positive_number

_LOG = logging.getLogger(__name__)

#: Keys of ``rope_parameters`` beside the fields of ``YarnScaling``.
_OTHER_KEYS: Final = frozenset(
    {
        *("rope_type", "type", "rope_theta", "partial_rotary_factor"),
        *("llama_4_scaling_beta", "max_position_embeddings"),  # of Ministral 3 and Mistral 4
    }
)
_DEFAULT_BETA_FAST: Final = 32.0
_DEFAULT_BETA_SLOW: Final = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class YarnScaling:
    """How YaRN stretches rotary embeddings to ``factor`` times ``original_max_position_embeddings`` tokens.

    Args:
        factor: The stretch of the context, at least 1.
        original_max_position_embeddings: The context before stretching, in tokens.
        beta_fast: Dimensions with more rotations than this over the original context are not stretched.
        beta_slow: Dimensions with fewer rotations are stretched in full; those between the two bounds in part.
        mscale: Numerator of the factor on cosines and sines (see ``attention_scale``); None without one.
        mscale_all_dim: Denominator of that factor; None without one. In latent attention it also scales the scores.
        attention_factor: The factor itself; None if it follows from ``mscale``, ``mscale_all_dim`` and ``factor``.
        truncate: Whether the bounds are rounded to whole dimensions.

    Raises:
        ConfigError: Values have the wrong type or size. The message lists all problems.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = _DEFAULT_BETA_FAST
    beta_slow: float = _DEFAULT_BETA_SLOW
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        """Check every value at once and report all problems together."""
        problems = [
            f"{name} must be a positive number, got {getattr(self, name)!r}"
            for name in ("factor", "beta_fast", "beta_slow")
            if not is_positive_number(getattr(self, name))
        ]
        problems += [
            f"{name} must be a number of at least 0 or null, got {value!r}"
            for name in ("mscale", "mscale_all_dim", "attention_factor")
            if (value := getattr(self, name)) is not None
            and not is_positive_number(value)
            and (isinstance(value, bool) or value != 0)
        ]
        if not is_positive_int(self.original_max_position_embeddings):
            problems.append(
                "original_max_position_embeddings must be a positive integer, "
                f"got {self.original_max_position_embeddings!r}"
            )
        truncate: object = self.truncate  # from JSON: not yet known to be what the annotation says
        if not isinstance(truncate, bool):
            problems.append(f"truncate must be true or false, got {truncate!r}")
        if not problems and self.factor < 1:
            problems.append(f"factor must be at least 1, got {self.factor!r}")
        if not problems and self.beta_fast < self.beta_slow:
            problems.append(f"beta_fast={self.beta_fast} must be at least beta_slow={self.beta_slow}")
        if problems:
            raise ConfigError("the YaRN scaling of rotary embeddings does not fit: " + "; ".join(problems))

    @property
    def attention_scale(self) -> float:
        """The factor on cosines and sines, as transformers computes it."""
        if self.attention_factor is not None:
            return float(self.attention_factor)
        if self.mscale and self.mscale_all_dim:  # transformers treats 0 as not given
            return self._concentration(self.mscale) / self._concentration(self.mscale_all_dim)
        return self._concentration(1.0)

    @property
    def megatron_mscales(self) -> tuple[float | None, float | None]:
        """Megatron's ``(yarn_mscale, yarn_mscale_all_dim)`` that give ``attention_scale``.

        Megatron (yarn_rotary_pos_embedding.py, 0.16 to 0.19) treats 0 as a number and has no ``attention_factor``:
        the equivalent ``mscale`` replaces it. Raises UnsupportedModelError for an attention factor with ``factor=1``,
        which Megatron cannot express.
        """
        if self.attention_factor is None:
            return (self.mscale, self.mscale_all_dim) if self.mscale and self.mscale_all_dim else (None, None)
        if self.attention_factor == self._concentration(1.0):
            return None, None
        return self._mscale(0.0), 0.0

    @property
    def latent_mscales(self) -> tuple[float, float]:
        """Megatron's ``(mscale, mscale_all_dim)`` of latent attention.

        ``mscale_all_dim`` also scales the attention scores, in transformers and in Megatron (``yarn_apply_mscale`` in
        modeling_mistral4.py; mcore multi_latent_attention.py, 0.16 to 0.19), so it is kept. Raises as
        ``megatron_mscales``.
        """
        if self.attention_factor is None and self.mscale and self.mscale_all_dim:
            return self.mscale, self.mscale_all_dim
        if not self.mscale_all_dim and self.attention_scale == self._concentration(1.0):
            return 1.0, 0.0
        return self._mscale(self.mscale_all_dim or 0.0), self.mscale_all_dim or 0.0

    def _mscale(self, mscale_all_dim: float) -> float:
        """The ``mscale`` with which Megatron computes ``attention_scale``."""
        if self.factor > 1:
            scale = self.attention_scale * self._concentration(mscale_all_dim)
            return (scale - 1) / (0.1 * math.log(self.factor))
        if self.attention_scale == 1:
            return 1.0
        raise UnsupportedModelError(
            f"attention_factor={self.attention_factor} with factor={self.factor}: Megatron's YaRN cannot express it."
        )

    def _concentration(self, mscale: float) -> float:
        return 0.1 * mscale * math.log(self.factor) + 1.0

    def to_hf(self) -> dict[str, Any]:
        """The content of ``rope_scaling``, which transformers 4 and 5 both read."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {"rope_type": "yarn", **{name: value for name, value in values.items() if value is not None}}


def rope_parameters(raw: Mapping[str, Any], *, partial_rotary_factor: float = 1.0) -> Mapping[str, Any]:
    """The rotary embeddings in a config.json: ``rope_scaling`` (transformers 4), else ``rope_parameters`` (5).

    ``partial_rotary_factor`` is the fraction of a head that this model rotates. Raises UnsupportedModelError for
    settings that no Mistral model has, ConfigError if it is no object.
    """
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(rope, Mapping):
        raise ConfigError(f"rope_scaling or rope_parameters: expected an object, got {rope!r}")
    nested = [name for name, value in rope.items() if isinstance(value, Mapping)]
    if nested:
        raise UnsupportedModelError(f"rope_parameters by layer type ({', '.join(nested)}): no Mistral model has them.")
    partial = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if partial not in (None, partial_rotary_factor):
        raise UnsupportedModelError(
            f"partial_rotary_factor {partial!r}: this model rotates {partial_rotary_factor:g} of a head."
        )
    return rope


def yarn_of(raw: Mapping[str, Any], rope: Mapping[str, Any], max_position_embeddings: int) -> YarnScaling | None:
    """The YaRN scaling in the ``rope_parameters`` of a config.json; None where rotary embeddings are not scaled.

    Raises UnsupportedModelError for another kind of scaling, ConfigError for values that do not fit.
    """
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type is None or rope_type == "default":
        return None
    if rope_type != "yarn":
        raise UnsupportedModelError(
            f"rope_type {rope_type!r}: Mistral models have plain rotary embeddings or 'yarn'; others are not supported."
        )
    if "factor" not in rope:
        raise ConfigError("rope_type 'yarn' needs a factor, but has none")
    known = {field.name for field in fields(YarnScaling)}
    unknown = [name for name in rope if name not in known | _OTHER_KEYS]
    if unknown:
        _LOG.warning("%s of the YaRN scaling: ignored, as in transformers", ", ".join(unknown))
    values = {name: rope[name] for name in known & rope.keys()}
    original = raw.get("original_max_position_embeddings") or values.get("original_max_position_embeddings")
    values["original_max_position_embeddings"] = max_position_embeddings if original is None else original
    values["beta_fast"] = values.get("beta_fast") or _DEFAULT_BETA_FAST
    values["beta_slow"] = values.get("beta_slow") or _DEFAULT_BETA_SLOW
    if values["factor"] is None and is_positive_int(values["original_max_position_embeddings"]):
        values["factor"] = max_position_embeddings / values["original_max_position_embeddings"]
    return YarnScaling(**values)
