"""Train a Mistral model with Megatron on a CPU, save it at one layout, and resume it at another.

GPTModel, DistributedDataParallel, optimizer, learning rate, pipeline schedule, save and load are Megatron's own. This
package makes the model (``build_model``) and the entries of the weights (``sharded_state_dict``). Megatron's optimizers
derive the entries of their state from those. There is no dropout, so nothing depends on random numbers.
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

#: The ``content_metadata`` that Megatron-LM saves in a checkpoint and gives to an optimizer.
_CONTENT: Final[Mapping[str, Any]] = {
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
}


class Training:
    """This rank's part of a training: model, optimizer, learning-rate schedule, and the number of steps done."""

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
            lr_warmup_steps=2 * SEQUENCES,  # in sequences, like all of these, as in Megatron-LM
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
        """Train on the next batch. Returns its mean loss (nats) before the step, and the norm of the gradient."""
        for chunk in self.trained:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        loss = _mean_loss(self.trained, torch.tensor(batch(self.steps_done, self.config.vocab_size)))
        _, norm, _ = self.optimizer.step()
        self.schedule.step(increment=SEQUENCES)
        self.steps_done += 1
        return loss, norm

    def norm_elements(self) -> int:
        """The number of elements of the gradient in Megatron's gradient norm, summed over all ranks."""
        total = 0
        names = ("get_grads_for_grad_norm", "get_main_grads_for_grad_norm")  # in 0.16, in 0.19 (optimizer/optimizer.py)
        for optimizer in self._optimizers():
            gradients = getattr(optimizer, next(name for name in names if hasattr(optimizer, name)))()
            count = torch.tensor(sum(gradient.numel() for gradient in gradients))
            dist.all_reduce(count, group=optimizer.get_grad_stats_parallel_group())
            total += int(count)
        return total

    def begin(self, weights: str) -> None:
        """Begin with the weights of a checkpoint, such as one that ``from-hf`` wrote."""
        self._load_weights(dist_checkpointing.load(self._weights(), _latest(weights)))
        self.optimizer.reload_model_params()

    def resume(self, checkpoint: str, *, lost: str | None = None) -> None:
        """Resume ``checkpoint``, saved at any layout, without its part ``lost`` (one of PARTS)."""
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
        """Save a checkpoint for ``resume`` in the root ``checkpoint``, as Megatron-LM does.

        The entries of the weights are made by this package, or with ``described_by_megatron`` by the model.
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
        """The state besides tensors: step counts, learning rates, weight decay and the state of their schedule."""
        groups = [group for optimizer in self._torch_optimizers() for group in optimizer.param_groups]
        states = [state for optimizer in self._torch_optimizers() for state in optimizer.state.values()]
        return {
            "steps_done": self.steps_done,
            "optimizer_steps": sorted({float(counts["step"]) for counts in (*groups, *states) if "step" in counts}),
            "groups": sorted((group["lr"], group["weight_decay"]) for group in groups),
            "schedule": self.schedule.state_dict(),
        }

    def float32_loss(self) -> float:
        """The mean loss (nats) of the next batch, computed in float32 with the weights of this model."""
        copies = _build(self.config, self.layout, torch.float32)
        with torch.no_grad():
            for chunk, copied in zip(self.chunks, copies, strict=True):
                for original, copy in zip(chunk.parameters(), copied.parameters(), strict=True):
                    copy.copy_(original)
        return _mean_loss(copies, torch.tensor(batch(self.steps_done, self.config.vocab_size)), forward_only=True)

    def _weights(self, *, described_by_megatron: bool = False) -> dict[str, Any]:
        """This rank's sharded state dict of the weights, nested as in Megatron-LM."""
        if described_by_megatron:
            metadata = {**_CONTENT, "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
            return _nested([chunk.sharded_state_dict(metadata=metadata) for chunk in self.chunks])
        data = _nested([chunk.state_dict(keep_vars=True) for chunk in self.chunks])  # the optimizer's parameters
        entries = sharded_state_dict(
            self.config,
            self.layout,
            dist.get_rank(),
            data=data if len(self.chunks) > 1 else data["model"],
        )
        return entries if len(self.chunks) > 1 else {"model": entries}

    def _weights_and_optimizer(self, *, is_loading: bool, described_by_megatron: bool = False) -> dict[str, Any]:
        """This rank's sharded state dict of the weights and of the optimizer."""
        weights = self._weights(described_by_megatron=described_by_megatron)
        state = self.optimizer.sharded_state_dict(weights, is_loading=is_loading, metadata=dict(_CONTENT))
        return {**weights, "optimizer": state}

    def _load_weights(self, state: Mapping[str, Any]) -> None:
        """Load a state dict of the weights, nested as in Megatron-LM, into the model."""
        for name, chunk in _nested(self.chunks).items():
            chunk.load_state_dict(state[name])

    def _optimizers(self) -> list[Any]:
        """Megatron's optimizers: several if it has chained them, else one."""
        chained: list[Any] = getattr(self.optimizer, "chained_optimizers", [self.optimizer])
        return chained

    def _torch_optimizers(self) -> list[torch.optim.Optimizer]:
        """The torch optimizers inside Megatron's."""
        return [optimizer.optimizer for optimizer in self._optimizers()]

    def _forget_step(self) -> None:
        """Set all step counts of the optimizers to 0."""
        for optimizer in self._torch_optimizers():
            for group in optimizer.param_groups:
                if "step" in group:
                    group["step"] = 0
            for state in optimizer.state.values():
                if "step" in state:
                    state["step"] = torch.zeros_like(state["step"])


def _latest(checkpoint: str) -> str:
    """The latest iteration directory of a checkpoint root."""
    return str(places.resolve_directory(Path(checkpoint)))


def _nested(per_chunk: Sequence[Any]) -> dict[str, Any]:
    """Values of the model chunks under Megatron-LM's names for them: ``model``, or ``model0``, ``model1``, ..."""
    if len(per_chunk) == 1:
        return {"model": per_chunk[0]}
    return {f"model{number}": value for number, value in enumerate(per_chunk)}


def _build(config: MistralConfig, layout: ParallelLayout, dtype: torch.dtype) -> list[Any]:
    """This rank's GPTModels."""
    return as_chunks(
        build_model(
            config,
            layout,
            dtype=dtype,
            perform_initialization=False,  # all values come from a checkpoint
            transformer_config={"batch_p2p_comm": False},  # gloo does not support it
        )
    )


def _optimizer(trained: list[DistributedDataParallel], *, distributed: bool) -> Any:  # noqa: ANN401  (untyped megatron)
    """Adam with float32 master weights: Megatron's DistributedOptimizer, or Float16OptimizerWithFloat16Params."""
    config = OptimizerConfig(
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
        return get_megatron_optimizer(config, trained)


def _mean_loss(chunks: Sequence[Any], sequences: torch.Tensor, *, forward_only: bool = False) -> float:
    """Run Megatron's schedule, forward and backward, on this rank's sequences; the mean loss of all sequences."""
    local = sequences.chunk(parallel_state.get_data_parallel_world_size())[parallel_state.get_data_parallel_rank()]
    microbatches = local.chunk(MICROBATCHES)
    losses = get_forward_backward_func()(
        forward_step_func=_forward,
        data_iterator=[iter(microbatches) for _ in chunks],
        model=list(chunks),
        num_microbatches=len(microbatches),
        seq_length=TOKENS,
        micro_batch_size=len(microbatches[0]),
        forward_only=forward_only,
    )
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, [loss.item() for loss in losses])  # only the last pipeline stage has losses
    values: list[float] = [loss for losses in gathered for loss in losses]
    return sum(values) / len(values)


def _forward(microbatches: Iterator[torch.Tensor], model: Any) -> tuple[torch.Tensor, Any]:  # noqa: ANN401  (megatron)
    """The ``forward_step_func`` of Megatron's schedule: the losses of all tokens, and the function to average them."""
    tokens = next(microbatches)
    mask = torch.ones(1, 1, TOKENS, TOKENS, dtype=torch.bool).triu(1)  # True where attention is not allowed
    return model(tokens[:, :-1], torch.arange(TOKENS)[None], mask, labels=tokens[:, 1:]), _loss


def _loss(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean loss, and a copy of it to report: the schedule divides the first in place."""
    loss = output.float().mean()
    return loss, loss.detach().clone()


def change_layout(layout: ParallelLayout) -> None:
    """Replace Megatron's parallel state by one for ``layout``."""
    destroy_parallel_state()
    initialize_megatron(layout, device="cpu")
