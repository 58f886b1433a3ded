"""A running Megatron model from a stored one: a Megatron checkpoint of any version, or Hugging Face files.

A rank's parameters are filled by the one plan that also makes files; Megatron's own reader, which needs a torch of the
writer's kind, has no part in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from dist_ckpt_mistral.convert import ranks
from dist_ckpt_mistral.convert.conversion import LossPolicy, names_of_sources
from dist_ckpt_mistral.errors import ConfigError, TensorMismatchError
from dist_ckpt_mistral.gather.execute import DEFAULT_EFFORT, Effort, execute
from dist_ckpt_mistral.mapping.rank_plan import live_rows, plan_held
from dist_ckpt_mistral.mapping.source import ModelSource, open_source, require_equal_twins
from dist_ckpt_mistral.megatron.build_model import Model, as_model, build_chunks
from dist_ckpt_mistral.megatron.runtime import default_device, initialize_megatron
from dist_ckpt_mistral.megatron.sharded_state_dict import torch_dtype
from dist_ckpt_mistral.model.config.mistral_config import GivenConfig, chosen_config
from dist_ckpt_mistral.model.layout.layout import ParallelLayout
from dist_ckpt_mistral.model.layout.local_tensors import LocalTensor

_ALONE: Final = ParallelLayout()
_NOTHING: Final[Mapping[str, Any]] = {}


def load_model(
    path: str | Path,
    *,
    layout: ParallelLayout = _ALONE,
    config: GivenConfig | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    padded_vocab_size: int | None = None,
    transformer_config: Mapping[str, Any] = _NOTHING,
    allow_lossy: bool = False,
    effort: Effort = DEFAULT_EFFORT,
) -> Model:
    """This rank's GPTModel with the weights in ``path``, or the list of them with virtual pipeline stages.

    Every rank of ``layout`` makes the same call and reads what it holds. Megatron is set up if it is not
    (``initialize_megatron``). Vocabulary padding holds zeros.

    Args:
        path: A Megatron checkpoint (root or iteration), a Hugging Face directory or hub id.
        layout: The parallel layout; its data-parallel replicas follow from the number of ranks.
        config: For checkpoints that do not tell theirs: itself, a config.json, or a directory with one.
        dtype: Converts the weights (rounding to nearest even; torch's own or its name), by default they keep the one
            that they are stored in.
        device: Where the model goes, by default CUDA where there is any, else the CPU.
        padded_vocab_size: Rows of embedding and head, by default what Megatron-LM pads to.
        transformer_config: Further fields of Megatron's TransformerConfig; they win.
        allow_lossy: Only warn where ``dtype`` destroys values, finite ones that become infinite or others that become
            zero; by default that is an error, which counts them.
        effort: Threads and copy buffers.

    Raises:
        DistCkptMistralError: The model cannot be read, does not fit the layout or cannot be expressed in Megatron; if
            that happens on one rank, it is raised on all.
    """
    device = default_device() if device is None else torch.device(device)
    layout = initialize_megatron(layout, device=device)

    def opened() -> ModelSource:
        name = None if dtype is None else "float32"  # FP8 values: rounded once, where losses are counted
        return open_source(path, config=chosen_config(config), dtype=name)

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
    transformer_config: Mapping[str, Any] = _NOTHING,
    allow_lossy: bool = False,
    effort: Effort = DEFAULT_EFFORT,
) -> Model:
    """As ``load_model``, from an opened model."""
    layout.check(source.config)
    layout = initialize_megatron(layout, device=device)
    dtype = torch_dtype(_only_dtype(source) if dtype is None else dtype)
    settings = {"perform_initialization": False, **transformer_config}
    chunks = build_chunks(source.config, layout, dtype, device, padded_vocab_size, settings)
    pairs = [
        pair
        for chunk, held in zip(chunks, _held(source, layout, padded_vocab_size), strict=True)
        for pair in _pairs(dict(chunk.named_parameters()), held)
    ]
    losses = LossPolicy(allowed=allow_lossy, names_of=names_of_sources)
    ranks.from_environment().each(lambda: _fill(source, pairs, str(dtype).removeprefix("torch."), losses, effort))
    return as_model([chunk.to(device) for chunk in chunks])


def _only_dtype(source: ModelSource) -> str:
    """The torch name of the dtype in which all weights are stored."""
    names = sorted({source.dtype_of(tensor) for tensor in source.tensors})
    if len(names) > 1:
        raise ConfigError(
            f"{source.path} stores its weights in several dtypes: {', '.join(names)}. "
            "Give dtype (--dtype on the command line)."
        )
    return names[0]


def _held(source: ModelSource, layout: ParallelLayout, vocab_rows: int | None) -> Iterator[list[LocalTensor]]:
    """What this rank holds of each of its model chunks."""
    at = layout.coordinates(dist.get_rank())
    for chunk in layout.model_chunks(source.table.num_layers, parallel_state.get_pipeline_model_parallel_rank()):
        yield list(layout.local_tensors(source.table, chunk, at, vocab_rows=vocab_rows))


def _pairs(
    parameters: Mapping[str, torch.nn.Parameter], held: Sequence[LocalTensor]
) -> list[tuple[LocalTensor, torch.nn.Parameter]]:
    """Every parameter of a model chunk with what it holds."""
    described = {each.module_name: each.local_shape for each in held}
    found = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    if described != found:
        different = sorted({name for name, _ in described.items() ^ found.items()})
        raise TensorMismatchError(
            "the installed megatron-core makes another model than the tensor table describes: "
            + "; ".join(f"{name}: expected {described.get(name)}, got {found.get(name)}" for name in different)
            + ". Install a version that this package is tested with: 0.16 or 0.19."
        )
    return [(each, parameters[each.module_name]) for each in held]


@dataclass(frozen=True, slots=True)
class _Memory:
    """Bytes of a tensor as the target of a plan."""

    view: memoryview

    def write(self, position: int, data: memoryview) -> None:
        self.view[position : position + len(data)] = data

    def start_writeback(self, position: int, num_bytes: int) -> None:
        """Memory is where it lasts."""


@torch.no_grad()
def _fill(
    source: ModelSource,
    pairs: Sequence[tuple[LocalTensor, torch.nn.Parameter]],
    dtype: str,
    losses: LossPolicy,
    effort: Effort,
) -> None:
    """Read what the parameters hold; rows that pad the vocabulary become zeros."""
    require_equal_twins(source)
    plan = plan_held(source, [held for held, _ in pairs], dtype)
    values = [
        torch.empty(parameter.shape, dtype=parameter.dtype) if parameter.is_cuda else parameter.detach()
        for _, parameter in pairs
    ]
    targets = {number: _Memory(value.view(-1).view(torch.uint8).numpy().data) for number, value in enumerate(values)}
    losses.accept(plan, execute(plan, targets, effort=effort, numbers=range(len(plan.segments)), checksums=False))
    for (held, parameter), value in zip(pairs, values, strict=True):
        value[live_rows(held) :] = 0
        if parameter.is_cuda:
            parameter.copy_(value)
