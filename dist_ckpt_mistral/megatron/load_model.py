"""Build a rank's ``GPTModel`` and fill it with stored weights: from a Megatron checkpoint or Hugging Face files.

The weights are copied by a ``BytePlan``, as in a conversion. Megatron's own reader is not used, because it reads only
checkpoints of similar versions of torch and Megatron.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from dist_ckpt_mistral.convert import ranks
from dist_ckpt_mistral.convert.conversion import LossPolicy, names_of_sources
from dist_ckpt_mistral.errors import ConfigError, TensorMismatchError
from dist_ckpt_mistral.gather.execute import DEFAULT_EFFORT, Effort, execute
from dist_ckpt_mistral.mapping.rank_plan import plan_local_tensors
from dist_ckpt_mistral.mapping.source import ModelSource, open_source, require_equal_twins
from dist_ckpt_mistral.megatron.build_model import NO_SETTINGS, ONE_RANK, Model, as_model, build_chunks
from dist_ckpt_mistral.megatron.runtime import default_device, initialize_megatron
from dist_ckpt_mistral.megatron.sharded_state_dict import torch_dtype
from dist_ckpt_mistral.model.config.mistral_config import GivenConfig, chosen_config
from dist_ckpt_mistral.model.layout.layout import ParallelLayout
from dist_ckpt_mistral.model.layout.local_tensors import LocalTensor, local_tensors


def load_model(
    path: str | Path,
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
    """Build this rank's GPTModel and load the weights in ``path`` into it.

    Every rank makes the same call and reads only its own part of the weights. The call sets up Megatron's process
    group, parallel state and random numbers where they are missing (``initialize_megatron``). Rows that only pad the
    vocabulary become zeros.

        model = dcm.load_model("ckpt", layout=dcm.ParallelLayout(tp=2, pp=4))  # under torchrun, on 8 ranks

    Args:
        path: A Megatron checkpoint (root or iteration directory), a Hugging Face directory or a hub id.
        layout: The parallel layout. Its ``dp`` is multiplied so that all ranks of the job are used.
        config: Configuration of a checkpoint that has none: a MistralConfig, a config.json, or a directory or hub id
            with one.
        dtype: Dtype to convert the weights to (rounding to nearest even), as a torch dtype or its name; by default
            they keep their stored dtype.
        device: Device of the model; by default CUDA if available, else the CPU.
        padded_vocab_size: Rows of the embedding and of the output layer; by default the next multiple of 128 x tp, as
            in Megatron-LM.
        transformer_config: Further fields of Megatron's TransformerConfig. They replace those that follow from the
            configuration and ``layout``.
        allow_lossy: Warn, instead of raising an error, if the conversion to ``dtype`` makes finite values infinite or
            other values zero. Warning and error count the values.
        effort: Number of threads and size of the copy buffers.

    Returns:
        The GPTModel; with virtual pipeline stages (``layout.vpp``) the list of this rank's GPTModels.

    Raises:
        DistCkptMistralError: The model cannot be read, does not fit the layout or cannot be expressed in Megatron.
            An error on one rank is raised on all ranks.
    """
    device = default_device() if device is None else torch.device(device)
    layout = initialize_megatron(layout, device=device)

    def opened() -> ModelSource:
        fp8_values_as = None if dtype is None else "float32"  # so that they are rounded once, where losses are counted
        return open_source(path, config=chosen_config(config), dtype=fp8_values_as)

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
    chunks = build_chunks(source.config, layout, dtype, device, padded_vocab_size, settings)
    pairs = [
        pair
        for chunk, tensors in zip(chunks, _local_tensors(source, layout, padded_vocab_size), strict=True)
        for pair in _pairs(dict(chunk.named_parameters()), tensors)
    ]
    losses = LossPolicy(allowed=allow_lossy, names_of=names_of_sources)
    ranks.from_environment().each(lambda: _fill(source, pairs, str(dtype).removeprefix("torch."), losses, effort))
    return as_model(chunks, device)


def _only_dtype(source: ModelSource) -> str:
    """The torch name of the dtype of all stored weights. Raises ConfigError if they have several."""
    names = sorted({source.dtype_of(tensor) for tensor in source.tensors})
    if len(names) > 1:
        raise ConfigError(
            f"{source.path} stores its weights in several dtypes: {', '.join(names)}. "
            "Give dtype (--dtype on the command line)."
        )
    return names[0]


def _local_tensors(source: ModelSource, layout: ParallelLayout, vocab_rows: int | None) -> Iterator[list[LocalTensor]]:
    """Yield the local tensors of each model chunk of this rank."""
    at = layout.coordinates(dist.get_rank())
    for chunk in layout.model_chunks(source.table.num_layers, parallel_state.get_pipeline_model_parallel_rank()):
        yield list(local_tensors(layout, source.table, chunk, at, vocab_rows=vocab_rows))


def _pairs(
    parameters: Mapping[str, torch.nn.Parameter], tensors: Sequence[LocalTensor]
) -> list[tuple[LocalTensor, torch.nn.Parameter]]:
    """Pair the local tensors of a model chunk with its parameters. Raises TensorMismatchError if they do not match."""
    expected = {tensor.module_name: tensor.local_shape for tensor in tensors}
    actual = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    if expected != actual:
        different = sorted({name for name, _ in expected.items() ^ actual.items()})
        raise TensorMismatchError(
            "the installed megatron-core makes another model than the tensor table describes: "
            + "; ".join(f"{name}: expected {expected.get(name)}, got {actual.get(name)}" for name in different)
            + ". Install a version that this package is tested with: 0.16 or 0.19."
        )
    return [(tensor, parameters[tensor.module_name]) for tensor in tensors]


@dataclass(frozen=True, slots=True)
class _Memory:
    """The bytes of a tensor in memory, as a target of ``execute``."""

    view: memoryview

    def write(self, position: int, data: memoryview) -> None:
        self.view[position : position + len(data)] = data

    def start_writeback(self, position: int, num_bytes: int) -> None:
        """Do nothing: the bytes stay in memory."""


@torch.no_grad()
def _fill(
    source: ModelSource,
    pairs: Sequence[tuple[LocalTensor, torch.nn.Parameter]],
    dtype: str,
    losses: LossPolicy,
    effort: Effort,
) -> None:
    """Read the weights into the parameters; rows that pad the vocabulary become zeros."""
    require_equal_twins(source)
    plan = plan_local_tensors(source, [tensor for tensor, _ in pairs], dtype)
    values = [
        torch.empty(parameter.shape, dtype=parameter.dtype) if parameter.is_cuda else parameter.detach()
        for _, parameter in pairs
    ]
    targets = {number: _Memory(value.view(-1).view(torch.uint8).numpy().data) for number, value in enumerate(values)}
    effort.progress.phase("load", plan.num_bytes)
    losses.accept(plan, execute(plan, targets, effort=effort, numbers=range(len(plan.segments)), checksums=False))
    for (tensor, parameter), value in zip(pairs, values, strict=True):
        value[tensor.live_rows :] = 0
        if parameter.is_cuda:
            parameter.copy_(value)
