"""A stored model of any format under Hugging Face names, with the place of every byte."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dist_ckpt_mistral.arguments import require_types
from dist_ckpt_mistral.errors import ConfigError, DistCkptMistralError, UnsupportedModelError
from dist_ckpt_mistral.formats import hf_directory, small_files, stored_checkpoint
from dist_ckpt_mistral.formats.hf_directory import FileSet
from dist_ckpt_mistral.formats.kinds import Kind
from dist_ckpt_mistral.formats.pickles.reader import paused_collector
from dist_ckpt_mistral.formats.places import locate
from dist_ckpt_mistral.formats.safetensors import read_header
from dist_ckpt_mistral.formats.small_files import NamedTokenizer
from dist_ckpt_mistral.gather.dequantize import dequantized
from dist_ckpt_mistral.gather.index import IndexedTensor, TensorIndex
from dist_ckpt_mistral.gather.links import Link
from dist_ckpt_mistral.gather.links import whole as whole_link
from dist_ckpt_mistral.gather.plan import BytePlan, only_dtype, plan_gather, plan_segments
from dist_ckpt_mistral.mapping import hf_record
from dist_ckpt_mistral.mapping.adapter_description import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    adapter_descriptions,
)
from dist_ckpt_mistral.mapping.adapters import adapters_in_files
from dist_ckpt_mistral.mapping.checkpoint_map import PADDING, CheckpointMap, Ignored, Twin, hf_links
from dist_ckpt_mistral.mapping.configuration import (
    Agreed,
    checkpoint_config,
    directory_config,
    matched,
    named_tokenizer,
)
from dist_ckpt_mistral.mapping.consolidated import consolidated_links, indexed_shapes
from dist_ckpt_mistral.mapping.matching import match_consolidated, match_hf
from dist_ckpt_mistral.mapping.quantized import Quantized, match_quantized
from dist_ckpt_mistral.model.config.adapter_config import AdapterConfig
from dist_ckpt_mistral.model.config.mistral_config import (
    ChosenConfig,
    MistralConfig,
    require_config_file,
)
from dist_ckpt_mistral.model.table.rules import ParamState, Stage
from dist_ckpt_mistral.model.table.table import HfTensor, TensorTable, tensor_table
from dist_ckpt_mistral.storage import documents

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ModelSource:
    """A model to read: a Megatron checkpoint, a Hugging Face directory, or a directory of consolidated files.

    Args:
        path: Directory of the model; of a checkpoint root, the iteration's directory.
        kind: What it is, in words.
        agreed: The configuration.
        table: The tensor table of the configuration.
        index: The stored tensors and the place of their bytes. FP8 weights appear with their dequantized values.
        tensors: The Hugging Face tensors that the model holds, in table order.
        links: Hugging Face name -> the stored boxes that make up the tensor, for all tensors and aliases of the table.
        ignored: Stored entries that are not used, with the reason.
        hf_files: Layout of the Hugging Face files that hold or held the weights; None if unknown.
        assets: Directories with the model's small files. The first one that has a file counts.
        named_tokenizer: The directory with a tokenizer of which the checkpoint has only the path.
        carried_from: Directory of the vision tower and projector, which Megatron's model does not have; None without.
        quantized: The FP8 weights and their scales.
        twins: Stored tensors that repeat the values of others.
        adapter_configs: What describes the LoRA adapter among the tensors, if there is one.
    """

    path: Path
    kind: str
    agreed: Agreed
    table: TensorTable
    index: TensorIndex
    tensors: tuple[HfTensor, ...]
    links: Mapping[str, list[Link]]
    ignored: Ignored
    hf_files: FileSet | None
    assets: tuple[Path, ...]
    carried_from: Path | None
    quantized: Quantized = field(default_factory=Quantized)
    twins: tuple[Twin, ...] = ()
    named_tokenizer: NamedTokenizer | None = None
    adapter_configs: tuple[AdapterConfig, ...] = ()

    @property
    def config(self) -> MistralConfig:
        """The configuration of the model."""
        return self.agreed.config

    @property
    def config_from(self) -> str:
        """The place of the configuration, in words."""
        return self.agreed.source

    def dtype_of(self, tensor: HfTensor) -> str:
        """The torch dtype name in which a tensor is stored. Raises TensorMismatchError if it is stored in several."""
        return only_dtype(self.index, self.links[tensor.hf_name])

    @property
    def tokenizer_places(self) -> tuple[Path, ...]:
        """The directories that may have the model's tokenizer. The first one that has a tokenizer counts."""
        return (*self.assets, *([] if self.named_tokenizer is None else [self.named_tokenizer.directory]))

    @property
    def hidden_twins(self) -> tuple[Twin, ...]:
        """The twins that have no Hugging Face name of their own."""
        return tuple(twin for twin in self.twins if twin.name not in self.links)

    @property
    def main_dtype(self) -> str:
        """The torch dtype name of the embedding, which stands for the model's dtype; of an adapter, its own."""
        of_embedding = (tensor for tensor in self.tensors if tensor.rule.stage is Stage.EMBEDDING)
        return self.dtype_of(next(of_embedding, self.tensors[0]))

    def plan_into(self, target: TensorIndex) -> BytePlan:
        """The byte plan that fills ``target``, whose tensors have Hugging Face names."""
        return plan_gather(self.index, target, (link for name in target.tensors for link in self.links[name]))

    def plan_of(self, tensors: Iterable[HfTensor], dtype: str | None = None) -> BytePlan:
        """The plan that reads ``tensors``: one segment each, in this order. ``dtype`` is that of ``plan_segments``."""
        targets = {each.hf_name: (each.shape, self.links[each.hf_name]) for each in tensors}
        return plan_segments(self.index, targets, dtype)


def open_source(
    path: str | Path, *, config: ChosenConfig | None = None, dtype: str | None = None, adapters: bool = False
) -> ModelSource:
    """Open a model of any format, or a hub id. ``config`` takes precedence over the model's own configurations.

    ``dtype`` (a torch name) is the dtype of dequantized FP8 weights; see ``open_hf`` for the default. With
    ``adapters``, it may be a LoRA adapter, alone or beside its model. Without it, that raises UnsupportedModelError.
    """
    place = locate(path, Kind.HF, Kind.CONSOLIDATED, Kind.CHECKPOINT, *([Kind.ADAPTER] if adapters else []))
    if place.kind is Kind.ADAPTER:
        return open_adapter(place.path, config=config)
    if place.kind is Kind.CHECKPOINT:
        source = open_megatron(place.path, config=config)
        return source if adapters else require_model(source)
    return open_hf(place.path, config=config, dtype=dtype)


def require_model(source: ModelSource) -> ModelSource:
    """``source``, if it is a model without adapter; else raise UnsupportedModelError."""
    if source.table.adapters:
        raise UnsupportedModelError(
            f"{source.path} holds a LoRA adapter, alone or beside its model: expected a model. to-hf --merge-adapter "
            "makes a model of both."
        )
    return source


def open_adapter(path: Path, *, config: ChosenConfig | None = None) -> ModelSource:
    """Open the LoRA adapter in a directory of PEFT. ``config`` is that of its model.

    By default it is the configuration of the model that adapter_config.json names. Raises ConfigError without one.
    """
    where = path / ADAPTER_CONFIG_FILE
    adapter = AdapterConfig.from_peft(documents.read_json(where), str(where))
    agreed = directory_config(path, config) if config is not None else _config_of_base(adapter)
    files = adapter_file_set(path)
    whole = tensor_table(agreed.config)
    tensors = {tensor.name: tensor for tensor in files.tensors(whole.of_adapters(()).usual_name)}
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    table = whole.of_adapters(adapters_in_files(whole.rules, shapes))
    spelling, ignored = match_hf(table, shapes, str(path), adapter=True)
    return ModelSource(
        path=path,
        kind=Kind.ADAPTER.value,
        agreed=agreed,
        table=table,
        index=files.tensor_index(path, table.usual_name),
        tensors=spelling.tensors,
        links={name: [whole_link(name, tensor.shape)] for name, tensor in table.hf_tensors().items()},
        ignored=ignored,
        hf_files=files,
        assets=(path,),
        carried_from=None,
        adapter_configs=(adapter,),
    )


def adapter_file_set(path: Path) -> FileSet:
    """The file with the tensors of an adapter in a directory of PEFT."""
    return FileSet(files={ADAPTER_FILE: read_header(path / ADAPTER_FILE)})


def _config_of_base(adapter: AdapterConfig) -> Agreed:
    """The configuration of the model that an adapter is for, by its name. Raises ConfigError if it is not found."""
    advice = "Give the model's config.json, its directory or its hub id with --base (--config for other commands)."
    if adapter.base_model is None:
        raise ConfigError(
            f"base_model_name_or_path in {adapter.source}: expected the adapter's model, got none. {advice}"
        )
    try:
        place = locate(adapter.base_model, Kind.HF, Kind.CONSOLIDATED, Kind.WEIGHTLESS)
        return directory_config(place.path)
    except DistCkptMistralError as error:
        raise ConfigError(
            f"{adapter.source} is for the model {adapter.base_model}, whose configuration is needed: {error}. {advice}"
        ) from error


def open_hf(path: Path, *, config: ChosenConfig | None = None, dtype: str | None = None) -> ModelSource:
    """Open a Hugging Face directory, or a directory of consolidated files.

    It must hold a configuration unless ``config`` is given. FP8 weights are dequantized to ``dtype``; by default to the
    dtype that the configuration names, or else to bfloat16.
    """
    kind = locate(path, Kind.HF, Kind.CONSOLIDATED).kind
    if config is None:
        require_config_file(path)
    files = hf_directory.read_directory(path)
    hf_directory.warn_of_files_not_read(path, files)
    agreed = directory_config(path, config, files.names())
    table = tensor_table(agreed.config)
    if kind is Kind.CONSOLIDATED:
        return _open_consolidated(path, agreed, table, files)
    quantized = match_quantized(files.tensors(table.usual_name), agreed.config, str(path), dtype)
    scales = dict(quantized.ignored)
    shapes = {each.name: each.shape for each in files.tensors(table.usual_name) if each.name not in scales}
    spelling, ignored = match_hf(table, shapes, str(path))
    again = {tensor.hf_name: tensor for tensor in spelling.stored_again}
    links = hf_links(table, shapes.keys() - again.keys())
    index = dequantized(files.tensor_index(path, table.usual_name), quantized.weights, quantized.dtype)
    if quantized.weights:
        _LOG.info("%s: %s", path, quantized.note)
    return ModelSource(
        path=path,
        kind=Kind.HF.value,
        agreed=agreed,
        table=table,
        index=index,
        tensors=spelling.tensors,
        links=links | {name: [whole_link(name, tensor.shape)] for name, tensor in again.items()},
        ignored=(*quantized.ignored, *ignored),
        hf_files=None if ignored or quantized.weights else files,
        assets=(path,),
        carried_from=path if table.carried else None,
        quantized=quantized,
        twins=tuple(Twin.of_alias(tensor, links[name]) for name, tensor in again.items()),
    )


def _open_consolidated(path: Path, agreed: Agreed, table: TensorTable, files: FileSet) -> ModelSource:
    """A model in consolidated files, under Hugging Face names."""
    index = files.tensor_index(path)
    shapes = {name: tensor.global_shape for name, tensor in index.tensors.items()}
    tensors = match_consolidated(table, shapes, str(path))
    seen = {
        name: IndexedTensor.whole(
            name, stored.dtype, shape, file=int(stored.files[0]), position=int(stored.positions[0])
        )
        for tensor in tensors
        for name, shape in indexed_shapes(tensor).items()
        for stored in (index.tensors[name],)
    }
    return ModelSource(
        path=path,
        kind=Kind.CONSOLIDATED.value,
        agreed=agreed,
        table=table,
        index=TensorIndex(files=index.files, tensors=seen),
        tensors=tuple(tensors),
        links={tensor.hf_name: consolidated_links(tensor) for tensor in table.hf_tensors().values()},
        ignored=(),
        hf_files=None,
        assets=(path,),
        carried_from=path if table.carried else None,
    )


def open_megatron(
    path: Path, *, config: ChosenConfig | None = None, state: ParamState = ParamState.WEIGHTS
) -> ModelSource:
    """Open a Megatron checkpoint (root or iteration).

    The configuration is ``config``, or else the first description of the checkpoint (see ``configuration``); all of
    them must agree. ``state`` selects the weights, or a state of the optimizer such as the master weights.
    """
    checkpoint = stored_checkpoint.open_stored(path)
    known = matched(checkpoint, checkpoint_config(checkpoint, config), state)
    table, found, stored = known.table, known.found, known.stored
    hf_files = hf_record.original_files(checkpoint)
    shapes = {name: tensor.global_shape for name, tensor in stored.tensors.items()}
    twins = found.twins(stored.tensors)
    with paused_collector():  # none of a hundred thousand new links is garbage
        links = {tensor.hf_name: found.links(tensor) for tensor in found.table.hf_tensors().values()}
    index = stored.index([*found.names(), *(twin.name for twin in twins)])
    if known.ranks is not None and state is ParamState.WEIGHTS and (heads := known.ranks.heads):
        names = [twin.name for twin in heads]
        index, twins = index.joined(known.ranks.raw.index(names), names), (*twins, *heads)
    return ModelSource(
        path=checkpoint.directory,
        kind=f"Megatron {checkpoint.backend} checkpoint" + (" of an adapter" if table.adapters else ""),
        agreed=known.agreed,
        table=table,
        index=index,
        tensors=_described(found.table, hf_files),
        links=links,
        ignored=(*found.ignored, *_padding(table, found, shapes)),
        hf_files=hf_files,
        assets=small_files.folders_beside(checkpoint.directory),
        named_tokenizer=named_tokenizer(checkpoint),
        carried_from=checkpoint.directory if found.table.carried else None,
        twins=twins,
        adapter_configs=adapter_descriptions(checkpoint) if table.adapters else (),
    )


def hf_content_metadata(config: MistralConfig, hf: str | Path | None = None) -> dict[str, Any]:
    """The record of a model for Megatron's ``save``: with it, an iteration describes itself.

    It is the same on all ranks, and has the key ``dist_ckpt_mistral`` and a version. megatron-core stores it as part of
    ``content_metadata``, and returns it from ``load_content_metadata``, so that a resumed run can pass it on:

        dist_checkpointing.save(state, path, content_metadata={**metadata, **dcm.hf_content_metadata(config)})

    Megatron-LM stores its args: ``pretrain(..., args_defaults=dcm.hf_content_metadata(config))`` adds the record there.
    A tokenizer is too large for either. It comes along in the root's folder ``hf``, see ``describe``.

    Args:
        config: The configuration of the model. Its ``hf_config`` is what ``to_hf`` writes.
        hf: Hugging Face directory or hub id of the original model. With it the record has the layout of its files,
            so that exports are divided into the same files. It takes about 120 bytes for each tensor.

    Returns:
        One item, of plain JSON types.

    Raises:
        ConfigError: ``hf`` has another configuration, which reads weights otherwise.
        FormatError: ``hf`` holds no model, or is damaged.
        TensorMismatchError: ``hf`` holds other tensors than a model with ``config``.

    Example:
        >>> sizes = dict(vocab_size=32768, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32)
        >>> config = MistralConfig(**sizes, num_attention_heads=32, num_key_value_heads=8, head_dim=128)
        >>> [*hf_content_metadata(config)]
        ['dist_ckpt_mistral']
    """
    require_types(hf_content_metadata, **locals())
    hf_files = None
    if hf is not None:
        chosen = ChosenConfig(config=config, source="the given configuration")
        hf_files = open_hf(locate(hf, Kind.HF, Kind.CONSOLIDATED).path, config=chosen).hf_files
    return {hf_record.KEY: hf_record.to_record(config, tensor_table(config), hf_files)}


def with_padding_rows(source: ModelSource) -> ModelSource:
    """``source`` with links that also reach the stored rows behind the vocabulary, which training pads it with.

    The tensors of the vocabulary then seem to have more rows than in the table. Nothing changes where none are stored.
    """
    extended = {}
    for name, tensor in source.table.hf_tensors().items():
        links = source.links.get(name, [])
        if tensor.rule.padded_vocabulary and len(links) == 1:
            rows = source.index.tensors[links[0].source].global_shape[0] - links[0].source_offset[0]
            extended[name] = [replace(links[0], shape=(rows, *links[0].shape[1:]))]
    return replace(source, links={**source.links, **extended})


def _described(table: TensorTable, hf_files: FileSet | None) -> tuple[HfTensor, ...]:
    """All tensors of the table; aliases only if the original files had them."""
    files = hf_files or FileSet(files={})
    return table.spelling(files.by_name("the record of the original files", table.usual_name)).tensors


def _padding(table: TensorTable, found: CheckpointMap, shapes: Mapping[str, tuple[int, ...]]) -> Ignored:
    """The vocabulary rows that are padding."""
    padded = []
    for rule in table.rules:
        if rule.padded_vocabulary:
            stored = found.stored(rule, ())[0]
            name = found.stored_name(stored.mcore_key)
            rows = shapes[name][0]
            if rows > rule.shape[0]:
                padded.append((f"{name}[{rule.shape[0]}:{rows}]", PADDING))
    return tuple(padded)
