"""The optimizer's part of a sharded state dict, for any rank of any layout: no optimizer, no model, no GPU.

Entries equal those that Megatron's optimizers make for a real ``GPTModel`` in the formats that keep the shapes of the
parameters (megatron-core 0.16 and 0.19): ``plain`` of Float16Optimizer (optimizer/optimizer.py), and
``fully_reshardable`` of DistributedOptimizer (optimizer/distrib_optimizer.py), which Megatron-LM writes with
``--dist-ckpt-optim-fully-reshardable``. So ``dist_checkpointing.load`` reshards them with the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from dist_ckpt_mistral.megatron.hf_metadata import ShardedStateDict
from dist_ckpt_mistral.megatron.sharded_state_dict import Supplier, nested, tensor_entries
from dist_ckpt_mistral.model.config.mistral_config import MistralConfig
from dist_ckpt_mistral.model.layout.layout import ParallelLayout
from dist_ckpt_mistral.model.table.rules import KeyStyle, LayerSpec, ParamState


def optimizer_state_dict(
    config: MistralConfig,
    layout: ParallelLayout,
    rank: int,
    *,
    distributed: bool = True,
    data: Mapping[str, Mapping[str, Any] | Supplier] | None = None,
    style: KeyStyle = KeyStyle.STACKED,
    spec: LayerSpec = LayerSpec.LOCAL,
    padded_vocab_size: int | None = None,
) -> dict[str, ShardedStateDict]:
    """What ``rank`` of ``layout`` holds of the optimizer: master weights and both moments of Adam, in float32.

    Under each of Megatron's names for these stands a dict like that of ``sharded_state_dict``, keyed by the names of
    the parameters in the local module; entries say which Hugging Face tensors they hold rows of, as those of the
    weights do. Megatron's optimizers number parameters instead, in an order that only they know: entries are the same,
    their place is not.

    Args:
        config: The model.
        layout: The parallel layout.
        rank: Counts as Megatron does for ``layout``.
        distributed: Whether it is Megatron's distributed optimizer (``fully_reshardable``), which calls the master
            weights ``param``; the ordinary one (``plain``) calls them ``fp32_param``.
        data: None to let ``load`` allocate; or under each of the names what ``sharded_state_dict`` takes as ``data``.
        style: How keys of layers are spelled; a load must ask in the style of the checkpoint.
        spec: Which modules the model's layers are made of.
        padded_vocab_size: Rows of embedding and head, by default what Megatron-LM pads to.

    Raises:
        LayoutError: The layout does not fit the model, or ``rank`` or ``padded_vocab_size`` the layout.
        TensorMismatchError: As for ``sharded_state_dict``.
    """
    which = -1 if distributed else 0
    names = [state.value[which] for state in ParamState if state is not ParamState.WEIGHTS]
    return {
        name: nested(
            tensor_entries(
                config,
                layout,
                rank,
                data=None if data is None else data[name],
                dtype=torch.float32,
                style=style,
                spec=spec,
                vocab_rows=padded_vocab_size,
                state=name,
            )
        )
        for name in names
    }
