"""What a conversion tells about itself when it is done."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dist_ckpt_mistral.errors import OutputError
from dist_ckpt_mistral.gather.casts import NOTHING, Lost
from dist_ckpt_mistral.gather.dtypes import itemsize_bytes
from dist_ckpt_mistral.gather.execute import Copied
from dist_ckpt_mistral.gather.plan import BytePlan, Segment
from dist_ckpt_mistral.mapping.checkpoint_map import PADDING, Ignored
from dist_ckpt_mistral.messages import human_bytes

_LOG = logging.getLogger(__name__)
#: So many tensors are told with their counts, the worst first.
_TOLD: Final = 20
#: Where more than one value of so many becomes zero, a tensor is destroyed. Fewer are those that happen to lie next to
#: zero: of normally distributed weights, float16 makes about one in a million zero.
_HARMLESS: Final = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """What a conversion did to one tensor, or to several whose rows are stored together.

    Of ``num_values`` values, ``overflowed`` were finite and became infinite or NaN, and ``vanished`` became zero and
    were not.
    """

    tensors: tuple[str, ...]
    dtype: str
    num_values: int
    overflowed: int
    vanished: int

    @property
    def destroys(self) -> bool:
        """Whether a value overflowed, or more than one in 10,000 vanished."""
        return self.overflowed > 0 or self.vanished * _HARMLESS > self.num_values

    def __str__(self) -> str:
        """``name: 3 become infinite, 5 become zero``."""
        amounts = {"infinite": self.overflowed, "zero": self.vanished}
        told = ", ".join(f"{count} become {what}" for what, count in amounts.items() if count)
        return f"{' and '.join(self.tensors)}: {told}"


def names_of_targets(segment: Segment) -> tuple[str, ...]:
    """What a segment is of, where the output is in Hugging Face's names."""
    return (segment.tensor,)


def names_of_sources(segment: Segment) -> tuple[str, ...]:
    """What a segment is of, where the source is in Hugging Face's names."""
    return segment.sources


@dataclass(frozen=True, slots=True, kw_only=True)
class LossPolicy:
    """What to do where values are destroyed: refuse, or warn if ``allowed``; and what to call the tensors.

    A few values next to zero that become zero are a warning in any case.
    """

    allowed: bool = False
    names_of: Callable[[Segment], tuple[str, ...]] = names_of_targets

    def accept(self, plan: BytePlan, copied: Mapping[int, Copied]) -> tuple[Loss, ...]:
        """What was lost, if that is allowed or harmless, after a warning that names it.

        Raises OutputError that names every tensor (the worst, if there are many) and counts its values.
        """
        found = _losses(plan, copied, self.names_of)
        if not found:
            return ()
        rest = [f"and {len(found) - _TOLD} more tensors"] if len(found) > _TOLD else []
        dtypes = " and ".join(sorted({loss.dtype for loss in found}))
        what = f"values that {dtypes} cannot hold: {'; '.join([*map(str, found[:_TOLD]), *rest])}"
        if not self.allowed and any(loss.destroys for loss in found):
            raise OutputError(
                f"the conversion destroys {what}. Choose a dtype of more range, or accept this with --allow-lossy "
                "(allow_lossy=True)."
            )
        _LOG.warning("the conversion lost %s", what)
        return found


def _losses(
    plan: BytePlan, copied: Mapping[int, Copied], names_of: Callable[[Segment], tuple[str, ...]]
) -> tuple[Loss, ...]:
    """The worst first."""
    lost: dict[tuple[tuple[str, ...], str], Lost] = defaultdict(lambda: NOTHING)
    values: Counter[tuple[tuple[str, ...], str]] = Counter()
    for number, each in copied.items():
        segment = plan.segments[number]
        key = (names_of(segment), segment.dtype)
        values[key] += segment.stored_bytes // itemsize_bytes(segment.dtype)
        if each.lost != NOTHING:
            lost[key] = lost[key].plus(each.lost)
    losses = [
        Loss(tensors=names, dtype=dtype, num_values=values[names, dtype], **each._asdict())
        for (names, dtype), each in lost.items()
    ]
    return tuple(sorted(losses, key=lambda loss: (-loss.overflowed, -loss.vanished, loss.tensors)))


#: For outputs whose tensors keep their dtypes.
REFUSE: Final = LossPolicy()


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """What a conversion wrote (or, on a dry run, would write). Sizes in bytes, file names relative to ``output``.

    ``losses`` are values that another dtype destroyed, where that was allowed.
    """

    output: Path
    config_from: str
    num_tensors: int
    num_bytes: int
    files: Mapping[str, int]
    ignored: Ignored
    losses: tuple[Loss, ...] = ()


def conversion_line(verb: str, done: Conversion) -> str:
    """What a conversion did, in one line."""
    padding = [name for name, reason in done.ignored if reason == PADDING]
    others = len(done.ignored) - len(padding)
    ignored = f"; {others} stored entries are not weights and stayed behind" if others else ""
    ignored += f"; dropped {', '.join(padding)}: {PADDING}" if padding else ""
    size = human_bytes(done.num_bytes)
    return f"{verb} {done.num_tensors} tensors ({size}) in {len(done.files)} files to {done.output}{ignored}"
