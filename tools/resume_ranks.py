"""One rank of the trainings of ``resume_demo.py``, which runs ``main`` with FOLDER as argument.

The environment has torchrun's variables. FOLDER/job.json has the runs; this rank writes its measurements of each to
FOLDER/rankN.json.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from resume_cpu import trainable_on_cpu
from resume_runs import LAYOUTS, SAVED_AFTER, STEPS, Run
from resume_training import Training, change_layout

from dist_ckpt_mistral.convert.ranks import from_environment
from dist_ckpt_mistral.convert.reshard import reshard
from dist_ckpt_mistral.model.config.mistral_config import MistralConfig


def main() -> None:
    """Do all runs one after the other, each with the parallel state of its layout."""
    folder = Path(sys.argv[1])
    job = json.loads((folder / "job.json").read_text())
    config, measured, current = MistralConfig.from_hf(job["hf"]), {}, None
    with trainable_on_cpu():
        for run in (Run(**each) for each in job["runs"]):
            print(f"{time.monotonic():.1f} s: {run.key}", flush=True)
            layout = LAYOUTS[run.layout]
            if layout != current:
                change_layout(layout)
                current = layout
            measured[run.key] = _do(run, Training(config, layout, run.optimizer), job["hf"])
    (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(measured))


def _do(run: Run, training: Training, hf: str) -> dict[str, Any]:
    """Do one run. Returns loss and gradient norm of each step by its number, and the counters at the checkpoint.

    ``norm_elements`` is the number of gradient elements in the last gradient norm.
    """
    measured: dict[str, Any] = {"losses": {}, "norms": {}}
    if run.resumed is not None and run.resharded is not None:
        reshard(run.resumed, run.resharded, training.layout, config=hf, ranks=from_environment())
        training.resume(run.resharded)
        measured["counters"] = training.counters()
    elif run.resumed is not None:
        training.resume(run.resumed, lost=run.lost)
        measured["counters"] = training.counters()
    elif run.weights is not None:
        training.begin(run.weights)
    if run.saved_again is not None:
        training.save(run.saved_again, described_by_megatron=True)
    while training.steps_done < STEPS:
        loss, norm = training.step()
        measured["losses"][training.steps_done] = loss
        measured["norms"][training.steps_done] = norm
        if run.saved is not None and training.steps_done == SAVED_AFTER:
            training.save(run.saved)
            measured["counters"] = training.counters()
    measured["norm_elements"] = training.norm_elements()
    if run.ended is not None:
        training.save(run.ended)
        measured["float32_loss"] = training.float32_loss()
    return measured
