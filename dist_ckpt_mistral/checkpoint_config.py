"""Which model configuration a Megatron checkpoint goes by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from dist_ckpt_mistral import embedded, strict_yaml
from dist_ckpt_mistral.errors import ConfigError
from dist_ckpt_mistral.formats.stored_checkpoint import StoredCheckpoint
from dist_ckpt_mistral.model.bridge_config import from_run_config
from dist_ckpt_mistral.model.config import MistralConfig
from dist_ckpt_mistral.model.megatron_args import from_megatron_args
from dist_ckpt_mistral.model.tensor_table import config_as_stored

#: Megatron-Bridge's configuration of a run, beside the shards (training/utils/checkpoint_utils.py, 0.1 to 0.7).
RUN_CONFIG_FILE: Final = "run_config.yaml"


def read_embedded(checkpoint: StoredCheckpoint) -> embedded.Embedded | None:
    """What an import left in the checkpoint, if training has not dropped it since."""
    return embedded.from_common_state(checkpoint.common_state, str(checkpoint.directory))


def choose_config(
    checkpoint: StoredCheckpoint, given: MistralConfig | None, remembered: embedded.Embedded | None
) -> tuple[MistralConfig, str]:
    """The configuration to go by, and where it is from.

    That is what was given, what an import embedded, Megatron-LM's own args, or Megatron-Bridge's run_config.yaml.
    """
    if given is not None:
        return config_as_stored(given, checkpoint.tensors), "the given configuration"
    if remembered is not None:
        known = config_as_stored(remembered.config, checkpoint.tensors)
        return known, "the Hugging Face configuration inside the checkpoint"
    args = checkpoint.common_state.get("args")
    if isinstance(args, Mapping):
        return from_megatron_args(args), "the args inside the checkpoint"
    run_config = checkpoint.directory / RUN_CONFIG_FILE
    if run_config.is_file():
        return from_run_config(
            strict_yaml.read_object(run_config), str(run_config)
        ), f"{RUN_CONFIG_FILE} inside the checkpoint"
    raise ConfigError(
        f"{checkpoint.directory} holds neither a Hugging Face configuration nor Megatron's args nor {RUN_CONFIG_FILE}. "
        "Give the model's config.json with --config."
    )
