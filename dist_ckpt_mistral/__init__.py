"""Mistral checkpoints between Megatron's distributed format and Hugging Face.

    import dist_ckpt_mistral as dcm

    dcm.from_hf("hf_dir", "ckpt")                      # Hugging Face -> Megatron torch_dist
    dcm.to_hf("ckpt", "out")                           # and back, byte for byte
    with dcm.open_checkpoint("ckpt") as checkpoint:    # lazily, by Hugging Face name
        q = checkpoint["model.layers.0.self_attn.q_proj.weight"]

    config = dcm.MistralConfig.from_hf("hf_dir")       # on the training side, with Megatron
    state = dcm.sharded_state_dict(config, dcm.ParallelLayout(tp=2, pp=4), rank=3)
    model = dcm.load_model("ckpt", layout=dcm.ParallelLayout(tp=2, pp=4))  # this rank's GPTModel, under torchrun

Names are imported on first use, so that importing the package costs nothing and never imports Megatron or torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dist_ckpt_mistral.checking import Check, check
    from dist_ckpt_mistral.conversion import Conversion
    from dist_ckpt_mistral.convert import from_hf, to_hf
    from dist_ckpt_mistral.errors import (
        ConfigError,
        DistCkptMistralError,
        FormatError,
        LayoutError,
        LostRankError,
        MissingLibraryError,
        OutputError,
        PlanError,
        TensorMismatchError,
        UnsafePickleError,
        UnsupportedFormatError,
        UnsupportedModelError,
    )
    from dist_ckpt_mistral.lazy_checkpoint import LazyCheckpoint, open_checkpoint
    from dist_ckpt_mistral.megatron.build_model import build_model
    from dist_ckpt_mistral.megatron.hf_metadata import add_hf_metadata
    from dist_ckpt_mistral.megatron.load_model import load_model
    from dist_ckpt_mistral.megatron.optimizer_state import optimizer_state_dict
    from dist_ckpt_mistral.megatron.runtime import initialize_megatron
    from dist_ckpt_mistral.megatron.sharded_state_dict import sharded_state_dict
    from dist_ckpt_mistral.migration import migrate
    from dist_ckpt_mistral.model.config.mistral_config import ConfigOverride, MistralConfig
    from dist_ckpt_mistral.model.layout.layout import ParallelLayout
    from dist_ckpt_mistral.model.table.rules import KeyStyle, LayerSpec
    from dist_ckpt_mistral.pretrain_command import PretrainCommand, megatron_args
    from dist_ckpt_mistral.reading.plan import ReadingPlan
    from dist_ckpt_mistral.reading.planner import plan_reading
    from dist_ckpt_mistral.report import Report, inspect
    from dist_ckpt_mistral.resharding import reshard
    from dist_ckpt_mistral.stored_comparison import compare_stored
    from dist_ckpt_mistral.verify import Comparison, compare

_HOME = {
    "Check": "checking",
    "Comparison": "verify",
    "ConfigError": "errors",
    "ConfigOverride": "model.config",
    "Conversion": "conversion",
    "DistCkptMistralError": "errors",
    "FormatError": "errors",
    "KeyStyle": "model.tensor_rules",
    "LayerSpec": "model.tensor_rules",
    "LayoutError": "errors",
    "LazyCheckpoint": "lazy_checkpoint",
    "LostRankError": "errors",
    "MissingLibraryError": "errors",
    "MistralConfig": "model.config",
    "OutputError": "errors",
    "ParallelLayout": "model.parallel_layout",
    "PlanError": "errors",
    "PretrainCommand": "pretrain_command",
    "ReadingPlan": "reading.plan",
    "Report": "report",
    "TensorMismatchError": "errors",
    "UnsafePickleError": "errors",
    "UnsupportedFormatError": "errors",
    "UnsupportedModelError": "errors",
    "add_hf_metadata": "megatron.hf_metadata",
    "build_model": "megatron.build_model",
    "check": "checking",
    "compare": "verify",
    "compare_stored": "stored_comparison",
    "from_hf": "convert",
    "initialize_megatron": "megatron.runtime",
    "inspect": "report",
    "load_model": "megatron.load_model",
    "megatron_args": "pretrain_command",
    "migrate": "migration",
    "open_checkpoint": "lazy_checkpoint",
    "optimizer_state_dict": "megatron.optimizer_state",
    "plan_reading": "reading.planner",
    "reshard": "resharding",
    "sharded_state_dict": "megatron.sharded_state_dict",
    "to_hf": "convert",
}

__all__ = [
    "Check",
    "Comparison",
    "ConfigError",
    "ConfigOverride",
    "Conversion",
    "DistCkptMistralError",
    "FormatError",
    "KeyStyle",
    "LayerSpec",
    "LayoutError",
    "LazyCheckpoint",
    "LostRankError",
    "MissingLibraryError",
    "MistralConfig",
    "OutputError",
    "ParallelLayout",
    "PlanError",
    "PretrainCommand",
    "ReadingPlan",
    "Report",
    "TensorMismatchError",
    "UnsafePickleError",
    "UnsupportedFormatError",
    "UnsupportedModelError",
    "add_hf_metadata",
    "build_model",
    "check",
    "compare",
    "compare_stored",
    "from_hf",
    "initialize_megatron",
    "inspect",
    "load_model",
    "megatron_args",
    "migrate",
    "open_checkpoint",
    "optimizer_state_dict",
    "plan_reading",
    "reshard",
    "sharded_state_dict",
    "to_hf",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401  (a module attribute of any kind)
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dist_ckpt_mistral import libraries  # noqa: PLC0415  (who imports the package may never need it)

    home = _HOME[name]
    needs = ("torch", "megatron.core") if home.startswith("megatron.") else ()
    with libraries.needed(f"{__name__}.{name}", *needs, extra="megatron"):
        value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_HOME))
