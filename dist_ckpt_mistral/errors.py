"""Every exception that this package raises on purpose.

    DistCkptMistralError
    ├── ConfigError                  a model configuration is wrong or contradicts itself
    │   └── UnsupportedModelError    a model that the tensor table does not know
    ├── LayoutError                  a parallel layout that Megatron would refuse
    ├── SourceError                  a source cannot be opened or read, changed during the run, or vanished
    │   └── FormatError              what was read is damaged, or is not what it should be
    │       ├── UnsafePickleError        a pickle needs something outside the allowlist
    │       └── UnsupportedFormatError   a Megatron checkpoint in a format that this package does not read
    ├── TensorMismatchError          tensors are missing, unknown, or differ from the model's in shape or dtype
    ├── PlanError                    boxes leave a gap, overlap, or reach outside their tensor
    ├── OutputError                  the output cannot be written
    ├── LostRankError                another rank of the job died
    └── MissingLibraryError          an optional library is not installed; also an ImportError

The command line prints each as one line on stderr and exits with code 1. Messages follow one template,
``{what} for {tensor} in {file}: expected {value} ({why}), got {value}. {next step}``, for example::

    shape mismatch for 'model.norm.weight' in 'model.safetensors': expected (4096,) (hidden_size=4096), got (512,).
    Check that config.json belongs to these files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final, TypeVar

from dist_ckpt_mistral.messages import printable

S = TypeVar("S")
T = TypeVar("T")
#: A combined error quotes at most this many messages and counts the rest.
_MAX_QUOTED_ERRORS: Final = 50
#: Messages quote names, and a hostile file may contain a name of a gigabyte.
_MAX_CHARACTERS: Final = 20_000


class DistCkptMistralError(Exception):
    """Base class of all errors that this package raises on purpose.

    Args:
        message: One line, after the template of this module. Unprintable characters are escaped, and all but the first
            20,000 characters are cut off.
    """

    def __init__(self, message: str) -> None:
        """Escape and shorten the message."""
        end = "" if len(message) <= _MAX_CHARACTERS else f"... and {len(message) - _MAX_CHARACTERS} more characters"
        super().__init__(printable(message[:_MAX_CHARACTERS]) + end)


class ConfigError(DistCkptMistralError):
    """A model configuration is wrong or contradicts itself."""


class UnsupportedModelError(ConfigError):
    """The model's architecture is one that the tensor table does not know."""


class LayoutError(DistCkptMistralError):
    """Megatron would refuse this parallel layout for this model."""


class SourceError(DistCkptMistralError):
    """A source cannot be opened or read, was changed during the run, or vanished. Its bytes may be sound."""


class FormatError(SourceError):
    """What was read is damaged, or is not what it should be. Reading it again gives the same."""


class UnsafePickleError(FormatError):
    """A pickle needs a class or function outside the allowlist; none of it was executed."""


class UnsupportedFormatError(FormatError):
    """A Megatron checkpoint, possibly sound, is in a format that this package does not read."""


class TensorMismatchError(DistCkptMistralError):
    """Tensors are missing, unknown, or differ from the model's in shape or dtype."""


class PlanError(DistCkptMistralError):
    """Boxes leave a gap, overlap, or reach outside their tensor."""


class OutputError(DistCkptMistralError):
    """The output cannot be written, for example because it exists or because the disk is full."""


class MissingLibraryError(DistCkptMistralError, ImportError):
    """An optional library is not installed. The message gives the command that installs it."""


class LostRankError(DistCkptMistralError):
    """Another rank of the job died. Raised on the rank that notices, because the dead one may have printed nothing."""


def for_all(work: Callable[[S], T], items: Iterable[S]) -> list[T]:
    """Call ``work`` on every item and return the results in order.

    Errors do not stop the loop: at its end one error is raised that joins all their messages. It has the class of the
    first.
    """
    results, errors = [], []
    for item in items:
        try:
            results.append(work(item))
        except DistCkptMistralError as error:
            errors.append(error)
    if errors:
        quoted = [str(error) for error in errors[:_MAX_QUOTED_ERRORS]]
        more = [f"and {len(errors) - len(quoted)} more"] if len(errors) > len(quoted) else []
        raise type(errors[0])("; ".join([*quoted, *more])) from errors[0]
    return results
