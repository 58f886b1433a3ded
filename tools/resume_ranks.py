"""One rank of the trainings of ``resume_demo.py``: ``python tools/resume_ranks.py FOLDER PARENT``.

Under torchrun's environment variables. FOLDER/job.json names the runs; FOLDER/rankN.json gets what this rank saw of
each. PARENT is the process that started it. Megatron's writers import this module anew: all that is heavy waits.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resume_runs import LAYOUTS, SAVED_AFTER, STEPS, Run

from dist_ckpt_mistral.convert.ranks import from_environment
from dist_ckpt_mistral.convert.reshard import reshard
from dist_ckpt_mistral.model.config.mistral_config import MistralConfig

if TYPE_CHECKING:
    from resume_training import Training


def main(folder: Path, parent: int) -> None:
    """Do all runs one after the other, each under the parallel state of its layout."""
    threading.Thread(target=_end_with, args=[parent], daemon=True).start()
    from resume_cpu import trainable_on_cpu  # noqa: PLC0415  (heavy)
    from resume_training import Training, change_layout  # noqa: PLC0415

    gc.freeze()  # Megatron looks for garbage with every save and load, and need not look at its own modules
    job = json.loads((folder / "job.json").read_text())
    config, told, current = MistralConfig.from_hf(job["hf"]), {}, None
    with trainable_on_cpu():
        for run in (Run(**each) for each in job["runs"]):
            print(f"{time.monotonic():.1f} s: {run.key}", flush=True)
            layout = LAYOUTS[run.layout]
            if layout != current:
                change_layout(layout)
                current = layout
            told[run.key] = _do(run, Training(config, layout, run.optimizer), job["hf"])
    (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(told))
    sys.stdout.flush()
    os._exit(0)  # Megatron's writers would hold up an ordinary exit


def _do(run: Run, training: Training, hf: str) -> dict[str, Any]:
    """Train as ``run`` says: loss and gradient norm of every step by its number, and the counters at the checkpoint.

    ``norm_elements`` is how many elements the last gradient norm was of.
    """
    told: dict[str, Any] = {"losses": {}, "norms": {}}
    if run.resumed is not None and run.resharded is not None:
        reshard(run.resumed, run.resharded, training.layout, config=hf, ranks=from_environment())
        training.resume(run.resharded)
        told["counters"] = training.counters()
    elif run.resumed is not None:
        training.resume(run.resumed, lost=run.lost)
        told["counters"] = training.counters()
    elif run.weights is not None:
        training.begin(run.weights)
    if run.saved_again is not None:
        training.save(run.saved_again, described_by_megatron=True)
    while training.steps_done < STEPS:
        loss, norm = training.step()
        told["losses"][training.steps_done] = loss
        told["norms"][training.steps_done] = norm
        if run.saved is not None and training.steps_done == SAVED_AFTER:
            training.save(run.saved)
            told["counters"] = training.counters()
    told["norm_elements"] = training.norm_elements()
    if run.ended is not None:
        training.save(run.ended)
        told["float32_loss"] = training.float32_loss()
    return told


def _end_with(parent: int) -> None:
    """When ``parent`` is gone, end this process, which must lead its process group, and all that it started."""
    while os.getppid() == parent:
        time.sleep(1)
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
