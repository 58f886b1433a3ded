"""Entry point of ``python -m dist_ckpt_mistral`` and of the command ``dist-ckpt-mistral``."""

import contextlib
import gc
import os
import signal
import sys
from types import FrameType


def run() -> int:
    """Run the command line and return its exit code.

    An interrupt prints one line instead of a traceback, also while the imports run.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a background job ignores SIGINT: keep that
        signal.signal(signal.SIGINT, _exit_during_import)
    from dist_ckpt_mistral.cli import main  # noqa: PLC0415  (slow; the handler must be in place before)

    code = main.main()
    gc.freeze()  # as it ends, Python would walk all objects for garbage, which takes as long as importing rich
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # nothing catches a KeyboardInterrupt while Python shuts down
    if code == main.EXIT_INTERRUPTED:
        _leave(code)
    return code


def _leave(code: int) -> None:
    """End at once: Python would wait for threads that wait for the answer of a store."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _exit_during_import(number: int, frame: FrameType | None) -> None:  # noqa: ARG001  (a signal handler's signature)
    """Exit at once with code 130: nothing has been written yet."""
    with contextlib.suppress(OSError):
        os.write(2, b"interrupted: Nothing was published.\n")
    os._exit(130)


if __name__ == "__main__":
    sys.exit(run())
