"""The arguments of public functions and classes: each is what the annotations say, or is refused by name.

Without the check a wrong one ends far below in a bare Python error, or counts as true: ``overwrite="no"``.
"""

from __future__ import annotations

import functools
import numbers
import os
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Union, get_args, get_origin, get_type_hints

from dist_ckpt_mistral.errors import ConfigError

#: What is taken besides instances of a class: numbers of numpy, and paths of other libraries.
_ALSO_TAKEN: Final[Mapping[type, type]] = {int: numbers.Integral, float: numbers.Real, Path: os.PathLike}


def require_types(owner: Callable[..., object], /, **arguments: object) -> None:
    """Raise ConfigError unless the ``arguments`` of ``owner``, by name, are what it is annotated with.

    Public functions and classes call it first, with ``**locals()``. What an annotation says of content, such as the
    keys of a mapping, is not looked at.

    Example:
        >>> def convert(path: str | Path, *, overwrite: bool = False) -> None:
        ...     require_types(convert, **locals())
        >>> convert("out", overwrite="no")
        Traceback (most recent call last):
        dist_ckpt_mistral.errors.ConfigError: overwrite of convert(): expected bool, got 'no'
    """
    if problems := [*wrong_types(owner, arguments)]:
        raise ConfigError("; ".join(problems))


def wrong_types(owner: Callable[..., object], arguments: Mapping[str, object]) -> Iterator[str]:
    """Yield a problem for each of the ``arguments`` of ``owner`` that is not what it is annotated with."""
    kinds_of = _annotated(owner)
    label = getattr(owner, "__qualname__", str(owner)).removesuffix(".__init__")
    for name, value in arguments.items():
        kinds = kinds_of.get(name, (object,))
        if not any(map(functools.partial(_is_of, value), kinds)):
            yield f"{name} of {label}(): expected {_either(kinds)}, got {value!r:.60}{_advice(kinds)}"
        elif Path in kinds and isinstance(value, str | os.PathLike):
            yield from (
                f"{name} of {label}(): expected a path, got {what}"
                for what in _no_path(str(value) if isinstance(value, Path) else os.fspath(value))
            )


def _no_path(text: str) -> Iterator[str]:
    """Yield what is wrong with the text of a path, where that would be taken for a place that nobody means."""
    if not text:  # of an unset variable: the current directory
        yield "an empty text"
    elif text.startswith("~") and not os.path.lexists(text.partition("/")[0]):  # a directory of that name
        yield f"{text!r:.200}, whose ~ os.path.expanduser expands"


def _either(kinds: tuple[type, ...]) -> str:
    """The classes in words: ``str, Path or None``."""
    *words, last = ["None" if kind is type(None) else kind.__name__ for kind in kinds]
    return f"{', '.join(words)} or {last}" if words else last


def _is_of(value: object, kind: type) -> bool:
    """Whether ``value`` is of ``kind``. A bool is no number, and one of Python's own bools alone is a bool."""
    if isinstance(value, bool) and kind in {int, float}:
        return False
    return isinstance(value, (kind, _ALSO_TAKEN.get(kind, kind)))


def _advice(kinds: tuple[type, ...]) -> str:
    """Where it says how to make the class of this package that is expected; empty if several things are, or none."""
    (first, *others) = [kind for kind in kinds if kind is not type(None)]
    package = __name__.partition(".")[0]
    if others or not first.__module__.startswith(package):
        return ""
    return f". help({package}.{first.__name__}) says how to make one"


@functools.cache
def _annotated(owner: Callable[..., object]) -> Mapping[str, tuple[type, ...]]:
    """The classes that each argument may be of; an argument whose annotation says more than classes is left out."""
    hints: dict[str, Any] = get_type_hints(owner)
    unions = {name: get_args(hint) if _is_union(hint) else (hint,) for name, hint in hints.items() if name != "return"}
    classes = {name: [get_origin(member) or member for member in members] for name, members in unions.items()}
    return {name: tuple(kinds) for name, kinds in classes.items() if all(isinstance(kind, type) for kind in kinds)}


def _is_union(hint: object) -> bool:
    return isinstance(hint, types.UnionType) or get_origin(hint) is Union


def require_whole(what: str, value: object, *, least: int, most: int | None = None, meaning: str = "") -> None:
    """Raise ConfigError unless ``value`` is a whole number from ``least`` to ``most``; ``meaning`` explains it."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least or (most is not None and value > most):
        limits = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ConfigError(f"{what}: expected a whole number {limits}{meaning and f' ({meaning})'}, got {value!r:.60}")
