"""The conversions: a source, a target, the byte plan between them, and its publication."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from dist_ckpt_mistral.conversion import Conversion
from dist_ckpt_mistral.errors import ConfigError
from dist_ckpt_mistral.formats import checkpoint_directory, small_files
from dist_ckpt_mistral.formats.hf_directory import FileSet
from dist_ckpt_mistral.formats.places import Kind, locate, require_not_swapped, resolve_directory
from dist_ckpt_mistral.formats.torch_dist.writer import CheckpointLayout
from dist_ckpt_mistral.gather import dtypes
from dist_ckpt_mistral.gather.execute import DEFAULT_EFFORT, Effort
from dist_ckpt_mistral.gather.plan import BytePlan
from dist_ckpt_mistral.journal import Recipe
from dist_ckpt_mistral.losses import LossPolicy, names_of_sources
from dist_ckpt_mistral.manifest import NewManifest, tensor_spans
from dist_ckpt_mistral.mapping.source import ModelSource, completed, open_hf, open_megatron, require_equal_twins
from dist_ckpt_mistral.messages import listed
from dist_ckpt_mistral.model.config.mistral_config import GivenConfig, chosen_config, given_directory
from dist_ckpt_mistral.model.layout.layout import ParallelLayout
from dist_ckpt_mistral.model.table.rules import ParamState
from dist_ckpt_mistral.new_checkpoint import plan_import, write_beside_shards
from dist_ckpt_mistral.new_hf_directory import hf_files, texts
from dist_ckpt_mistral.ranks import Ranks
from dist_ckpt_mistral.storage import documents, paths
from dist_ckpt_mistral.storage.local import Sources, TargetFile
from dist_ckpt_mistral.writing import Checksums, write_output

_LOG = logging.getLogger(__name__)

#: ``save_pretrained``'s unit, and a size that every file system and browser takes.
DEFAULT_FILE_BYTES: Final = 5_000_000_000
_ALONE: Final = Ranks()


def to_hf(
    checkpoint: str | Path,
    output: str | Path,
    *,
    config: GivenConfig | None = None,
    weights: str = "model",
    dtype: str | None = None,
    allow_lossy: bool = False,
    max_file_bytes: int = DEFAULT_FILE_BYTES,
    manifest: bool = True,
    overwrite: bool = False,
    resume: bool = False,
    dry_run: bool = False,
    effort: Effort = DEFAULT_EFFORT,
    ranks: Ranks = _ALONE,
) -> Conversion:
    """Export a Megatron checkpoint to a Hugging Face directory that ``from_pretrained`` loads.

    ``config`` is for checkpoints that lost theirs: itself, a config.json, or a directory with one and the tokenizer.
    A directory also gives the vision tower and projector of a multimodal model, which training in Megatron drops.
    ``weights`` is ``model``, or ``master`` for the optimizer's float32 copy. ``dtype`` converts, else every tensor
    keeps its own; where it destroys values (finite ones become infinite, others zero) that is an error that counts
    them, or with ``allow_lossy`` a warning. A checkpoint that ``from_hf`` wrote gives back the original files, byte for
    byte; ``manifest`` adds integrity.json to them, for ``check``. ``resume`` goes on with what a run that was killed or
    failed has copied; ``dry_run`` checks everything and touches nothing. Raises DistCkptMistralError; then nothing is
    published.
    """
    checkpoint, output = Path(checkpoint), Path(output)
    state = _which_weights(weights)

    def find() -> Path:
        dtypes.require_weight_dtype(dtype)
        require_not_swapped(checkpoint, output, Kind.CHECKPOINT)
        paths.require_apart(checkpoint, output)
        paths.require_writable(output, overwrite=overwrite)
        return resolve_directory(checkpoint)

    def prepare() -> tuple[Sources, ModelSource, FileSet, BytePlan]:
        given = given_directory(config, vision=True)
        with Sources() as inputs:
            inputs.look_at([*directory.rglob("*"), *(given.iterdir() if given else ())])
            opened = open_megatron(directory, config=chosen_config(config), state=state)
            require_equal_twins(opened)
            source = completed(opened, given)
            file_set = hf_files(source, dtype, max_file_bytes)
            plan = source.plan_into(file_set.tensor_index(output, source.table.usual_name))
        return inputs, source, file_set, plan

    directory = ranks.on_first(find)  # once, for all ranks: training may save another iteration meanwhile
    inputs, source, file_set, plan = ranks.each(prepare)
    _LOG.info("configuration: %s", source.config_from)
    if source.carried_from is not None:
        _LOG.info("vision tower and projector: unchanged from %s", source.carried_from)
    given = given_directory(config)
    carried = small_files.gathered([*([given] if given else ()), *source.assets])
    beside = texts(source, file_set, carried)
    inputs.look_at(carried.values())

    def complete(staging: Path, targets: Mapping[int, TargetFile], _: Checksums) -> None:
        for number, file in enumerate(file_set.files.values()):
            targets[number].write(0, file.head)
        small_files.write_small_files(staging, carried, beside)

    sizes = {name: file.num_bytes for name, file in file_set.files.items()}
    options = {"--weights": weights, "--dtype": dtype, "--max-file-size": max_file_bytes}
    losses = write_output(
        output,
        plan,
        sizes,
        complete=complete,
        manifest=NewManifest(folder=Path(), tensors=tensor_spans(file_set)) if manifest else None,
        checksums=False,
        recipe=Recipe.of(plan, inputs, {"command": "to-hf", **options, "configuration": source.config.to_hf()}),
        beside=[*carried.values()],
        overwrite=overwrite,
        resume=resume,
        dry_run=dry_run,
        effort=effort,
        ranks=ranks,
        losses=LossPolicy(allowed=allow_lossy),
    )
    return Conversion.of(output, plan, sizes, source, num_tensors=len(plan.segments), losses=losses)


def _which_weights(weights: str) -> ParamState:
    """The state of the parameters that an option calls ``model`` or ``master``."""
    states = {"model": ParamState.WEIGHTS, "master": ParamState.MASTER}
    if weights not in states:
        raise ConfigError(f"weights={weights!r} is not supported: expected one of {', '.join(states)}")
    return states[weights]


def from_hf(
    hf: str | Path,
    checkpoint: str | Path,
    *,
    tp: int = 1,
    pp: int = 1,
    ep: int = 1,
    dtype: str | None = None,
    allow_lossy: bool = False,
    iteration: int | None = None,
    manifest: bool = True,
    overwrite: bool = False,
    resume: bool = False,
    dry_run: bool = False,
    effort: Effort = DEFAULT_EFFORT,
    ranks: Ranks = _ALONE,
) -> Conversion:
    """Import a Hugging Face directory or hub id into a new Megatron checkpoint root.

    A directory may also hold Mistral AI's own files, or weights in FP8, whose values are imported. ``tp``, ``pp`` and
    ``ep`` choose how the stored chunks are cut, never what can be loaded. Without ``iteration`` the checkpoint is a
    ``release``, Megatron's name for weights without training state. ``dtype`` converts, else every tensor keeps its
    own; where it destroys values (finite ones become infinite, others zero) that is an error that counts them, or with
    ``allow_lossy`` a warning. ``manifest`` adds integrity.json, which megatron-core 0.18 and newer can verify.
    ``resume`` goes on with what a run that was killed or failed has copied; ``dry_run`` checks everything and touches
    nothing. Raises DistCkptMistralError; then nothing is published.
    """
    output = Path(checkpoint)
    layout = ParallelLayout(tp=tp, pp=pp, ep=ep)
    checkpoint_directory.require_iteration(iteration)
    step = Path(checkpoint_directory.iteration_name(iteration))

    def prepare() -> tuple[Sources, ModelSource, CheckpointLayout, BytePlan]:
        dtypes.require_weight_dtype(dtype)
        require_not_swapped(hf, output, Kind.HF, Kind.OWN)
        paths.require_writable(output, overwrite=overwrite)
        directory = locate(hf, Kind.HF, Kind.OWN).path
        paths.require_apart(directory, output)
        with Sources() as inputs:
            inputs.look_at(directory.glob("*"))
            source = open_hf(directory, dtype=dtype and "float32")  # FP8 values: rounded once, where losses are counted
            return inputs, source, *plan_import(source, layout, dtype, step)

    inputs, source, written, plan = ranks.each(prepare)
    carried = small_files.small_files(source.path)
    if folders := small_files.other_folders(source.path):
        _LOG.warning("folders in %s stay behind, as they belong to no tokenizer: %s", source.path, listed(folders))
    inputs.look_at(carried.values())

    def complete(staging: Path, targets: Mapping[int, TargetFile], checksums: Checksums) -> None:
        written.finish(targets, plan, checksums)
        write_beside_shards(staging / step, source, carried, layout, dtype or source.main_dtype, iteration)
        documents.write_bytes(staging / step / checkpoint_directory.METADATA_FILE, written.metadata())
        checkpoint_directory.write_tracker(staging, step.name)

    sizes = written.file_sizes(step)
    options = {"--tp": tp, "--pp": pp, "--ep": ep, "--dtype": dtype, "--iteration": iteration}
    losses = write_output(
        output,
        plan,
        sizes,
        complete=complete,
        manifest=NewManifest(folder=step) if manifest else None,
        checksums=True,
        recipe=Recipe.of(plan, inputs, {"command": "from-hf", **options}),
        beside=[*carried.values()],
        overwrite=overwrite,
        resume=resume,
        dry_run=dry_run,
        effort=effort,
        ranks=ranks,
        losses=LossPolicy(allowed=allow_lossy, names_of=names_of_sources),
    )
    return Conversion.of(output, plan, sizes, source, num_tensors=len(source.tensors), losses=losses)
