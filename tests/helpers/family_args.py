"""Small models of the family in Megatron's args."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

from family_models import family_model

from dist_ckpt_mistral.model.args.megatron_args import to_megatron_args
from dist_ckpt_mistral.model.config.mistral_config import MistralConfig


def megatron(module: str) -> Any:  # noqa: ANN401  (a module of megatron-core, which is untyped)
    """A module of the installed megatron-core; what importing it warns of is not ours to mend."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(f"megatron.core.{module}")


def config_of(case: str, **changes: object) -> MistralConfig:
    """The configuration of a model that transformers knows."""
    sizes = family_model(case).config.to_dict() | {"dtype": "bfloat16"} | changes
    return MistralConfig.from_hf(sizes)


def args_of(case: str, **changes: object) -> dict[str, Any]:
    """The args of a small model, with changes; a change to ``...`` takes the field away."""
    args = to_megatron_args(config_of(case), dtype="bfloat16", tp=1, pp=1) | changes
    return {name: value for name, value in args.items() if value is not ...}
