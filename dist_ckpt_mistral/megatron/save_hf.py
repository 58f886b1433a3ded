"""Write a Hugging Face directory of a live model: ``to_hf``, with the live gather in place of stored files."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch

from dist_ckpt_mistral.arguments import require_types
from dist_ckpt_mistral.convert.conversion import Conversion, LossPolicy
from dist_ckpt_mistral.convert.output import DEFAULT_OUTPUT, Output, write_output
from dist_ckpt_mistral.convert.to_hf import conversion, hf_files, new_directory
from dist_ckpt_mistral.errors import ConfigError, LostRankError
from dist_ckpt_mistral.gather.execute import DEFAULT_EFFORT, Copied, Effort, Target, copy_part, execute
from dist_ckpt_mistral.gather.plan import Part, Segment
from dist_ckpt_mistral.mapping.vision import completed
from dist_ckpt_mistral.megatron.export_weights import TIMEOUT
from dist_ckpt_mistral.megatron.live_gather import LiveGather, open_live, plan_live_gather
from dist_ckpt_mistral.megatron.live_model import AnyModel
from dist_ckpt_mistral.megatron.live_ranks import LiveRanks
from dist_ckpt_mistral.megatron.sharded_state_dict import dtype_name
from dist_ckpt_mistral.model.config.mistral_config import ChosenConfig, GivenConfig, chosen_config, given_directory
from dist_ckpt_mistral.storage.remote_path import RemotePath, as_path
from dist_ckpt_mistral.storage.sources import Sources


def save_hf(
    model: AnyModel,
    config: GivenConfig,
    hf: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    allow_lossy: bool = False,
    bucket_bytes: int | None = None,
    timeout: timedelta = TIMEOUT,
    output: Output = DEFAULT_OUTPUT,
    effort: Effort = DEFAULT_EFFORT,
) -> Conversion:
    """Write the weights of a live model, in any layout, to a Hugging Face directory that ``from_pretrained`` loads.

    A collective call, as ``export_weights``. The first rank gets all tensors and writes them; nothing is published
    unless all is complete. The directory is that of ``to_hf`` after a save of the same model.

        dcm.save_hf(model, "hf_dir", "out")  # with the tokenizer of hf_dir

    Args:
        model: Any GPTModel of Megatron, also in wrappers such as DDP and Float16Module, or the list of a rank's model
            chunks. Nothing is changed.
        config: The configuration of the model: a ``MistralConfig``, a config.json, or a directory or hub id with one,
            which also supplies the tokenizer, and the vision tower and projector of a multimodal model.
        hf: Directory to create, or its URL in a store.
        dtype: Converts all weights, as a torch dtype or its name: to bfloat16, float16 or float32. None keeps the
            dtype of each.
        allow_lossy: Accept that ``dtype`` makes values infinite or zero, and count them in a warning.
        bucket_bytes: Size of a buffer, as for ``export_weights``.
        timeout: How long a rank waits for the others, and for the first one to write the tensors of a bucket.
        output: How to write the directory; ``resume`` begins anew. Into a store the parts go as tensors come,
            and a run that fails leaves nothing there.
        effort: Memory to use for copying; one thread of the first rank writes.

    Returns:
        The files that were written, or with ``output.dry_run`` would be.

    Raises:
        TensorMismatchError: The model is not that of ``config``; all tensors are named. Or ranks disagree about one, or
            ``config`` is multimodal and no directory with a vision tower.
        PlanError: The ranks do not hold every element of a tensor once.
        ConfigError: ``bucket_bytes`` is smaller than a tensor, or ``dtype`` is not supported.
        OutputError: The directory cannot be written, or ``dtype`` destroys values. Nothing is published.
        LayoutError: Ranks were given different arguments.
        LostRankError: A rank did not come within ``timeout``, or ended.
    """
    require_types(save_hf, **locals())
    target, live = as_path(hf), LiveRanks(timeout)
    ranks = live.ranks

    def prepare() -> tuple[ChosenConfig, Path | None]:
        chosen = chosen_config(config)
        if chosen is None:
            raise ConfigError("config: expected a configuration, got None")
        return chosen, given_directory(config)

    def arguments() -> dict[str, object]:
        options = {"bucket_bytes": bucket_bytes, "dtype": dtype_name(dtype), "allow_lossy": allow_lossy}
        return {**options, "hf": str(target), "output": output}

    chosen, config_directory = ranks.each(prepare)
    language_model, parts = open_live(model, chosen, live, arguments)
    source = ranks.each(lambda: completed(language_model, config_directory))
    file_set = hf_files(source, dtype_name(dtype), output.max_file_bytes)
    plan = source.plan_into(file_set.tensor_index(target, source.table.usual_name))
    carried = {n for n, each in enumerate(plan.segments) if each.copies["source_file"].max() >= live.world_size}
    gathered = {number: each for number, each in enumerate(plan.segments) if number not in carried}
    gather = plan_live_gather(
        # in the dtypes of the source: values are converted where they are written, and losses counted
        replace(plan, segments=tuple(replace(each, dtype=each.source_dtype) for each in gathered.values())),
        source,
        model,
        parts,
        ranks=live,
        receivers=frozenset([0]),
        bucket_bytes=bucket_bytes,
    )
    with Sources() as inputs:
        inputs.look_at(plan.source_files)
        new = ranks.each(
            lambda: new_directory(
                source,
                file_set,
                replace(plan, source_files=()),  # the ranks are no files
                inputs,
                config_directory,
                options={"command": "save_hf", "dtype": dtype_name(dtype), "max_file_bytes": output.max_file_bytes},
                losses=LossPolicy(allowed=allow_lossy),
            )
        )

    def copy(numbers: Sequence[int], targets: Mapping[int, Target]) -> dict[int, Copied]:
        copied: dict[int, Copied] = {}
        in_order = replace(effort, workers=1) if isinstance(target, RemotePath) else effort
        written = _written(gather, gathered, targets, effort)
        try:
            for is_carried, group in itertools.groupby(range(len(plan.segments)), carried.__contains__):
                if not is_carried:
                    copied.update(itertools.islice(written, len([*group])))
                elif numbers:
                    copied |= execute(plan, targets, effort=in_order, numbers=[*group], checksums=True)
        except LostRankError:
            if numbers:
                raise
            return {}  # the first rank has stopped, and will say why
        finally:
            written.close()
        return copied

    losses = write_output(target, new, output=output, effort=effort, ranks=ranks, copy=copy)
    return conversion(target, source, new, losses)


def _written(
    gather: LiveGather, segments: Mapping[int, Segment], targets: Mapping[int, Target], effort: Effort
) -> Generator[tuple[int, Copied], None, None]:
    """Gather the tensors of ``segments``, and write them on the rank that gets them. Yields the result of each."""
    with contextlib.closing(gather.tensors()) as tensors:
        for (number, segment), (_, tensor) in zip(segments.items(), tensors, strict=False):
            bands = _InMemory(tensor.view(-1).view(torch.uint8).cpu().numpy().data, effort.band_bytes())
            whole = Part(number, 0, segment.num_bytes)
            yield number, copy_part(segment, whole, targets[segment.file], bands, effort, checksum=True)


@dataclass(frozen=True, slots=True)
class _InMemory:
    """A segment whose bytes are in memory, as a source of bands of ``band_bytes``."""

    data: memoryview
    band_bytes: int

    def bands(self, segment: Segment, low: int, high: int, *, position: int = 0) -> Iterator[memoryview]:  # noqa: ARG002
        """Yield the bytes ``[low, high)``."""
        for start in range(low, high, self.band_bytes):
            yield self.data[start : min(start + self.band_bytes, high)]
