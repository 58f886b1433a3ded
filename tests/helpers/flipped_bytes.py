"""Changed bytes, and what a check says of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import dist_ckpt_mistral as dcm

T = TypeVar("T")


def flip(path: Path, position: int, mask: int = 1) -> None:
    """Change bits of one byte of a file; doing it again undoes it."""
    with path.open("r+b") as file:
        file.seek(position)
        [byte] = file.read(1)
        file.seek(position)
        file.write(bytes([byte ^ mask]))


def damaged(directory: Path, file: str, position: int, **options: Any) -> list[dict[str, Any]]:  # noqa: ANN401  (of check)
    """What a check finds with one bit of one byte changed; it must find something, and name the file."""
    path = directory / file
    flip(path, position, 1 << position % 8)
    try:
        found: list[dict[str, Any]] = dcm.check(directory, **options).to_json()["findings"]
    finally:
        flip(path, position, 1 << position % 8)
    assert found, f"byte {position} of {file} went unnoticed"
    assert any(file == finding["file"] or file in finding["what"] for finding in found), (file, position, found)
    return found


def some(of: Sequence[T], count: int) -> Sequence[T]:
    """About so many, the first and others at equal distances."""
    return of[:: max(1, len(of) // count)]
