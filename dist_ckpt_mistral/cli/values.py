"""What a word of the command line means: paths, numbers, sizes. Each function is a ``type`` of argparse."""

from __future__ import annotations

import argparse
import os
import re
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pathlib import Path

#: Python itself refuses to convert more than 4300 digits.
_MOST_DIGITS: Final = 40


def name(text: str) -> str:
    """Parse a path or hub id. An empty text, as of an unset shell variable, would mean the current directory.

    ``-`` is refused, too: it means standard output elsewhere, and would become a file of that name.
    So is ``~``: it comes from quotes, or from ``--config=~/model``, where shells do not expand it. As an
    output it would become a directory of that name.
    """
    if not text:
        raise argparse.ArgumentTypeError("expected a path, got an empty text")
    if text == "-" and not os.path.lexists(text):
        raise argparse.ArgumentTypeError("expected a path, got '-': no command reads or writes a stream. ./- is a name")
    if text.startswith("~") and not os.path.lexists(text.partition("/")[0]):
        raise argparse.ArgumentTypeError(
            f"expected a path, got {text!r:.500}, in which no shell has expanded the ~. Write the directory out, or "
            f"./{text:.500} if it is a name"
        )
    return text


def path(text: str) -> Path:
    """Parse a path or URL; an empty text is refused, as in ``name``."""
    from dist_ckpt_mistral.storage.remote_path import as_path

    return as_path(name(text))


def not_negative(text: str) -> int:
    """Parse a whole number of at least 0. The user of the number checks its upper limit."""
    if not text.isdecimal() or len(text) > _MOST_DIGITS:
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r:.500}")
    return int(text)


def positive(text: str) -> int:
    """Parse a whole number of at least 1."""
    number = not_negative(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return number


def seed(text: str) -> int:
    """Parse a seed of torch's generators: a whole number of at most 64 bits."""
    number = not_negative(text)
    if number >= 1 << 64:
        raise argparse.ArgumentTypeError(f"expected a whole number below 2^64, got {text!r}")
    return number


def positive_number(text: str) -> float:
    """Parse a number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return number


def probability(text: str) -> float:
    """Parse a number above 0 and at most 1."""
    number = positive_number(text)
    if number > 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0 and at most 1, got {text!r}")
    return number


def size(text: str) -> int:
    """Parse a size in bytes: ``5GB`` (decimal) or ``5GiB`` (binary)."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?)\s*([KMGT]?)(i?)B?", text, re.IGNORECASE)
    num_bytes = 0
    if match:
        power = " KMGT".index(match[2].upper() or " ")
        num_bytes = int(float(match[1]) * (1024 if match[3] else 1000) ** power)
    if num_bytes < 1:
        raise argparse.ArgumentTypeError(f"expected a size such as 5GB or 500MB, got {text!r}")
    if match and not match[2] and not text.upper().endswith("B"):
        raise argparse.ArgumentTypeError(f"expected a size with its unit, such as {text}GB or {text}B, got {text!r}")
    return num_bytes


def layer_counts(text: str) -> tuple[int, ...]:
    """Parse the numbers of layers of the pipeline stages: ``3,5``."""
    return tuple(not_negative(count) for count in text.split(","))
