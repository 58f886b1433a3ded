"""The runs of ``resume_demo.py`` and their data, for the demo and for its ranks."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dist_ckpt_mistral.model.layout.layout import ParallelLayout

#: Number of steps of each training. The checkpoint is saved after SAVED_AFTER steps.
STEPS: Final = 10
SAVED_AFTER: Final = 4
#: A batch has SEQUENCES sequences of TOKENS tokens. Each rank's sequences are divided into MICROBATCHES.
SEQUENCES: Final = 8
TOKENS: Final = 32
MICROBATCHES: Final = 2
#: Number of different tokens in the text, and the share of them that follow from the previous token by a rule.
_ALPHABET: Final = 32
_REGULARITY: Final = 0.9
#: As high as possible without divergence, so that a lost part of the state changes the next losses visibly.
LEARNING_RATE: Final = 5e-3

#: Largest accepted difference, in nats, between a loss after a resumption and that of the training that never stopped.
#: A resumption starts from the same state, bit for bit. But another layout adds the same numbers in another order and
#: rounds to bfloat16 in between, and each step depends on the one before. Measured: 0.0002. Trainings that never
#: stopped differ between layouts by 0.0004 for the same reason. A lost part of the state makes a difference of 0.3.
TOLERANCE: Final = 0.003

#: The layouts, all of four ranks. The training begins at the first one.
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
#: Other layouts at which a training never stops. They show how much losses differ without a resumption.
OTHERS: Final = ("TP1 x DP4",)
#: Parts of the state that resumptions at CONTROL_AT lose on purpose: the optimizer's state, its step count, and the
#: schedule of the learning rate.
PARTS: Final = ("optimizer", "step", "schedule")
CONTROL_AT: Final = "TP1 x DP4"
#: The layout of the resumption from a copy of the checkpoint that ``reshard`` made for this layout.
RESHARDED_AT: Final = "TP4"
#: The layout of the resumption whose result is exported to Hugging Face.
EXPORTED_AT: Final = "TP2 x PP2"

#: Name -> Megatron's class, and the format of its state.
OPTIMIZERS: Final[Mapping[str, str]] = {
    "distributed": "DistributedOptimizer, fully_reshardable",
    "float16": "Float16OptimizerWithFloat16Params",
}


def never_stopped(layout: str) -> str:
    """Name of the run that never stops, at ``layout``."""
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
    """One training of STEPS steps, with the optimizer ``optimizer``.

    It begins with the weights in ``weights``, or it resumes the checkpoint ``resumed`` without the part ``lost``. With
    ``resharded``, it makes a copy there, resharded for its layout, and resumes that. It saves a checkpoint to
    ``saved`` after SAVED_AFTER steps, to ``saved_again`` right after the resumption, and to ``ended`` after the last
    step. All these are checkpoint roots.
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
    """The measurements of all runs with one optimizer.

    ``losses`` has the loss of each step in nats, by the name of the run and the number of the step. ``megatron_loss``
    and ``hf_loss`` are the losses of the exported model on the next batch, in float32.
    """

    optimizer: str
    losses: Mapping[str, Mapping[int, float]]
    megatron_loss: float
    hf_loss: float

    def differences(self, run: str) -> dict[int, float]:
        """The differences of a run's losses from those of the training that never stopped, by step."""
        whole = self.losses[never_stopped(BEGUN_AT)]
        return {step: abs(loss - whole[step]) for step, loss in self.losses[run].items()}

    def difference(self, run: str) -> float:
        """The largest of the differences of a run."""
        return max(self.differences(run).values())

    @property
    def resumed(self) -> float:
        """The largest difference of a resumption."""
        return max(self.difference(run) for run in (*map(resumed_at, LAYOUTS), resharded_to(RESHARDED_AT)))

    @property
    def unstopped(self) -> float:
        """The largest difference of a training that never stopped at another layout."""
        return max(self.difference(never_stopped(layout)) for layout in OTHERS)

    @property
    def lost(self) -> float:
        """The smallest difference that a lost part of the state makes."""
        return min(self.difference(resumed_without(part)) for part in PARTS)

    @property
    def is_good(self) -> bool:
        """Whether all resumptions stay within TOLERANCE, and all lost parts of the state exceed it."""
        return self.resumed <= TOLERANCE < self.lost


def runs(optimizers: Sequence[str], weights: Path, folder: Path) -> list[Run]:
    """All trainings with these optimizers, ordered by layout. Their checkpoints go to ``folder``."""
    unordered = [run for optimizer in optimizers for run in _runs(optimizer, weights, folder / optimizer)]
    return sorted(unordered, key=lambda run: [*LAYOUTS].index(run.layout))


def _runs(optimizer: str, weights: Path, folder: Path) -> Iterator[Run]:
    """Yield all trainings with one optimizer; a checkpoint is saved before it is resumed."""
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
    """Batch ``number``: SEQUENCES lists of TOKENS + 1 tokens. It is the same at each layout."""
    generator = random.Random(number)  # noqa: S311  (no secret)
    spread = vocab_size // _ALPHABET
    sequences = []
    for _ in range(SEQUENCES):
        letters = [generator.randrange(_ALPHABET)]
        while len(letters) <= TOKENS:
            regular = (5 * letters[-1] + 3) % _ALPHABET
            letters.append(regular if generator.random() < _REGULARITY else generator.randrange(_ALPHABET))
        sequences.append([letter * spread for letter in letters])
    return sequences
