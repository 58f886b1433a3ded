"""Values that a conversion of element types would destroy: refused by name, unless that is asked for."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from dist_ckpt_mistral.errors import OutputError
from dist_ckpt_mistral.gather.casts import NOTHING, Lost
from dist_ckpt_mistral.gather.dtypes import itemsize_bytes
from dist_ckpt_mistral.gather.execute import Copied
from dist_ckpt_mistral.gather.plan import BytePlan, Segment

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
