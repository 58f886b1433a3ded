"""One view of every place that a model can be read from: its tensors in Hugging Face's names, and their bytes."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from dist_ckpt_mistral.errors import DistCkptMistralError, TensorMismatchError
from dist_ckpt_mistral.formats import hf_directory, small_files, stored_checkpoint
from dist_ckpt_mistral.formats.hf_directory import FileSet
from dist_ckpt_mistral.formats.pickles.reader import paused_collector
from dist_ckpt_mistral.formats.places import Kind, locate
from dist_ckpt_mistral.gather.compare import compare_bits
from dist_ckpt_mistral.gather.dequantize import dequantized
from dist_ckpt_mistral.gather.execute import DEFAULT_EFFORT, Effort
from dist_ckpt_mistral.gather.index import IndexedTensor, TensorIndex
from dist_ckpt_mistral.gather.links import Link, whole
from dist_ckpt_mistral.gather.plan import BytePlan, only_dtype, plan_gather, plan_segments
from dist_ckpt_mistral.mapping import configuration
from dist_ckpt_mistral.mapping.checkpoint_map import PADDING, CheckpointMap, Ignored, Twin, hf_links
from dist_ckpt_mistral.mapping.configuration import Agreed, checkpoint_config, directory_config, matched, read_embedded
from dist_ckpt_mistral.mapping.consolidated import consolidated_links, indexed_shapes
from dist_ckpt_mistral.mapping.matching import match_consolidated, match_hf
from dist_ckpt_mistral.mapping.quantized import Quantized, match_quantized
from dist_ckpt_mistral.messages import listed
from dist_ckpt_mistral.model.config.mistral_config import (
    ChosenConfig,
    MistralConfig,
    require_config_file,
)
from dist_ckpt_mistral.model.table.rules import ParamState, Place
from dist_ckpt_mistral.model.table.table import HfTensor, TensorTable, tensor_table

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ModelSource:
    """A model that can be read: a Megatron checkpoint, a Hugging Face directory, or one of Mistral AI's own files.

    ``tensors`` are those it holds, in table order; ``links`` say of each, and of all aliases in the table, which stored
    boxes make it up. ``twins`` are stored tensors whose values are stored a second time. ``hf_files`` is how Hugging
    Face files hold or held it, ``assets`` the directories of the small files that belong to it: of a name that several
    have, the first counts.
    ``quantized`` says which weights are stored as FP8 numbers and scales: the index has their values.
    ``carried_from`` is where the tensors are that Megatron's model does not have: None if there are none, or nowhere.
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

    @property
    def config(self) -> MistralConfig:
        """The configuration that the model goes by."""
        return self.agreed.config

    @property
    def config_from(self) -> str:
        """Where the configuration is from, in words."""
        return self.agreed.source

    def dtype_of(self, tensor: HfTensor) -> str:
        """The torch dtype name in which a tensor is stored. Raises TensorMismatchError if it is stored in several."""
        return only_dtype(self.index, self.links[tensor.hf_name])

    @property
    def hidden_twins(self) -> tuple[Twin, ...]:
        """The twins that have no Hugging Face name of their own, by which they could be seen."""
        return tuple(twin for twin in self.twins if twin.name not in self.links)

    @property
    def main_dtype(self) -> str:
        """The torch dtype name of the embedding, which is that of the model."""
        return next(self.dtype_of(tensor) for tensor in self.tensors if tensor.rule.place is Place.EMBEDDING)

    def plan_into(self, target: TensorIndex) -> BytePlan:
        """The byte plan that fills ``target``, whose tensors have Hugging Face names."""
        return plan_gather(self.index, target, (link for name in target.tensors for link in self.links[name]))

    def plan_of(self, tensors: Iterable[HfTensor]) -> BytePlan:
        """A plan for reading: one segment for each of ``tensors``, in this order."""
        return plan_segments(self.index, {each.hf_name: (each.shape, self.links[each.hf_name]) for each in tensors})


def open_source(path: str | Path, *, config: ChosenConfig | None = None, dtype: str | None = None) -> ModelSource:
    """Open whatever ``path`` is, a hub id included. ``config`` comes before the configurations that it brings along.

    ``dtype`` is what the values of quantized weights are rounded to, else as ``open_hf`` says.
    """
    place = locate(path, Kind.HF, Kind.CONSOLIDATED, Kind.CHECKPOINT)
    if place.kind is Kind.CHECKPOINT:
        return open_megatron(place.path, config=config)
    return open_hf(place.path, config=config, dtype=dtype)


def open_hf(path: Path, *, config: ChosenConfig | None = None, dtype: str | None = None) -> ModelSource:
    """Open a Hugging Face directory, or one in Mistral AI's own rendering.

    Its configuration must be there unless ``config`` is given. FP8 weights have values of ``dtype``, else of the dtype
    that the configuration names, else of bfloat16.
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
        links=links | {name: [whole(name, tensor.shape)] for name, tensor in again.items()},
        ignored=(*quantized.ignored, *ignored),
        hf_files=None if ignored or quantized.weights else files,
        assets=(path,),
        carried_from=path if table.carried else None,
        quantized=quantized,
        twins=tuple(Twin.of_alias(tensor, links[name]) for name, tensor in again.items()),
    )


def _open_consolidated(path: Path, agreed: Agreed, table: TensorTable, files: FileSet) -> ModelSource:
    """A model in Mistral AI's own rendering, seen as Hugging Face's."""
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

    The configuration is ``config``, else what an import embedded, else the checkpoint's own ``args``, else its
    run_config.yaml; all of these must agree. ``state`` may pick another tensor than the weights that training kept for
    every parameter, such as the master weights.
    """
    checkpoint = stored_checkpoint.open_stored(path)
    known = matched(checkpoint, checkpoint_config(checkpoint, config), state)
    table, found = known.table, known.found
    remembered = read_embedded(checkpoint)
    shapes = {name: tensor.global_shape for name, tensor in checkpoint.tensors.items()}
    twins = found.twins(checkpoint.tensors)
    with paused_collector():  # of a hundred thousand links each lives
        links = {tensor.hf_name: found.links(tensor) for tensor in found.table.hf_tensors().values()}
    return ModelSource(
        path=checkpoint.directory,
        kind=f"Megatron {checkpoint.backend} checkpoint",
        agreed=known.agreed,
        table=table,
        index=checkpoint.index([*found.names(), *(twin.name for twin in twins)]),
        tensors=_described(found.table, remembered),
        links=links,
        ignored=(*found.ignored, *_padding(table, found, shapes)),
        hf_files=remembered.hf_files if remembered else None,
        assets=small_files.folders_beside(checkpoint.directory),
        carried_from=checkpoint.directory if found.table.carried else None,
        twins=twins,
    )


def completed(source: ModelSource, directory: Path | None) -> ModelSource:
    """``source`` with what Megatron's model does not have, from a Hugging Face directory if it has none of its own.

    Then that directory's layout of files counts, too.

    Raises TensorMismatchError if it takes a directory and there is none, or one without these tensors.
    """
    carried = [name for name, tensor in source.table.hf_tensors().items() if tensor.rule.place is Place.CARRIED]
    if not carried or source.carried_from is not None:
        return source
    what = (
        f"{source.path} holds a language model alone (Megatron saves no other), and its configuration describes a "
        f"vision tower and a projector besides ({listed(carried)})"
    )
    if directory is None:
        raise TensorMismatchError(f"{what}. Give the original Hugging Face directory, weights included, with --config.")
    try:
        original = open_hf(directory)
    except DistCkptMistralError as error:
        raise type(error)(f"{what}, but they cannot come from {directory}: {error}") from error
    added = [tensor for tensor in original.tensors if tensor.hf_name in carried]
    return replace(
        source,
        tensors=(*added, *source.tensors),  # as the table has them: vision comes first
        index=source.index.joined(original.index, carried),
        links={**source.links, **{name: original.links[name] for name in carried}},
        hf_files=source.hf_files or original.hf_files,
        carried_from=directory,
    )


def _described(table: TensorTable, remembered: configuration.HfRecord | None) -> tuple[HfTensor, ...]:
    """All usual tensors of the table; aliases only where the original files had them besides."""
    files = remembered.hf_files if remembered and remembered.hf_files else FileSet(files={})
    return table.spelling(files.by_name("the record of the original files", table.usual_name)).tensors


def _padding(table: TensorTable, found: CheckpointMap, shapes: Mapping[str, tuple[int, ...]]) -> Ignored:
    """The vocabulary rows that only pad it."""
    padded = []
    for rule in table.rules:
        if rule.padded_vocabulary:
            stored = found.stored(rule, ())[0]
            name = found.stored_name(stored.mcore_key)
            rows = shapes[name][0]
            if rows > rule.shape[0]:
                padded.append((f"{name}[{rule.shape[0]}:{rows}]", PADDING))
    return tuple(padded)


def twin_differences(
    index: TensorIndex, twins: Sequence[Twin], effort: Effort = DEFAULT_EFFORT
) -> Iterator[tuple[Twin, str]]:
    """The twins that are stored with two different values, and how they differ."""
    apart = [twin for twin in twins if not index.tensors[twin.name].shares_bytes(index.tensors[twin.main])]
    found = {
        twin.name: f"{dtypes[0]}, not {dtypes[1]}"
        for twin in apart
        if len(set(dtypes := (index.tensors[twin.name].dtype, only_dtype(index, twin.links)))) > 1
    }
    same = {twin.name: twin for twin in apart if twin.name not in found}
    own = plan_segments(index, {name: (twin.shape, [whole(name, twin.shape)]) for name, twin in same.items()})
    others = plan_segments(index, {name: (twin.shape, twin.links) for name, twin in same.items()})
    found |= dict(compare_bits(own, others, [*same], effort))
    for twin in apart:
        if twin.name in found:
            yield twin, f"differs from {twin.main!r}, which is stored for the same weights: {found[twin.name]}"


def require_equal_twins(source: ModelSource, *, only_hidden: bool = False) -> None:
    """Raise TensorMismatchError, which names both, unless what is stored a second time is the same: only one is used.

    ``only_hidden`` leaves out those that ``source`` lists by a Hugging Face name of their own.
    """
    found = [*twin_differences(source.index, source.hidden_twins if only_hidden else source.twins)]
    if found:
        told = "; ".join(f"{twin.name!r} {what}" for twin, what in found)
        remove = "remove the tensor that is not meant"
        tied = f"The configuration ties them. Set tie_word_embeddings to false in config.json, or {remove}"
        advice = tied if any(twin.is_head for twin, _ in found) else remove.capitalize()
        raise TensorMismatchError(f"{source.path} contradicts itself: {told}. {advice}.")
