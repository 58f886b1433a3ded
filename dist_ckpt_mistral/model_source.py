"""One view of every place that a model can be read from: its tensors in Hugging Face's names, and their bytes."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from dist_ckpt_mistral import embedded
from dist_ckpt_mistral.checkpoint_config import Agreed, checkpoint_config, directory_config, matched, read_embedded
from dist_ckpt_mistral.errors import DistCkptMistralError, TensorMismatchError
from dist_ckpt_mistral.formats import backends, hf_directory, small_files
from dist_ckpt_mistral.formats.hf_directory import FileSet
from dist_ckpt_mistral.formats.pickle_reading import paused_collector
from dist_ckpt_mistral.formats.quantized import Quantized, match_quantized
from dist_ckpt_mistral.gather.dequantize import dequantized
from dist_ckpt_mistral.gather.links import Link, whole
from dist_ckpt_mistral.gather.plan import BytePlan, plan_gather
from dist_ckpt_mistral.gather.tensor_index import IndexedTensor, TensorIndex
from dist_ckpt_mistral.mapping import PADDING, CheckpointMap, Ignored
from dist_ckpt_mistral.matching import match_hf, match_own
from dist_ckpt_mistral.model.config import ChosenConfig, MistralConfig, require_config_file
from dist_ckpt_mistral.model.tensor_rules import ParamState, Place
from dist_ckpt_mistral.model.tensor_table import HfTensor, TensorTable, tensor_table
from dist_ckpt_mistral.name_ranges import listed
from dist_ckpt_mistral.own_links import indexed_shapes, own_links

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ModelSource:
    """A model that can be read: a Megatron checkpoint, a Hugging Face directory, or one of Mistral AI's own files.

    ``tensors`` are those it holds, in table order; ``links`` say of each which stored boxes make it up. ``hf_files`` is
    how Hugging Face files hold or held it, ``assets`` the directories of the small files that belong to it: of a name
    that several have, the first counts.
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

    @property
    def config(self) -> MistralConfig:
        """The configuration that the model goes by."""
        return self.agreed.config

    @property
    def config_from(self) -> str:
        """Where the configuration is from, in words."""
        return self.agreed.source

    def dtype_of(self, tensor: HfTensor) -> str:
        """The torch dtype name in which a tensor is stored."""
        return self.index.tensors[self.links[tensor.hf_name][0].source].dtype

    @property
    def main_dtype(self) -> str:
        """The torch dtype name of the embedding, which is that of the model."""
        return next(self.dtype_of(tensor) for tensor in self.tensors if tensor.rule.place is Place.EMBEDDING)

    def plan_into(self, target: TensorIndex) -> BytePlan:
        """The byte plan that fills ``target``, whose tensors have Hugging Face names."""
        return plan_gather(self.index, target, (link for name in target.tensors for link in self.links[name]))

    def plan_of(self, names: list[str]) -> BytePlan:
        """A plan for reading: one segment for each of ``names``, in this order."""
        by_name = {tensor.hf_name: tensor for tensor in self.tensors}
        tensors = {
            name: IndexedTensor.whole(name, self.dtype_of(by_name[name]), by_name[name].shape, file=number, position=0)
            for number, name in enumerate(names)
        }
        return self.plan_into(TensorIndex(files=tuple(Path(name) for name in names), tensors=tensors))


def open_source(path: Path, *, config: ChosenConfig | None = None, dtype: str | None = None) -> ModelSource:
    """Open whatever ``path`` is. ``config`` comes before the configurations that the model brings along.

    ``dtype`` is what the values of quantized weights are rounded to, else as ``open_hf`` says.
    """
    if hf_directory.is_model_directory(path) or hf_directory.is_own_directory(path):
        return open_hf(path, config=config, dtype=dtype)
    return open_megatron(path, config=config)


def open_hf(path: Path, *, config: ChosenConfig | None = None, dtype: str | None = None) -> ModelSource:
    """Open a Hugging Face directory, or one in Mistral AI's own rendering.

    Its configuration must be there unless ``config`` is given. FP8 weights have values of ``dtype``, else of the dtype
    that the configuration names, else of bfloat16.
    """
    hf_directory.require_directory(path)
    small_files.require_no_adapter(path)
    if config is None:
        require_config_file(path)
    files = hf_directory.read_directory(path)
    agreed = directory_config(path, config, [tensor.name for tensor in files.tensors()])
    table = tensor_table(agreed.config)
    if hf_directory.is_own_directory(path):
        return _open_own(path, agreed, table, files)
    quantized = match_quantized(files.tensors(table.usual_name), agreed.config, str(path), dtype)
    scales = dict(quantized.ignored)
    shapes = {each.name: each.shape for each in files.tensors(table.usual_name) if each.name not in scales}
    tensors, ignored = match_hf(table, shapes, str(path))
    index = dequantized(files.tensor_index(path, table.usual_name), quantized.weights, quantized.dtype)
    if quantized.weights:
        _LOG.info("%s: %s", path, quantized.note)
    return ModelSource(
        path=path,
        kind="Hugging Face directory",
        agreed=agreed,
        table=table,
        index=index,
        tensors=tuple(tensors),
        links={tensor.hf_name: [whole(tensor.hf_name, tensor.shape)] for tensor in tensors},
        ignored=(*quantized.ignored, *ignored),
        hf_files=None if ignored or quantized.weights else files,
        assets=(path,),
        carried_from=path if table.carried else None,
        quantized=quantized,
    )


def _open_own(path: Path, agreed: Agreed, table: TensorTable, files: FileSet) -> ModelSource:
    """A model in Mistral AI's own rendering, seen as Hugging Face's."""
    index = files.tensor_index(path)
    shapes = {name: tensor.global_shape for name, tensor in index.tensors.items()}
    tensors = match_own(table, shapes, str(path))
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
        kind="directory of Mistral AI's own files",
        agreed=agreed,
        table=table,
        index=TensorIndex(files=index.files, tensors=seen),
        tensors=tuple(tensors),
        links={tensor.hf_name: own_links(tensor) for tensor in tensors},
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
    checkpoint = backends.open_stored(path)
    known = matched(checkpoint, checkpoint_config(checkpoint, config), state)
    table, found = known.table, known.found
    remembered = read_embedded(checkpoint)
    shapes = {name: tensor.global_shape for name, tensor in checkpoint.tensors.items()}
    tensors = _described(found.table, remembered)
    with paused_collector():  # of a hundred thousand links each lives
        links = {tensor.hf_name: found.links(tensor) for tensor in tensors}
    return ModelSource(
        path=checkpoint.directory,
        kind=f"Megatron {checkpoint.backend} checkpoint",
        agreed=known.agreed,
        table=table,
        index=checkpoint.index(found.names()),
        tensors=tensors,
        links=links,
        ignored=(*found.ignored, *_padding(table, found, shapes)),
        hf_files=remembered.hf_files if remembered else None,
        assets=small_files.folders_beside(checkpoint.directory),
        carried_from=checkpoint.directory if found.table.carried else None,
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


def _described(table: TensorTable, remembered: embedded.Embedded | None) -> tuple[HfTensor, ...]:
    """All tensors of the table; aliases only where the original files had them."""
    files = remembered.hf_files if remembered and remembered.hf_files else FileSet(files={})
    original = files.by_name("the record of the original files", table.usual_name)
    return tuple(t for t in table.hf_tensors().values() if not t.is_alias or t.hf_name in original)


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
