"""What a run says of its LoRA adapter: PEFT's adapter_config.json, Megatron-Bridge's run_config.yaml, ms-swift's args.

Only what changes the adapter's effect is read: the factor of B A, which is alpha / rank (or alpha / sqrt(rank)), and
whatever would make the adapter something else than W + scale * B A, which is refused by name.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Self

from dist_ckpt_mistral.errors import ConfigError, UnsupportedModelError
from dist_ckpt_mistral.messages import listed
from dist_ckpt_mistral.model.config.parts import is_positive_int, is_positive_number

#: Fields of adapter_config.json (PEFT 0.21, tuners/lora/config.py) that change what the adapter computes, or where it
#: is -> the values with which they do not.
_PLAIN: Final[Mapping[str, tuple[object, ...]]] = {
    "bias": ("none",),
    **dict.fromkeys(("modules_to_save", "layers_to_transform", "layers_pattern", "layer_replication"), (None,)),
    **dict.fromkeys(("target_parameters", "trainable_token_indices", "alora_invocation_tokens"), (None,)),
    **dict.fromkeys(("arrow_config", "monteclora_config", "velora_config", "use_bdlora", "eva_config"), (None,)),
    **dict.fromkeys(("use_dora", "lora_bias", "fan_in_fan_out", "use_qalora"), (False,)),
    "alpha_pattern": ({},),
}
#: Ways to begin a training that also change the weights of the model (PEFT 0.21, docs, package_reference/lora).
_CHANGES_MODEL: Final = re.compile(r"pissa|olora|corda|loftq|lora_ga")
#: Megatron-Bridge's classes whose adapters are plain LoRA (peft/*.py, 0.6).
_LORA_CLASSES: Final = ("LoRA", "VLMLoRA", "CanonicalLoRA")
_MERGE_FIRST: Final = (
    "Merge it into its model first, with what trained it (peft: merge_and_unload), and give the model."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    """What decides the effect of a LoRA adapter.

    Args:
        source: The place of this description, in words.
        alpha: The numerator of the factor by which B A is multiplied.
        rank: The rank that the description names; None if it names none. A tensor's own rank counts.
        use_rslora: Whether the denominator is the square root of the rank, and not the rank.
        dropout: Probability of dropout while training, before A.
        base_model: Name or path of the model that the adapter is for, if it is known.
        peft: The content of the adapter_config.json that was imported; None without one.
    """

    source: str
    alpha: float
    rank: int | None = None
    use_rslora: bool = False
    dropout: float = 0.0
    base_model: str | None = None
    peft: Mapping[str, Any] | None = None

    def scale(self, rank: int) -> float:
        """The factor of B A for an adapter of this rank."""
        return self.alpha / (math.sqrt(rank) if self.use_rslora else rank)

    @classmethod
    def from_peft(cls, content: Mapping[str, Any], where: str) -> Self:
        """Read the content of an adapter_config.json; ``where`` names the file in errors.

        Raises UnsupportedModelError for what is not plain LoRA, ConfigError where alpha or rank are missing.
        """
        kind = content.get("peft_type")
        if kind != "LORA":
            raise UnsupportedModelError(f"peft_type in {where}: expected 'LORA', got {kind!r:.60}. {_MERGE_FIRST}")
        others = [
            f"{name}={content[name]!r:.80}"
            for name, plain in _PLAIN.items()
            if content.get(name) not in (*plain, None, [], {})
        ]
        start = content.get("init_lora_weights")
        if isinstance(start, str) and _CHANGES_MODEL.match(start):
            others.append(f"init_lora_weights={start!r}, which changes the weights of the model")
        if others:
            raise UnsupportedModelError(
                f"{where} describes another adapter than a plain LoRA of whole matrices in all layers: {listed(others)}"
                f". {_MERGE_FIRST}"
            )
        return cls(
            source=where,
            alpha=_alpha(content.get("lora_alpha"), f"lora_alpha in {where}"),
            rank=_rank(content.get("r"), f"r in {where}"),
            use_rslora=content.get("use_rslora") is True,
            dropout=_dropout(content.get("lora_dropout")),
            base_model=_text(content.get("base_model_name_or_path")),
            peft=content,
        )

    @classmethod
    def from_bridge(cls, run_config: Mapping[str, Any], where: str) -> Self | None:
        """Read the section ``peft`` of Megatron-Bridge's run_config.yaml; None if it has none.

        Raises UnsupportedModelError for what is not plain LoRA, ConfigError where alpha is missing.
        """
        section = run_config.get("peft")
        if not isinstance(section, Mapping):
            return None
        kind = str(section.get("_target_", "")).rpartition(".")[2]
        if kind not in _LORA_CLASSES:
            raise UnsupportedModelError(
                f"_target_ of peft in {where}: expected one of {', '.join(_LORA_CLASSES)}, got {kind!r:.80}. "
                f"{_MERGE_FIRST}"
            )
        names = (("checkpoint", "hf_source_path"), ("model", "hf_model_id"))
        sections = ((run_config.get(name), field) for name, field in names)
        found = (part.get(field) for part, field in sections if isinstance(part, Mapping))
        return cls(
            source=f"peft in {where}",
            alpha=_alpha(section.get("alpha"), f"peft.alpha in {where}"),
            rank=_rank(section.get("dim"), f"peft.dim in {where}"),
            dropout=_dropout(section.get("dropout")),
            base_model=next(filter(None, map(_text, found)), None),
        )

    @classmethod
    def from_swift(cls, args: Mapping[str, Any], where: str) -> Self | None:
        """Read ms-swift's args (swift/megatron/arguments/megatron_args.py, 4.6); None if they are not of a LoRA."""
        if args.get("lora_rank") is None or "lora" not in (args.get("tuner_type"), args.get("train_type")):
            return None
        return cls(
            source=where,
            alpha=_alpha(args.get("lora_alpha"), f"lora_alpha in {where}"),
            rank=_rank(args.get("lora_rank"), f"lora_rank in {where}"),
            use_rslora=args.get("use_rslora") is True,
            dropout=_dropout(args.get("lora_dropout")),
            base_model=_text(args.get("model")),
        )

    def to_peft(self, ranks: Mapping[str, int], within: str = "") -> dict[str, Any]:
        """The content of adapter_config.json for an adapter of the modules ``ranks`` (name -> rank).

        ``within`` is a part of all their names, where modules elsewhere end like them, as in a vision tower. If an
        imported content says the same, it is returned as it is.
        """
        usual = Counter(ranks.values()).most_common(1)[0][0]
        targets = sorted({name.rpartition(".")[2] for name in ranks})
        ends: dict[str, set[int]] = {}
        for name, rank in ranks.items():
            ends.setdefault(".".join(name.split(".")[-2:]), set()).add(rank)
        made = {
            "alpha_pattern": {},
            "auto_mapping": None,
            "base_model_name_or_path": self.base_model or "",
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": True,
            "lora_alpha": int(self.alpha) if float(self.alpha).is_integer() else self.alpha,
            "lora_dropout": self.dropout,
            "modules_to_save": None,
            "peft_type": "LORA",
            "r": usual,
            "rank_pattern": {end: rank for end, (rank, *_) in sorted(ends.items()) if rank != usual},
            "target_modules": rf".*{within}.*\.({'|'.join(targets)})" if within else targets,
            "task_type": "CAUSAL_LM",
            "use_dora": False,
            "use_rslora": self.use_rslora,
        }
        return dict(self.peft) if self.peft is not None and self._says_the_same(made, ranks) else made

    def _says_the_same(self, made: Mapping[str, Any], ranks: Mapping[str, int]) -> bool:
        """Whether the imported adapter_config.json describes these ranks, this alpha and these modules."""
        original = dict(self.peft or {})
        described = [adapted_rank(original, name) for name in ranks]
        same = ("lora_alpha", "use_rslora")
        return described == [*ranks.values()] and all(original.get(key, made[key]) == made[key] for key in same)


def adapted_rank(peft: Mapping[str, Any], module: str) -> int | None:
    """The rank that an adapter_config.json gives a module, as PEFT reads ``rank_pattern`` (utils/other.py, 0.21)."""
    pattern = peft.get("rank_pattern") or {}
    for key, rank in pattern.items():
        if re.fullmatch(rf"(.*\.)?({key})", module):
            return rank if is_positive_int(rank) else None
    rank = peft.get("r")
    return rank if is_positive_int(rank) else None


def contradictions(configs: Sequence[AdapterConfig], rank: int) -> Iterator[str]:
    """Yield, in words, how descriptions of one adapter differ in the factor of B A at a rank."""
    first, *others = configs
    for other in others:
        if not math.isclose(first.scale(rank), other.scale(rank), rel_tol=1e-9):
            yield " and ".join(f"B A times {each.scale(rank):g} by {each.source}" for each in (first, other))


def _alpha(value: object, what: str) -> float:
    if not isinstance(value, int | float) or not is_positive_number(value):
        raise ConfigError(f"{what}: expected a number above 0, got {value!r:.60}. Give it with --lora-alpha.")
    return value


def _rank(value: object, what: str) -> int:
    if not isinstance(value, int) or not is_positive_int(value):
        raise ConfigError(f"{what}: expected a whole number of at least 1, got {value!r:.60}")
    return value


def _dropout(value: object) -> float:
    return float(value) if isinstance(value, int | float) and 0 <= value < 1 else 0.0


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None
