"""Set up process group, parallel state and random numbers for a Megatron model, and run its code on a CPU.

Megatron-core 0.16 and 0.19 use CUDA in code that also runs on a CPU (rotary_pos_embedding.py, transformer/utils.py,
parallel_state.py). ``without_cuda`` replaces the functions that they call.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Final

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import initialize_rng_tracker, model_parallel_cuda_manual_seed
from torch.distributed import distributed_c10d
from torch.overrides import TorchFunctionMode

from dist_ckpt_mistral.arguments import require_types
from dist_ckpt_mistral.convert import ranks
from dist_ckpt_mistral.errors import LayoutError
from dist_ckpt_mistral.model.layout.layout import ParallelLayout

#: Megatron-LM adds this to the seed for each pipeline stage (megatron/training/initialize.py).
_SEED_STEP: Final = 100
#: Axis of a layout -> the function that returns this rank's process group along it.
_GROUPS: Final[Mapping[str, Callable[[], dist.ProcessGroup]]] = {
    "tp": parallel_state.get_tensor_model_parallel_group,
    "pp": parallel_state.get_pipeline_model_parallel_group,
    "cp": parallel_state.get_context_parallel_group,
    "dp": parallel_state.get_data_parallel_group,
    "ep": parallel_state.get_expert_model_parallel_group,
    "etp": parallel_state.get_expert_tensor_parallel_group,
}


def default_device() -> torch.device:
    """CUDA if available, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def initialize_megatron(
    layout: ParallelLayout, *, device: torch.device | str | None = None, seed: int = 1234
) -> ParallelLayout:
    """Set up the process group, Megatron's parallel state and its random numbers, where they are missing.

    Every rank makes the same call. Under ``torchrun`` the process joins its ranks; otherwise it is the only rank. The
    backend is gloo on a CPU, and gloo with nccl on CUDA. An existing process group or parallel state is kept, and must
    fit the layout. Random numbers are seeded as in Megatron-LM, together with a new parallel state.

        layout = dcm.initialize_megatron(dcm.ParallelLayout(tp=2, pp=2))  # under torchrun, on 8 ranks: dp is 2

    Args:
        layout: The parallel layout.
        device: Device of the models; by default CUDA if available, else the CPU.
        seed: Seed of the random numbers, as Megatron-LM's ``--seed``.

    Returns:
        The layout with its ``dp`` multiplied so that all ranks of the job are used.

    Raises:
        LayoutError: The number of ranks is not a multiple of that of ``layout``, or the existing parallel state is of
            another layout.
    """
    require_types(initialize_megatron, **locals())
    device = default_device() if device is None else torch.device(device)
    if not dist.is_initialized():
        _join(device)
    layout = _with_replicas(layout, dist.get_world_size())
    if parallel_state.model_parallel_is_initialized():
        _require_same(layout)
    else:
        with on_device(device):
            _initialize_parallel_state(layout)
        torch.manual_seed(seed + _SEED_STEP * parallel_state.get_pipeline_model_parallel_rank())
        if device.type == "cuda":
            model_parallel_cuda_manual_seed(seed)
    if device.type == "cpu":
        initialize_rng_tracker(inference_rng_tracker=True)  # the default tracker reads CUDA's random number states
    return layout


def _join(device: torch.device) -> None:
    """Initialize torch's process group: the ranks of torchrun, or this process alone."""
    cuda = device.type == "cuda"
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend, timeout=ranks.PATIENCE)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    ranks.leave_at_exit()


def _with_replicas(layout: ParallelLayout, world_size: int) -> ParallelLayout:
    """``layout`` with its ``dp`` multiplied to use ``world_size`` ranks. Raises LayoutError if that is impossible."""
    if world_size % layout.world_size:
        raise LayoutError(
            f"wrong number of ranks: expected {layout.world_size} (tp={layout.tp} x pp={layout.pp} x cp={layout.cp} x "
            f"dp={layout.dp}), got {world_size}. Start them with: torchrun --nproc-per-node {layout.world_size} ..."
        )
    return replace(layout, dp=layout.dp * (world_size // layout.world_size))


def _initialize_parallel_state(layout: ParallelLayout) -> None:
    """Initialize Megatron's parallel state with the sizes and the rank order of ``layout``."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        order=layout.order,
    )


def destroy_parallel_state() -> None:
    """Destroy Megatron's parallel state and all process groups except the default one. All ranks make the call.

    ``parallel_state.destroy_model_parallel`` only forgets the groups (megatron-core 0.16 to 0.19). Their threads and
    sockets, about a hundred for each layout, stay until the groups are destroyed.
    """
    parallel_state.destroy_model_parallel()
    if not dist.is_initialized():
        return
    dist.barrier()  # other ranks may still use a group
    for group in list(distributed_c10d._world.pg_map):  # noqa: SLF001  (torch has no public list of groups)
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)


def _require_same(layout: ParallelLayout) -> None:
    """Raise LayoutError if Megatron's parallel state has other sizes or another rank order than ``layout``.

    The ranks of a rank's groups show both differences on every rank. So all ranks raise the error and none hangs.
    """
    vpp = (layout.vpp or 1, parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1)
    different = [f"vpp: expected {vpp[0]}, got {vpp[1]}"] if vpp[0] != vpp[1] else []
    for axis, group in _GROUPS.items():
        expected, actual = layout.peers(dist.get_rank(), axis), dist.get_process_group_ranks(group())
        if len(expected) != len(actual):
            different.append(f"{axis}: expected {len(expected)}, got {len(actual)}")
        elif expected != actual:
            different.append(f"{axis} group of rank {dist.get_rank()}: expected ranks {expected}, got {actual}")
    if different:
        raise LayoutError(
            f"Megatron's parallel state is not that of the layout: {', '.join(different)}. Give the layout that it "
            "has, with its order of ranks, or call dist_ckpt_mistral.megatron.runtime.destroy_parallel_state() first."
        )


def on_device(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Within the block Megatron's code runs on ``device``: unchanged on CUDA, ``without_cuda`` on a CPU."""
    return contextlib.nullcontext() if device.type == "cuda" else without_cuda()


@contextlib.contextmanager
def without_cuda() -> Iterator[None]:
    """Within the block code that uses CUDA gets the CPU: the current device, ``device="cuda"`` and ``Tensor.cuda``.

    ``torch.cuda.current_device``, ``torch.cuda.synchronize`` and ``Tensor.cuda`` are replaced for all threads of the
    process. Meanwhile no other thread may use a GPU, or enter or leave such a block. Every forward pass of a
    ``CpuGPTModel`` is such a block.
    """
    replacements = {
        (torch.cuda, "current_device"): lambda: "cpu",
        (torch.cuda, "synchronize"): lambda *_: None,
        (torch.Tensor, "cuda"): lambda tensor, *_, **__: tensor,
    }
    originals = {(owner, name): getattr(owner, name) for owner, name in replacements}
    try:
        for (owner, name), replacement in replacements.items():
            setattr(owner, name, replacement)
        with _CpuForCuda():
            yield
    finally:
        for (owner, name), original in originals.items():
            setattr(owner, name, original)


class _CpuForCuda(TorchFunctionMode):
    """Changes the argument ``device="cuda"`` of torch functions to ``device="cpu"``."""

    def __torch_function__(
        self,
        func: Any,  # noqa: ANN401
        types: Any,  # noqa: ANN401
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        kwargs = kwargs or {}
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs = kwargs | {"device": "cpu"}
        return func(*args, **kwargs)
