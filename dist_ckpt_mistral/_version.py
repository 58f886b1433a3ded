"""Which version of the package this is: here alone, pyproject.toml reads it.

What is installed would tell too, but to ask imports an email parser: a tenth of the time that a small export takes.
"""

from __future__ import annotations

from typing import Final

__version__: Final = "0.1.0"
