"""What a conversion tells about itself when it is done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from dist_ckpt_mistral.gather.plan import BytePlan
from dist_ckpt_mistral.losses import Loss
from dist_ckpt_mistral.mapping.checkpoint_map import PADDING, Ignored
from dist_ckpt_mistral.messages import human_bytes


class Origin(Protocol):
    """What is converted: where its configuration is from, and what of it stays behind."""

    @property
    def config_from(self) -> str:
        """Where the configuration is from."""

    @property
    def ignored(self) -> Ignored:
        """What stays behind, and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """What a conversion wrote (or, on a dry run, would write). Sizes in bytes, file names relative to ``output``.

    ``losses`` are values that another dtype destroyed, where that was allowed.
    """

    output: Path
    config_from: str
    num_tensors: int
    num_bytes: int
    files: Mapping[str, int]
    ignored: Ignored
    losses: tuple[Loss, ...] = ()

    @classmethod
    def of(
        cls,
        output: Path,
        plan: BytePlan,
        files: Mapping[str, int],
        origin: Origin,
        *,
        num_tensors: int,
        losses: tuple[Loss, ...] = (),
    ) -> Conversion:
        """What ``plan`` brings from ``origin`` into the ``files`` of ``output``."""
        return cls(
            output=output,
            config_from=origin.config_from,
            num_tensors=num_tensors,
            num_bytes=plan.num_bytes,
            files=files,
            ignored=origin.ignored,
            losses=losses,
        )


def conversion_line(verb: str, done: Conversion) -> str:
    """What a conversion did, in one line."""
    padding = [name for name, reason in done.ignored if reason == PADDING]
    others = len(done.ignored) - len(padding)
    ignored = f"; {others} stored entries are not weights and stayed behind" if others else ""
    ignored += f"; dropped {', '.join(padding)}: {PADDING}" if padding else ""
    size = human_bytes(done.num_bytes)
    return f"{verb} {done.num_tensors} tensors ({size}) in {len(done.files)} files to {done.output}{ignored}"
