"""JSON as the formats define it: UTF-8, no duplicate keys, an object at the top."""

from __future__ import annotations

import json
from typing import Any, Final

from dist_ckpt_mistral.errors import FormatError

#: Objects and lists in each other. The formats need five; what is said of values recurses into them.
_MOST_LEVELS: Final = 100


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = sorted({key for key, _ in pairs if key in seen or seen.add(key)})  # type: ignore[func-returns-value]
        raise FormatError(f"duplicate JSON keys {', '.join(map(repr, twice))}")
    return result


def loads_object(text: bytes | str, where: str) -> dict[str, Any]:
    """Parse ``text``, which must be one JSON object; ``where`` names the file for the error."""
    try:
        text = text if isinstance(text, str) else text.decode()  # json itself would take UTF-16 and UTF-32 too
        value = json.loads(text, object_pairs_hook=_refuse_duplicates)
    except FormatError as error:
        raise FormatError(f"{error} in {where}. Nothing was read from it.") from error
    except (ValueError, RecursionError) as error:
        raise FormatError(f"invalid JSON in {where}: {error}") from error
    if _levels(value) > _MOST_LEVELS:
        raise FormatError(
            f"invalid JSON in {where}: expected at most {_MOST_LEVELS} levels of objects and lists, got more"
        )
    if not isinstance(value, dict):
        raise FormatError(f"invalid JSON in {where}: expected an object, got {type(value).__name__}")
    return value


def _levels(value: object) -> int:
    """How many objects and lists lie in each other at most; counted to one more than is allowed."""
    level, count = [value], 0
    while (level := [each for each in level if isinstance(each, dict | list)]) and count <= _MOST_LEVELS:
        level = [inner for each in level for inner in (each.values() if isinstance(each, dict) else each)]
        count += 1
    return count
