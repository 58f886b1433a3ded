"""Work in several threads ends when it is interrupted, also where a thread does not."""

from __future__ import annotations

import _thread
import threading
import time

import pytest

from dist_ckpt_mistral.gather.execute import run_all


@pytest.mark.parametrize("patience_s", [None, 5.0])
def test_an_interrupt_stops_threads_and_drops_what_waits(patience_s: float | None) -> None:
    """Running calls are stopped and waited for; those that have not begun never begin."""
    stopped, begun = threading.Event(), list[int]()

    def work(number: int) -> None:
        begun.append(number)
        if number == 1:
            _thread.interrupt_main()
        stopped.wait(30)

    with pytest.raises(KeyboardInterrupt):
        run_all(work, range(20), workers=2, stop=stopped.set, patience_s=patience_s)
    assert stopped.is_set()
    assert begun == [0, 1]


def test_an_interrupt_does_not_wait_for_a_silent_store() -> None:
    """A call that nothing stops is waited for as long as is said."""
    answered = threading.Event()

    def work(_: int) -> None:
        _thread.interrupt_main()
        answered.wait(30)

    begun_s = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_all(work, range(3), workers=1, patience_s=0.1)
    assert time.monotonic() - begun_s < 10
    answered.set()
