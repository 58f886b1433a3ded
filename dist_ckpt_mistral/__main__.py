"""``python -m dist_ckpt_mistral``, which is also the command ``dist-ckpt-mistral``."""

import contextlib
import os
import signal
import sys
from types import FrameType


def run() -> int:
    """Run the command line; an interrupt ends it with one line at any moment, also while Python still imports it."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else they are ignored, as in the background
        signal.signal(signal.SIGINT, _leave)
    from dist_ckpt_mistral.cli import main  # noqa: PLC0415  (takes most of the time until a command begins)

    code = main.main()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # while Python ends there is nobody to catch an exception
    return code


def _leave(number: int, frame: FrameType | None) -> None:  # noqa: ARG001  (the signature of a signal handler)
    """End at once: nothing has begun that must be cleared up."""
    with contextlib.suppress(OSError):
        os.write(2, b"interrupted: Nothing was published.\n")
    os._exit(130)


if __name__ == "__main__":
    sys.exit(run())
