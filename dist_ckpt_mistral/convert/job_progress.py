"""The progress of ranks that share a job: the first rank tells that of all as far as it can know it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from dist_ckpt_mistral.convert.journal import NewNotes
from dist_ckpt_mistral.convert.ranks import Ranks
from dist_ckpt_mistral.gather.plan import BytePlan, Part
from dist_ckpt_mistral.gather.progress import DEFAULT_PROGRESS, NO_PROGRESS, Progress

#: Time between two looks at what the other ranks have noted.
_LOOK_S: Final = 0.5


def begin_phase(name: str, num_bytes: int, progress: Progress, ranks: Ranks) -> None:
    """Begin a phase in which this rank works on ``num_bytes``. If others work too, its name says whose they are."""
    share = f" ({ranks.kind} {ranks.rank} of {ranks.world_size})" if ranks.world_size > 1 else ""
    progress.phase(name + share, num_bytes)


@contextlib.contextmanager
def copying(plan: BytePlan, numbers: Sequence[int], folder: Path, progress: Progress, ranks: Ranks) -> Iterator[None]:
    """Phase "copy", within which the ranks copy: this one the segments ``numbers`` of the plan.

    On the first rank the phase is that of the whole job: a thread adds what the other ranks note in their journals in
    ``folder``, part by part. What an earlier run has noted counts from the start, while they still check it. On a file
    system that shows a file's growth late, such as NFS, the others' parts come late.
    """
    if not ranks.is_first:
        begin_phase("copy", sum(plan.segments[number].stored_bytes for number in numbers), progress, ranks)
        yield
        return
    progress.phase("copy", plan.num_bytes)
    if ranks.world_size == 1 or progress is NO_PROGRESS or progress is DEFAULT_PROGRESS:
        yield
        return
    mine, known, notes, ended = set(numbers), set[Part](), NewNotes(folder), threading.Event()

    def add_others() -> None:
        new = {part for part in notes.read() if part.number not in mine} - known
        known.update(new)
        progress.advance(sum(plan.segments[part.number].stored(part.low, part.high)[1] for part in new))

    def follow() -> None:
        with contextlib.suppress(OSError):  # it only informs
            while not ended.wait(_LOOK_S):
                add_others()
            add_others()

    thread = threading.Thread(target=follow, name="progress of other ranks", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
