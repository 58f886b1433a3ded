"""What the values of a configuration may be: they come from JSON or pickles and can be of any type."""

from __future__ import annotations

import sys
from typing import TypeGuard


def is_positive_int(value: object) -> TypeGuard[int]:
    """Whether ``value`` is a whole number of at least 1; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def is_positive_number(value: object) -> bool:
    """Whether ``value`` is a number above 0 that a float can hold; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= sys.float_info.max
