"""A rank's ``GPTModel`` of a Mistral model, for training and inference, on CUDA or on a CPU.

``model_config`` tells Megatron what the model is, ``local_layers`` what its layers are made of.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Final, TypeAlias

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.spec_utils import ModuleSpec

from dist_ckpt_mistral.errors import UnsupportedModelError
from dist_ckpt_mistral.megatron.model_config import gpt_model_arguments, transformer_config
from dist_ckpt_mistral.megatron.runtime import default_device, initialize_megatron, on_device, without_cuda
from dist_ckpt_mistral.megatron.sharded_state_dict import weight_dtype
from dist_ckpt_mistral.model.config.mistral_config import MistralConfig
from dist_ckpt_mistral.model.layout.layout import ParallelLayout, padded_vocab_size

#: One rank's model: a GPTModel, or one for each of its virtual pipeline stages.
Model: TypeAlias = GPTModel | list[GPTModel]

_ALONE: Final = ParallelLayout()
_NOTHING: Final[Mapping[str, Any]] = {}

#: Megatron's tensor-parallel layers, and the axis along which each cuts its weight.
_CUT_AXES: Final[Mapping[type, int]] = {VocabParallelEmbedding: 0, ColumnParallelLinear: 0, RowParallelLinear: 1}
_LATENT_EPSILON: Final = 1e-6


class CpuGPTModel(GPTModel):  # type: ignore[misc]  # megatron is untyped
    """A GPTModel that runs where there is no CUDA, though Megatron's code asks for it."""

    @functools.wraps(GPTModel.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401  (as GPTModel)
        """Run forward on the CPU."""
        with without_cuda():
            return super().forward(*args, **kwargs)


def build_model(
    config: MistralConfig,
    layout: ParallelLayout = _ALONE,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    padded_vocab_size: int | None = None,
    perform_initialization: bool = True,
    transformer_config: Mapping[str, Any] = _NOTHING,
) -> Model:
    """This rank's GPTModel, or the list of them with virtual pipeline stages.

    Megatron's process group, parallel state and random numbers are set up if they are not (``initialize_megatron``).
    Experts train without tensor parallelism alone: Megatron demands sequence parallelism with it, which the norms of
    its local spec lack.

    Args:
        config: The model.
        layout: The parallel layout; its data-parallel replicas follow from the number of ranks.
        dtype: Of the weights (torch's own or its name), by default what ``config`` says.
        device: Where the model goes, by default CUDA where there is any, else the CPU.
        padded_vocab_size: Rows of embedding and head, by default what Megatron-LM pads to.
        perform_initialization: Draw random weights; else they are whatever the memory held.
        transformer_config: Further fields of Megatron's TransformerConfig, such as dropout or recomputation; they win.

    Raises:
        LayoutError: The layout does not fit the model or the ranks.
        ConfigError: Neither ``dtype`` nor ``config`` gives a dtype for weights, or ``transformer_config`` has unknown
            fields.
        UnsupportedModelError: The installed megatron-core cannot express the model.
    """
    device = default_device() if device is None else torch.device(device)
    layout.check(config)
    layout = initialize_megatron(layout, device=device)
    settings = {"perform_initialization": perform_initialization, **transformer_config}
    chunks = build_chunks(config, layout, weight_dtype(config, dtype), device, padded_vocab_size, settings)
    return as_model([chunk.to(device) for chunk in chunks])


def build_chunks(
    config: MistralConfig,
    layout: ParallelLayout,
    dtype: torch.dtype,
    device: torch.device,
    vocab_rows: int | None,
    settings: Mapping[str, Any],
) -> list[GPTModel]:
    """One GPTModel for each model chunk of this rank, made for ``device`` but still on the CPU (mostly)."""
    told, spec = transformer_config(config, layout, dtype, settings), layer_spec(config)
    kind = GPTModel if device.type == "cuda" else CpuGPTModel
    rows = padded_vocab_size(config.vocab_size, layout.tp) if vocab_rows is None else vocab_rows
    chunks = []
    for number in range(layout.vpp or 1):
        stage = number if layout.vpp else None
        ends = {"ignore_virtual": False, "vp_stage": stage}
        with on_device(device):
            chunk = kind(
                told,
                spec,
                vocab_size=rows,
                pre_process=parallel_state.is_pipeline_first_stage(**ends),
                post_process=parallel_state.is_pipeline_last_stage(**ends),
                vp_stage=stage,
                **gpt_model_arguments(config),
            )
        _mark_tensor_parallel(chunk)
        chunks.append(chunk.to(dtype))
    return chunks


def _mark_tensor_parallel(chunk: GPTModel) -> None:
    """Say which weights tensor parallelism cuts, and along which axis.

    Megatron-core 0.16 does so only where it initializes them (tensor_parallel/layers.py). What is not marked it takes
    for a copy, and leaves it out of the gradient norm: training such a model would clip wrongly.
    """
    glu = {module.linear_fc1 for module in chunk.modules() if isinstance(module, MLP)}
    for module in chunk.modules():
        axis = next((axis for kind, axis in _CUT_AXES.items() if isinstance(module, kind)), None)
        weight = None if axis is None else module.weight
        if weight is not None and not hasattr(weight, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=axis, stride=1 + (module in glu))


def as_model(chunks: list[GPTModel]) -> Model:
    """What stands for a rank's model: its only chunk, or the list."""
    return chunks[0] if len(chunks) == 1 else chunks


def as_chunks(model: Model) -> list[GPTModel]:
    """The chunks of a rank's model."""
    return model if isinstance(model, list) else [model]


class LocalAttention(DotProductAttention):  # type: ignore[misc]  # megatron is untyped
    """Megatron's attention, which may be latent and may scale queries by their position."""

    def __init__(
        self,
        *args: Any,  # noqa: ANN401  (as DotProductAttention)
        k_channels: int | None = None,  # noqa: ARG002  (what latent attention tells, config.kv_channels says)
        v_channels: int | None = None,  # noqa: ARG002
        query_scaling: tuple[float, int] | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        """Scale the query at position p by ``1 + beta * log(1 + p // period)``, given (beta, period)."""
        super().__init__(*args, **kwargs)
        self.query_scaling = query_scaling

    def forward(self, query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:  # noqa: ANN401
        """Attend. ``query`` ``[queries, batch, heads, size]`` stands at the last ones of the positions of ``key``."""
        if self.query_scaling is not None:
            beta, period = self.query_scaling
            positions = torch.arange(len(key) - len(query), len(key), device=query.device)
            scale = 1 + beta * torch.log(1 + torch.floor(positions / period))
            query = query * scale[:, None, None, None].to(query.dtype)
        attended: torch.Tensor = super().forward(query, key, *args, **kwargs)
        return attended


class LatentNorm(torch.nn.RMSNorm):
    """The norm of a latent, as transformers has it."""

    def __init__(self, hidden_size: int, config: object, eps: float) -> None:  # noqa: ARG002  (Megatron's)
        """Take what Megatron tells every norm."""
        super().__init__(hidden_size, eps=_LATENT_EPSILON)


def layer_spec(config: MistralConfig) -> ModuleSpec:
    """Megatron's spec of a layer of the model; experts are a ``SequentialMLP``.

    Raises UnsupportedModelError for scaled queries without YaRN's original context.
    """
    _mend_without_transformer_engine()
    is_latent = config.latent_attention is not None
    spec = get_gpt_layer_local_spec(
        num_experts=None if config.experts is None else config.experts.num_experts,
        multi_latent_attention=is_latent,
        normalization="RMSNorm",
    )
    attention = spec.submodules.self_attention.submodules
    attention.core_attention = ModuleSpec(module=LocalAttention, params={"query_scaling": _query_scaling(config)})
    if is_latent:
        attention.q_layernorm = attention.kv_layernorm = LatentNorm
    return spec


def _mend_without_transformer_engine() -> None:
    """Megatron-core 0.16 uses two names without Transformer Engine that it has only with it."""
    moe_utils.te_general_gemm = getattr(moe_utils, "te_general_gemm", None)
    if not isinstance(getattr(multi_latent_attention, "TELinear", None), type):
        multi_latent_attention.HAVE_TE = False


def _query_scaling(config: MistralConfig) -> tuple[float, int] | None:
    """How queries are scaled by their position, as transformers does (``get_llama_4_attn_scale``, 5.23)."""
    if config.llama_4_scaling_beta is None:
        return None
    if config.yarn is None:
        raise UnsupportedModelError(
            f"llama_4_scaling_beta={config.llama_4_scaling_beta} without YaRN, whose original context it counts in."
        )
    return config.llama_4_scaling_beta, config.yarn.original_max_position_embeddings
