"""Build a rank's ``GPTModel`` of a Mistral model, for training and inference, on CUDA or on a CPU.

``model_config`` makes its TransformerConfig; ``layer_spec`` here chooses the modules of its layers.
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

from dist_ckpt_mistral.arguments import require_types
from dist_ckpt_mistral.errors import UnsupportedModelError
from dist_ckpt_mistral.megatron.model_config import gpt_model_arguments, transformer_config
from dist_ckpt_mistral.megatron.runtime import default_device, initialize_megatron, on_device, without_cuda
from dist_ckpt_mistral.megatron.sharded_state_dict import weight_dtype
from dist_ckpt_mistral.model.config.mistral_config import MistralConfig
from dist_ckpt_mistral.model.layout.layout import ParallelLayout
from dist_ckpt_mistral.model.layout.vocabulary import vocabulary_rows

#: One rank's model: a GPTModel, or with virtual pipeline stages a list with one GPTModel for each.
Model: TypeAlias = GPTModel | list[GPTModel]

ONE_RANK: Final = ParallelLayout()
NO_SETTINGS: Final[Mapping[str, Any]] = {}
#: Megatron's tensor-parallel layers, and the axis along which each cuts its weight.
_CUT_AXES: Final[Mapping[type, int]] = {VocabParallelEmbedding: 0, ColumnParallelLinear: 0, RowParallelLinear: 1}
#: The epsilon of the norms of latents in transformers, whatever rms_norm_eps is (modeling_mistral4.py, 5.23).
_LATENT_EPSILON: Final = 1e-6


def build_model(
    config: MistralConfig,
    layout: ParallelLayout = ONE_RANK,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    padded_vocab_size: int | None = None,
    perform_initialization: bool = True,
    transformer_config: Mapping[str, Any] = NO_SETTINGS,
) -> Model:
    """Build this rank's GPTModel with random weights.

    Every rank makes the same call. The call sets up Megatron's process group, parallel state and random numbers where
    they are missing (``initialize_megatron``). Experts can be trained only with ``tp=1``: Megatron demands sequence
    parallelism for experts with tensor parallelism, and the norms of its local layer spec do not support that.

        model = dcm.build_model(dcm.MistralConfig.from_hf("hf_dir"), dcm.ParallelLayout(tp=2))

    Args:
        config: The configuration of the model.
        layout: The parallel layout. Its ``dp`` is multiplied so that all ranks of the job are used.
        dtype: Dtype of the weights, as a torch dtype or its name; by default that of ``config``.
        device: Device of the model; by default CUDA if available, else the CPU.
        padded_vocab_size: Rows of the embedding and of the output layer; by default the next multiple of 128 x tp, as
            in Megatron-LM.
        perform_initialization: Draw random weights. Without it the weights are uninitialized memory.
        transformer_config: Further fields of Megatron's TransformerConfig, such as dropout or recomputation. They
            replace defaults, and nothing that ``config`` or ``layout`` says.

    Returns:
        The GPTModel; with virtual pipeline stages (``layout.vpp``) the list of this rank's GPTModels.

    Raises:
        LayoutError: The layout does not fit the model or the number of ranks.
        ConfigError: Neither ``dtype`` nor ``config`` gives a dtype for weights, or ``transformer_config`` has unknown
            fields, or says something else than ``config`` or ``layout``.
        UnsupportedModelError: The installed megatron-core cannot express the model.
    """
    require_types(build_model, **locals())
    device = default_device() if device is None else torch.device(device)
    layout.check(config)
    layout = initialize_megatron(layout, device=device)
    settings = {"perform_initialization": perform_initialization, **transformer_config}
    chunks = build_chunks(config, layout, weight_dtype(config, dtype), device, padded_vocab_size, settings)
    return as_model(chunks, device)


def build_chunks(
    config: MistralConfig,
    layout: ParallelLayout,
    dtype: torch.dtype,
    device: torch.device,
    vocab_rows: int | None,
    settings: Mapping[str, Any],
) -> list[GPTModel]:
    """One GPTModel for each model chunk (virtual pipeline stage) of this rank.

    Their parameters are on the CPU, even if ``device`` is CUDA: ``as_model`` moves them.
    """
    megatron_config, spec = transformer_config(config, layout, dtype, settings), layer_spec(config)
    kind = GPTModel if device.type == "cuda" else CpuGPTModel
    rows = vocabulary_rows(config.vocab_size, layout.tp, vocab_rows)
    chunks = []
    for vp_stage in range(layout.vpp) if layout.vpp else [None]:
        stage = {"ignore_virtual": False, "vp_stage": vp_stage}
        with on_device(device):
            chunk = kind(
                megatron_config,
                spec,
                vocab_size=rows,
                pre_process=parallel_state.is_pipeline_first_stage(**stage),
                post_process=parallel_state.is_pipeline_last_stage(**stage),
                vp_stage=vp_stage,
                **gpt_model_arguments(config),
            )
        _mark_tensor_parallel(chunk)
        chunks.append(chunk.to(dtype))
    return chunks


def _mark_tensor_parallel(chunk: GPTModel) -> None:
    """Mark the weights that tensor parallelism cuts with the axis of the cut.

    Megatron-core 0.16 marks only weights that it initializes (tensor_parallel/layers.py). Ranks above 0 leave unmarked
    weights out of the gradient norm, because they take them for copies; training would clip gradients wrongly.
    """
    gated = {module.linear_fc1 for module in chunk.modules() if isinstance(module, MLP)}
    for module in chunk.modules():
        axis = next((axis for kind, axis in _CUT_AXES.items() if isinstance(module, kind)), None)
        weight = None if axis is None else module.weight
        if weight is not None and not hasattr(weight, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=axis, stride=1 + (module in gated))


def as_model(chunks: list[GPTModel], device: torch.device) -> Model:
    """Move the model chunks of a rank to ``device``; return the only one, or the list of several."""
    moved = [chunk.to(device) for chunk in chunks]
    return moved[0] if len(moved) == 1 else moved


def as_chunks(model: Model) -> list[GPTModel]:
    """The model chunks (GPTModels) of a rank's model, as a list."""
    return model if isinstance(model, list) else [model]


class CpuGPTModel(GPTModel):  # type: ignore[misc]  # megatron is untyped
    """A GPTModel whose forward pass runs on a machine without CUDA."""

    @functools.wraps(GPTModel.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401  (as GPTModel)
        """Run GPTModel's forward ``without_cuda``."""
        with without_cuda():
            return super().forward(*args, **kwargs)


class LocalAttention(DotProductAttention):  # type: ignore[misc]  # megatron is untyped
    """Megatron's attention, usable for latent attention, and with an optional scale of queries by position."""

    def __init__(
        self,
        *args: Any,  # noqa: ANN401  (as DotProductAttention)
        k_channels: int | None = None,  # noqa: ARG002  (given by latent attention; config.kv_channels has the size)
        v_channels: int | None = None,  # noqa: ARG002
        query_scaling: tuple[float, int] | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        """With ``query_scaling`` = (beta, period), scale the query at position p by 1 + beta * log(1 + p // period)."""
        super().__init__(*args, **kwargs)
        self.query_scaling = query_scaling

    def forward(self, query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:  # noqa: ANN401
        """Attend. ``query`` ``[queries, batch, heads, size]`` has the last of the positions that ``key`` has."""
        if self.query_scaling is not None:
            beta, period = self.query_scaling
            positions = torch.arange(len(key) - len(query), len(key), device=query.device)
            scale = 1 + beta * torch.log(1 + torch.floor(positions / period))
            query = query * scale[:, None, None, None].to(query.dtype)
        attended: torch.Tensor = super().forward(query, key, *args, **kwargs)
        return attended


class LatentNorm(torch.nn.RMSNorm):
    """The norm of a latent, with the epsilon of transformers."""

    def __init__(self, hidden_size: int, config: object, eps: float) -> None:  # noqa: ARG002  (Megatron's)
        """Take the arguments that Megatron gives to every norm."""
        super().__init__(hidden_size, eps=_LATENT_EPSILON)


def layer_spec(config: MistralConfig) -> ModuleSpec:
    """Megatron's local spec of a layer of the model, with experts as ``SequentialMLP``.

    Raises UnsupportedModelError if queries are scaled by position but there is no YaRN.
    """
    _define_names_of_transformer_engine()
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


def _define_names_of_transformer_engine() -> None:
    """Define two names that megatron-core 0.16 uses but defines only if Transformer Engine is installed."""
    moe_utils.te_general_gemm = getattr(moe_utils, "te_general_gemm", None)
    if not isinstance(getattr(multi_latent_attention, "TELinear", None), type):
        multi_latent_attention.HAVE_TE = False


def _query_scaling(config: MistralConfig) -> tuple[float, int] | None:
    """(beta, period in tokens) of the scale of queries (transformers' ``get_llama_4_attn_scale``, 5.23), or None."""
    if config.llama_4_scaling_beta is None:
        return None
    if config.yarn is None:
        raise UnsupportedModelError(
            f"llama_4_scaling_beta={config.llama_4_scaling_beta} without YaRN: the scale of queries needs YaRN's "
            "original_max_position_embeddings."
        )
    return config.llama_4_scaling_beta, config.yarn.original_max_position_embeddings
