"""What a check for damage found: the problems, and what was and was not checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from dist_ckpt_mistral.errors import ConfigError, DistCkptMistralError, FormatError, SourceError, UnsupportedFormatError
from dist_ckpt_mistral.messages import concise_repr, listed, printable
from dist_ckpt_mistral.storage import paths

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One problem.

    Args:
        file: The damaged file, relative to the checked directory; None if the problem is in no single file.
        tensor: The key of the damaged stored tensor or object; None if the problem is in no single one.
        hf_names: The Hugging Face tensors with rows in the damaged data.
        what: The problem, in words.
    """

    file: str | None = None
    tensor: str | None = None
    hf_names: tuple[str, ...] = ()
    what: str

    __repr__ = concise_repr

    def __str__(self) -> str:
        """``file: tensor (Hugging Face names): what``."""
        names = "" if self.hf_names in {(), (self.tensor,)} else f" ({listed([*map(printable, self.hf_names)])})"
        tensor = None if self.tensor is None else printable(self.tensor) + names
        return ": ".join(part for part in (self.file and printable(self.file), tensor, self.what) if part)


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """The result of ``check``.

    Args:
        directory: The checked directory.
        checked: What was checked, in words.
        not_checked: What could not be checked, and why, in words.
        findings: All problems.
    """

    directory: Path
    checked: tuple[str, ...]
    not_checked: tuple[str, ...]
    findings: tuple[Finding, ...]

    __repr__ = concise_repr

    @property
    def is_sound(self) -> bool:
        """Whether there are no findings."""
        return not self.findings

    def to_json(self) -> dict[str, Any]:
        """The content of ``verify A --json``, in JSON types."""
        return {"sound": self.is_sound, **asdict(self), "directory": str(self.directory)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """The results of a check so far, as in ``Check``."""

    directory: Path
    checked: list[str] = field(default_factory=list)
    not_checked: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    def attempt(self, work: Callable[[], T]) -> T | None:
        """The result of ``work``, or None after an error. The error becomes a finding.

        Without a known configuration the tensors of the model are not checked: ConfigError goes to ``not_checked``.
        """
        try:
            return work()
        except ConfigError as error:
            self.not_checked.append(f"whether all tensors of the model are there: {error}")
        except UnsupportedFormatError:
            raise  # an unsupported format is no damage
        except DistCkptMistralError as error:
            if is_unreachable(error, self.directory):
                raise
            self.findings.append(Finding(what=str(error)))
        return None


def is_unreachable(error: DistCkptMistralError, directory: Path) -> bool:
    """Whether a store could not be read, which says nothing about what it holds."""
    return paths.is_url(directory) and isinstance(error, SourceError) and not isinstance(error, FormatError)
