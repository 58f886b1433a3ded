"""Progress as a list: what a conversion or comparison tells about itself."""

from __future__ import annotations

import dist_ckpt_mistral as dcm


class Recorded(dcm.Progress):
    """Records the phases with their totals, and the bytes done with the phase they belong to."""

    def __init__(self) -> None:
        """Begin without a phase."""
        self.phases: list[tuple[str, int]] = []
        self.done: list[tuple[str, int]] = []

    def phase(self, name: str, total_bytes: int) -> None:
        """Record the phase."""
        self.phases.append((name, total_bytes))

    def advance(self, num_bytes: int) -> None:
        """Record the bytes. Appending is safe in any thread."""
        self.done.append((self.phases[-1][0] if self.phases else "", num_bytes))

    def sums(self) -> list[tuple[str, int]]:
        """The bytes done in each phase, by its name, as ``phases`` would have them."""
        return [(name, sum(count for of, count in self.done if of == name)) for name, _ in self.phases]
