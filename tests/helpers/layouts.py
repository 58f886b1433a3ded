"""Hypothesis strategies for parallel layouts that fit, in all the ways in which Megatron can spread layers."""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby
from math import gcd, lcm
from typing import Any

from hypothesis import reject
from hypothesis import strategies as st

from dist_ckpt_mistral.errors import LayoutError
from dist_ckpt_mistral.model.config.mistral_config import MistralConfig
from dist_ckpt_mistral.model.config.parts import Experts, LatentAttention
from dist_ckpt_mistral.model.layout.layout import ParallelLayout

_SMALL = st.integers(1, 3)
_ORDERS = ("tp-cp-ep-dp-pp", "tp-ep-dp-cp-pp", "dp-cp-tp-pp", "cp-tp-dp-ep-pp", "tp-cp-dp-pp")


@st.composite
def models(draw: st.DrawFn) -> tuple[MistralConfig, ParallelLayout]:
    """A small dense model, and a layout that fits it."""
    tp = draw(st.integers(1, 4))
    pipeline, num_layers = draw(pipelines())
    groups = draw(
        st.sampled_from([*(each for each in range(1, tp) if tp % each == 0), *(tp * each for each in (1, 2))])
    )
    config = MistralConfig(
        vocab_size=draw(st.integers(1, 300)),
        hidden_size=draw(_SMALL),
        intermediate_size=tp * draw(_SMALL),
        num_hidden_layers=num_layers,
        num_attention_heads=lcm(groups, tp) * draw(_SMALL),
        num_key_value_heads=groups,
        head_dim=tp // gcd(tp, 2 * groups) * draw(_SMALL),
        tie_word_embeddings=draw(st.booleans()),
        dtype="bfloat16",
    )
    cp, dp, order = draw(st.integers(1, 2)), draw(_SMALL), draw(st.sampled_from(_ORDERS))
    return config, ParallelLayout(tp=tp, cp=cp, dp=dp, order=order, **pipeline)


@st.composite
def family(draw: st.DrawFn) -> tuple[MistralConfig, ParallelLayout]:
    """A small model with experts, with latent attention or without, and a layout that fits it."""
    dense, plain = draw(models())
    tp, etp = plain.tp, draw(st.none() | _SMALL)
    ep = draw(_SMALL) if "ep" in plain.order else 1
    experts = Experts(
        num_experts=ep * draw(_SMALL),
        experts_per_token=1,
        intermediate_size=lcm(etp or tp, tp) * draw(_SMALL),
        shared_intermediate_size=tp * draw(st.integers(0, 2)),
        packed=draw(st.booleans()),
    )
    rotated = 2 * draw(_SMALL)
    latent = LatentAttention(
        q_lora_rank=tp * draw(_SMALL),
        kv_lora_rank=tp * (rotated + draw(_SMALL)) - rotated,
        qk_nope_head_dim=draw(_SMALL),
        qk_rope_head_dim=rotated,
        v_head_dim=draw(_SMALL),
    )
    config = replace(dense, experts=experts, latent_attention=draw(st.none() | st.just(latent)))
    try:
        fewest = replace(plain, dp=None, ep=ep, etp=etp)  # type: ignore[arg-type]  # the default, which counts
        return config, replace(fewest, dp=fewest.dp * draw(st.integers(1, 2)))
    except LayoutError:
        reject()


@st.composite
def pipelines(draw: st.DrawFn) -> tuple[dict[str, Any], int]:
    """The pipeline fields of a ``ParallelLayout``, and a number of layers that they fit."""
    pp = draw(st.integers(1, 4))
    kind = draw(st.sampled_from([_even, _counted, _with_ends, _with_places, _spelled]))
    vpp = draw(st.none() | _SMALL) if pp > 1 and kind is not _counted else None
    fields, num_layers = draw(kind(pp, vpp or 1))
    return {"pp": pp, "vpp": vpp, **fields}, num_layers


@st.composite
def _even(draw: st.DrawFn, pp: int, chunks: int) -> tuple[dict[str, Any], int]:
    return {}, pp * chunks * draw(_SMALL)


@st.composite
def _counted(draw: st.DrawFn, pp: int, _chunks: int) -> tuple[dict[str, Any], int]:
    layers = draw(st.lists(st.integers(0, 3), min_size=pp, max_size=pp).filter(any))
    return {"pp_layers": tuple(layers)}, sum(layers)


@st.composite
def _with_ends(draw: st.DrawFn, pp: int, chunks: int) -> tuple[dict[str, Any], int]:
    enough_for_both = pp >= (3 if chunks > 1 else 2)
    ends = draw(st.sampled_from([("first",), ("last",), *([("first", "last")] if enough_for_both else [])]))
    fields = {f"num_layers_in_{end}_pipeline_stage": chunks * draw(_SMALL) for end in ends}
    return fields, sum(fields.values()) + (pp - len(ends)) * chunks * draw(_SMALL)


@st.composite
def _with_places(draw: st.DrawFn, pp: int, chunks: int) -> tuple[dict[str, Any], int]:
    ends = draw(st.sampled_from([("embedding",), ("loss",), ("embedding", "loss")]))
    places = pp * chunks * draw(st.integers(1, 4).filter(lambda size: pp * chunks * size > len(ends)))
    return {f"account_for_{end}_in_pipeline_split": True for end in ends}, places - len(ends)


@st.composite
def _spelled(draw: st.DrawFn, pp: int, chunks: int) -> tuple[dict[str, Any], int]:
    """A layout string; equal stages are drawn together here and there."""
    stages = pp * chunks
    counts = draw(st.lists(st.integers(0, 3), min_size=stages, max_size=stages).filter(any))
    letters = ["t" * count if draw(st.booleans()) else f"t*{count}," for count in counts]
    letters = ["E" + letters[0], *letters[1:]]
    letters[-1] += "L"
    text = ""
    for stage, equal in groupby(letters):
        times = len(list(equal))
        text += f"({stage}|)*{times}" if times > 1 and stage else f"{stage}|" * times
    text = text.removesuffix("|")
    if text.endswith("|)*1") or not text.endswith("L"):
        text = "|".join(letters)
    return {"pipeline_model_parallel_layout": text}, sum(counts)
