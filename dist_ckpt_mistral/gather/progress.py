"""The progress of long work: which phase it is in, and how many bytes of it are done."""

from __future__ import annotations

from typing import Final


class Progress:
    """Receives the progress of a conversion, comparison or check, as ``Effort(progress=...)``.

    Work has one phase or several, one after the other: "copy", "checksum", "sync", "compare", "check", "load". This
    class ignores them; a subclass overrides one method or both.

    Example:
        >>> class Phases(dist_ckpt_mistral.Progress):  # doctest: +SKIP
        ...     def phase(self, name, total_bytes):
        ...         print(f"{name}: {total_bytes} bytes")
        >>> dist_ckpt_mistral.to_hf("ckpt", "out", effort=dist_ckpt_mistral.Effort(progress=Phases()))  # doctest: +SKIP
    """

    def phase(self, name: str, total_bytes: int) -> None:
        """Begin a phase of ``total_bytes``; the one before has ended, or failed."""

    def advance(self, num_bytes: int) -> None:
        """Add bytes that are done. Called from any thread, for every band that is copied: it must be quick."""


#: Ignores all progress.
NO_PROGRESS: Final = Progress()
