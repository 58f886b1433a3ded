"""``Experts``: the mixture of experts that stands in for the MLP of every layer."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Final, TypeGuard

from dist_ckpt_mistral.errors import ConfigError

#: Far beyond every model. Sizes of a hostile file must come to no number that overflows, and ...
MAX_SIZE: Final = 2**31 - 1
#: ... to no table that fills the memory: of layers, and of heads and experts in all layers together.
MAX_LAYERS: Final = 10_000
MAX_PARTS: Final = 1_000_000
_SIZES: Final = ("num_experts", "experts_per_token", "intermediate_size")


def is_positive_int(value: object) -> TypeGuard[int]:
    """Whether ``value`` is a whole number from 1 to ``MAX_SIZE``; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MAX_SIZE


def not_a_size(name: str, value: object) -> str:
    """What is wrong with a ``value`` that is no positive integer."""
    most = f" of at most {MAX_SIZE}" if isinstance(value, int) and value > MAX_SIZE else ""
    return f"{name} must be a positive integer{most}, got {value!r:.200}"


def is_positive_number(value: object) -> bool:
    """Whether ``value`` is a number above 0 that a float can hold; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= sys.float_info.max


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """How many experts a layer has, how large they are, and how its router chooses ``experts_per_token`` of them.

    The router takes the softmax over all experts, chooses the highest, and multiplies what they give with their
    probabilities times ``routed_scaling_factor``; with ``normalized`` the probabilities of those chosen add up to 1.
    With ``num_groups`` above 1 the experts stand in so many groups, of which only ``groups_per_token`` may be chosen.
    ``shared_intermediate_size`` is the size of an MLP that every token passes besides, 0 without one. ``packed`` says
    that Hugging Face files hold the experts of a layer in one tensor.
    """

    num_experts: int
    experts_per_token: int
    intermediate_size: int
    shared_intermediate_size: int = 0
    normalized: bool = True
    routed_scaling_factor: float = 1.0
    num_groups: int = 1
    groups_per_token: int = 1
    packed: bool = False

    def __post_init__(self) -> None:
        """Check every value at once and report all problems together."""
        problems = [
            f"{name} must be a positive integer, got {getattr(self, name)!r}"
            for name in (*_SIZES, "num_groups", "groups_per_token")
            if not is_positive_int(getattr(self, name))
        ]
        if self.shared_intermediate_size != 0 and not is_positive_int(self.shared_intermediate_size):
            problems.append(
                f"shared_intermediate_size must be an integer of at least 0, got {self.shared_intermediate_size!r}"
            )
        normalized: object = self.normalized  # from JSON: not yet known to be what the annotation says
        if not isinstance(normalized, bool):
            problems.append(f"normalized must be true or false, got {normalized!r}")
        if not is_positive_number(self.routed_scaling_factor):
            problems.append(f"routed_scaling_factor must be a positive number, got {self.routed_scaling_factor!r}")
        if not problems:
            problems += self._contradictions()
        if problems:
            raise ConfigError("the experts of the model do not fit: " + "; ".join(problems))

    def _contradictions(self) -> list[str]:
        problems = []
        if self.experts_per_token > self.num_experts:
            problems.append(f"experts_per_token={self.experts_per_token} of num_experts={self.num_experts}")
        if self.num_experts % self.num_groups or self.groups_per_token > self.num_groups:
            problems.append(
                f"groups_per_token={self.groups_per_token} of num_groups={self.num_groups} "
                f"among num_experts={self.num_experts}"
            )
        return problems


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentAttention:
    """Sizes of multi-latent attention, in Hugging Face's names; without ``q_lora_rank`` queries have no latent.

    The last ``qk_rope_head_dim`` of ``qk_head_dim`` dimensions of a query or key are rotated.
    """

    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int

    def __post_init__(self) -> None:
        """Check every size at once and report all problems together."""
        sizes = {name: getattr(self, name) for name in self.__slots__}
        if self.q_lora_rank is None:
            del sizes["q_lora_rank"]
        problems = [
            f"{name} must be a positive integer, got {n!r}" for name, n in sizes.items() if not is_positive_int(n)
        ]
        if problems:
            raise ConfigError("the sizes of latent attention do not fit: " + "; ".join(problems))

    @property
    def qk_head_dim(self) -> int:
        """Dimensions of a query or key."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class Vision:
    """The sizes of a Pixtral vision tower, and of the projector from it to the language model.

    ``merged_patches`` patches along each side become one token (``spatial_merge_size``), of whose features the
    projector takes ``feature_layers`` layers.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_channels: int
    patch_size: int
    merged_patches: int
    feature_layers: int
    projector_bias: bool

    def __post_init__(self) -> None:
        """Check every size at once and report all problems together."""
        sizes = {name: getattr(self, name) for name in self.__slots__ if name != "projector_bias"}
        problems = [
            f"{name} must be a positive integer, got {size!r}"
            for name, size in sizes.items()
            if not is_positive_int(size)
        ]
        bias: object = self.projector_bias  # from JSON: not yet known to be what the annotation says
        if not isinstance(bias, bool):
            problems.append(f"projector_bias must be true or false, got {bias!r}")
        if not problems and self.hidden_size % self.num_attention_heads:
            problems.append(
                f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads={self.num_attention_heads}"
            )
        if problems:
            raise ConfigError("the sizes of the vision tower and its projector do not fit: " + "; ".join(problems))

    @property
    def head_dim(self) -> int:
        """Dimensions of a head."""
        return self.hidden_size // self.num_attention_heads
