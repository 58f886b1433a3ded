"""What the values of a configuration may be: they come from JSON or pickles and can be of any type."""

from __future__ import annotations

import sys
from typing import Final, TypeGuard

#: Far beyond every model. Sizes of a hostile file must come to no number that overflows, and ...
MAX_SIZE: Final = 2**31 - 1
#: ... to no table that fills the memory: of layers, and of heads and experts in all layers together.
MAX_LAYERS: Final = 10_000
MAX_PARTS: Final = 1_000_000


def is_positive_int(value: object) -> TypeGuard[int]:
    """Whether ``value`` is a whole number from 1 to ``MAX_SIZE``; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MAX_SIZE


def not_a_size(name: str, value: object) -> str:
    """What is wrong with a ``value`` that is no positive integer."""
    most = f" of at most {MAX_SIZE}" if isinstance(value, int) and value > MAX_SIZE else ""
    return f"{name} must be a positive integer{most}, got {value!r:.200}"


def is_positive_number(value: object) -> bool:
    """Whether ``value`` is a number above 0 that a float can hold; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= sys.float_info.max
