"""A mixture of experts in Megatron-LM's args."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from dist_ckpt_mistral.errors import UnsupportedModelError
from dist_ckpt_mistral.model.experts import Experts
from dist_ckpt_mistral.model.megatron_fields import (
    EXPERTS,
    EXPERTS_ARCHITECTURE,
    GROUPS_OF_EXPERTS,
    LOAD_BALANCING,
    MOE_LAYER_FREQ,
    MORE_OF_EXPERTS,
    PRE_SOFTMAX,
    SAME_VALUE,
    Field,
    unmet,
)

#: Routers that choose otherwise than by the highest probability (mcore transformer/moe/router.py, 0.16 to 0.19).
_OTHER_ROUTING: Final = ("sinkhorn", "quantile_balancing")
#: transformers rates a group by its two best experts (Mistral4TopkRouter).
_RATED_BY: Final = 2


def expert_args(experts: Experts | None) -> list[tuple[Field, Any]]:
    """The fields that describe experts. Raises UnsupportedModelError for a router that Megatron cannot express."""
    if experts is None:
        return [(EXPERTS["num_experts"], None)]
    require_routable(experts)
    more = [(field, getattr(experts, attribute)) for attribute, field in MORE_OF_EXPERTS.items()]
    return [
        *((field, getattr(experts, attribute)) for attribute, field in EXPERTS.items()),
        *((field, None if value == field.default else value) for field, value in more),
        *(
            (field, getattr(experts, attribute) if experts.num_groups > 1 else None)
            for attribute, field in GROUPS_OF_EXPERTS.items()
        ),
        (PRE_SOFTMAX, not experts.normalized),
        *EXPERTS_ARCHITECTURE,
        (MOE_LAYER_FREQ, MOE_LAYER_FREQ.default),
    ]


def require_routable(experts: Experts) -> None:
    """Raise UnsupportedModelError where Megatron's router cannot choose the experts that transformers' does."""
    if experts.experts_per_token == 1 and experts.normalized:
        raise UnsupportedModelError(
            "one expert per token with a probability of 1: Megatron's router needs moe_router_pre_softmax then, "
            "which is another model (mcore TransformerConfig, 0.16 to 0.19)."
        )
    groups = _other_groups(experts)
    if groups:
        raise UnsupportedModelError(
            f"{groups}: Megatron's router chooses groups in the same way only if normalized=False and "
            f"experts_per_token // groups_per_token is {_RATED_BY}."
        )


def _other_groups(experts: Experts) -> str | None:
    """Groups that limit the choice, where Megatron would choose others.

    It rates a group by its best ``experts_per_token // groups_per_token`` experts, and before the softmax where that
    is taken over the chosen ones (``group_limited_topk`` in transformer/moe/moe_utils.py, 0.16 to 0.19).
    """
    rated_by = experts.experts_per_token // experts.groups_per_token
    if experts.groups_per_token == experts.num_groups or (not experts.normalized and rated_by == _RATED_BY):
        return None
    return (
        f"groups_per_token={experts.groups_per_token} of num_groups={experts.num_groups} for "
        f"experts_per_token={experts.experts_per_token} with normalized={experts.normalized}"
    )


def experts_of(args: Mapping[str, Any], *, packed: bool) -> Experts | None:
    """The experts, None without any; ``packed`` is how Hugging Face files hold them.

    Raises ConfigError where their sizes do not fit.
    """
    if not EXPERTS["num_experts"].of(args):
        return None
    values = {attribute: field.of(args) for attribute, field in EXPERTS.items()}
    if values["intermediate_size"] is None:
        values["intermediate_size"] = SAME_VALUE["intermediate_size"].of(args)
    values |= {attribute: field.of(args) or field.default for attribute, field in MORE_OF_EXPERTS.items()}
    if GROUPS_OF_EXPERTS["groups_per_token"].of(args):
        values |= {attribute: field.of(args) for attribute, field in GROUPS_OF_EXPERTS.items()}
    return Experts(**values, normalized=not PRE_SOFTMAX.of(args), packed=packed)


def unmet_by_experts(args: Mapping[str, Any], experts: Experts, *, latent: bool) -> Iterator[str]:
    """What the args say of experts that no model of the family has; ``latent`` is whether attention is latent."""
    yield from unmet(EXPERTS_ARCHITECTURE, args)
    frequency, balancing = MOE_LAYER_FREQ.of(args), LOAD_BALANCING.of(args)
    if not all(each == 1 for each in (frequency if isinstance(frequency, list | tuple) else [frequency])):
        yield f"moe_layer_freq={frequency!r:.200}"
    if any(each in _OTHER_ROUTING for each in (balancing if isinstance(balancing, list | tuple) else [balancing])):
        yield f"moe_router_load_balancing_type={balancing!r:.200}"
    if not latent:
        demands = ((PRE_SOFTMAX, False), *((field, field.default) for field in MORE_OF_EXPERTS.values()))
        demands += ((GROUPS_OF_EXPERTS["groups_per_token"], None),)
        yield from (f"{found} without multi_latent_attention" for found in unmet(demands, args))
    elif groups := _other_groups(experts):
        yield groups
    elif experts.shared_intermediate_size % experts.intermediate_size:
        shared = MORE_OF_EXPERTS["shared_intermediate_size"].name
        yield f"{shared}={experts.shared_intermediate_size}, no multiple of {experts.intermediate_size}"
