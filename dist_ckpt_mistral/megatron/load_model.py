"""Build a rank's ``GPTModel`` and fill it, as ``load_weights`` does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dist_ckpt_mistral.arguments import require_types
from dist_ckpt_mistral.convert import ranks
from dist_ckpt_mistral.convert.conversion import LossPolicy, names_of_sources
from dist_ckpt_mistral.errors import ConfigError
from dist_ckpt_mistral.gather.execute import DEFAULT_EFFORT, Effort
from dist_ckpt_mistral.mapping.source import ModelSource, open_source
from dist_ckpt_mistral.megatron.build_model import NO_SETTINGS, ONE_RANK, Model, as_model, build_chunks
from dist_ckpt_mistral.megatron.load_weights import planned
from dist_ckpt_mistral.megatron.runtime import default_device, initialize_megatron
from dist_ckpt_mistral.megatron.sharded_state_dict import torch_dtype
from dist_ckpt_mistral.model.config.mistral_config import GivenConfig, chosen_config
from dist_ckpt_mistral.model.layout.layout import ParallelLayout


def load_model(
    source: str | Path,
    *,
    layout: ParallelLayout = ONE_RANK,
    config: GivenConfig | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    padded_vocab_size: int | None = None,
    transformer_config: Mapping[str, Any] = NO_SETTINGS,
    allow_lossy: bool = False,
    effort: Effort = DEFAULT_EFFORT,
) -> Model:
    """Build this rank's GPTModel and load the weights in ``source`` into it.

    Every rank makes the same call and reads only its own part of the weights. The call sets up Megatron's process
    group, parallel state and random numbers where they are missing (``initialize_megatron``). Rows that only pad the
    vocabulary become zeros.

        model = dcm.load_model("ckpt", layout=dcm.ParallelLayout(tp=2, pp=4))  # under torchrun, on 8 ranks

    Args:
        source: A Megatron checkpoint (root or iteration directory), a Hugging Face directory or a hub id.
        layout: The parallel layout. Its ``dp`` is multiplied so that all ranks of the job are used.
        config: Configuration of a checkpoint that has none: a MistralConfig, a config.json, or a directory or hub id
            with one.
        dtype: Dtype to convert the weights to (rounding to nearest even), as a torch dtype or its name; by default
            they keep their stored dtype.
        device: Device of the model; by default CUDA if available, else the CPU.
        padded_vocab_size: Rows of the embedding and of the output layer; by default the next multiple of 128 x tp, as
            in Megatron-LM.
        transformer_config: Further fields of Megatron's TransformerConfig. They replace defaults, and nothing that the
            configuration or ``layout`` says.
        allow_lossy: Warn, instead of raising an error, if the conversion to ``dtype`` makes finite values infinite or
            other values zero. Warning and error count the values.
        effort: Number of threads and size of the copy buffers.

    Returns:
        The GPTModel; with virtual pipeline stages (``layout.vpp``) the list of this rank's GPTModels.

    Raises:
        DistCkptMistralError: The model cannot be read, does not fit the layout or cannot be expressed in Megatron.
            An error on one rank is raised on all ranks.
    """
    require_types(load_model, **locals())
    device = default_device() if device is None else torch.device(device)
    layout = initialize_megatron(layout, device=device)

    def opened() -> ModelSource:
        fp8_values_as = None if dtype is None else "float32"  # so that they are rounded once, where losses are counted
        return open_source(source, config=chosen_config(config), dtype=fp8_values_as)

    return load_source(
        ranks.from_environment().each(opened),
        layout,
        dtype=dtype,
        device=device,
        padded_vocab_size=padded_vocab_size,
        transformer_config=transformer_config,
        allow_lossy=allow_lossy,
        effort=effort,
    )


def load_source(
    source: ModelSource,
    layout: ParallelLayout,
    *,
    dtype: torch.dtype | str | None,
    device: torch.device,
    padded_vocab_size: int | None = None,
    transformer_config: Mapping[str, Any] = NO_SETTINGS,
    allow_lossy: bool = False,
    effort: Effort = DEFAULT_EFFORT,
) -> Model:
    """Build and fill the model as ``load_model`` does, from an opened ``source``."""
    layout.check(source.config)
    layout = initialize_megatron(layout, device=device)
    dtype = torch_dtype(_only_dtype(source) if dtype is None else dtype)
    settings = {"perform_initialization": False, **transformer_config}
    model = as_model(build_chunks(source.config, layout, dtype, device, padded_vocab_size, settings), device)
    together = ranks.from_environment()
    filling = planned(model, lambda: source, together)
    together.each(lambda: filling.run(LossPolicy(allowed=allow_lossy, names_of=names_of_sources), effort))
    return model


def _only_dtype(source: ModelSource) -> str:
    """The torch name of the dtype of all stored weights. Raises ConfigError if they have several."""
    names = sorted({source.dtype_of(tensor) for tensor in source.tensors})
    if len(names) > 1:
        raise ConfigError(
            f"{source.path} stores its weights in several dtypes: {', '.join(names)}. "
            "Give dtype (--dtype on the command line)."
        )
    return names[0]
