"""Every exception that this package raises on purpose.

    DistCkptMistralError
    ├── ConfigError                  a model configuration is wrong or contradicts itself
    │   └── UnsupportedModelError    a model that the tensor table does not know
    ├── LayoutError                  a parallel layout that Megatron would refuse
    ├── FormatError                  bytes on disk are not what their format says
    │   ├── UnsafePickleError        a pickle asks for something outside the allowlist
    │   └── UnsupportedFormatError   a checkpoint of Megatron's in a format that this package does not read
    ├── TensorMismatchError          tensors missing, unknown, or of another shape or dtype than the model's
    ├── PlanError                    boxes that leave a gap, overlap, or reach outside their tensor
    ├── OutputError                  the destination cannot be written as asked
    ├── LostRankError                another process of the job is gone
    └── MissingLibraryError          a library that only some uses need is not installed; an ImportError, too

The command line turns each into one line on stderr and exit code 1. Messages follow one template:
``{what} for {tensor} in {file}: expected {value} ({why}), got {value}. {next step}``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final, TypeVar

from dist_ckpt_mistral.messages import printable

S = TypeVar("S")
T = TypeVar("T")
#: More errors than this are counted, not told.
_MOST_ERRORS: Final = 50
#: Messages spell out names, and a hostile file may have one of a gigabyte.
_MOST_LETTERS: Final = 20_000


class DistCkptMistralError(Exception):
    """Base of all errors of this package."""

    def __init__(self, message: str) -> None:
        """Keep the message, printable and of a length that can be read."""
        end = "" if len(message) <= _MOST_LETTERS else f"... and {len(message) - _MOST_LETTERS} more characters"
        super().__init__(printable(message[:_MOST_LETTERS]) + end)


class ConfigError(DistCkptMistralError):
    """A model configuration is wrong or contradicts itself."""


class UnsupportedModelError(ConfigError):
    """A model that the tensor table does not know."""


class LayoutError(DistCkptMistralError):
    """A parallel layout that Megatron would refuse for this model."""


class FormatError(DistCkptMistralError):
    """Bytes on disk are not what their format says."""


class UnsafePickleError(FormatError):
    """A pickle asks for something outside the allowlist; nothing of it was executed."""


class UnsupportedFormatError(FormatError):
    """A checkpoint of Megatron's in a format that this package does not read; nothing need be wrong with it."""


class TensorMismatchError(DistCkptMistralError):
    """Tensors are missing, unknown, or of another shape or dtype than the model's."""


class PlanError(DistCkptMistralError):
    """Boxes leave a gap, overlap, or reach outside their tensor."""


class OutputError(DistCkptMistralError):
    """The destination cannot be written as asked."""


class MissingLibraryError(DistCkptMistralError, ImportError):
    """A library that only some uses of this package need is not installed. The message says how to install it."""


class LostRankError(DistCkptMistralError):
    """Another process of the job is gone: the one that notices speaks, for the lost one may not have."""


def for_all(work: Callable[[S], T], items: Iterable[S]) -> list[T]:
    """``work`` on all items. What goes wrong becomes one error, which tells of all: of the class of the first."""
    results, errors = [], []
    for item in items:
        try:
            results.append(work(item))
        except DistCkptMistralError as error:
            errors.append(error)
    if errors:
        told = [str(error) for error in errors[:_MOST_ERRORS]]
        more = [f"and {len(errors) - len(told)} more"] if len(errors) > len(told) else []
        raise type(errors[0])("; ".join([*told, *more])) from errors[0]
    return results
