"""The progress of long work: which phase it is in, and how many bytes of it are done."""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from tqdm import tqdm

#: Work that takes no longer shows no bar.
_PATIENCE_S: Final = 0.3


class Progress:
    """Receives the progress of a conversion, comparison or check, as ``Effort(progress=...)``.

    Work has one phase or several, one after the other: "copy", "checksum", "sync", "compare", "check", "load". This
    class ignores them; a subclass overrides one method or both. ``ProgressBar`` shows them; by default that is done in
    notebooks alone.

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


class ProgressBar(Progress):
    """Shows each phase as a bar of tqdm: in a notebook as its own, elsewhere as a line on standard error.

    Example:
        >>> effort = dist_ckpt_mistral.Effort(progress=dist_ckpt_mistral.ProgressBar())  # doctest: +SKIP
        >>> dist_ckpt_mistral.to_hf("ckpt", "out", effort=effort)  # doctest: +SKIP
    """

    def __init__(self) -> None:
        """Show nothing before the first phase, nor in its first 0.3 s."""
        self._bar: tqdm[None] | None = None
        self._lock = threading.Lock()

    def phase(self, name: str, total_bytes: int) -> None:
        """Begin a new bar; that of the phase before is closed."""
        from tqdm.auto import tqdm as bar_here  # noqa: PLC0415  (only a bar needs it)

        with self._lock:
            self._close()
            if total_bytes:
                self._bar = bar_here(
                    desc=name, total=total_bytes, unit="B", unit_scale=True, delay=_PATIENCE_S, leave=False
                )

    def advance(self, num_bytes: int) -> None:
        """Add bytes to the bar, which ends with the last of them. tqdm draws it ten times a second at most."""
        with self._lock:
            if self._bar is not None:
                self._bar.update(num_bytes)
                if self._bar.n >= self._bar.total:
                    self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class NotebookProgress(ProgressBar):
    """A ``ProgressBar`` in a notebook, and nothing elsewhere: what is shown if nobody asks for anything."""

    def phase(self, name: str, total_bytes: int) -> None:
        """Begin a new bar in a notebook."""
        if in_notebook():
            super().phase(name, total_bytes)


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook, such as Jupyter's or Colab's."""
    shell = sys.modules.get("IPython")
    return shell is not None and type(shell.get_ipython()).__name__ in _NOTEBOOK_SHELLS


#: IPython's classes of shells that are the kernel of a notebook: ipykernel's, and Colab's.
_NOTEBOOK_SHELLS: Final = ("ZMQInteractiveShell", "Shell")
#: Ignores all progress.
NO_PROGRESS: Final = Progress()
#: What is shown if nobody asks for anything.
DEFAULT_PROGRESS: Final = NotebookProgress()
