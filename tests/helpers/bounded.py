"""Runs the command line, or a function, in a process that the kernel keeps from taking much memory or time."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Final

#: What nobody may need on small input: address space, of which Python and numpy reserve 150 MB, and processor time.
LIMIT_BYTES: Final = 500 << 20
LIMIT_SECONDS: Final = 8

_LIMITED: Final = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[1]), int(sys.argv[1])))
resource.setrlimit(resource.RLIMIT_CPU, (int(sys.argv[2]), int(sys.argv[2])))
from dist_ckpt_mistral.cli.main import main
sys.exit(main(sys.argv[3:]))
"""


def bounded(*arguments: object, limit_bytes: int = LIMIT_BYTES) -> subprocess.CompletedProcess[str]:
    """``dist-ckpt-mistral`` with these arguments; the kernel ends it where it takes too much."""
    command = [sys.executable, "-c", _LIMITED, str(limit_bytes), str(LIMIT_SECONDS), *map(str, arguments)]
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}  # numpy's own threads and buffers, which nobody needs
    return subprocess.run(
        command, check=False, capture_output=True, text=True, errors="replace", env=environment, timeout=60
    )


def bounded_refusal(*arguments: object) -> str:
    """The one line with which a command refuses: exit code 1, nothing on standard output, no traceback."""
    outcome = bounded(*arguments)
    assert (outcome.returncode, outcome.stdout) == (1, ""), outcome
    assert outcome.stderr.startswith("error: "), outcome.stderr[-3000:]
    assert outcome.stderr.count("\n") == 1
    assert "out of memory" not in outcome.stderr
    return outcome.stderr
