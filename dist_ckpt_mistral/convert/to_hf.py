"""A new Hugging Face directory: what its files hold, and what lies beside them."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dist_ckpt_mistral.convert.conversion import Conversion, LossPolicy
from dist_ckpt_mistral.convert.journal import Recipe
from dist_ckpt_mistral.convert.output import DEFAULT_OUTPUT, Checksums, NewFiles, NewManifest, Output, write_output
from dist_ckpt_mistral.convert.ranks import ALONE, Ranks
from dist_ckpt_mistral.errors import ConfigError
from dist_ckpt_mistral.formats import hf_directory, small_files
from dist_ckpt_mistral.formats.hf_directory import FileSet, tensor_spans
from dist_ckpt_mistral.formats.places import CONFIG_FILE, INDEX_FILE, Kind, require_not_swapped, resolve_directory
from dist_ckpt_mistral.gather import dtypes
from dist_ckpt_mistral.gather.dtypes import Shape
from dist_ckpt_mistral.gather.execute import DEFAULT_EFFORT, Effort
from dist_ckpt_mistral.gather.plan import BytePlan
from dist_ckpt_mistral.mapping.source import ModelSource, completed, open_megatron, require_equal_twins
from dist_ckpt_mistral.model.config.mistral_config import GivenConfig, chosen_config, given_directory
from dist_ckpt_mistral.model.config.quantization import described_method
from dist_ckpt_mistral.model.table.rules import ParamState
from dist_ckpt_mistral.storage import paths
from dist_ckpt_mistral.storage.local import Sources, TargetFile

_LOG = logging.getLogger(__name__)


def to_hf(
    checkpoint: str | Path,
    hf: str | Path,
    *,
    config: GivenConfig | None = None,
    weights: str = "model",
    dtype: str | None = None,
    allow_lossy: bool = False,
    output: Output = DEFAULT_OUTPUT,
    effort: Effort = DEFAULT_EFFORT,
    ranks: Ranks = ALONE,
) -> Conversion:
    """Export a Megatron checkpoint to a Hugging Face directory that ``from_pretrained`` loads.

    A checkpoint that ``from_hf`` wrote gives back the original files, byte for byte.

    Args:
        checkpoint: Root of a Megatron checkpoint, or one ``iter_*`` or ``release`` directory in it.
        hf: Directory to create.
        config: For checkpoints that lost their configuration: a ``MistralConfig``, a config.json, or a directory or hub
            id with one and the tokenizer. A directory also gives the vision tower and projector of a multimodal model,
            which training in Megatron drops.
        weights: ``"model"``, or ``"master"`` for the optimizer's float32 copy of the weights.
        dtype: Converts all weights to ``"bfloat16"``, ``"float16"`` or ``"float32"``; None keeps the dtype of each.
        allow_lossy: Warn where ``dtype`` destroys values (finite ones become infinite, others zero), and count them.
        output: How the directory is written.
        effort: How much of the machine to use.
        ranks: The processes that share the work; by default this one alone.

    Returns:
        What was written, or with ``output.dry_run`` would be.

    Raises:
        DistCkptMistralError: The checkpoint is damaged, contradicts itself or its configuration, or the directory
            cannot be written; values would be destroyed without ``allow_lossy``. Then nothing is published.
    """
    checkpoint, target = Path(checkpoint), Path(hf)
    state = _which_weights(weights)

    def find() -> Path:
        dtypes.require_weight_dtype(dtype)
        require_not_swapped(checkpoint, target, Kind.CHECKPOINT)
        paths.require_apart(checkpoint, target)
        paths.require_writable(target, overwrite=output.overwrite)
        return resolve_directory(checkpoint)

    def prepare() -> tuple[Sources, ModelSource, FileSet, BytePlan]:
        given = given_directory(config, vision=True)
        with Sources() as inputs:
            inputs.look_at([*directory.rglob("*"), *(given.iterdir() if given else ())])
            opened = open_megatron(directory, config=chosen_config(config), state=state)
            require_equal_twins(opened)
            source = completed(opened, given)
            file_set = hf_files(source, dtype, output.max_file_bytes)
            plan = source.plan_into(file_set.tensor_index(target, source.table.usual_name))
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
    options = {"--weights": weights, "--dtype": dtype, "--max-file-size": output.max_file_bytes}
    new = NewFiles(
        plan=plan,
        file_bytes=sizes,
        complete=complete,
        manifest=NewManifest(folder=Path(), tensors=tensor_spans(file_set)),
        checksums=False,
        recipe=Recipe.of(plan, inputs, {"command": "to-hf", **options, "configuration": source.config.to_hf()}),
        beside=[*carried.values()],
        losses=LossPolicy(allowed=allow_lossy),
    )
    losses = write_output(target, new, output=output, effort=effort, ranks=ranks)
    return Conversion(
        output=target,
        config_from=source.config_from,
        num_tensors=len(plan.segments),
        num_bytes=plan.num_bytes,
        files=sizes,
        ignored=source.ignored,
        losses=losses,
    )


def _which_weights(weights: str) -> ParamState:
    """The state of the parameters that an option calls ``model`` or ``master``."""
    states = {"model": ParamState.WEIGHTS, "master": ParamState.MASTER}
    if weights not in states:
        raise ConfigError(f"weights={weights!r} is not supported: expected one of {', '.join(states)}")
    return states[weights]


def hf_files(source: ModelSource, dtype: str | None, max_file_bytes: int) -> FileSet:
    """The files to write: the original ones where they still fit the tensors, else as ``save_pretrained`` would."""
    known = source.table.hf_tensors()

    def stored(names: Iterable[str]) -> dict[str, tuple[str, Shape]]:
        return {name: (dtype or source.dtype_of(known[name]), known[name].shape) for name in names}

    if source.hf_files is not None:
        held = source.hf_files.by_name(str(source.path), source.table.usual_name)
        original = {name: (tensor.dtype, tensor.shape) for name, (_, _, tensor) in held.items()}
        is_whole = original.keys() <= source.links.keys() and not source.table.spelling(original).missing
        if is_whole and original == stored(original):
            return source.hf_files
        _LOG.info("the tensors differ in name or dtype from the original files: the files are laid out anew")
    usual = stored(tensor.hf_name for tensor in source.tensors if not tensor.is_alias)
    tensors = [(name, *each) for name, each in usual.items()]
    return hf_directory.plan_files(tensors, max_file_bytes=max_file_bytes)


def texts(source: ModelSource, files: FileSet, carried: Mapping[str, Path]) -> dict[str, bytes | None]:
    """What describes the weights in ``files``, by name: the text in ``carried`` where it is true of them; None is none.

    The index comes last, as it makes a model in several files visible.
    """
    if method := described_method(source.config.hf_config or {}):
        _LOG.info("%s describes quantized weights (%s): that is left out, these are not quantized", CONFIG_FILE, method)
    return {
        CONFIG_FILE: _config_json(source, files, carried.get(CONFIG_FILE)),
        INDEX_FILE: files.index_json(carried.get(INDEX_FILE)),
    }


def _config_json(source: ModelSource, files: FileSet, original: Path | None) -> bytes:
    """config.json: the original text where it is still true, else with the dtype that most of the weights have.

    A text is true that says no dtype. So is one that says another than the weights have, if it came with these very
    weights.
    """
    sizes: Counter[str] = Counter()
    for file in files.files.values():
        for tensor in file.tensors:
            sizes[tensor.dtype] += tensor.end - tensor.begin
    dtype = sizes.most_common(1)[0][0]
    if source.config.hf_config is None:
        _LOG.warning(
            "config.json is made from %s, which has no bos_token_id, eos_token_id and pad_token_id: transformers takes "
            "its defaults for this family. Give the original Hugging Face directory with --config to keep its own.",
            source.config_from,
        )
    content = source.config.to_hf()
    text = hf_directory.text_of(original, content)
    if text is not None and (source.config.dtype in {None, dtype} or _is_imported(source, files, content)):
        return text
    if source.config.dtype != dtype:
        content["dtype" if "dtype" in content else "torch_dtype"] = dtype
    return hf_directory.config_json(content, original)


def _is_imported(source: ModelSource, files: FileSet, content: Mapping[str, Any]) -> bool:
    """Whether configuration and files are those that an import left in the checkpoint."""
    left = [folder / CONFIG_FILE for folder in source.assets if (folder / CONFIG_FILE).is_file()]
    return files is source.hf_files and any(hf_directory.text_of(path, content) for path in left)
