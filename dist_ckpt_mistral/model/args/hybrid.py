"""Read the args of a HybridModel as those of the GPTModel that computes the same.

A HybridModel (``MambaModel`` to 0.17) has attention and MLP as layers of their own, in the order of
``hybrid_layer_pattern`` (megatron-core models/hybrid/hybrid_layer_allocation.py, 0.19). With both in turn, as in
``*-*-``, it is a model of the Mistral family with half as many layers. Apart from megatron_args.py because a pattern
changes what other args mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from dist_ckpt_mistral.model.args.fields import COMPUTED, EXPERTS, MOE_LAYER_FREQ, SAME_VALUE
from dist_ckpt_mistral.model.config.parts import is_positive_int

_PATTERNS: Final = ("hybrid_layer_pattern", "hybrid_override_pattern")
#: One layer of the family, as two of a HybridModel -> whether its attention is latent, and whether it has experts.
_LAYERS: Final = {"*-": (False, False), "*E": (False, True), "+-": (True, False), "+E": (True, True)}


def hybrid_pattern(args: Mapping[str, Any]) -> object:
    """The pattern of the layers of a HybridModel; None for the args of a GPTModel."""
    return next((args[name] for name in _PATTERNS if args.get(name) is not None), None)


def as_gpt_args(args: Mapping[str, Any]) -> Mapping[str, Any]:
    """The args of a GPTModel for those of a HybridModel that computes the same; all others are returned unchanged."""
    pattern = hybrid_pattern(args)
    symbols = pattern.replace("|", "") if isinstance(pattern, str) else ""  # "|" separates pipeline stages
    layer, num_layers = symbols[:2], len(symbols) // 2
    stated = SAME_VALUE["num_hidden_layers"].of(args)
    if layer not in _LAYERS or symbols != layer * num_layers or stated not in (None, len(symbols)):
        return args
    is_latent, has_experts = _LAYERS[layer]
    if is_latent != bool(COMPUTED["multi_latent_attention"].of(args)):
        return args
    if has_experts and not EXPERTS["num_experts"].of(args):
        return args
    window = COMPUTED["window_attn_skip_freq"]
    return {
        **args,
        **dict.fromkeys(_PATTERNS),
        "is_hybrid_model": False,
        **dict.fromkeys(SAME_VALUE["num_hidden_layers"].names, num_layers),
        **({} if has_experts else dict.fromkeys(EXPERTS["num_experts"].names)),
        **dict.fromkeys(MOE_LAYER_FREQ.names, 1),  # the pattern says where experts are
        **dict.fromkeys(window.names, _of_attention(window.of(args), len(symbols))),
    }


def _of_attention(skip: object, num_layers: int) -> object:
    """The entries for attention of ``window_attn_skip_freq``, which counts all layers (``is_layer_window_attention``).

    With a number n, every nth layer has full attention. Values of other forms are left for others to refuse.
    """
    if is_positive_int(skip):
        skip = [int(number % skip != 0) for number in range(1, num_layers + 1)]
    return skip[::2] if isinstance(skip, list | tuple) and len(skip) == num_layers else skip
