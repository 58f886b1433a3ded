"""Commands that a message shows: exact when they are pasted into bash."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable


def command_line(words: Iterable[str]) -> str:
    """``words`` as one line of printable characters that bash reads as exactly these words."""
    return " ".join(shlex.quote(word) if word.isprintable() else _with_escapes(word) for word in words)


def _with_escapes(word: str) -> str:
    """A word with characters that a terminal must not get, in bash's notation ``$'...'``."""
    return "$'" + "".join(c if c.isprintable() and c not in "'\\" else _bytes_of(c) for c in word) + "'"


def _bytes_of(character: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in os.fsencode(character))
