"""One rank of the trainings of ``pretrain_demo.py``: ``python tools/pretrain_ranks.py FOLDER PARENT``.

The environment has torchrun's variables. FOLDER/job.json has the trainings. Arguments, loading and saving are those of
Megatron-LM (``megatron.training``). Megatron's writer processes import this module again, so modules that are slow to
import are imported in ``main``.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final
from unittest import mock

from resume_ranks import end_with
from resume_runs import LAYOUTS

from dist_ckpt_mistral.model.config.mistral_config import MistralConfig

#: What Megatron-LM needs on a CPU, and what it demands besides the flags of a model.
_ON_CPU: Final = (
    *("--use-cpu-initialization", "--distributed-backend", "gloo", "--transformer-impl", "local"),
    *("--attention-backend", "unfused", "--no-persist-layer-norm", "--no-masked-softmax-fusion"),
    *("--no-bias-swiglu-fusion", "--no-bias-dropout-fusion", "--no-rope-fusion", "--no-gradient-accumulation-fusion"),
    *("--micro-batch-size", "1", "--lr", "1e-4", "--train-iters", "10", "--save-interval", "1"),
)


def main(folder: Path, parent: int) -> None:
    """Do all trainings one after the other, each with the parallel state of its layout."""
    threading.Thread(target=end_with, args=[parent], daemon=True).start()
    import torch  # noqa: PLC0415  (slow)
    from resume_cpu import trainable_on_cpu  # noqa: PLC0415

    job = json.loads((folder / "job.json").read_text())
    config = MistralConfig.from_hf(job["hf"])
    device = SimpleNamespace(major=9, minor=0, multi_processor_count=1, total_memory=1 << 34)
    losses = []
    with (
        trainable_on_cpu(),
        mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0)),
        mock.patch.object(torch.cuda, "get_device_properties", return_value=device),
        mock.patch.object(torch.cuda, "device_count", return_value=1),
        mock.patch.object(torch.cuda, "get_rng_state", side_effect=lambda *_: torch.zeros(8, dtype=torch.uint8)),
    ):
        for training in job["trainings"]:
            print(training, flush=True)
            losses += _train(config, **training)
    (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(losses))
    sys.stdout.flush()
    os._exit(0)  # an ordinary exit would wait for Megatron's writer processes


def _train(config: MistralConfig, *, layout: str, flags: list[str], begun: int, steps: int) -> list[float]:
    """Load, train and save with Megatron-LM. Returns the loss of each step in nats."""
    from megatron.core.num_microbatches_calculator import (  # noqa: PLC0415
        destroy_num_microbatches_calculator,
        init_num_microbatches_calculator,
    )
    from megatron.core.rerun_state_machine import (  # noqa: PLC0415
        destroy_rerun_state_machine,
        initialize_rerun_state_machine,
    )
    from megatron.training import checkpointing  # noqa: PLC0415
    from megatron.training.arguments import parse_args, validate_args  # noqa: PLC0415
    from megatron.training.global_vars import set_args  # noqa: PLC0415
    from resume_training import Training, change_layout  # noqa: PLC0415

    sys.argv = ["pretrain_gpt.py", *flags, *_ON_CPU]
    args = parse_args()
    validate_args(args, {})
    args.sequence_parallel = False  # torch's norms refuse it; it changes no weights
    set_args(args)
    change_layout(LAYOUTS[layout])
    destroy_rerun_state_machine()
    initialize_rerun_state_machine()
    destroy_num_microbatches_calculator()
    init_num_microbatches_calculator(
        args.rank, None, args.global_batch_size, args.micro_batch_size, args.data_parallel_size
    )
    training = Training(config, LAYOUTS[layout], "float16")
    parts: tuple[Any, ...] = (training.trained, training.optimizer, training.schedule)
    iteration, _ = checkpointing.load_checkpoint(*parts)
    if iteration != begun:
        raise SystemExit(f"Megatron-LM loaded iteration {iteration}, not {begun}")
    training.steps_done = begun
    losses = [training.step()[0] for _ in range(steps)]
    checkpointing.save_checkpoint(training.steps_done, *parts, 0)
    return losses


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
