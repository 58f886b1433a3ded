"""``Experts``: the mixture of experts that stands in for the MLP of every layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from dist_ckpt_mistral.errors import ConfigError
from dist_ckpt_mistral.model.checks import is_positive_int, is_positive_number

_SIZES: Final = ("num_experts", "experts_per_token", "intermediate_size")


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
