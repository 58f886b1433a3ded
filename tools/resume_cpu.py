"""Replacements that let Megatron train without CUDA, Apex and Transformer Engine."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import megatron.core.optimizer
import torch
from megatron.core.msc_utils import MultiStorageClientFeature
from megatron.core.optimizer import distrib_optimizer

from dist_ckpt_mistral.megatron.runtime import without_cuda


@contextlib.contextmanager
def trainable_on_cpu() -> Iterator[None]:
    """Within the block Megatron can train without CUDA, Apex and Transformer Engine."""
    tensor_type = torch.Tensor.type

    def of_cuda(tensor: torch.Tensor, *arguments: Any, **options: Any) -> Any:  # noqa: ANN401  (torch's signature)
        """Tensor.type, but torch.FloatTensor is called torch.cuda.FloatTensor, as Megatron's optimizers require."""
        name: Any = tensor_type(tensor, *arguments, **options)
        if not isinstance(name, str) or name.startswith("torch.cuda."):  # without_cuda makes this call twice
            return name
        return name.replace("torch.", "torch.cuda.")

    with (
        without_cuda(),
        mock.patch.object(torch.Tensor, "type", of_cuda),
        mock.patch.object(torch.cuda, "current_stream", return_value=None),  # a CPU has no streams
        mock.patch.multiple(distrib_optimizer, HAVE_APEX_OR_TE=True, USING_APEX_OPTIMIZER=True),  # like _FusedAdam
        mock.patch.object(distrib_optimizer, "quantize_param_shard"),  # for float8; fails without Transformer Engine
        mock.patch.object(MultiStorageClientFeature, "_enabled", new=False),  # of 0.16: slow, and 0.19 does without
    ):
        yield


@contextlib.contextmanager
def fused_adam() -> Iterator[None]:
    """Within the block Megatron builds its optimizers with ``_FusedAdam``."""
    with mock.patch.multiple(megatron.core.optimizer, USING_PYTORCH_OPTIMIZER=False, Adam=_FusedAdam):
        yield


class _FusedAdam(torch.optim.AdamW):
    """AdamW that keeps one step count for each parameter group, like FusedAdam of Apex and Transformer Engine.

    torch's AdamW keeps one for each tensor. With it Megatron's DistributedOptimizer raises KeyError: 'step' on load
    (distrib_optimizer.py, _set_main_param_and_optimizer_states, megatron-core 0.16.1).
    """

    def __init__(self, params: Any, *, adam_w_mode: bool, **options: Any) -> None:  # noqa: ANN401  (as FusedAdam)
        """Take the arguments that Megatron gives to FusedAdam."""
        if not adam_w_mode:
            raise ValueError("adam_w_mode=False is not supported: AdamW decouples weight decay")
        super().__init__(params, **options)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Accept a state without step counts of tensors; AdamW would raise an error."""
        torch.optim.Optimizer.__setstate__(self, state)

    def step(self) -> None:  # type: ignore[override]  # Megatron gives no closure
        """Do a step of AdamW with the step count of the group for each of its tensors."""
        for group in self.param_groups:
            for state in self._states(group):
                state["step"] = torch.tensor(float(group.get("step", 0)))
        super().step()
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for state in self._states(group):
                del state["step"]

    def _states(self, group: dict[str, Any]) -> list[dict[str, Any]]:
        """The states of the tensors in a parameter group."""
        return [self.state[parameter] for parameter in group["params"] if self.state.get(parameter)]
