"""A training of a Mistral model by Megatron, on a CPU, that can be saved at one layout and resumed at another.

All of it is Megatron's own: GPTModel, DistributedDataParallel, optimizer, learning rate, pipeline schedule, save and
load. From this project come the model for a configuration (``build_model``) and what a rank holds of its weights
(``sharded_state_dict``), from which Megatron's optimizers conclude what they hold of their state. There is no dropout:
nothing depends on random numbers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from resume_cpu import fused_adam
from resume_runs import LEARNING_RATE, MICROBATCHES, SEQUENCES, STEPS, TOKENS, batch

from dist_ckpt_mistral.formats import checkpoint_directory, places
from dist_ckpt_mistral.megatron.build_model import as_chunks, build_model
from dist_ckpt_mistral.megatron.runtime import destroy_parallel_state, initialize_megatron
from dist_ckpt_mistral.megatron.sharded_state_dict import sharded_state_dict
from dist_ckpt_mistral.model.config.mistral_config import MistralConfig
from dist_ckpt_mistral.model.layout.layout import ParallelLayout

#: What Megatron-LM keeps in a checkpoint as ``content_metadata`` and gives to an optimizer.
_CONTENT: Final[Mapping[str, Any]] = {
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
}


class Training:
    """This rank's share of a training: model, optimizer, learning-rate schedule, and how many steps are done."""

    def __init__(self, config: MistralConfig, layout: ParallelLayout, optimizer: str) -> None:
        """Set everything up. The parallel state must be that of ``layout``; ``optimizer`` is one of OPTIMIZERS."""
        self.config, self.layout, self.steps_done = config, layout, 0
        distributed = optimizer == "distributed"
        buffers = DistributedDataParallelConfig(use_distributed_optimizer=distributed, grad_reduce_in_fp32=True)
        self.chunks = _build(config, layout, torch.bfloat16)
        self.trained = [DistributedDataParallel(chunk.config, buffers, chunk) for chunk in self.chunks]
        self.optimizer = _optimizer(self.trained, distributed=distributed)
        self.schedule = OptimizerParamScheduler(
            self.optimizer,
            init_lr=0.0,
            max_lr=LEARNING_RATE,
            min_lr=LEARNING_RATE / 10,
            lr_warmup_steps=2 * SEQUENCES,  # all of these count sequences, as in Megatron-LM
            lr_decay_steps=STEPS * SEQUENCES,
            lr_decay_style="cosine",
            start_wd=0.1,
            end_wd=0.1,
            wd_incr_steps=STEPS * SEQUENCES,
            wd_incr_style="constant",
        )
        for chunk in self.chunks:
            chunk.config.finalize_model_grads_func = finalize_model_grads
            chunk.config.grad_scale_func = self.optimizer.scale_loss

    def step(self) -> tuple[float, float]:
        """Train on the next batch: its mean loss before this step, and the norm of the gradient."""
        for each in self.trained:
            each.zero_grad_buffer()
        self.optimizer.zero_grad()
        loss = _mean_loss(self.trained, torch.tensor(batch(self.steps_done, self.config.vocab_size)))
        _, norm, _ = self.optimizer.step()
        self.schedule.step(increment=SEQUENCES)
        self.steps_done += 1
        return loss, norm

    def norm_elements(self) -> int:
        """How many elements the gradient has whose norm Megatron takes, on all ranks together."""
        total = 0
        for each in self._optimizers():
            # Renamed between megatron-core 0.16 and 0.19 (optimizer/optimizer.py).
            named = next(n for n in ("get_grads_for_grad_norm", "get_main_grads_for_grad_norm") if hasattr(each, n))
            counted = torch.tensor(sum(gradient.numel() for gradient in getattr(each, named)()))
            dist.all_reduce(counted, group=each.get_grad_stats_parallel_group())
            total += int(counted)
        return total

    def begin(self, weights: str) -> None:
        """Begin with the weights of a checkpoint, such as ``from-hf`` writes."""
        self._load_weights(dist_checkpointing.load(self._weights(), _latest(weights)))
        self.optimizer.reload_model_params()

    def resume(self, checkpoint: str, *, lost: str | None = None) -> None:
        """Go on from ``checkpoint``, saved at whatever layout, as if ``lost`` (one of PARTS) were not in it."""
        if lost == "optimizer":
            self.begin(checkpoint)
            common = dist_checkpointing.load_common_state_dict(_latest(checkpoint))
        else:
            common = dist_checkpointing.load(self._weights_and_optimizer(is_loading=True), _latest(checkpoint))
            self._load_weights(common)
            self.optimizer.load_state_dict(common["optimizer"])
        if lost == "step":
            self._forget_step()
        if lost != "schedule":
            self.schedule.load_state_dict(common["opt_param_scheduler"])
        self.steps_done = common["iteration"]

    def save(self, checkpoint: str, *, described_by_megatron: bool = False) -> None:
        """Save all that ``resume`` needs, under a root such as Megatron-LM's.

        The entries of the weights are this project's, or ``described_by_megatron``: the model's own.
        """
        root = Path(checkpoint)
        directory = root / checkpoint_directory.iteration_name(self.steps_done)
        if dist.get_rank() == 0:
            directory.mkdir(parents=True)
        dist.barrier()
        state = {
            **self._weights_and_optimizer(is_loading=False, described_by_megatron=described_by_megatron),
            "opt_param_scheduler": self.schedule.state_dict(),
            "iteration": self.steps_done,
            "checkpoint_version": 3.0,
        }
        dist_checkpointing.save(state, str(directory), content_metadata=dict(_CONTENT))
        if dist.get_rank() == 0:
            (root / checkpoint_directory.TRACKER_FILE).write_text(str(self.steps_done))
        dist.barrier()

    def counters(self) -> dict[str, Any]:
        """All of the state that is no tensor: what is counted, and what follows from it."""
        groups = [group for each in self._torch_optimizers() for group in each.param_groups]
        states = [state for each in self._torch_optimizers() for state in each.state.values()]
        return {
            "steps_done": self.steps_done,
            "optimizer_steps": sorted({float(each["step"]) for each in (*groups, *states) if "step" in each}),
            "groups": sorted((group["lr"], group["weight_decay"]) for group in groups),
            "schedule": self.schedule.state_dict(),
        }

    def float32_loss(self) -> float:
        """The mean loss of the next batch as the weights of this model give it when all is computed in float32."""
        twins = _build(self.config, self.layout, torch.float32)
        with torch.no_grad():
            for chunk, twin in zip(self.chunks, twins, strict=True):
                for own, copy in zip(chunk.parameters(), twin.parameters(), strict=True):
                    copy.copy_(own)
        return _mean_loss(twins, torch.tensor(batch(self.steps_done, self.config.vocab_size)), forward_only=True)

    def _weights(self, *, described_by_megatron: bool = False) -> dict[str, Any]:
        """What this rank holds of the weights, nested as in Megatron-LM."""
        if described_by_megatron:
            metadata = {**_CONTENT, "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
            return _nested([chunk.sharded_state_dict(metadata=metadata) for chunk in self.chunks])
        data = _nested([chunk.state_dict(keep_vars=True) for chunk in self.chunks])  # the optimizer knows them
        entries = sharded_state_dict(
            self.config,
            self.layout,
            dist.get_rank(),
            data=data if len(self.chunks) > 1 else data["model"],
        )
        return entries if len(self.chunks) > 1 else {"model": entries}

    def _weights_and_optimizer(self, *, is_loading: bool, described_by_megatron: bool = False) -> dict[str, Any]:
        weights = self._weights(described_by_megatron=described_by_megatron)
        state = self.optimizer.sharded_state_dict(weights, is_loading=is_loading, metadata=dict(_CONTENT))
        return {**weights, "optimizer": state}

    def _load_weights(self, state: Mapping[str, Any]) -> None:
        for name, chunk in _nested(self.chunks).items():
            chunk.load_state_dict(state[name])

    def _optimizers(self) -> list[Any]:
        """Megatron's own, of which it may have chained several."""
        chained: list[Any] = getattr(self.optimizer, "chained_optimizers", [self.optimizer])
        return chained

    def _torch_optimizers(self) -> list[torch.optim.Optimizer]:
        return [each.optimizer for each in self._optimizers()]

    def _forget_step(self) -> None:
        for each in self._torch_optimizers():
            for group in each.param_groups:
                if "step" in group:
                    group["step"] = 0
            for state in each.state.values():
                if "step" in state:
                    state["step"] = torch.zeros_like(state["step"])


def _latest(checkpoint: str) -> str:
    return str(places.resolve_directory(Path(checkpoint)))


def _nested(per_chunk: Sequence[Any]) -> dict[str, Any]:
    """Name what belongs to the model chunks as Megatron-LM does."""
    if len(per_chunk) == 1:
        return {"model": per_chunk[0]}
    return {f"model{number}": each for number, each in enumerate(per_chunk)}


def _build(config: MistralConfig, layout: ParallelLayout, dtype: torch.dtype) -> list[Any]:
    """This rank's GPTModels."""
    return as_chunks(
        build_model(
            config,
            layout,
            dtype=dtype,
            perform_initialization=False,  # all values come from a checkpoint
            transformer_config={"batch_p2p_comm": False},  # gloo has no batches
        )
    )


def _optimizer(trained: list[DistributedDataParallel], *, distributed: bool) -> Any:  # noqa: ANN401  (untyped megatron)
    """Adam with float32 master weights: Megatron's DistributedOptimizer, or Float16OptimizerWithFloat16Params."""
    wanted = OptimizerConfig(
        optimizer="adam",
        lr=LEARNING_RATE,
        min_lr=LEARNING_RATE / 10,
        weight_decay=0.1,
        adam_beta1=0.9,
        adam_beta2=0.95,
        clip_grad=1.0,
        bf16=True,
        params_dtype=torch.bfloat16,
        use_distributed_optimizer=distributed,
    )
    with fused_adam() if distributed else contextlib.nullcontext():
        return get_megatron_optimizer(wanted, trained)


def _mean_loss(chunks: Sequence[Any], sequences: torch.Tensor, *, forward_only: bool = False) -> float:
    """Run Megatron's schedule, forward and backward, on this rank's sequences; the mean loss of all sequences."""
    mine = sequences.chunk(parallel_state.get_data_parallel_world_size())[parallel_state.get_data_parallel_rank()]
    microbatches = mine.chunk(MICROBATCHES)
    losses = get_forward_backward_func()(
        forward_step_func=_forward,
        data_iterator=[iter(microbatches) for _ in chunks],
        model=list(chunks),
        num_microbatches=len(microbatches),
        seq_length=TOKENS,
        micro_batch_size=len(microbatches[0]),
        forward_only=forward_only,
    )
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, [loss.item() for loss in losses])  # those of the last pipeline stage
    known: list[float] = [loss for losses in everyone for loss in losses]
    return sum(known) / len(known)


def _forward(microbatches: Iterator[torch.Tensor], model: Any) -> tuple[torch.Tensor, Any]:  # noqa: ANN401  (megatron)
    tokens = next(microbatches)
    hidden = torch.ones(1, 1, TOKENS, TOKENS, dtype=torch.bool).triu(1)
    return model(tokens[:, :-1], torch.arange(TOKENS)[None], hidden, labels=tokens[:, 1:]), _loss


def _loss(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    loss = output.float().mean()
    return loss, loss.detach().clone()  # the schedule divides the first in place


def change_layout(layout: ParallelLayout) -> None:
    """Set up Megatron's parallel state for ``layout``, in the place of another one's."""
    destroy_parallel_state()
    initialize_megatron(layout, device="cpu")
