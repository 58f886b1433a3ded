"""Two descriptions of one model, compared value by value.

A checkpoint may be described several times: by a config.json, by the record that an import left, by Megatron's
``args``, by Megatron-Bridge's ``run_config.yaml``. Some values decide how stored rows are read, others what is computed
with them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from dist_ckpt_mistral.model.config import MistralConfig

#: Fields of a MistralConfig that decide which stored rows are which weights; of its parts, all but those below.
_OF_WEIGHTS: Final = frozenset(
    {
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "tie_word_embeddings"),
        *("num_attention_heads", "num_key_value_heads", "head_dim"),
        *("experts", "experts.num_experts", "experts.intermediate_size", "experts.shared_intermediate_size"),
        *("latent_attention", "latent_attention.q_lora_rank", "latent_attention.kv_lora_rank"),
        *("latent_attention.qk_nope_head_dim", "latent_attention.qk_rope_head_dim", "latent_attention.v_head_dim"),
    }
)
#: Fields that follow from others: the files hold their own dtypes, and ``packed`` is how a family's files are named.
_FOLLOW: Final = frozenset({"dtype", "hf_config", "experts.packed"})
#: Keys of config.json that say who wrote it and how it is run, not what the model is.
_NOT_OF_THE_MODEL: Final = frozenset(
    {
        *("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "initializer_range"),
        *("_attn_implementation", "_attn_implementation_autoset", "quantization_config", "compression_config"),
        *("return_dict", "output_attentions", "output_hidden_states", "chunk_size_feed_forward", "is_decoder"),
    }
)
#: Keys that are read into fields of a MistralConfig, where transformers 4 and 5 may spell the same value differently.
_READ: Final = ("rope_", "text_config", "vision_config", "partial_rotary_factor")


@dataclass(frozen=True, slots=True, kw_only=True)
class Disagreement:
    """One value that two descriptions of a model give differently.

    ``of_weights`` says that the value decides how the stored weights are read: with a wrong one they are permuted, cut
    or dropped. Any other value changes what is computed with them.
    """

    name: str
    first: object
    second: object
    of_weights: bool

    def __str__(self) -> str:
        """The name and both values."""
        return f"{self.name}: {_worded(self.first)} and {_worded(self.second)}"


def disagreements(first: MistralConfig, second: MistralConfig) -> list[Disagreement]:
    """Every value that two configurations give differently, the fields of their parts one by one."""
    a, b = _values(first), _values(second)
    fields = [
        Disagreement(name=name, first=a[name], second=b[name], of_weights=name in _OF_WEIGHTS)
        for name in a
        if name in b and a[name] != b[name]
    ]
    return [*fields, *_other_keys(first.hf_config, second.hf_config)]


def listed_disagreements(found: Iterable[Disagreement]) -> str:
    """All of them in words: each name with its first and its second value."""
    return "; ".join(map(str, found))


def _values(config: MistralConfig) -> dict[str, Any]:
    """The fields by name. A part that is absent is None; its fields then have no value to compare."""
    values: dict[str, Any] = {}
    for name, value in asdict(config).items():
        if name in _FOLLOW:
            continue
        values[name] = value if value is None or not isinstance(value, dict) else _PRESENT
        if isinstance(value, dict):
            values |= {f"{name}.{each}": part for each, part in value.items() if f"{name}.{each}" not in _FOLLOW}
    return values


#: Stands for a part that is there, whatever it says.
_PRESENT: Final = "present"


def _other_keys(first: Mapping[str, Any] | None, second: Mapping[str, Any] | None) -> Iterator[Disagreement]:
    """The values of a config.json that are no field of a MistralConfig, such as token ids, where both give one."""
    fields = MistralConfig.__dataclass_fields__
    for name in first or {}:
        if name in fields or name in _NOT_OF_THE_MODEL or name.startswith(_READ) or name not in (second or {}):
            continue
        if first[name] != second[name]:  # type: ignore[index]  # both have the name
            yield Disagreement(name=name, first=first[name], second=second[name], of_weights=False)  # type: ignore[index]


def _worded(value: object) -> str:
    return "none" if value is None else f"{value!r:.200}"
