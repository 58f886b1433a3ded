"""Shapes and positions of tensors, in elements."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Final, TypeAlias

Shape: TypeAlias = tuple[int, ...]

#: What files say may be no more: then the bytes of so many elements, and the sum of any two such numbers, can still be
#: counted in 63 bits, as numpy and the operating system count.
MOST: Final = 1 << 59


def is_countable(shape: Iterable[int]) -> bool:
    """Whether a tensor of this shape can be counted and indexed; one that is empty because of another axis, too."""
    return math.prod(extent or 1 for extent in shape) <= MOST
