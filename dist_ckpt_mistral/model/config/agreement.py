"""Compare two descriptions of one model value by value.

A checkpoint may have several: a config.json, the record of an import, Megatron's ``args``, and Megatron-Bridge's
``run_config.yaml``. Some values decide how stored rows are read, others what is computed with them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from dist_ckpt_mistral.model.config.families import COMMON_DEFAULTS, FAMILIES, LATENT_SIZES
from dist_ckpt_mistral.model.config.mistral_config import MistralConfig
from dist_ckpt_mistral.model.config.parts import Experts

#: Names of values that decide which stored rows are which weights.
_OF_WEIGHTS: Final = frozenset(
    {
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "tie_word_embeddings"),
        *("num_attention_heads", "num_key_value_heads", "head_dim"),
        *("experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size", "n_shared_experts"),
        *("latent_attention", *LATENT_SIZES),
    }
)
#: Fields that are not compared: files hold their own dtypes, and the keys of ``hf_config`` are compared one by one.
_FOLLOW: Final = frozenset({"dtype", "hf_config"})
#: Fields that hold a part of the model -> prefix of its keys in the comparison.
_PREFIXES: Final = {"yarn": "yarn.", "experts": "", "latent_attention": "", "vision": "vision_config."}
#: Keys of config.json that do not describe the model, but its origin and how it is run.
_NOT_OF_THE_MODEL: Final = frozenset(
    {
        *("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "initializer_range"),
        *("_attn_implementation", "_attn_implementation_autoset", "quantization_config", "compression_config"),
        *("return_dict", "output_attentions", "output_hidden_states", "chunk_size_feed_forward", "is_decoder"),
    }
)
#: Prefixes of keys that become fields of a MistralConfig and that transformers 4 and 5 may spell differently.
_READ: Final = ("rope_", "partial_rotary_factor")
#: Keys that transformers fills in if a config.json lacks them.
_FILLED_IN: Final = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True, slots=True, kw_only=True)
class Disagreement:
    """One value that two descriptions of a model give differently.

    Args:
        name: The key in config.json or the field of ``MistralConfig``, such as ``yarn.factor`` in a part.
        first: The value in the first description.
        second: The value in the second description.
        of_weights: Whether the value decides how stored weights are read, so that a wrong one permutes, cuts or drops
            weights. Any other value changes what is computed with them.
    """

    name: str
    first: object
    second: object
    of_weights: bool

    def __str__(self) -> str:
        """The name and both values."""
        return f"{self.name}: {_worded(self.first)} and {_worded(self.second)}"


def disagreements(first: MistralConfig, second: MistralConfig) -> list[Disagreement]:
    """Every value that differs between two configurations, including each value of their parts."""
    configs = (first, second)
    a, b = ({name: getattr(config, name) for name in config.__slots__ if name not in _FOLLOW} for config in configs)
    for name, prefix in _PREFIXES.items():
        part_a, part_b = _part(first, name), _part(second, name)
        if part_a is None or part_b is None:
            a[name], b[name] = part_a, part_b
        else:
            del a[name], b[name]
            a |= {prefix + key: value for key, value in part_a.items()}
            b |= {prefix + key: value for key, value in part_b.items()}
    if first.hf_config is not None and second.hf_config is not None:
        a, b = _other_keys(first.hf_config, first.model_type) | a, _other_keys(second.hf_config, second.model_type) | b
    return [
        Disagreement(name=name, first=a[name], second=b[name], of_weights=name in _OF_WEIGHTS)
        for name in a
        if name in b and a[name] != b[name]
    ]


def listed_disagreements(differences: Iterable[Disagreement]) -> str:
    """Each name with its first and its second value, joined by semicolons."""
    return "; ".join(map(str, differences))


def _part(config: MistralConfig, name: str) -> dict[str, Any] | None:
    """The values of the part ``name`` by their keys in config.json where it has such; None without that part."""
    part = getattr(config, name)
    if part is None:
        return None
    return FAMILIES[config.model_type].expert_keys(part) if isinstance(part, Experts) else asdict(part)


def _other_keys(raw: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    """The values of a config.json that are no fields of a MistralConfig, such as token ids, with their defaults."""
    sections = {name: raw.get(name) for name in ("text_config", "vision_config")}
    text, vision = (section if isinstance(section, Mapping) else {} for section in sections.values())
    defaults = {**COMMON_DEFAULTS, **FAMILIES[model_type].defaults}
    outer = {**{name: defaults[name] for name in _FILLED_IN}, **text, **raw}
    return {
        name: value
        for prefix, keys in (("", outer), ("vision_config.", vision))
        for key, value in keys.items()
        if (name := prefix + key) not in MistralConfig.__dataclass_fields__
        and key not in _NOT_OF_THE_MODEL
        and key not in sections
        and not key.startswith(_READ)
    }


def _worded(value: object) -> str:
    return "none" if value is None else f"{value!r:.200}"
