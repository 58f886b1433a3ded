"""A new Megatron checkpoint of a model: its chunks, the way to them, and what lies beside them."""

from __future__ import annotations

import itertools
import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dist_ckpt_mistral.convert.conversion import Conversion, LossPolicy, names_of_sources
from dist_ckpt_mistral.convert.journal import Recipe
from dist_ckpt_mistral.convert.output import DEFAULT_OUTPUT, Checksums, NewFiles, NewManifest, Output, write_output
from dist_ckpt_mistral.convert.ranks import ALONE, Ranks
from dist_ckpt_mistral.errors import LayoutError, for_all
from dist_ckpt_mistral.formats import checkpoint_directory, hf_directory, small_files
from dist_ckpt_mistral.formats.checkpoint_directory import ITERATION_TRAIN_STATE_FILE, untrained
from dist_ckpt_mistral.formats.places import CONFIG_FILE, INDEX_FILE, Kind, locate, require_not_swapped
from dist_ckpt_mistral.formats.torch_dist import common_state, writer
from dist_ckpt_mistral.formats.torch_dist.writer import CheckpointLayout, NewChunk, NewObject
from dist_ckpt_mistral.gather import dtypes
from dist_ckpt_mistral.gather.execute import DEFAULT_EFFORT, Effort
from dist_ckpt_mistral.gather.links import Link, compose, reverse
from dist_ckpt_mistral.gather.plan import BytePlan, only_dtype, plan_gather
from dist_ckpt_mistral.mapping import configuration
from dist_ckpt_mistral.mapping.checkpoint_map import CheckpointMap, new_checkpoint_map
from dist_ckpt_mistral.mapping.chunking import cut_chunks
from dist_ckpt_mistral.mapping.configuration import RUN_CONFIG_FILE
from dist_ckpt_mistral.mapping.source import ModelSource, open_hf, require_equal_twins
from dist_ckpt_mistral.messages import listed
from dist_ckpt_mistral.model.args.bridge import to_run_config
from dist_ckpt_mistral.model.args.megatron_args import to_megatron_args
from dist_ckpt_mistral.model.layout.layout import ParallelLayout
from dist_ckpt_mistral.model.table.rules import KeyStyle
from dist_ckpt_mistral.model.table.table import OLD_EXTRA_STATES, TensorTable
from dist_ckpt_mistral.storage import documents, paths
from dist_ckpt_mistral.storage.local import Sources, TargetFile

_LOG = logging.getLogger(__name__)


def from_hf(
    hf: str | Path,
    checkpoint: str | Path,
    *,
    layout: ParallelLayout | None = None,
    tp: int = 1,
    pp: int = 1,
    ep: int = 1,
    dtype: str | None = None,
    allow_lossy: bool = False,
    iteration: int | None = None,
    output: Output = DEFAULT_OUTPUT,
    effort: Effort = DEFAULT_EFFORT,
    ranks: Ranks = ALONE,
) -> Conversion:
    """Import a Hugging Face model into a new Megatron checkpoint root.

    Args:
        hf: Hugging Face directory or hub id. It may also hold Mistral AI's own (consolidated) files, or weights in FP8,
            whose values are imported.
        checkpoint: Checkpoint root to create.
        layout: How the stored chunks are cut, never what can be loaded.
        tp: Tensor parallelism, short for ``layout=ParallelLayout(tp=tp, pp=pp, ep=ep)``.
        pp: Pipeline parallelism, likewise.
        ep: Expert parallelism, likewise.
        dtype: Converts all weights to ``"bfloat16"``, ``"float16"`` or ``"float32"``; None keeps the dtype of each.
        allow_lossy: Warn where ``dtype`` destroys values (finite ones become infinite, others zero), and count them.
        iteration: Stores the weights as this iteration. None makes a ``release``, Megatron's name for weights without
            training state.
        output: How the checkpoint is written.
        effort: How much of the machine to use.
        ranks: The processes that share the work; by default this one alone.

    Returns:
        What was written, or with ``output.dry_run`` would be.

    Raises:
        LayoutError: The model cannot be cut so, or ``layout`` is given together with ``tp``, ``pp`` or ``ep``.
        DistCkptMistralError: The directory is damaged, contradicts itself, or holds another model; the checkpoint
            cannot be written; values would be destroyed without ``allow_lossy``. Then nothing is published.
    """
    target = Path(checkpoint)
    shorthand = ParallelLayout(tp=tp, pp=pp, ep=ep)
    if layout is not None and shorthand != ParallelLayout():
        raise LayoutError("give either a layout, or tp, pp and ep")
    cut_for = layout or shorthand
    checkpoint_directory.require_iteration(iteration)
    step = Path(checkpoint_directory.iteration_name(iteration))

    def prepare() -> tuple[Sources, ModelSource, CheckpointLayout, BytePlan]:
        dtypes.require_weight_dtype(dtype)
        require_not_swapped(hf, target, Kind.HF, Kind.OWN)
        paths.require_writable(target, overwrite=output.overwrite)
        directory = locate(hf, Kind.HF, Kind.OWN).path
        paths.require_apart(directory, target)
        with Sources() as inputs:
            inputs.look_at(directory.glob("*"))
            source = open_hf(directory, dtype=dtype and "float32")  # FP8 values: rounded once, where losses are counted
            return inputs, source, *plan_import(source, cut_for, dtype, step)

    inputs, source, written, plan = ranks.each(prepare)
    carried = small_files.small_files(source.path)
    if folders := small_files.other_folders(source.path):
        _LOG.warning("folders in %s stay behind, as they belong to no tokenizer: %s", source.path, listed(folders))
    inputs.look_at(carried.values())

    def complete(staging: Path, targets: Mapping[int, TargetFile], checksums: Checksums) -> None:
        written.finish(targets, plan, checksums)
        write_beside_shards(staging / step, source, carried, cut_for, dtype or source.main_dtype, iteration)
        documents.write_bytes(staging / step / checkpoint_directory.METADATA_FILE, written.metadata())
        checkpoint_directory.write_tracker(staging, step.name)

    sizes = written.file_sizes(step)
    options = {"layout": repr(cut_for), "--dtype": dtype, "--iteration": iteration}
    new = NewFiles(
        plan=plan,
        file_bytes=sizes,
        complete=complete,
        manifest=NewManifest(folder=step),
        checksums=True,
        recipe=Recipe.of(plan, inputs, {"command": "from-hf", **options}),
        beside=[*carried.values()],
        losses=LossPolicy(allowed=allow_lossy, names_of=names_of_sources),
    )
    losses = write_output(target, new, output=output, effort=effort, ranks=ranks)
    return Conversion(
        output=target,
        config_from=source.config_from,
        num_tensors=len(source.tensors),
        num_bytes=plan.num_bytes,
        files=sizes,
        ignored=source.ignored,
        losses=losses,
    )


def plan_import(
    source: ModelSource, layout: ParallelLayout, dtype: str | None, step: Path
) -> tuple[CheckpointLayout, BytePlan]:
    """What the new checkpoint's files hold where, and the way there."""
    layout.check(source.config)
    require_equal_twins(source)
    new = new_checkpoint_map(source.table)
    links = [
        link
        for tensor in source.tensors
        if not tensor.is_alias
        for second in map(reverse, new.links(tensor))
        for first in source.links[tensor.hf_name]
        if (link := compose(first, second)) is not None
    ]
    chunks = _chunks(source, new, links, layout, dtype)
    objects = [NewObject.empty(_extra_states(source.table))]
    written = writer.lay_out(chunks, objects, num_files=layout.world_size)
    return written, plan_gather(source.index, written.index(step), links)


def _chunks(
    source: ModelSource, new: CheckpointMap, links: Sequence[Link], layout: ParallelLayout, dtype: str | None
) -> Iterator[NewChunk]:
    """The chunks that the ranks of ``layout`` would save, one file a rank, without vocabulary padding."""
    into: dict[str, list[Link]] = defaultdict(list)
    for link in links:
        into[link.target].append(link)
    dtypes = dict(zip(into, for_all(lambda name: dtype or only_dtype(source.index, into[name]), into), strict=True))
    others = new.also_written()
    for cut in cut_chunks(new, new.shapes(), layout):
        yield NewChunk(
            mcore_key=cut.name,
            dtype=dtypes[cut.name],
            global_shape=cut.global_shape,
            offset=cut.offset,
            shape=cut.shape,
            file=cut.rank,
            other_keys=others.get(cut.name, ()),
        )


def _extra_states(table: TensorTable) -> list[str]:
    """The object keys that models of any layer spec and version look for."""
    shapes = dict.fromkeys(OLD_EXTRA_STATES, (table.num_layers,)) | table.extra_states(KeyStyle.STACKED)
    return [
        writer.object_key(key, index, shape)
        for key, shape in shapes.items()
        for index in itertools.product(*map(range, shape))
    ]


def write_beside_shards(
    directory: Path,
    source: ModelSource,
    carried: Mapping[str, Path],
    layout: ParallelLayout,
    dtype: str,
    iteration: int | None,
) -> None:
    """Write metadata.json, the model's description in several forms, and the small Hugging Face files.

    Megatron-LM reads common.pt, Megatron-Bridge run_config.yaml and train_state.pt. ``.metadata`` comes last and
    elsewhere.
    """
    documents.write_bytes(directory / checkpoint_directory.BACKEND_FILE, writer.BACKEND_JSON)
    written: dict[str, Any] = {"dtype": dtype, "tp": layout.tp, "pp": layout.pp, "ep": layout.ep}
    documents.write_bytes(directory / RUN_CONFIG_FILE, documents.yaml_bytes(to_run_config(source.config, **written)))
    documents.write_bytes(directory / ITERATION_TRAIN_STATE_FILE, untrained(iteration or 0))
    state: dict[str, Any] = {
        "args": to_megatron_args(source.config, **written),
        "checkpoint_version": 3.0,
        "iteration": iteration or 0,
        "content_metadata": {
            "singleton_local_shards": False,
            "chained_optim_avoid_prefix": True,
            configuration.KEY: configuration.to_record(source.config, source.table, source.hf_files),
        },
    }
    documents.write_bytes(directory / common_state.COMMON_FILE, common_state.write(state))
    texts: dict[str, bytes | None] = {}
    if CONFIG_FILE in carried:
        texts[CONFIG_FILE] = hf_directory.config_json(source.config.to_hf(), carried[CONFIG_FILE])
    if source.hf_files is None:  # the files are not remembered, and then an index of them tells nothing
        texts[INDEX_FILE] = None
    (directory / small_files.ASSETS_FOLDER).mkdir()
    small_files.write_small_files(directory / small_files.ASSETS_FOLDER, carried, texts)
