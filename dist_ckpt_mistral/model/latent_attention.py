"""``LatentAttention``: the sizes of multi-latent attention (MLA)."""

from __future__ import annotations

from dataclasses import dataclass

from dist_ckpt_mistral.errors import ConfigError
from dist_ckpt_mistral.model.checks import is_positive_int


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
