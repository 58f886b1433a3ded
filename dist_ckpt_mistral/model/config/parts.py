"""Parts of a ``MistralConfig`` (experts, latent attention, vision) and the checks of their sizes."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Final, TypeGuard

from dist_ckpt_mistral.errors import ConfigError

#: Far beyond every model: products of sizes from a hostile file must not overflow.
MAX_SIZE: Final = 2**31 - 1
#: Limits that keep the tensor table in memory: layers, and key heads and experts in all layers together.
MAX_LAYERS: Final = 10_000
MAX_PARTS: Final = 1_000_000
_SIZES: Final = ("num_experts", "experts_per_token", "intermediate_size")


def is_positive_int(value: object) -> TypeGuard[int]:
    """Whether ``value`` is an integer from 1 to ``MAX_SIZE``; booleans are not."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MAX_SIZE


def not_a_size(name: str, value: object) -> str:
    """The error message for a ``value`` that is no positive integer of at most ``MAX_SIZE``."""
    most = f" of at most {MAX_SIZE}" if isinstance(value, int) and value > MAX_SIZE else ""
    return f"{name} must be a positive integer{most}, got {value!r:.200}"


def is_positive_number(value: object) -> bool:
    """Whether ``value`` is a number above 0 that a float can hold; booleans are not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= sys.float_info.max


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """The mixture of experts that replaces the MLP of every layer.

    The router takes the softmax over all experts, chooses those with the highest probabilities, and multiplies the
    output of each with its probability times ``routed_scaling_factor``.

    Args:
        num_experts: Experts per layer.
        experts_per_token: Experts that the router chooses for a token.
        intermediate_size: Features between the two linear modules of an expert.
        shared_intermediate_size: The same of the MLP that every token passes too; 0 without one.
        normalized: Whether the probabilities of the chosen experts are scaled to add up to 1.
        routed_scaling_factor: Factor on the probabilities.
        num_groups: Groups of experts, all of the same size.
        groups_per_token: Groups whose experts the router may choose for a token.
        packed: Whether Hugging Face files hold all experts of a layer in one tensor.

    Raises:
        ConfigError: Values do not fit together; the message lists all problems.
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
    """Sizes of multi-latent attention, under Hugging Face's names.

    Args:
        q_lora_rank: Dimensions of the latent of all queries of a token; None if queries have no latent.
        kv_lora_rank: Dimensions of the latent of all keys and values of a token.
        qk_nope_head_dim: Dimensions of a query or key head that are not rotated. They come first.
        qk_rope_head_dim: Dimensions of a query or key head that are rotated.
        v_head_dim: Dimensions of a value head.

    Raises:
        ConfigError: A size is no positive integer. The message lists all problems.
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

    Args:
        hidden_size: Features of a patch between the tower's layers.
        intermediate_size: Features between the two linear modules of its MLP.
        num_hidden_layers: Number of its layers.
        num_attention_heads: Number of its attention heads.
        num_channels: Channels of an image.
        patch_size: Side of a patch, in pixels.
        merged_patches: Side of the square of patches that the projector merges into one token (``spatial_merge_size``).
        feature_layers: Number of the tower's layers whose features the projector takes.
        projector_bias: Whether the linear modules of the projector have biases.

    Raises:
        ConfigError: Values have the wrong type or size. The message lists all problems.
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
        """Dimensions of an attention head of the tower."""
        return self.hidden_size // self.num_attention_heads
