"""What a rank does to fill live models, beside the tasks of megatron_ranks.py."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final
from unittest import mock

import torch
import torch.distributed as dist
from gpt_optimizer import Optimizer
from gpt_stage import Stage
from megatron.core import dist_checkpointing
from megatron.core.transformer.module import Float16Module
from reads import counted_reads

from dist_ckpt_mistral.errors import DistCkptMistralError, FormatError
from dist_ckpt_mistral.gather.execute import Effort
from dist_ckpt_mistral.megatron import live_ranks
from dist_ckpt_mistral.megatron import load_weights as subject
from dist_ckpt_mistral.megatron.load_weights import load_weights
from dist_ckpt_mistral.model.config.mistral_config import MistralConfig
from dist_ckpt_mistral.model.layout.layout import ParallelLayout
from dist_ckpt_mistral.storage.local import SourceFiles

if TYPE_CHECKING:
    from megatron.core.models.gpt.gpt_model import GPTModel

#: Long enough for all that these tests wait for, and short enough for a test.
_PATIENCE: Final = timedelta(seconds=60)


def _stage(config: dict[str, Any], layout: dict[str, Any], *, grouped: bool = False) -> Stage:
    """A live model that holds nothing yet."""
    uneven = layout.get("pp_layers")
    parallel = ParallelLayout(**layout | {"pp_layers": uneven and tuple(uneven)})
    stage = Stage(MistralConfig.from_hf(config), parallel, grouped=grouped)
    stage.forget()
    return stage


def _wrapped(stage: Stage) -> tuple[Any, Optimizer | None]:
    """The model as training has it: one chunk in DistributedDataParallel, with its optimizer, else in Float16Module."""
    if len(stage.chunks) == 1:
        optimizer = Optimizer(stage, distributed=True)
        return optimizer.models[0], optimizer
    return [Float16Module(chunk.config, chunk) for chunk in stage.chunks], None


def fill_live(
    *,
    config: dict[str, Any],
    layout: dict[str, Any],
    style: str,
    hf: str,
    at: str,
    source: str,
    wrapped: bool = False,
    grouped: bool = False,
    one_by_one: bool = False,
) -> dict[str, Any]:
    """Fill one model with ``load_weights`` from ``source``, another from the checkpoint ``at`` with Megatron; compare.

    ``one_by_one`` fills each virtual pipeline stage by itself, as where Megatron-LM makes it.
    ``needed_bytes`` are those of this rank's parameters without padding.
    """
    del style, hf
    ours, theirs = (_stage(config, layout, grouped=grouped) for _ in range(2))
    loaded = dist_checkpointing.load({"model": theirs.sharded_state_dict()}, at)
    theirs.load_state_dict(loaded["model"])
    model, optimizer = _wrapped(ours) if wrapped else (ours.chunks, None)
    ours.forget()
    with _counted() as read:
        for each in model if one_by_one else [model]:
            assert load_weights(each, source, timeout=_PATIENCE, effort=Effort(workers=2)) is each
    return {
        "different": [*_different(theirs, ours)],
        "parameters": len([*ours.parameters()]),
        "read_bytes": sum(read),
        "needed_bytes": sum(
            parameter[: _live_rows(ours, name, parameter)].nbytes for name, parameter, _ in ours.parameters()
        ),
        "main_weights": None if optimizer is None else _main_weights(optimizer),
    }


def _live_rows(stage: Stage, name: str, parameter: torch.Tensor) -> int:
    """The rows of a parameter that do not pad the vocabulary."""
    rows = len(parameter)
    if name not in ("embedding.word_embeddings.weight", "output_layer.weight"):
        return rows
    live: int = max(0, min(rows, stage.config.vocab_size - stage.tp_rank * rows))
    return live


def _different(theirs: Stage, ours: Stage) -> Iterator[str]:
    """Yield the parameters that do not hold the same bits, or padding that is not zero."""
    for (name, expected, layer), (_, actual, _) in zip(theirs.parameters(), ours.parameters(), strict=True):
        rows = _live_rows(ours, name, actual)
        if not torch.equal(*(each.detach()[:rows].view(torch.int16) for each in (expected, actual))):
            yield f"{name} (layer {layer})"
        if actual[rows:].any():
            yield f"padding of {name}"


@contextlib.contextmanager
def _counted() -> Iterator[list[int]]:
    """Count the bytes that the fill reads from files."""
    read: list[int] = []
    run = subject.Filling.run

    def run_counted(filling: subject.Filling, *arguments: Any) -> None:  # noqa: ANN401
        with counted_reads() as more:
            run(filling, *arguments)
        read.extend(more)

    with mock.patch.object(subject.Filling, "run", run_counted):
        yield read


def _main_weights(optimizer: Optimizer) -> list[bool]:
    """Whether the optimizer's own weights are the model's: before and after it is told to read them again."""
    parts = getattr(optimizer.own, "chained_optimizers", [optimizer.own])

    def equal() -> bool:
        return all(
            torch.equal(main, shard.float())
            for part in parts
            for shards, mains in zip(part.shard_float16_groups, part.shard_fp32_from_float16_groups, strict=True)
            for shard, main in zip(shards, mains, strict=True)
        )

    before = equal()
    optimizer.own.reload_model_params()
    return [before, equal()]


def refuse_to_fill(
    *, config: dict[str, Any], layout: dict[str, Any], style: str, hf: str, why: str, other: str
) -> dict[str, Any]:
    """Try to fill a live model though something is wrong, on one rank or on all; tell the error and what was written.

    ``other`` is the directory of another model.
    """
    del style
    stage, rank = _stage(config, layout), dist.get_rank()
    model, source, patience = stage.chunks, hf, _PATIENCE
    if why == "another model":
        source = other
    elif why == "no model on rank 1" and rank == 1:
        source = f"{hf}-absent"
    elif why == "another model on rank 1" and rank == 1:
        source = other
        stage = _stage(MistralConfig.from_hf(other).to_hf(), layout)
        model = stage.chunks
    elif why == "half a model on rank 1" and rank == 1:
        for chunk in model:
            _lose_parameter(chunk)
    elif why == "rank 1 stays away":
        if rank == 1:
            next(live_ranks._CALLS)  # noqa: SLF001  (so that it meets the others the next time)
            return {"error": "", "kind": "", "written": False}
        patience = timedelta(seconds=2)
    failing = why == "reads fail on rank 1" and rank == 1
    try:
        with _failing_reads() if failing else contextlib.nullcontext():
            load_weights(model, source, timeout=patience)
    except DistCkptMistralError as error:
        written = any(not parameter.isnan().all() for _, parameter, _ in stage.parameters())
        return {"error": str(error), "kind": type(error).__name__, "written": written}
    return {"error": None, "kind": None, "written": True}


@contextlib.contextmanager
def _failing_reads() -> Iterator[None]:
    """Have files fail once parameters are read, as on a network that breaks."""
    run = subject.Filling.run

    def run_badly(filling: subject.Filling, *arguments: Any) -> None:  # noqa: ANN401
        with mock.patch.object(SourceFiles, "read_into", side_effect=FormatError("cannot read the file.")):
            run(filling, *arguments)

    with mock.patch.object(subject.Filling, "run", run_badly):
        yield


def _lose_parameter(chunk: GPTModel) -> None:
    """Have a model leave a parameter out of its sharded state dict."""
    whole: Callable[..., dict[str, Any]] = chunk.sharded_state_dict

    def less(*arguments: Any, **options: Any) -> dict[str, Any]:  # noqa: ANN401
        state = whole(*arguments, **options)
        first = next(itertools.islice((name for name in state if name.endswith("linear_proj.weight")), 1))
        return {name: each for name, each in state.items() if name != first}

    chunk.sharded_state_dict = less
