"""Megatron's own optimizers over a rank's real models, stepped once: the oracle for optimizer state.

What Megatron needs to do that without CUDA stands here as well.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final
from unittest import mock

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, distrib_optimizer, get_megatron_optimizer

if TYPE_CHECKING:
    from gpt_stage import Stage

#: What Megatron-LM stores as ``content_metadata`` and gives to an optimizer.
CONTENT: Final = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}


class OnCpu(torch.overrides.TorchFunctionMode):
    """Sends to the CPU what Megatron's buffers and optimizers ask of CUDA unasked."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        """Replace the device; FloatTensor counts as cuda.FloatTensor, which is what optimizers accept."""
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = "cpu"
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.")
        return func(*args, **kwargs)


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    """Within the block Megatron's optimizers can be made and stepped."""
    with mock.patch.object(distrib_optimizer, "quantize_param_shard"), OnCpu():  # would raise for want of FP8
        yield


class Optimizer:
    """Adam in float32 over the bfloat16 models of a stage, ordinary or distributed, after one step."""

    def __init__(self, stage: Stage, *, distributed: bool) -> None:
        """Make it and step it with gradients that are the same on all ranks of a replica."""
        self.stage, self.distributed = stage, distributed
        ddp = DistributedDataParallelConfig(use_distributed_optimizer=distributed, grad_reduce_in_fp32=True)
        wanted = OptimizerConfig(
            optimizer="adam",
            lr=1e-3,
            bf16=True,
            params_dtype=torch.bfloat16,
            use_distributed_optimizer=distributed,
            clip_grad=0.0,
        )
        with on_cpu():
            self.models = [DistributedDataParallel(chunk.config, ddp, chunk) for chunk in stage.chunks]
            self.own = get_megatron_optimizer(wanted, self.models)
            self._step()

    @torch.no_grad()
    def _step(self) -> None:
        for model in self.models:
            trained = [(name, each) for name, each in model.named_parameters() if each.requires_grad]
            for name, parameter in trained:
                wave = torch.arange(parameter.numel()).view(parameter.shape) + len(name)
                parameter.main_grad.copy_(torch.sin(wave.float()) * 1e-2)
        for each in getattr(self.own, "chained_optimizers", [self.own]):
            each.prepare_grads()
            each.step_with_ready_grads()
        if self.distributed:
            for model in self.models:
                model.start_param_sync(force_sync=True)

    def sharded_state_dict(
        self, weights: dict[str, Any], *, is_loading: bool = False, counted: bool = False
    ) -> dict[str, Any]:
        """Megatron's own entries of the optimizer, for those of the model.

        With experts it is several optimizers; ``counted`` puts their numbers before keys, as was usual to 0.14.
        """
        metadata = (CONTENT if self.distributed else {}) | {"chained_optim_avoid_prefix": not counted}
        with on_cpu():
            state: dict[str, Any] = self.own.sharded_state_dict(weights, is_loading=is_loading, metadata=dict(metadata))
        return state
