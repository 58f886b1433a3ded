"""The conversions: a source, a target, the byte plan between them, and its publication."""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from dist_ckpt_mistral import dtypes, embedded, hub, storage
from dist_ckpt_mistral.chunking import cuts
from dist_ckpt_mistral.conversion import Conversion
from dist_ckpt_mistral.errors import ConfigError, TensorMismatchError
from dist_ckpt_mistral.formats import common_state, hf_directory, torch_dist, torch_dist_writer
from dist_ckpt_mistral.formats.hf_directory import FileSet
from dist_ckpt_mistral.formats.torch_dist_writer import CheckpointLayout, NewChunk, NewObject
from dist_ckpt_mistral.gather.executor import Effort
from dist_ckpt_mistral.gather.links import Link, compose, reverse
from dist_ckpt_mistral.gather.plan import BytePlan, plan_gather
from dist_ckpt_mistral.journal import Recipe
from dist_ckpt_mistral.manifest import NewManifest, tensor_spans
from dist_ckpt_mistral.mapping import CheckpointMap, new_checkpoint_map
from dist_ckpt_mistral.model.config import GivenConfig, given_config, given_directory
from dist_ckpt_mistral.model.megatron_args import to_megatron_args
from dist_ckpt_mistral.model.parallel_layout import ParallelLayout
from dist_ckpt_mistral.model.tensor_rules import KeyStyle, ParamState, TensorTable
from dist_ckpt_mistral.model.tensor_table import OLD_EXTRA_STATES
from dist_ckpt_mistral.model_source import ModelSource, completed, open_hf, open_megatron
from dist_ckpt_mistral.ranks import Ranks
from dist_ckpt_mistral.stamps import Stamps, stamps
from dist_ckpt_mistral.storage import TargetFile
from dist_ckpt_mistral.verify import first_difference
from dist_ckpt_mistral.writing import Checksums, write_output

_LOG = logging.getLogger(__name__)

#: ``save_pretrained``'s unit, and a size that every file system and browser takes.
DEFAULT_FILE_BYTES: Final = 5_000_000_000
_DEFAULT_EFFORT: Final = Effort()
_ALONE: Final = Ranks()


def to_hf(
    checkpoint: str | Path,
    output: str | Path,
    *,
    config: GivenConfig | None = None,
    weights: str = "model",
    dtype: str | None = None,
    max_file_bytes: int = DEFAULT_FILE_BYTES,
    manifest: bool = True,
    overwrite: bool = False,
    resume: bool = False,
    dry_run: bool = False,
    effort: Effort = _DEFAULT_EFFORT,
    ranks: Ranks = _ALONE,
) -> Conversion:
    """Export a Megatron checkpoint to a Hugging Face directory that ``from_pretrained`` loads.

    ``config`` is for checkpoints that lost theirs: itself, a config.json, or a directory with one and the tokenizer.
    A directory also gives the vision tower and projector of a multimodal model, which training in Megatron drops.
    ``weights`` is ``model``, or ``master`` for the optimizer's float32 copy. ``dtype`` converts, else every tensor
    keeps its own. A checkpoint that ``from_hf`` wrote gives back the original files, byte for byte; ``manifest`` adds
    integrity.json to them, for ``check``. ``resume`` goes on with what a run that was killed or failed has copied.
    Raises DistCkptMistralError; then nothing is published.
    """
    checkpoint, output = Path(checkpoint), Path(output)
    state = _which_weights(weights)

    def prepare() -> tuple[Stamps, ModelSource, FileSet, BytePlan]:
        dtypes.require_weight_dtype(dtype)
        storage.require_apart(checkpoint, output)
        storage.require_writable(output, overwrite=overwrite or dry_run)
        given = given_directory(config)
        inputs = stamps([*torch_dist.resolve_directory(checkpoint).rglob("*"), *(given.iterdir() if given else ())])
        opened = open_megatron(checkpoint, config=given_config(config), state=state)
        source = completed(opened, given)
        file_set = _hf_files(source, dtype, max_file_bytes)
        plan = source.plan_into(file_set.tensor_index(output, source.table.usual_name))
        return inputs, source, file_set, plan

    inputs, source, file_set, plan = ranks.each(prepare)
    _LOG.info("configuration: %s", source.config_from)
    if source.carried_from is not None:
        _LOG.info("vision tower and projector: unchanged from %s", source.carried_from)
    assets = given_directory(config) or source.assets
    carried = hf_directory.carried_files(assets)[0] if assets is not None else []

    def complete(staging: Path, targets: Mapping[int, TargetFile], _: Checksums) -> None:
        for number, file in enumerate(file_set.files.values()):
            targets[number].write(0, file.head)
        _write_hf_assets(staging, source, file_set, carried)

    sizes = {name: file.num_bytes for name, file in file_set.files.items()}
    if not dry_run:
        options = {"--weights": weights, "--dtype": dtype, "--max-file-size": max_file_bytes}
        write_output(
            output,
            plan,
            sizes,
            complete=complete,
            manifest=NewManifest(folder=Path(), tensors=tensor_spans(file_set)) if manifest else None,
            checksums=False,
            recipe=Recipe.of(plan, inputs, {"command": "to-hf", **options, "configuration": source.config.to_hf()}),
            beside_bytes=storage.total_bytes(carried),
            overwrite=overwrite,
            resume=resume,
            effort=effort,
            ranks=ranks,
        )
    return Conversion.of(output, plan, sizes, source, num_tensors=len(plan.segments))


def _which_weights(weights: str) -> ParamState:
    """The state of the parameters that an option calls ``model`` or ``master``."""
    states = {"model": ParamState.WEIGHTS, "master": ParamState.MASTER}
    if weights not in states:
        raise ConfigError(f"weights={weights!r} is not supported: expected one of {', '.join(states)}")
    return states[weights]


def _hf_files(source: ModelSource, dtype: str | None, max_file_bytes: int) -> FileSet:
    """The files to write: the original ones where they still fit the tensors, else as ``save_pretrained`` would."""
    stored = {tensor.hf_name: (dtype or source.dtype_of(tensor), tensor.shape) for tensor in source.tensors}
    if source.hf_files is not None:
        held = source.hf_files.by_name(str(source.path), source.table.usual_name)
        original = {name: (tensor.dtype, tensor.shape) for name, (_, _, tensor) in held.items()}
        if original == stored:
            return source.hf_files
        _LOG.info("the tensors differ in name or dtype from the original files: the files are laid out anew")
    tensors = [(t.hf_name, *stored[t.hf_name]) for t in source.tensors if not t.is_alias]
    return hf_directory.plan_files(tensors, max_file_bytes=max_file_bytes)


def _write_hf_assets(staging: Path, source: ModelSource, files: FileSet, carried: Sequence[Path]) -> None:
    """Everything of a Hugging Face directory that is not weights; the index last."""
    content = _config_json(
        source, files, next((path for path in carried if path.name == hf_directory.CONFIG_FILE), None)
    )
    storage.write_bytes(staging / hf_directory.CONFIG_FILE, content)
    for path in carried:
        if path.name != hf_directory.CONFIG_FILE:
            storage.copy_file(path, staging / path.name)
    if not any(hf_directory.is_tokenizer_file(path.name) for path in carried):
        _LOG.warning("no tokenizer came with the checkpoint: give a Hugging Face directory with --config to add one")
    index_json = files.index_json()
    if index_json is not None:
        storage.write_bytes(staging / hf_directory.INDEX_FILE, index_json)


def _config_json(source: ModelSource, files: FileSet, original: Path | None) -> bytes:
    """config.json: the original text where it is still true, else with the dtype that most of the weights have."""
    sizes: Counter[str] = Counter()
    for file in files.files.values():
        for tensor in file.tensors:
            sizes[tensor.dtype] += tensor.end - tensor.begin
    dtype = sizes.most_common(1)[0][0]
    content = source.config.to_hf()
    if source.config.dtype != dtype:
        content["dtype" if "dtype" in content else "torch_dtype"] = dtype
    return hf_directory.config_json(content, original)


def from_hf(
    hf: str | Path,
    checkpoint: str | Path,
    *,
    tp: int = 1,
    pp: int = 1,
    ep: int = 1,
    dtype: str | None = None,
    iteration: int | None = None,
    manifest: bool = True,
    overwrite: bool = False,
    resume: bool = False,
    effort: Effort = _DEFAULT_EFFORT,
    ranks: Ranks = _ALONE,
) -> Conversion:
    """Import a Hugging Face directory or hub id into a new Megatron checkpoint root.

    ``tp``, ``pp`` and ``ep`` choose how the stored chunks are cut, never what can be loaded. Without ``iteration`` the
    checkpoint is a ``release``, Megatron's name for weights without training state. ``dtype`` converts, else every
    tensor keeps its own. ``manifest`` adds integrity.json, which megatron-core 0.18 and newer can verify. ``resume``
    goes on with what a run that was killed or failed has copied. Raises
    DistCkptMistralError; then nothing is published.
    """
    output = Path(checkpoint)
    layout = ParallelLayout(tp=tp, pp=pp, ep=ep)
    torch_dist.require_iteration(iteration)
    step = Path(torch_dist.iteration_name(iteration))

    def prepare() -> tuple[Stamps, ModelSource, CheckpointLayout, BytePlan]:
        dtypes.require_weight_dtype(dtype)
        storage.require_writable(output, overwrite=overwrite)
        directory = hub.local_directory(str(hf))
        storage.require_apart(directory, output)
        inputs = stamps(directory.glob("*"))
        source = open_hf(directory, dtype=dtype)
        return inputs, source, *_plan_import(source, layout, dtype, step)

    inputs, source, written, plan = ranks.each(prepare)
    carried, left = hf_directory.carried_files(source.path)
    if left:
        _LOG.warning("too large to travel inside the checkpoint, left behind: %s", ", ".join(left))

    def complete(staging: Path, targets: Mapping[int, TargetFile], checksums: Checksums) -> None:
        written.finish(targets, plan, checksums)
        _write_beside_shards(staging / step, source, carried, layout, dtype or source.main_dtype, iteration)
        storage.write_bytes(staging / step / torch_dist.METADATA_FILE, written.metadata())
        storage.write_bytes(staging / torch_dist.TRACKER_FILE, torch_dist.tracker_text(iteration))

    sizes = written.file_sizes(step)
    options = {"--tp": tp, "--pp": pp, "--ep": ep, "--dtype": dtype, "--iteration": iteration}
    write_output(
        output,
        plan,
        sizes,
        complete=complete,
        manifest=NewManifest(folder=step) if manifest else None,
        checksums=True,
        recipe=Recipe.of(plan, inputs, {"command": "from-hf", **options}),
        beside_bytes=storage.total_bytes(carried),
        overwrite=overwrite,
        resume=resume,
        effort=effort,
        ranks=ranks,
    )
    return Conversion.of(output, plan, sizes, source, num_tensors=len(source.tensors))


def _plan_import(
    source: ModelSource, layout: ParallelLayout, dtype: str | None, step: Path
) -> tuple[CheckpointLayout, BytePlan]:
    """What the new checkpoint's files hold where, and the way there."""
    layout.check(source.config)
    require_equal_aliases(source)
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
    written = torch_dist_writer.lay_out(chunks, objects, num_files=layout.world_size)
    return written, plan_gather(source.index, written.index(step), links)


def require_equal_aliases(source: ModelSource) -> None:
    """A file may hold a tied tensor twice, under both names: then both must be the same, for only one is kept."""
    for tensor in source.tensors:
        if tensor.is_alias:
            main = tensor.rule.parts[0].hf_name
            if first_difference(source, main, source, tensor.hf_name) is not None:
                raise TensorMismatchError(
                    f"{tensor.hf_name!r} in {source.path} differs from {main!r}, but the configuration ties them. "
                    "Set tie_word_embeddings to false in config.json, or remove the tensor that is not meant."
                )


def _chunks(
    source: ModelSource, new: CheckpointMap, links: Sequence[Link], layout: ParallelLayout, dtype: str | None
) -> Iterator[NewChunk]:
    """The chunks that the ranks of ``layout`` would save, one file a rank, without vocabulary padding."""
    stored_dtype = {link.target: source.index.tensors[link.source].dtype for link in links}
    others = new.also_written()
    for cut in cuts(new, new.shapes(), layout):
        yield NewChunk(
            mcore_key=cut.name,
            dtype=dtype or stored_dtype[cut.name],
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
        torch_dist_writer.object_key(key, index, shape)
        for key, shape in shapes.items()
        for index in itertools.product(*map(range, shape))
    ]


def _write_beside_shards(
    directory: Path,
    source: ModelSource,
    carried: Sequence[Path],
    layout: ParallelLayout,
    dtype: str,
    iteration: int | None,
) -> None:
    """Write metadata.json, common.pt and the small Hugging Face files; ``.metadata`` comes last and elsewhere."""
    storage.write_bytes(directory / torch_dist.BACKEND_FILE, torch_dist_writer.BACKEND_JSON)
    state: dict[str, Any] = {
        "args": to_megatron_args(source.config, dtype=dtype, tp=layout.tp, pp=layout.pp, ep=layout.ep),
        "checkpoint_version": 3.0,
        "iteration": iteration or 0,
        "content_metadata": {
            "singleton_local_shards": False,
            "chained_optim_avoid_prefix": True,
            embedded.KEY: embedded.to_record(source.config, source.table, source.hf_files),
        },
    }
    storage.write_bytes(directory / common_state.COMMON_FILE, common_state.write(state))
    (directory / embedded.ASSETS_FOLDER).mkdir()
    for path in carried:
        target = directory / embedded.ASSETS_FOLDER / path.name
        if path.name == hf_directory.CONFIG_FILE:
            storage.write_bytes(target, hf_directory.config_json(source.config.to_hf(), path))
        else:
            storage.copy_file(path, target)
