"""The result of a conversion, and the values that a conversion of dtypes destroys."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dist_ckpt_mistral.errors import OutputError
from dist_ckpt_mistral.gather.casts import NOTHING, Lost
from dist_ckpt_mistral.gather.dtypes import itemsize_bytes
from dist_ckpt_mistral.gather.execute import Copied
from dist_ckpt_mistral.gather.plan import BytePlan, Segment
from dist_ckpt_mistral.mapping.checkpoint_map import PADDING, Ignored
from dist_ckpt_mistral.mapping.read_plan import ReadingPlan
from dist_ckpt_mistral.messages import concise_repr, counted, human_bytes, human_seconds

_LOG = logging.getLogger(__name__)
#: Tensors that a message names, with their counts.
_MOST_NAMED: Final = 20
#: A tensor is destroyed if more than one of this number of values becomes zero. Fewer happen to be close to zero: of
#: normally distributed weights, float16 makes about one in a million zero.
_HARMLESS: Final = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """The values of one tensor that a conversion destroyed, or of several tensors whose rows are stored together.

    Args:
        tensors: Hugging Face names of the tensors.
        dtype: Torch name of the dtype that they were converted to.
        num_values: Number of values.
        overflowed: Number of finite values that became infinite or NaN.
        vanished: Number of nonzero values that became zero.
    """

    tensors: tuple[str, ...]
    dtype: str
    num_values: int
    overflowed: int
    vanished: int

    __repr__ = concise_repr

    @property
    def destroys(self) -> bool:
        """Whether a value overflowed, or more than one in 10,000 vanished."""
        return self.overflowed > 0 or self.vanished * _HARMLESS > self.num_values

    def to_json(self) -> dict[str, Any]:
        """The fields in JSON types, with the tensors as ``hf_names``."""
        counts = {name: getattr(self, name) for name in ("dtype", "num_values", "overflowed", "vanished")}
        return {"hf_names": list(self.tensors), **counts}

    def __str__(self) -> str:
        """``name: 3 become infinite, 5 become zero``."""
        counts = {"infinite": self.overflowed, "zero": self.vanished}
        return f"{' and '.join(self.tensors)}: " + ", ".join(f"{n} become {what}" for what, n in counts.items() if n)


def names_of_targets(segment: Segment) -> tuple[str, ...]:
    """The Hugging Face tensor of a segment, if the output has Hugging Face names."""
    return (segment.tensor,)


def names_of_sources(segment: Segment) -> tuple[str, ...]:
    """The Hugging Face tensors of a segment, if the source has Hugging Face names."""
    return segment.sources


@dataclass(frozen=True, slots=True, kw_only=True)
class LossPolicy:
    """What to do if values are destroyed: raise an error, or log a warning if ``allowed``.

    A harmless number of values that become zero is always a warning. ``names_of`` gives the names for messages.
    """

    allowed: bool = False
    names_of: Callable[[Segment], tuple[str, ...]] = names_of_targets

    def accept(self, plan: BytePlan, copied: Mapping[int, Copied]) -> tuple[Loss, ...]:
        """The losses, after a warning that names their tensors.

        Raises OutputError, which names the tensors with most losses, unless the losses are allowed or harmless.
        """
        losses = _losses(plan, copied, self.names_of)
        if not losses:
            return ()
        rest = [f"and {counted(len(losses) - _MOST_NAMED, 'more tensor')}"] if len(losses) > _MOST_NAMED else []
        dtypes = " and ".join(sorted({loss.dtype for loss in losses}))
        what = f"values that {dtypes} cannot hold: {'; '.join([*map(str, losses[:_MOST_NAMED]), *rest])}"
        if not self.allowed and any(loss.destroys for loss in losses):
            raise OutputError(
                f"the conversion destroys {what}. Choose a dtype of more range, or accept this with --allow-lossy "
                "(allow_lossy=True)."
            )
        _LOG.warning("the conversion lost %s", what)
        return losses


def _losses(
    plan: BytePlan, copied: Mapping[int, Copied], names_of: Callable[[Segment], tuple[str, ...]]
) -> tuple[Loss, ...]:
    """The losses by tensors and dtype, the largest first."""
    lost: dict[tuple[tuple[str, ...], str], Lost] = defaultdict(lambda: NOTHING)
    num_values: Counter[tuple[tuple[str, ...], str]] = Counter()
    for number, outcome in copied.items():
        segment = plan.segments[number]
        key = (names_of(segment), segment.dtype)
        num_values[key] += segment.stored_bytes // itemsize_bytes(segment.dtype)
        if outcome.lost != NOTHING:
            lost[key] = lost[key].plus(outcome.lost)
    losses = [
        Loss(tensors=names, dtype=dtype, num_values=num_values[names, dtype], **counts._asdict())
        for (names, dtype), counts in lost.items()
    ]
    return tuple(sorted(losses, key=lambda loss: (-loss.overflowed, -loss.vanished, loss.tensors)))


#: The policy for outputs whose tensors keep their dtypes.
REFUSE: Final = LossPolicy()


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """The result of a conversion, or of a dry run.

    Args:
        output: The new directory.
        config_from: Source of the model configuration, in words.
        num_tensors: Number of tensors in the output.
        num_bytes: Size of their data.
        files: Name of each file of tensors, relative to ``output`` -> its size in bytes.
        ignored: Names of the stored entries that are not in the output, and the reasons.
        losses: Values that a conversion of dtypes destroyed.
        costly_load: The reads at a usual tensor parallelism, if they would be much more than needed, as a large
            model was imported without a layout; else None.
        is_adapter: Whether the output is a LoRA adapter, alone or beside its model.
    """

    output: Path
    config_from: str
    num_tensors: int
    num_bytes: int
    files: Mapping[str, int]
    ignored: Ignored
    losses: tuple[Loss, ...] = ()
    costly_load: ReadingPlan | None = None
    is_adapter: bool = False

    __repr__ = concise_repr

    def to_json(self) -> dict[str, Any]:
        """What ``--json`` prints of it, in JSON types."""
        return {
            "output": str(self.output),
            "config_from": self.config_from,
            "num_tensors": self.num_tensors,
            "num_bytes": self.num_bytes,
            "files": dict(self.files),
            "ignored": [{"name": name, "reason": reason} for name, reason in self.ignored],
            "losses": [loss.to_json() for loss in self.losses],
        }


def conversion_line(done: Conversion, *, seconds: float | None) -> str:
    """The result of a conversion that took ``seconds``, or None for a dry run, in one line."""
    padding = [name for name, reason in done.ignored if reason == PADDING]
    others = len(done.ignored) - len(padding)
    ignored = f"; {counted(others, 'stored entry is not a weight', 'stored entries are not weights')}" if others else ""
    ignored += " and stayed behind" if others else ""
    ignored += f"; dropped {', '.join(padding)}: {PADDING}" if padding else ""
    verb = "would write" if seconds is None else "wrote"
    time = "" if seconds is None else f" in {human_seconds(seconds)} ({human_bytes(done.num_bytes / seconds)}/s)"
    tensors, files = counted(done.num_tensors, "tensor"), counted(len(done.files), "file")
    return f"{verb} {tensors} ({human_bytes(done.num_bytes)}) in {files} to {done.output}{time}{ignored}"
