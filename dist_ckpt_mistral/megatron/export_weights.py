"""Stream the weights of a live model under Hugging Face names, out of any layout, to all ranks or to some."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from datetime import timedelta
from typing import Final, Literal

import torch  # noqa: TC002  (for readers of the annotations)

from dist_ckpt_mistral.arguments import require_types
from dist_ckpt_mistral.megatron.live_gather import open_live, plan_live_gather, receivers_of
from dist_ckpt_mistral.megatron.live_model import AnyModel
from dist_ckpt_mistral.megatron.live_ranks import LiveRanks
from dist_ckpt_mistral.megatron.sharded_state_dict import dtype_name
from dist_ckpt_mistral.model.config.mistral_config import ChosenConfig, MistralConfig

#: Megatron-LM's own limit for collectives (--distributed-timeout-minutes).
TIMEOUT: Final = timedelta(minutes=10)


def export_weights(
    model: AnyModel,
    config: MistralConfig,
    *,
    to: Literal["all"] | int | Collection[int] = "all",
    bucket_bytes: int | None = None,
    dtype: torch.dtype | str | None = None,
    timeout: timedelta = TIMEOUT,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Stream the weights of a live model, spread over ranks in any layout, as Hugging Face tensors.

    A collective call: every rank of torch's process group makes it and takes all tensors, even where ``to`` leaves
    nothing to take. The first tensor is the embedding, then come the layers and the norm; a head that is tied to the
    embedding is left out, as in Hugging Face files. Every call yields the same names in the same order on all ranks.
    Only main replicas send, each element once.

        for hf_name, tensor in dcm.export_weights(model, config):
            engine.load_weights([(hf_name, tensor)])  # vLLM, SGLang, ...

    The tensors stay on the device of the model, and are the caller's. Besides them a rank needs two buffers of
    ``bucket_bytes``: while the tensors of one are used, the next one travels. The weights of a bucket are read when it
    is sent, so the model must not change before the last tensor.

    Args:
        model: Any GPTModel of Megatron, also in wrappers such as DDP and Float16Module, or the list of a rank's model
            chunks. Nothing is changed.
        config: The configuration of the model.
        to: Who gets the tensors: ``"all"`` ranks, one rank or several. The loop of the others ends without a tensor.
        bucket_bytes: Size of a buffer. None takes 256 MiB, or the size of the largest tensor.
        dtype: Converts all weights, as a torch dtype or its name: to bfloat16, float16 or float32. None keeps the
            dtype of each. Values are converted as by ``tensor.to(dtype)``: those too large become infinite.
        timeout: How long a rank waits for the others, with each bucket.

    Yields:
        Hugging Face name and tensor.

    Raises:
        TensorMismatchError: The model is not that of ``config``; all tensors are named. Or ranks disagree about one.
        PlanError: The ranks do not hold every element of a tensor once.
        ConfigError: ``bucket_bytes`` is smaller than a tensor, or ``dtype`` is not supported.
        LayoutError: ``to`` has other ranks, or ranks were given different arguments.
        LostRankError: A rank did not come within ``timeout``, or ended. All others raise it.

    All but the last are raised by the call itself, on every rank.
    """
    require_types(export_weights, **locals())
    ranks = LiveRanks(timeout)

    def arguments() -> dict[str, object]:
        return {"to": receivers_of(to, ranks), "bucket_bytes": bucket_bytes, "dtype": dtype_name(dtype)}

    chosen = ChosenConfig(config=config, source="the given configuration")
    source, parts = open_live(model, chosen, ranks, arguments)
    gather = plan_live_gather(
        source.plan_of(source.tensors, dtype_name(dtype)),
        source,
        model,
        parts,
        ranks=ranks,
        receivers=receivers_of(to, ranks),
        bucket_bytes=bucket_bytes,
    )
    return ((segment.tensor, tensor) for segment, tensor in gather.tensors())
