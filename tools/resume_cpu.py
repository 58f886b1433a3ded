"""What Megatron misses where it trains without CUDA, Apex and Transformer Engine."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import megatron.core.optimizer
import torch
from megatron.core.optimizer import distrib_optimizer

from dist_ckpt_mistral.megatron.runtime import without_cuda


@contextlib.contextmanager
def trainable_on_cpu() -> Iterator[None]:
    """Within the block Megatron can train without CUDA, Apex and Transformer Engine."""
    kind = torch.Tensor.type

    def of_cuda(tensor: torch.Tensor, *arguments: Any, **options: Any) -> Any:  # noqa: ANN401  (torch's signature)
        """What Megatron's optimizers accept: FloatTensor counts as cuda.FloatTensor."""
        answer: Any = kind(tensor, *arguments, **options)
        if not isinstance(answer, str) or answer.startswith("torch.cuda."):  # without_cuda sends the call here twice
            return answer
        return answer.replace("torch.", "torch.cuda.")

    with (
        without_cuda(),
        mock.patch.object(torch.Tensor, "type", of_cuda),
        mock.patch.object(torch.cuda, "current_stream", return_value=None),  # there is nothing to wait for
        mock.patch.multiple(distrib_optimizer, HAVE_APEX_OR_TE=True, USING_APEX_OPTIMIZER=True),  # as _FusedAdam counts
        mock.patch.object(distrib_optimizer, "quantize_param_shard"),  # of float8, raises without Transformer Engine
    ):
        yield


@contextlib.contextmanager
def fused_adam() -> Iterator[None]:
    """Within the block Megatron's optimizers are built around an AdamW that counts like FusedAdam."""
    with mock.patch.multiple(megatron.core.optimizer, USING_PYTORCH_OPTIMIZER=False, Adam=_FusedAdam):
        yield


class _FusedAdam(torch.optim.AdamW):
    """AdamW that counts steps where FusedAdam of Apex and Transformer Engine does: once a group, not once a tensor.

    Megatron's DistributedOptimizer needs that: with torch's own it raises KeyError: 'step' when it loads
    (distrib_optimizer.py, _set_main_param_and_optimizer_states, megatron-core 0.16.1).
    """

    def __init__(self, params: Any, *, adam_w_mode: bool, **options: Any) -> None:  # noqa: ANN401  (as FusedAdam)
        """Take what Megatron gives to FusedAdam."""
        if not adam_w_mode:
            raise ValueError("this AdamW decouples weight decay")
        super().__init__(params, **options)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take a state without the steps of tensors, which AdamW would miss."""
        torch.optim.Optimizer.__setstate__(self, state)

    def step(self) -> None:  # type: ignore[override]  # Megatron gives no closure
        """Step, with the group's count in the place of the tensors' own."""
        for group in self.param_groups:
            for state in self._states(group):
                state["step"] = torch.tensor(float(group.get("step", 0)))
        super().step()
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for state in self._states(group):
                del state["step"]

    def _states(self, group: dict[str, Any]) -> list[dict[str, Any]]:
        return [self.state[parameter] for parameter in group["params"] if self.state.get(parameter)]
