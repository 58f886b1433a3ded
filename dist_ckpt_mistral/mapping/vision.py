"""Add the vision tower and projector to a language model that was saved without them, as Megatron saves it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dist_ckpt_mistral.errors import DistCkptMistralError, TensorMismatchError
from dist_ckpt_mistral.formats import checkpoint_directory, small_files
from dist_ckpt_mistral.formats.hf_directory import FileSet
from dist_ckpt_mistral.formats.kinds import Kind
from dist_ckpt_mistral.formats.places import what_is
from dist_ckpt_mistral.formats.safetensors import read_header
from dist_ckpt_mistral.gather.index import TensorIndex
from dist_ckpt_mistral.gather.links import Link
from dist_ckpt_mistral.gather.links import whole as whole_link
from dist_ckpt_mistral.mapping.source import ModelSource, open_source
from dist_ckpt_mistral.messages import listed
from dist_ckpt_mistral.model.table.rules import Stage
from dist_ckpt_mistral.model.table.table import HfTensor, TensorTable
from dist_ckpt_mistral.storage import paths


def completed(source: ModelSource, directory: Path | None) -> ModelSource:
    """Add the vision tower and projector to a language model that was saved without them.

    They come from ``directory``, a Hugging Face directory whose file layout then counts, too; without weights there,
    from the folder ``hf`` of the checkpoint's root, or else from the release in that root. A source that is complete is
    returned as it is. Raises TensorMismatchError if the tensors are needed and no place holds them.
    """
    carried = [name for name, tensor in source.table.hf_tensors().items() if tensor.rule.stage is Stage.CARRIED]
    if not carried or source.carried_from is not None:
        return source
    what = (
        f"{source.path} holds a language model alone (Megatron saves no other), and its configuration describes a "
        f"vision tower and a projector besides ({listed(carried)})"
    )
    has_weights = directory is not None and what_is(directory).kind is not Kind.WEIGHTLESS
    place = directory if has_weights else _place_of_vision(source.path) or directory
    if place is None:
        raise TensorMismatchError(
            f"{what}. Give the original Hugging Face directory, weights included, with --config. Or describe the "
            "checkpoint's root with that directory, for every iteration in it."
        )
    try:
        original = _open_vision(place, source.table, carried)
    except DistCkptMistralError as error:
        raise type(error)(f"{what}, but they cannot come from {place}: {error}") from error
    links = {name: original.links[name] for name in carried}
    return replace(
        source,
        tensors=(*original.tensors, *source.tensors),  # as the table has them: vision comes first
        index=source.index.joined(original.index, {link.source: None for each in links.values() for link in each}),
        links={**source.links, **links},
        hf_files=source.hf_files or original.hf_files,
        carried_from=place,
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Vision:
    """A vision tower and projector; fields as in ModelSource."""

    tensors: tuple[HfTensor, ...]
    index: TensorIndex
    links: Mapping[str, list[Link]]
    hf_files: FileSet | None = None


def _place_of_vision(iteration: Path) -> Path | None:
    """The file in the root's folder ``hf`` with a vision tower, or else the directory of a release in the root."""
    for folder in small_files.hf_folders(iteration):
        file = folder / small_files.VISION_FILE
        if file.is_file() and not paths.leads_outside(file, folder):
            return file
    root = checkpoint_directory.root_of(iteration)
    release = None if root is None else root / checkpoint_directory.iteration_name(None)
    is_usable = release is not None and what_is(release).kind is Kind.CHECKPOINT
    return release if is_usable and release != iteration.resolve() else None


def _open_vision(place: Path, table: TensorTable, carried: Sequence[str]) -> _Vision:
    """The tensors ``carried`` in a Hugging Face directory, a Megatron checkpoint, or a file of a root's folder."""
    hf_tensors = table.hf_tensors()
    if place.is_dir():
        original = open_source(place)
        if original.carried_from is None:
            raise TensorMismatchError("it holds a language model alone, too")
        tensors = tuple(tensor for tensor in original.tensors if tensor.hf_name in carried)
        return _Vision(tensors=tensors, index=original.index, links=original.links, hf_files=original.hf_files)
    files = FileSet(files={place.name: read_header(place)})
    expected = {name: hf_tensors[name].shape for name in carried}
    stored = {tensor.name: tensor.shape for tensor in files.tensors()}
    if stored != expected:
        wrong = sorted(name for name in {*stored, *expected} if stored.get(name) != expected.get(name))
        raise TensorMismatchError(f"it holds other tensors, or in other shapes: {listed(wrong)}")
    return _Vision(
        tensors=tuple(hf_tensors[name] for name in carried),
        index=files.tensor_index(place.parent),
        links={name: [whole_link(name, expected[name])] for name in carried},
    )
