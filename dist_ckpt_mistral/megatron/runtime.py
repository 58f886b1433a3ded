"""What a Megatron model needs around it: process group, parallel state, random numbers, and a CPU in place of CUDA.

Megatron-core 0.16 and 0.19 ask for CUDA in places that a CPU gets to as well (rotary_pos_embedding.py,
transformer/utils.py, parallel_state.py): ``without_cuda`` answers them.
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

from dist_ckpt_mistral.convert import ranks
from dist_ckpt_mistral.errors import LayoutError
from dist_ckpt_mistral.model.layout.layout import ParallelLayout

#: What Megatron-LM adds to the seed from one pipeline stage to the next (megatron/training/initialize.py).
_SEED_STEP: Final = 100
#: The process group of this rank along each axis of a layout.
_GROUPS: Final[Mapping[str, Callable[[], dist.ProcessGroup]]] = {
    "tp": parallel_state.get_tensor_model_parallel_group,
    "pp": parallel_state.get_pipeline_model_parallel_group,
    "cp": parallel_state.get_context_parallel_group,
    "dp": parallel_state.get_data_parallel_group,
    "ep": parallel_state.get_expert_model_parallel_group,
    "etp": parallel_state.get_expert_tensor_parallel_group,
}


def default_device() -> torch.device:
    """CUDA where there is any, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def initialize_megatron(
    layout: ParallelLayout, *, device: torch.device | str | None = None, seed: int = 1234
) -> ParallelLayout:
    """Set up whatever Megatron models of ``layout`` need and is not there yet; the same call on every rank.

    Under ``torchrun`` its ranks are joined, else this process stands alone: over gloo on a CPU, nccl with CUDA (the
    default where there is any). What is already set up must fit the layout and stays as it is; else random numbers are
    seeded as Megatron-LM does. Returns the layout with the ``dp`` that the number of ranks comes to.

    Raises LayoutError where the number of ranks or the parallel state that is there is not that of ``layout``.
    """
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
        initialize_rng_tracker(inference_rng_tracker=True)  # the other kind keeps CUDA's random number states
    return layout


def _join(device: torch.device) -> None:
    """Join the ranks of torchrun, or stand alone."""
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
    """``layout`` with as many data-parallel replicas as the ranks make up."""
    if world_size % layout.world_size:
        raise LayoutError(
            f"wrong number of ranks: expected {layout.world_size} (tp={layout.tp} x pp={layout.pp} x cp={layout.cp} x "
            f"dp={layout.dp}), got {world_size}. Start them with: torchrun --nproc-per-node {layout.world_size} ..."
        )
    return replace(layout, dp=layout.dp * (world_size // layout.world_size))


def _initialize_parallel_state(layout: ParallelLayout) -> None:
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
    """Take down Megatron's parallel state, and every process group but that of all ranks; all ranks call it.

    ``parallel_state.destroy_model_parallel`` forgets the groups without closing them: each keeps its threads and
    sockets, some hundred for every layout that a process goes through (megatron-core 0.16 to 0.19).
    """
    parallel_state.destroy_model_parallel()
    if not dist.is_initialized():
        return
    dist.barrier()  # no rank closes a group that another one still talks in
    for group in list(distributed_c10d._world.pg_map):  # noqa: SLF001  (torch has no list of groups that is public)
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)


def _require_same(layout: ParallelLayout) -> None:
    """Refuse a layout that is not that of the parallel state: other sizes, or ranks that count in another order.

    Who shares a group with a rank shows both, on any rank: so all ranks refuse alike, and none waits for the others.
    """
    vpp = (layout.vpp or 1, parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1)
    different = [f"vpp: expected {vpp[0]}, got {vpp[1]}"] if vpp[0] != vpp[1] else []
    for axis, group in _GROUPS.items():
        wanted, found = layout.peers(dist.get_rank(), axis), dist.get_process_group_ranks(group())
        if len(wanted) != len(found):
            different.append(f"{axis}: expected {len(wanted)}, got {len(found)}")
        elif wanted != found:
            different.append(f"{axis} group of rank {dist.get_rank()}: expected ranks {wanted}, got {found}")
    if different:
        raise LayoutError(
            f"Megatron's parallel state is not that of the layout: {', '.join(different)}. Give the layout that it "
            "has, with its order of ranks, or call dist_ckpt_mistral.megatron.runtime.destroy_parallel_state() first."
        )


def on_device(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Within the block Megatron's code runs on ``device``: as it is on CUDA, ``without_cuda`` on a CPU."""
    return contextlib.nullcontext() if device.type == "cuda" else without_cuda()


@contextlib.contextmanager
def without_cuda() -> Iterator[None]:
    """Within the block what asks for CUDA gets the CPU: the current device, ``device="cuda"``, ``.cuda()``.

    ``torch.cuda.current_device``, ``torch.cuda.synchronize`` and ``Tensor.cuda`` are replaced for the whole process,
    all its threads included: no other thread may use a GPU meanwhile, or enter or leave such a block. Every forward of
    a model on the CPU is one (``CpuGPTModel``).
    """
    answers = {
        (torch.cuda, "current_device"): lambda: "cpu",
        (torch.cuda, "synchronize"): lambda *_: None,
        (torch.Tensor, "cuda"): lambda tensor, *_, **__: tensor,
    }
    kept = {(owner, name): getattr(owner, name) for owner, name in answers}
    try:
        for (owner, name), answer in answers.items():
            setattr(owner, name, answer)
        with _CpuForCuda():
            yield
    finally:
        for (owner, name), own in kept.items():
            setattr(owner, name, own)


class _CpuForCuda(TorchFunctionMode):
    """Creates on the CPU what is to be created on CUDA."""

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
