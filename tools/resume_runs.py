"""What ``resume_demo.py`` trains, on what, and how often: known to it and to its ranks."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dist_ckpt_mistral.model.layout.layout import ParallelLayout

#: Steps of every training; after SAVED_AFTER of them there is a checkpoint.
STEPS: Final = 10
SAVED_AFTER: Final = 4
#: The batch of each step, in sequences and tokens, and in how many parts each rank's sequences go through the model.
SEQUENCES: Final = 8
TOKENS: Final = 32
MICROBATCHES: Final = 2
#: How many different tokens the text has, and how often one follows by rule from the one before.
_ALPHABET: Final = 32
_REGULARITY: Final = 0.9
#: As high as training bears: what is lost at a resumption then shows in the losses of the next steps.
LEARNING_RATE: Final = 5e-3

#: Nats. How far a loss after a resumption may be from that of the training that never stopped. The state that a
#: resumption starts from is the same, bit for bit. But another layout adds the same numbers in another order, rounds to
#: bfloat16 in between, and every step builds on the one before. Measured: 0.0002, where trainings that nobody stopped
#: differ between layouts by 0.0004 for the same reason, and a lost part of the state makes out 0.3.
TOLERANCE: Final = 0.003

#: All of four ranks. The first is the one that training begins at.
LAYOUTS: Final[Mapping[str, ParallelLayout]] = {
    "TP2 x DP2": ParallelLayout(tp=2, dp=2),
    "TP1 x DP4": ParallelLayout(dp=4),
    "TP4": ParallelLayout(tp=4),
    "PP2 x DP2": ParallelLayout(pp=2, dp=2),
    "TP2 x PP2": ParallelLayout(tp=2, pp=2),
    "PP2 x VPP2 x DP2": ParallelLayout(pp=2, vpp=2, dp=2),
}
WORLD_SIZE: Final = 4
BEGUN_AT: Final = "TP2 x DP2"
#: Never stopped either, at other layouts: by how much do losses differ that nobody resumed?
OTHERS: Final = ("TP1 x DP4",)
#: What resumptions at CONTROL_AT lose on purpose: all of the optimizer's state, its step, the learning rate's schedule.
PARTS: Final = ("optimizer", "step", "schedule")
CONTROL_AT: Final = "TP1 x DP4"
#: Where a training is resumed from a copy of the checkpoint that ``reshard`` made for that layout.
RESHARDED_AT: Final = "TP4"
#: Where the training is resumed whose result goes to Hugging Face.
EXPORTED_AT: Final = "TP2 x PP2"

#: Name -> what Megatron calls it, and the format of its state.
OPTIMIZERS: Final[Mapping[str, str]] = {
    "distributed": "DistributedOptimizer, fully_reshardable",
    "float16": "Float16OptimizerWithFloat16Params",
}


def never_stopped(layout: str) -> str:
    """Name of the run that goes through at ``layout``."""
    return f"{layout}, never stopped"


def resumed_at(layout: str) -> str:
    """Name of the run that is resumed at ``layout``."""
    return f"resumed at {layout}"


def resharded_to(layout: str) -> str:
    """Name of the run that is resumed at ``layout`` from a copy resharded for it."""
    return f"resharded to {layout}, resumed"


def resumed_without(part: str) -> str:
    """Name of the run that loses ``part``, one of PARTS, when it is resumed."""
    return f"resumed without {part}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One training, by the optimizer of that name, up to STEPS.

    It begins with the weights alone of ``weights``, or as a resumption of the checkpoint ``resumed``, all of which is
    restored but ``lost``; with ``resharded``, it is resumed from a copy there, resharded for its layout. A checkpoint
    is left in ``saved`` after SAVED_AFTER steps, in ``saved_again`` right after the resumption, in ``ended`` after the
    last step. All are roots of checkpoints.
    """

    name: str
    optimizer: str
    layout: str
    weights: str | None = None
    resumed: str | None = None
    resharded: str | None = None
    lost: str | None = None
    saved: str | None = None
    saved_again: str | None = None
    ended: str | None = None

    @property
    def key(self) -> str:
        """The name, unique among the runs of all optimizers."""
        return f"{self.optimizer}: {self.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Story:
    """What came of all runs with one optimizer.

    ``losses`` are those of every step, in nats, by the number of the step; ``megatron_loss`` and ``hf_loss`` are the
    exported model's on the next batch, in float32.
    """

    optimizer: str
    losses: Mapping[str, Mapping[int, float]]
    megatron_loss: float
    hf_loss: float

    def differences(self, run: str) -> dict[int, float]:
        """How far the loss of every step is from that of the training that never stopped."""
        whole = self.losses[never_stopped(BEGUN_AT)]
        return {step: abs(loss - whole[step]) for step, loss in self.losses[run].items()}

    def difference(self, run: str) -> float:
        """The largest of these."""
        return max(self.differences(run).values())

    @property
    def resumed(self) -> float:
        """The largest difference of a resumption."""
        return max(self.difference(run) for run in (*map(resumed_at, LAYOUTS), resharded_to(RESHARDED_AT)))

    @property
    def unstopped(self) -> float:
        """The largest difference of trainings that never stopped either, at other layouts."""
        return max(self.difference(never_stopped(layout)) for layout in OTHERS)

    @property
    def lost(self) -> float:
        """The least that a lost part of the state makes out."""
        return min(self.difference(resumed_without(part)) for part in PARTS)

    @property
    def is_good(self) -> bool:
        """Whether all resumptions go on within TOLERANCE, in which nothing could hide that was lost."""
        return self.resumed <= TOLERANCE < self.lost


def runs(optimizers: Sequence[str], weights: Path, folder: Path) -> list[Run]:
    """All trainings with these optimizers in a possible order, layout by layout; their checkpoints go to ``folder``."""
    every = [run for optimizer in optimizers for run in _runs(optimizer, weights, folder / optimizer)]
    return sorted(every, key=lambda run: [*LAYOUTS].index(run.layout))


def _runs(optimizer: str, weights: Path, folder: Path) -> Iterator[Run]:
    saved = str(folder / "saved")
    for layout in (BEGUN_AT, *OTHERS):
        yield Run(
            name=never_stopped(layout),
            optimizer=optimizer,
            layout=layout,
            weights=str(weights),
            saved=saved if layout == BEGUN_AT else None,
        )
    for layout in LAYOUTS:
        yield Run(
            name=resumed_at(layout),
            optimizer=optimizer,
            layout=layout,
            resumed=saved,
            saved_again=str(folder / f"saved again at {layout}"),
            ended=str(folder / "ended") if layout == EXPORTED_AT else None,
        )
    yield Run(
        name=resharded_to(RESHARDED_AT),
        optimizer=optimizer,
        layout=RESHARDED_AT,
        resumed=saved,
        resharded=str(folder / "resharded"),
    )
    for part in PARTS:
        yield Run(name=resumed_without(part), optimizer=optimizer, layout=CONTROL_AT, resumed=saved, lost=part)


def batch(number: int, vocab_size: int) -> list[list[int]]:
    """Batch ``number``, the same at every layout: SEQUENCES times TOKENS + 1 tokens, to be predicted one by one."""
    chance = random.Random(number)  # noqa: S311  (no secret)
    spread = vocab_size // _ALPHABET
    sequences = []
    for _ in range(SEQUENCES):
        letters = [chance.randrange(_ALPHABET)]
        while len(letters) <= TOKENS:
            regular = (5 * letters[-1] + 3) % _ALPHABET
            letters.append(regular if chance.random() < _REGULARITY else chance.randrange(_ALPHABET))
        sequences.append([letter * spread for letter in letters])
    return sequences
