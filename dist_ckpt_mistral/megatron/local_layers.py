"""The layers of a model of the Mistral family: Megatron's local spec, which needs neither Transformer Engine nor Apex.

Its own attention (transformer/dot_product_attention.py, 0.16 to 0.19) lacks two things: it cannot be built for latent
attention, and it does not scale queries by their position, as Ministral 3 and Mistral Small 4 do. And latents are
normed with the epsilon of the model, where transformers has one for them (modeling_mistral4.py, 5.23).
"""

from __future__ import annotations

from typing import Any, Final

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.spec_utils import ModuleSpec

from dist_ckpt_mistral.errors import UnsupportedModelError
from dist_ckpt_mistral.model.config.mistral_config import MistralConfig

_LATENT_EPSILON: Final = 1e-6


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
