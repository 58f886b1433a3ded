"""Replacements that let Megatron train without CUDA, Apex and Transformer Engine, and Megatron-LM start there."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any, Final
from unittest import mock

import megatron.core.optimizer
import torch
from megatron.core.msc_utils import MultiStorageClientFeature
from megatron.core.optimizer import distrib_optimizer

from dist_ckpt_mistral.megatron.runtime import without_cuda

#: What Megatron-LM needs on a CPU, and what it demands besides the flags of a model.
_FLAGS_ON_CPU: Final = (
    *("--use-cpu-initialization", "--distributed-backend", "gloo", "--transformer-impl", "local"),
    *("--attention-backend", "unfused", "--no-persist-layer-norm", "--no-masked-softmax-fusion"),
    *("--no-bias-swiglu-fusion", "--no-bias-dropout-fusion", "--no-rope-fusion", "--no-gradient-accumulation-fusion"),
    *("--micro-batch-size", "1", "--lr", "1e-4", "--train-iters", "10", "--save-interval", "1"),
)


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
def megatron_lm_on_cpu() -> Iterator[None]:
    """Within the block Megatron-LM's own arguments, load and save work too."""
    device = SimpleNamespace(major=9, minor=0, multi_processor_count=1, total_memory=1 << 34)
    with (
        trainable_on_cpu(),
        mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0)),
        mock.patch.object(torch.cuda, "get_device_properties", return_value=device),
        mock.patch.object(torch.cuda, "device_count", return_value=1),
        mock.patch.object(torch.cuda, "get_rng_state", side_effect=lambda *_: torch.zeros(8, dtype=torch.uint8)),
        mock.patch.object(torch.cuda, "set_rng_state"),
    ):
        yield


def megatron_lm_started(flags: Sequence[str]) -> None:
    """Parse flags as ``pretrain_gpt.py`` does, and set Megatron-LM's global state up. Needs megatron-core 0.19."""
    from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator  # noqa: PLC0415  (only here)
    from megatron.core.rerun_state_machine import initialize_rerun_state_machine  # noqa: PLC0415  (likewise)
    from megatron.training.arguments import parse_args, validate_args  # noqa: PLC0415  (likewise)
    from megatron.training.global_vars import set_args  # noqa: PLC0415  (likewise)

    sys.argv = ["pretrain_gpt.py", *flags, *_FLAGS_ON_CPU]
    args = parse_args()
    validate_args(args, {})
    args.sequence_parallel = False  # torch's norms refuse it; it changes no weights
    set_args(args)
    initialize_rerun_state_machine()
    init_num_microbatches_calculator(
        args.rank, None, args.global_batch_size, args.micro_batch_size, args.data_parallel_size
    )


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
