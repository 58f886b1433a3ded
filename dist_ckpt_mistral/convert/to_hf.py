"""``to-hf``: a new Hugging Face directory of a Megatron checkpoint, with its safetensors files and its other files."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from dist_ckpt_mistral.arguments import require_types
from dist_ckpt_mistral.convert.adapter_directory import adapter_files, adapter_of, adapter_texts, imported_small_files
from dist_ckpt_mistral.convert.conversion import Conversion, Loss, LossPolicy
from dist_ckpt_mistral.convert.journal import Recipe
from dist_ckpt_mistral.convert.output import (
    DEFAULT_OUTPUT,
    NewFiles,
    Output,
    source_directory,
    write_output,
)
from dist_ckpt_mistral.convert.ranks import ALONE, Ranks
from dist_ckpt_mistral.errors import ConfigError, TensorMismatchError
from dist_ckpt_mistral.formats import hf_directory, small_files
from dist_ckpt_mistral.formats.hf_directory import FileSet, tensor_spans
from dist_ckpt_mistral.formats.kinds import CONFIG_FILE, INDEX_FILE, Kind
from dist_ckpt_mistral.formats.places import locate
from dist_ckpt_mistral.gather import dtypes
from dist_ckpt_mistral.gather.dtypes import Shape
from dist_ckpt_mistral.gather.execute import DEFAULT_EFFORT, Effort
from dist_ckpt_mistral.gather.parts import Around
from dist_ckpt_mistral.gather.plan import BytePlan
from dist_ckpt_mistral.mapping.merge import adapter_part, base_part, merged, without_zeros
from dist_ckpt_mistral.mapping.source import ModelSource, open_megatron, open_source
from dist_ckpt_mistral.mapping.twins import require_equal_twins
from dist_ckpt_mistral.mapping.vision import completed
from dist_ckpt_mistral.messages import human_bytes
from dist_ckpt_mistral.model.config.adapter_config import AdapterConfig
from dist_ckpt_mistral.model.config.mistral_config import ChosenConfig, GivenConfig, chosen_config, given_directory
from dist_ckpt_mistral.model.config.quantization import described_method
from dist_ckpt_mistral.model.table.rules import ParamState
from dist_ckpt_mistral.storage.remote_path import as_path
from dist_ckpt_mistral.storage.sources import Sources

_LOG = logging.getLogger(__name__)
#: The values of ``weights``, and the state of the parameters that each exports.
_STATES: Final = {"model": ParamState.WEIGHTS, "master": ParamState.MASTER}


def to_hf(
    checkpoint: str | Path,
    hf: str | Path,
    *,
    config: GivenConfig | None = None,
    weights: str = "model",
    dtype: str | None = None,
    allow_lossy: bool = False,
    merge_adapter: bool = False,
    base: str | Path | None = None,
    lora_alpha: float | None = None,
    output: Output = DEFAULT_OUTPUT,
    effort: Effort = DEFAULT_EFFORT,
    ranks: Ranks = ALONE,
) -> Conversion:
    """Export a Megatron checkpoint to a Hugging Face directory that ``from_pretrained`` loads.

    A checkpoint that ``from_hf`` wrote gives back the original files, byte for byte. A LoRA adapter becomes a directory
    that PEFT loads.

    Args:
        checkpoint: Root of a Megatron checkpoint, or one ``iter_*`` or ``release`` directory in it.
        hf: Directory to create.
        config: Configuration for a checkpoint that has lost its own: a ``MistralConfig``, a config.json, or a directory
            or hub id with one. A directory or hub id also supplies the tokenizer, and the vision tower and projector
            that training in Megatron drops from a multimodal model.
        weights: ``"model"``, or ``"master"`` for the optimizer's float32 copy of the weights.
        dtype: Converts all weights to ``"bfloat16"``, ``"float16"`` or ``"float32"``; None keeps the dtype of each.
        allow_lossy: Accept that ``dtype`` makes values infinite or zero, and count them in a warning.
        merge_adapter: Export the model with its LoRA adapter merged: each adapted W becomes W + scale * B A, computed
            by numpy in float32 and rounded once.
        base: The model that an adapter belongs to, in any format that is read. Needed to merge an adapter that was
            saved without its model. Refused for a checkpoint without an adapter, whose configuration is ``config``.
        lora_alpha: The alpha of an adapter whose checkpoint does not say it.
        output: How to write the directory.
        effort: Threads and memory to use.
        ranks: The processes that share the work; by default this one alone.

    Returns:
        The files that were written, or with ``output.dry_run`` would be.

    Raises:
        ConfigError: There is no configuration, or configurations contradict each other.
        FormatError: The checkpoint is damaged.
        TensorMismatchError: Tensors are missing, unknown or of another shape.
        OutputError: The directory cannot be written, or ``dtype`` destroys values. Nothing is published.

    Example:
        >>> dist_ckpt_mistral.to_hf("ckpt", "out").num_tensors  # doctest: +SKIP
        291
    """
    require_types(to_hf, **locals())
    checkpoint, target = as_path(checkpoint), as_path(hf)
    if weights not in _STATES:
        raise ConfigError(f"weights={weights!r} is not supported: expected one of {', '.join(_STATES)}")

    def find() -> Path:
        dtypes.require_weight_dtype(dtype)
        return source_directory(checkpoint, target, output)

    def prepare() -> tuple[Sources, ModelSource, FileSet, BytePlan]:
        config_directory = given_directory(config)
        with Sources() as inputs:
            folders = [*([config_directory] if config_directory else ()), *small_files.hf_folders(directory)]
            inputs.look_at([*directory.rglob("*"), *(path for folder in folders for path in folder.iterdir())])
            model = _opened_base(base, inputs) if base is not None and merge_adapter else None
            chosen = _chosen(config, base, model)
            opened = open_megatron(directory, config=chosen, state=_STATES[weights])
            require_equal_twins(opened)
            if opened.table.adapters or merge_adapter or (base, lora_alpha) != (None, None):
                adapter = adapter_of(opened, lora_alpha, None if base is None else str(base))
                source = _merged(opened, model, adapter, dtype) if merge_adapter else _alone(opened, adapter)
            else:
                source = opened
            source = completed(source, config_directory)
            file_set = hf_files(source, dtype, output.max_file_bytes)
            plan = source.plan_into(file_set.tensor_index(target, source.table.usual_name))
        return inputs, source, file_set, plan

    directory = ranks.on_first(find)  # once for all ranks: training may save another iteration meanwhile
    inputs, source, file_set, plan = ranks.each(prepare)
    options: dict[str, object] = {"command": "to-hf", "--weights": weights, "--dtype": dtype}
    options["--max-file-size"] = output.max_file_bytes
    if merge_adapter:
        options |= {"--merge-adapter": True, "--base": None if base is None else str(base), "--lora-alpha": lora_alpha}
    losses = LossPolicy(allowed=allow_lossy)
    new = new_directory(source, file_set, plan, inputs, given_directory(config), options=options, losses=losses)
    return conversion(target, source, new, write_output(target, new, output=output, effort=effort, ranks=ranks))


def _opened_base(base: str | Path, inputs: Sources) -> ModelSource:
    """The model to merge an adapter into. Its files join ``inputs`` before they are opened."""
    place = locate(base, Kind.HF, Kind.CONSOLIDATED, Kind.CHECKPOINT)
    inputs.look_at(place.path.rglob("*"))
    model = open_source(place.path)
    if model.table.adapters:
        raise TensorMismatchError(f"{place.path} is itself an adapter: give the model that it belongs to with --base.")
    require_equal_twins(model)
    return model


def _chosen(config: GivenConfig | None, base: str | Path | None, model: ModelSource | None) -> ChosenConfig | None:
    """The caller's configuration, or else that of the model that the adapter belongs to."""
    if config is None and model is not None:
        return ChosenConfig(config=model.config, source=f"{model.config_from} of {model.path}")
    return chosen_config(base if config is None else config)


def _alone(opened: ModelSource, adapter: AdapterConfig) -> ModelSource:
    """The adapter in ``opened``, for a directory of PEFT."""
    _LOG.info("adapter: alpha %s from %s", adapter.alpha, adapter.source)
    source = adapter_part(opened)
    if len(source.tensors) < len(opened.tensors):
        _LOG.warning(
            "%s also holds the model that the adapter belongs to: it stays behind. --merge-adapter exports the model "
            "with the adapter merged.",
            opened.path,
        )
    return replace(without_zeros(source), adapter_configs=(adapter,))


def _merged(opened: ModelSource, model: ModelSource | None, adapter: AdapterConfig, dtype: str | None) -> ModelSource:
    """The model in ``opened``, or else ``model``, with the adapter in ``opened`` merged into it."""
    if model is None:
        model = base_part(opened)
        if not model.tensors:
            named = "" if adapter.base_model is None else f" ({adapter.source} calls it {adapter.base_model})"
            raise TensorMismatchError(
                f"{opened.path} holds an adapter alone: to merge it, its model is needed{named}. Give that with "
                "--base: a Hugging Face directory, a hub id or a Megatron checkpoint."
            )
    _LOG.info("adapter: alpha %s from %s, merged in float32", adapter.alpha, adapter.source)
    return merged(model, without_zeros(adapter_part(opened)), adapter, dtype)


def new_directory(
    source: ModelSource,
    file_set: FileSet,
    plan: BytePlan,
    inputs: Sources,
    config_directory: Path | None,
    *,
    options: Mapping[str, object],
    losses: LossPolicy,
) -> NewFiles:
    """The content of a Hugging Face directory of ``source``: the files that ``plan`` fills, and all small ones.

    ``config_directory`` supplies small files before those of the source. ``options`` are the caller's choices.
    """
    _LOG.info("configuration: %s", source.config_from)
    if source.carried_from is not None:
        _LOG.info("vision tower and projector: unchanged from %s", source.carried_from)
    if source.table.adapters:
        (adapter,) = source.adapter_configs
        copied_files, texts = imported_small_files(source, adapter), adapter_texts(source, adapter)
    else:
        copied_files, texts = other_files(source, file_set, config_directory)
    inputs.look_at(copied_files.values())

    heads = [file.head for file in file_set.files.values()]

    def complete(staging: Path) -> None:
        small_files.write_small_files(staging, copied_files, texts)

    return NewFiles(
        plan=plan,
        file_bytes={name: file.num_bytes for name, file in file_set.files.items()},
        complete=complete,
        around=lambda number: [Around.fixed(0, heads[number])],
        commit=(INDEX_FILE, CONFIG_FILE, small_files.ADAPTER_FILE),
        folder=Path(),
        tensors=tensor_spans(file_set),
        recipe=Recipe.of(plan, inputs, {**options, "configuration": source.config.to_hf()}),
        copied_files=[*copied_files.values()],
        losses=losses,
    )


def other_files(
    source: ModelSource, file_set: FileSet, config_directory: Path | None
) -> tuple[dict[str, Path], dict[str, bytes | None]]:
    """What lies beside the weights in a Hugging Face directory of ``source``, whose tensors are in ``file_set``.

    Returns the files to copy by name, and the content of those that are written; None if there is no such file.
    """
    places = [*([config_directory] if config_directory else ()), *source.assets]
    copied_files = small_files.gathered(places, source.named_tokenizer)
    return copied_files, _texts(source, file_set, copied_files)


def conversion(target: Path, source: ModelSource, new: NewFiles, losses: tuple[Loss, ...]) -> Conversion:
    """The result of writing ``new`` to ``target``."""
    return Conversion(
        output=target,
        config_from=source.config_from,
        num_tensors=len(new.plan.segments),
        num_bytes=new.plan.num_bytes,
        files=new.file_bytes,
        ignored=source.ignored,
        is_adapter=bool(source.table.adapters),
        losses=losses,
    )


def hf_files(source: ModelSource, dtype: str | None, max_file_bytes: int) -> FileSet:
    """The files to write: the original ones if the tensors still fit them, else files as of ``save_pretrained``.

    A chosen maximum size counts for the original ones, too; the default does not, so that exports equal the original.
    """
    if source.table.adapters:
        return adapter_files(source, dtype)
    hf_tensors = source.table.hf_tensors()

    def described(names: Iterable[str]) -> dict[str, tuple[str, Shape]]:
        return {name: (dtype or source.dtype_of(hf_tensors[name]), hf_tensors[name].shape) for name in names}

    if source.hf_files is not None:
        by_name = source.hf_files.by_name(str(source.path), source.table.usual_name)
        original = {name: (tensor.dtype, tensor.shape) for name, (_, _, tensor) in by_name.items()}
        is_whole = original.keys() <= source.links.keys() and not source.table.spelling(original).missing
        largest = max((file.num_bytes for file in source.hf_files.files.values()), default=0)
        is_small = max_file_bytes == DEFAULT_OUTPUT.max_file_bytes or largest <= max_file_bytes
        if is_whole and is_small and original == described(original):
            return source.hf_files
        why = (
            "the tensors differ in name or dtype from the original files"
            if is_small
            else f"the original files have up to {human_bytes(largest)}, more than {human_bytes(max_file_bytes)}"
        )
        _LOG.info("%s: they are divided into new files", why)
    usual = described(tensor.hf_name for tensor in source.tensors if not tensor.is_alias)
    tensors = [(name, *dtype_and_shape) for name, dtype_and_shape in usual.items()]
    return hf_directory.plan_files(tensors, max_file_bytes=max_file_bytes)


def _texts(source: ModelSource, files: FileSet, copied_files: Mapping[str, Path]) -> dict[str, bytes | None]:
    """The content of config.json and of the index for ``files``; None if there is no index.

    A file in ``copied_files`` that describes ``files`` correctly keeps its bytes. The index is last, because it makes a
    model in several files visible.
    """
    if method := described_method(source.config.hf_config or {}):
        _LOG.info("%s describes quantized weights (%s): that is left out, these are not quantized", CONFIG_FILE, method)
    return {
        CONFIG_FILE: _config_json(source, files, copied_files.get(CONFIG_FILE)),
        INDEX_FILE: files.index_json(copied_files.get(INDEX_FILE)),
    }


def _config_json(source: ModelSource, files: FileSet, original: Path | None) -> bytes:
    """The content of config.json: the original bytes if they are correct, else with the dtype of most weights.

    The original is correct if it has the values of ``source`` and either no dtype, the dtype of most weights, or any
    dtype if it was imported with these very files.
    """
    sizes: Counter[str] = Counter()
    for file in files.files.values():
        for tensor in file.tensors:
            sizes[tensor.dtype] += tensor.end - tensor.begin
    dtype = sizes.most_common(1)[0][0]
    if source.config.hf_config is None:
        _LOG.warning(
            "config.json is made from %s, which has no bos_token_id, eos_token_id and pad_token_id: transformers takes "
            "its defaults for this family. Give the original Hugging Face directory with --config to keep its values.",
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
    """Whether ``content`` and ``files`` are the configuration and the files that were imported into the checkpoint."""
    imported = [folder / CONFIG_FILE for folder in source.assets if (folder / CONFIG_FILE).is_file()]
    return files is source.hf_files and any(hf_directory.text_of(path, content) for path in imported)
