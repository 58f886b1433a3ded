"""Which model configuration a Megatron checkpoint goes by."""

from __future__ import annotations

from collections.abc import Mapping

from dist_ckpt_mistral import embedded
from dist_ckpt_mistral.errors import ConfigError
from dist_ckpt_mistral.formats import torch_dist
from dist_ckpt_mistral.model.config import MistralConfig
from dist_ckpt_mistral.model.megatron_args import from_megatron_args


def read_embedded(checkpoint: torch_dist.TorchDistCheckpoint) -> embedded.Embedded | None:
    """What an import left in the checkpoint, if training has not dropped it since."""
    return embedded.from_common_state(checkpoint.common_state, str(checkpoint.directory))


def choose_config(
    checkpoint: torch_dist.TorchDistCheckpoint, given: MistralConfig | None, remembered: embedded.Embedded | None
) -> tuple[MistralConfig, str]:
    """The configuration to go by, and where it is from: given, embedded by an import, or Megatron's own args."""
    if given is not None:
        return given, "the given configuration"
    if remembered is not None:
        return remembered.config, "the Hugging Face configuration inside the checkpoint"
    args = checkpoint.common_state.get("args")
    if not isinstance(args, Mapping):
        raise ConfigError(
            f"{checkpoint.directory} holds neither a Hugging Face configuration nor Megatron's args. "
            "Give the model's config.json with --config."
        )
    return from_megatron_args(args), "the args inside the checkpoint"
