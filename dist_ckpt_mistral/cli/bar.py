"""The progress bar: one line on standard error, which is not there while anything else is printed, and at the end."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections import deque
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

from dist_ckpt_mistral.gather.progress import Progress

if TYPE_CHECKING:
    from tqdm import tqdm

#: A command that takes no longer shows no bar, and does not import what draws it.
_PATIENCE_S: Final = 0.3
_REFRESH_S: Final = 0.1
#: Weight of the last refresh in the rate: it follows the last seconds.
_SMOOTHING: Final = 0.03
_MOST_COLUMNS: Final = 100
#: If the width of the terminal is unknown.
_COLUMNS: Final = 80
#: Columns to the right of the bar. There a terminal echoes the ^C of an interrupt, which is cleared with the bar.
_MARGIN: Final = 4


class _Phase:
    """A phase, and what was done in it since the last refresh. No dataclass: ``--help`` would wait for their import."""

    def __init__(self, name: str, total_bytes: int) -> None:
        """Begin with nothing done."""
        self.name, self.total_bytes, self.done = name, total_bytes, deque[int]()

    def take(self) -> int:
        """The number of bytes done since the last call."""
        return sum(self.done.popleft() for _ in range(len(self.done)))


class ProgressBar(Progress):
    """Shows the current phase in a bar: percent, bytes, time so far and to go, rate.

    A thread draws it, so that ``advance`` takes a fraction of a microsecond, and so that it goes on while nothing is
    done. Errors of the terminal end the bar and nothing else.
    """

    def __init__(self) -> None:
        """Show nothing before the first phase, nor in the first 0.3 s of it."""
        self._phase = self._drawn = _Phase("", 0)
        self._bar: tqdm[None] | None = None
        self._on_terminal = threading.RLock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._draw_on, name="progress bar", daemon=True)

    def phase(self, name: str, total_bytes: int) -> None:
        """Begin a new bar."""
        self._phase = _Phase(name, total_bytes)
        if self._thread.ident is None:
            self._thread.start()

    def advance(self, num_bytes: int) -> None:
        """Leave the number for the next refresh."""
        self._phase.done.append(num_bytes)  # takes no lock

    def __enter__(self) -> Self:
        """Be known to what prints, from now on."""
        _SHOWN.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Remove the bar."""
        self._ended.set()
        try:
            if self._thread.ident is not None:
                self._thread.join()
        finally:
            with contextlib.suppress(OSError), self.hidden():
                self._close()
            _SHOWN.remove(self)

    @contextlib.contextmanager
    def hidden(self) -> Iterator[None]:
        """Clear the line of the bar, and draw nothing within the block."""
        with self._on_terminal:
            if self._bar is not None:
                with contextlib.suppress(OSError):
                    sys.stderr.write("\r" + " " * (_columns() - 1) + "\r")
                    sys.stderr.flush()
            yield

    def _draw_on(self) -> None:
        wait_s = _PATIENCE_S
        with contextlib.suppress(OSError):
            while not self._ended.wait(wait_s):
                with self._on_terminal:
                    self._draw()
                wait_s = _REFRESH_S

    def _draw(self) -> None:
        phase = self._phase
        num_bytes = phase.take()
        if self._bar is None or phase is not self._drawn:
            self._close()
            self._bar, self._drawn = _new_bar(phase, num_bytes), phase
            return
        self._bar.ncols = _bar_columns()
        if num_bytes:
            self._bar.update(num_bytes)
        else:
            self._bar.refresh()  # the time goes on; update(0) would take this time out of the rate

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


#: The bar of the running command, if it has one.
_SHOWN: Final[list[ProgressBar]] = []


@contextlib.contextmanager
def hidden() -> Iterator[None]:
    """Within the block no bar is on the terminal; it comes back with its next refresh."""
    with contextlib.ExitStack() as stack:
        for bar in _SHOWN:
            stack.enter_context(bar.hidden())
        yield


def _new_bar(phase: _Phase, num_bytes: int) -> tqdm[None]:
    """Draw the bar of a phase in which ``num_bytes`` are done already."""
    from tqdm import tqdm

    class Bar(tqdm):  # type: ignore[misc]  # tqdm has no types
        monitor_interval = 0  # no thread that refreshes it: that is ours

    Bar.set_lock(threading.RLock())  # not one between processes
    return Bar(
        desc=phase.name,
        total=phase.total_bytes or None,
        initial=num_bytes,
        unit="B",
        unit_scale=True,
        leave=False,
        file=sys.stderr,
        ncols=_bar_columns(),
        mininterval=0,
        miniters=1,
        smoothing=_SMOOTHING,
    )


def _bar_columns() -> int:
    return max(1, min(_MOST_COLUMNS, _columns() - _MARGIN))


def _columns() -> int:
    with contextlib.suppress(OSError, ValueError):  # it has no width, or is closed
        return os.get_terminal_size(sys.stderr.fileno()).columns or _COLUMNS
    return _COLUMNS
