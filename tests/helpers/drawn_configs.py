"""Hypothesis strategies for models of every family, with values that their args can express."""

from __future__ import annotations

from typing import Any, Final

from hypothesis import strategies as st

from dist_ckpt_mistral.model.config.mistral_config import FULL, SLIDING, MistralConfig
from dist_ckpt_mistral.model.config.parts import Experts, LatentAttention
from dist_ckpt_mistral.model.config.yarn import YarnScaling

_SIZE: Final = st.integers(1, 9)
_SCALE: Final = st.floats(0.1, 3.0)
_FAMILIES: Final = ("mistral", "mixtral", "ministral", "ministral3", "mistral4")


@st.composite
def configs(draw: st.DrawFn) -> MistralConfig:
    """A model of any family."""
    family = draw(st.sampled_from(_FAMILIES))
    groups, layers = draw(_SIZE), draw(st.integers(2, 9))
    sizes: dict[str, Any] = {
        "model_type": family,
        "vocab_size": draw(st.integers(1, 300)),
        "hidden_size": draw(_SIZE),
        "intermediate_size": draw(_SIZE),
        "num_hidden_layers": layers,
        "num_attention_heads": groups * draw(_SIZE),
        "num_key_value_heads": groups,
        "head_dim": draw(_SIZE),
        "rms_norm_eps": draw(st.floats(1e-8, 1e-3)),
        "rope_theta": draw(st.floats(2.0, 1e9)),
        "max_position_embeddings": draw(st.integers(1, 1 << 20)),
        "tie_word_embeddings": draw(st.booleans()),
        "dtype": "bfloat16",
        "yarn": draw(_yarn(st.just(value=True)) if family == "mistral4" else st.none() | _yarn(st.booleans())),
    }
    if family in ("ministral3", "mistral4"):
        sizes["llama_4_scaling_beta"] = draw(_SCALE)
    if family == "mistral4":
        sizes |= draw(_latent(sizes))
    else:
        sizes["sliding_window"] = draw(st.integers(1, 5000) if family == "ministral" else st.none() | _SIZE)
    if family == "ministral":
        kinds = st.lists(st.sampled_from([SLIDING, FULL]), min_size=layers, max_size=layers)
        sizes["layer_types"] = tuple(draw(kinds.filter(lambda each: len(set(each)) > 1)))
    if family == "mixtral":
        sizes["experts"] = draw(_experts(intermediate_size=sizes["intermediate_size"]))
    return MistralConfig(**sizes)


@st.composite
def _yarn(draw: st.DrawFn, truncates: st.SearchStrategy[bool]) -> YarnScaling:
    return YarnScaling(
        factor=draw(st.floats(1.5, 200.0)),
        original_max_position_embeddings=draw(st.integers(1, 1 << 20)),
        beta_fast=draw(st.floats(2.0, 64.0)),
        beta_slow=draw(st.floats(0.1, 2.0)),
        mscale=draw(st.none() | _SCALE),
        mscale_all_dim=draw(st.none() | _SCALE),
        attention_factor=draw(st.none() | st.floats(0.1, 4.0)),
        truncate=draw(truncates),
    )


@st.composite
def _latent(draw: st.DrawFn, sizes: dict[str, Any]) -> dict[str, Any]:
    latent = LatentAttention(
        q_lora_rank=draw(st.none() | _SIZE),
        kv_lora_rank=draw(_SIZE),
        qk_nope_head_dim=draw(_SIZE),
        qk_rope_head_dim=draw(_SIZE),
        v_head_dim=draw(_SIZE),
    )
    size = draw(_SIZE)
    experts = _experts(
        intermediate_size=size,
        shared_intermediate_size=size * draw(st.integers(0, 3)),
        routed_scaling_factor=draw(_SCALE),
        packed=True,
    )
    return {
        "latent_attention": latent,
        "head_dim": latent.qk_head_dim,
        "num_key_value_heads": sizes["num_attention_heads"],
        "experts": draw(experts),
    }


def _experts(**values: object) -> st.SearchStrategy[Experts]:
    """Experts whose router is normalized, with at least two of them per token."""
    counts = st.integers(2, 9).flatmap(lambda count: st.tuples(st.just(count), st.integers(2, count)))
    return counts.map(lambda each: Experts(num_experts=each[0], experts_per_token=each[1], **values))  # type: ignore[arg-type]


@st.composite
def experts_of_any_router(draw: st.DrawFn) -> Experts:
    """Experts in groups of at least two, chosen in all the ways that transformers has."""
    num_groups = draw(st.integers(1, 4))
    groups_per_token = draw(st.integers(1, num_groups))
    size = draw(st.integers(2, 5))
    return Experts(
        num_experts=num_groups * size,
        experts_per_token=draw(st.integers(1, groups_per_token * size)),
        intermediate_size=1,
        normalized=draw(st.booleans()),
        routed_scaling_factor=draw(st.sampled_from([1.0, 2.5])),
        num_groups=num_groups,
        groups_per_token=groups_per_token,
        packed=True,
    )
