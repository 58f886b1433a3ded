"""``Vision``: the vision tower and the projector before a language model. Megatron does not run them here."""

from __future__ import annotations

from dataclasses import dataclass

from dist_ckpt_mistral.errors import ConfigError
from dist_ckpt_mistral.model.checks import is_positive_int


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
