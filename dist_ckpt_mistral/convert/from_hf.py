"""``from-hf``: a new Megatron checkpoint of a Hugging Face model, with its chunks and its other files."""

from __future__ import annotations

import contextlib
import logging
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from dist_ckpt_mistral.arguments import require_types
from dist_ckpt_mistral.convert.adapter_import import in_megatron, run_config_section
from dist_ckpt_mistral.convert.conversion import Conversion, LossPolicy, names_of_sources
from dist_ckpt_mistral.convert.describe import asset_texts, description_texts
from dist_ckpt_mistral.convert.joined_ranks import empty_extra_states
from dist_ckpt_mistral.convert.journal import Recipe
from dist_ckpt_mistral.convert.output import DEFAULT_OUTPUT, NewFiles, Output, write_output
from dist_ckpt_mistral.convert.ranks import ALONE, Ranks
from dist_ckpt_mistral.errors import ConfigError, LayoutError, OutputError, for_all
from dist_ckpt_mistral.formats import checkpoint_directory, small_files
from dist_ckpt_mistral.formats.checkpoint_directory import ITERATION_TRAIN_STATE_FILE
from dist_ckpt_mistral.formats.kinds import Kind, Place
from dist_ckpt_mistral.formats.places import locate, require_not_swapped
from dist_ckpt_mistral.formats.torch_dist import writer
from dist_ckpt_mistral.formats.torch_dist.common_state import COMMON_FILE
from dist_ckpt_mistral.formats.torch_dist.writer import CheckpointLayout, NewChunk
from dist_ckpt_mistral.gather import dtypes
from dist_ckpt_mistral.gather.execute import DEFAULT_EFFORT, Effort
from dist_ckpt_mistral.gather.index import TensorIndex
from dist_ckpt_mistral.gather.links import Link, compose, reverse
from dist_ckpt_mistral.gather.plan import BytePlan, only_dtype, plan_gather
from dist_ckpt_mistral.mapping import hf_record
from dist_ckpt_mistral.mapping.adapter_description import RECORD_KEY
from dist_ckpt_mistral.mapping.checkpoint_map import CheckpointMap, new_checkpoint_map
from dist_ckpt_mistral.mapping.chunking import cut_chunks
from dist_ckpt_mistral.mapping.configuration import RUN_CONFIG_FILE
from dist_ckpt_mistral.mapping.read_plan import ReadingPlan, plan_reads
from dist_ckpt_mistral.mapping.source import ModelSource, open_adapter, open_hf
from dist_ckpt_mistral.mapping.twins import require_equal_twins
from dist_ckpt_mistral.messages import listed
from dist_ckpt_mistral.model.args.bridge import to_run_config
from dist_ckpt_mistral.model.args.megatron_args import to_megatron_args
from dist_ckpt_mistral.model.config.mistral_config import GivenConfig, chosen_config
from dist_ckpt_mistral.model.layout.layout import ParallelLayout
from dist_ckpt_mistral.model.table.table import TensorTable
from dist_ckpt_mistral.storage import documents, paths
from dist_ckpt_mistral.storage.remote_path import as_path
from dist_ckpt_mistral.storage.sources import Sources

_LOG = logging.getLogger(__name__)
#: What is imported.
_IMPORTED: Final = (Kind.HF, Kind.CONSOLIDATED, Kind.ADAPTER)
#: From this size on, a model is usually trained with tensor parallelism: mixed precision with Adam takes 18 bytes for
#: each parameter (Megatron-LM, docs, distributed optimizer), and these fill a GPU of 80 GB.
_LARGE_MODEL_PARAMETERS: Final = 80_000_000_000 // 18
#: The tensor parallelism to expect, the largest first: Megatron-LM advises to keep it within a node, which has 8 GPUs.
_USUAL_TP: Final = (8, 4, 2)


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
    base: GivenConfig | None = None,
    output: Output = DEFAULT_OUTPUT,
    effort: Effort = DEFAULT_EFFORT,
    ranks: Ranks = ALONE,
) -> Conversion:
    """Import a Hugging Face model, or a LoRA adapter of PEFT, into a new Megatron checkpoint root.

    Args:
        hf: Hugging Face directory or hub id. It may hold Mistral AI's consolidated files. The values of FP8 weights are
            imported. An adapter becomes one of Megatron-Bridge.
        checkpoint: Checkpoint root to create.
        layout: The layout to cut the stored chunks for. The checkpoint loads at any other layout, too.
        tp: Tensor-parallel size, short for ``layout=ParallelLayout(tp=tp, pp=pp, ep=ep)``.
        pp: Pipeline-parallel size, likewise.
        ep: Expert-parallel size, likewise.
        dtype: Converts all weights to ``"bfloat16"``, ``"float16"`` or ``"float32"``; None keeps the dtype of each.
        allow_lossy: Accept that ``dtype`` makes values infinite or zero, and count them in a warning.
        iteration: Stores the weights as this iteration. None makes a ``release``, Megatron's name for weights without
            training state.
        base: The model of an adapter, or its configuration: a ``MistralConfig``, a config.json, or a directory or hub
            id with one. By default the model that the adapter names.
        output: How to write the checkpoint.
        effort: Threads and memory to use.
        ranks: The processes that share the work; by default this one alone.

    Returns:
        The files that were written, or with ``output.dry_run`` would be.

    Raises:
        LayoutError: The model cannot be divided for this layout, or ``layout`` is given with ``tp``, ``pp`` or ``ep``.
        ConfigError: The model is not supported, or its configurations contradict each other.
        FormatError: The directory is damaged.
        TensorMismatchError: Tensors are missing, unknown or of another shape.
        OutputError: The checkpoint cannot be written, or ``dtype`` destroys values. Nothing is published.

    Example:
        >>> dist_ckpt_mistral.from_hf("hf_dir", "ckpt", tp=2).num_tensors  # doctest: +SKIP
        291
    """
    require_types(from_hf, **locals())
    target = as_path(checkpoint)
    shorthand = ParallelLayout(tp=tp, pp=pp, ep=ep)
    if layout is not None and shorthand != ParallelLayout():
        raise LayoutError("give either a layout, or tp, pp and ep")
    layout = layout or shorthand
    checkpoint_directory.require_iteration(iteration)
    step = Path(checkpoint_directory.iteration_name(iteration))

    def prepare() -> tuple[Sources, ModelSource, TensorTable, CheckpointLayout, BytePlan, TensorIndex]:
        dtypes.require_weight_dtype(dtype)
        require_not_swapped(hf, target, *_IMPORTED)
        paths.require_writable(target, overwrite=output.overwrite)
        _require_no_other_iteration(target, step.name)
        place = locate(hf, *_IMPORTED)
        paths.require_apart(place.path, target)
        with Sources() as inputs:
            inputs.look_at(place.path.glob("*"))
            source, table = _opened(place, base, layout, dtype)
            return inputs, source, table, *_plan_import(source, table, layout, dtype, step)

    inputs, source, table, checkpoint_layout, plan, chunks = ranks.each(prepare)
    copied_files = small_files.small_files(source.path, of_adapter=bool(table.adapters))
    if folders := small_files.other_folders(source.path):
        _LOG.warning("folders in %s stay behind, as they belong to no tokenizer: %s", source.path, listed(folders))
    inputs.look_at(copied_files.values())

    def complete(staging: Path) -> None:
        _write_other_files(staging / step, source, table, copied_files, layout, dtype, iteration)
        documents.write_bytes(staging / step / checkpoint_directory.METADATA_FILE, checkpoint_layout.metadata())
        for_all_iterations = description_texts(source.config, source.hf_files, copied_files)
        (staging / small_files.ASSETS_FOLDER).mkdir()
        small_files.write_small_files(staging / small_files.ASSETS_FOLDER, copied_files, for_all_iterations)
        checkpoint_directory.write_tracker(staging, step.name)

    sizes = checkpoint_layout.file_sizes(step)
    options = {"layout": repr(layout), "--dtype": dtype, "--iteration": iteration}
    new = NewFiles(
        plan=plan,
        file_bytes=sizes,
        complete=complete,
        around=checkpoint_layout.around(plan),
        commit=checkpoint_directory.commit_names(step.name),
        folder=step,
        recipe=Recipe.of(plan, inputs, {"command": "from-hf", **options}),
        copied_files=[*copied_files.values()] * 2,  # for the iteration, and for its root
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
        is_adapter=bool(table.adapters),
        losses=losses,
        costly_load=_costly_load(source, table, chunks, target / step) if layout == ParallelLayout() else None,
    )


def _opened(
    place: Place, base: GivenConfig | None, layout: ParallelLayout, dtype: str | None
) -> tuple[ModelSource, TensorTable]:
    """What to import, and the table of its tensors in Megatron."""
    if place.kind is Kind.ADAPTER:
        return in_megatron(open_adapter(place.path, config=chosen_config(base)), layout)
    if base is not None:
        raise ConfigError(f"{place.path} is a model: --base (base) goes with a PEFT directory of an adapter")
    source = open_hf(place.path, dtype=dtype and "float32")  # FP8 values are rounded once, when they are written
    return source, source.table


def _require_no_other_iteration(root: Path, step: str) -> None:
    """Raise OutputError if ``root`` holds an iteration of another name than ``step``: training may have saved it."""
    iterations = [path.name for path in root.glob("*/") if checkpoint_directory.is_iteration_name(path.name)]
    others = [name for name in iterations if name != step and not (root / name).is_symlink()]
    if others:
        raise OutputError(
            f"the output {root} holds {listed(sorted(others))}, which an import would remove. Choose another name; to "
            "leave the model's configuration and tokenizer there for these iterations, use describe."
        )


def _plan_import(
    source: ModelSource, table: TensorTable, layout: ParallelLayout, dtype: str | None, step: Path
) -> tuple[CheckpointLayout, BytePlan, TensorIndex]:
    """The positions of all data in the new checkpoint's files, the plan that copies it there, and the new chunks.

    The checkpoint holds the tensors of ``table``.
    """
    layout.check(source.config)
    require_equal_twins(source)
    new = new_checkpoint_map(table)
    links = [
        link
        for tensor in table.sources_of_rows()
        for into_checkpoint in map(reverse, new.links(tensor))
        for from_source in source.links[tensor.hf_name]
        if (link := compose(from_source, into_checkpoint)) is not None
    ]
    chunks = [*_chunks(source, new, links, layout, dtype)]
    objects = [] if table.adapters else [empty_extra_states(table)]
    checkpoint_layout = writer.lay_out(chunks, objects, num_files=1 + max(chunk.file for chunk in chunks))
    index = checkpoint_layout.index(step)
    return checkpoint_layout, plan_gather(source.index, index, links), index


def _costly_load(source: ModelSource, table: TensorTable, chunks: TensorIndex, path: Path) -> ReadingPlan | None:
    """The reads of the largest usual tensor parallelism, if the model is large and it reads much more than it needs."""
    if sum(math.prod(tensor.global_shape) for tensor in chunks.tensors.values()) < _LARGE_MODEL_PARAMETERS:
        return None
    for tp in _USUAL_TP:
        layout = ParallelLayout(tp=tp)
        with contextlib.suppress(LayoutError):
            layout.check(source.config)
            maps = [new_checkpoint_map(table)]
            plan = plan_reads(layout, maps, chunks, path=path, config_from=source.config_from)
            return plan if plan.reads_much_more else None
    return None


def _chunks(
    source: ModelSource, new: CheckpointMap, links: Sequence[Link], layout: ParallelLayout, dtype: str | None
) -> Iterator[NewChunk]:
    """The chunks that the ranks of ``layout`` would save, without vocabulary padding, in a file for each that saves."""
    links_into: dict[str, list[Link]] = defaultdict(list)
    for link in links:
        links_into[link.target].append(link)
    dtypes_of_keys = for_all(lambda key: dtype or only_dtype(source.index, links_into[key]), links_into)
    dtype_of = dict(zip(links_into, dtypes_of_keys, strict=True))
    other_keys = new.also_written()
    boxes = [*cut_chunks(new, new.shapes(), layout)]
    file_of = {rank: file for file, rank in enumerate(sorted({box.rank for box in boxes}))}
    for chunk in boxes:
        yield NewChunk(
            mcore_key=chunk.name,
            dtype=dtype_of[chunk.name],
            global_shape=chunk.global_shape,
            offset=chunk.offset,
            shape=chunk.shape,
            file=file_of[chunk.rank],
            other_keys=other_keys.get(chunk.name, ()),
        )


def _write_other_files(
    directory: Path,
    source: ModelSource,
    table: TensorTable,
    copied_files: Mapping[str, Path],
    layout: ParallelLayout,
    dtype: str | None,
    iteration: int | None,
) -> None:
    """Write the files of an iteration besides data files and ``.metadata``, which the caller writes last.

    These are metadata.json, the configuration for Megatron-LM (common.pt) and for Megatron-Bridge (run_config.yaml,
    train_state.pt), and the small Hugging Face files.
    """
    documents.write_bytes(directory / checkpoint_directory.BACKEND_FILE, writer.BACKEND_JSON)
    dtype = dtype or source.main_dtype
    if table.adapters:  # the dtype of its model counts
        dtype = source.config.dtype if source.config.dtype in dtypes.WEIGHT_DTYPES else dtype
    settings: dict[str, Any] = {"dtype": dtype, "tp": layout.tp, "pp": layout.pp, "ep": layout.ep}
    run_config = to_run_config(source.config, **settings)
    record = hf_record.to_record(source.config, table, source.hf_files)
    if table.adapters:
        (adapter,) = source.adapter_configs
        run_config["peft"] = run_config_section(table, adapter)
        record[RECORD_KEY] = adapter.peft
    documents.write_bytes(directory / RUN_CONFIG_FILE, documents.yaml_bytes(run_config))
    documents.write_bytes(directory / ITERATION_TRAIN_STATE_FILE, writer.untrained(iteration or 0))
    state: dict[str, Any] = {
        "args": to_megatron_args(source.config, **settings),
        "checkpoint_version": 3.0,
        "iteration": iteration or 0,
        "content_metadata": {
            "singleton_local_shards": False,
            "chained_optim_avoid_prefix": True,
            hf_record.KEY: record,
        },
    }
    documents.write_bytes(directory / COMMON_FILE, writer.common_state(state))
    texts = asset_texts(source.config, source.hf_files, copied_files)
    (directory / small_files.ASSETS_FOLDER).mkdir()
    small_files.write_small_files(directory / small_files.ASSETS_FOLDER, copied_files, texts)
