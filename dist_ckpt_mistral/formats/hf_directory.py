"""Hugging Face model directories: which safetensors files hold which tensors, and the JSON files that describe them."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from reprlib import repr as short
from typing import Any, Final

from dist_ckpt_mistral.errors import FormatError
from dist_ckpt_mistral.formats.kinds import (
    CONFIG_FILE,
    CONSOLIDATED_FILE,
    CONSOLIDATED_INDEX_FILE,
    INDEX_FILE,
    SINGLE_FILE,
    Kind,
)
from dist_ckpt_mistral.formats.places import locate
from dist_ckpt_mistral.formats.safetensors import FileTensor, SafetensorsFile, new_file, parse_header, read_header
from dist_ckpt_mistral.gather import dtypes
from dist_ckpt_mistral.gather.dtypes import Shape, is_countable
from dist_ckpt_mistral.gather.index import IndexedTensor, TensorIndex
from dist_ckpt_mistral.messages import listed
from dist_ckpt_mistral.storage import documents, paths
from dist_ckpt_mistral.storage.local import Span

_LOG = logging.getLogger(__name__)

_SAFETENSORS: Final = ".safetensors"
#: Name of the file -> name of the tensor -> byte span of its data in the file, ascending.
TensorSpans = Mapping[str, Mapping[str, Span]]


@dataclass(frozen=True, slots=True, kw_only=True)
class FileSet:
    """The safetensors files of one model by name, and the ``metadata`` of their index (empty without an index)."""

    files: Mapping[str, SafetensorsFile]
    index_metadata: Mapping[str, Any] = field(default_factory=dict)

    def tensors(self, name_of: Callable[[str], str] = str) -> Iterator[FileTensor]:
        """The tensors of all files, renamed by ``name_of``."""
        return (replace(tensor, name=name_of(tensor.name)) for file in self.files.values() for tensor in file.tensors)

    def by_name(
        self, where: str, name_of: Callable[[str], str] = str
    ) -> dict[str, tuple[int, SafetensorsFile, FileTensor]]:
        """Tensor name -> (number of its file, the file, the tensor), with names changed by ``name_of``.

        Raises FormatError, which calls the files ``where``, if two tensors get the same name.
        """
        tensors: dict[str, tuple[int, SafetensorsFile, FileTensor]] = {}
        for number, file in enumerate(self.files.values()):
            for tensor in file.tensors:
                _, _, other = tensors.setdefault(name_of(tensor.name), (number, file, tensor))
                if other is not tensor:
                    raise FormatError(f"{where} holds the same tensor as {other.name!r} and as {tensor.name!r}")
        return tensors

    def tensor_index(self, directory: Path, name_of: Callable[[str], str] = str) -> TensorIndex:
        """The position of every tensor in the files, which exist or are planned in ``directory``.

        ``name_of`` and errors are those of ``by_name``.
        """
        tensors = {
            name: IndexedTensor.whole(
                name, tensor.dtype, tensor.shape, file=number, position=file.data_start + tensor.begin
            )
            for name, (number, file, tensor) in self.by_name(str(directory), name_of).items()
        }
        return TensorIndex(files=tuple(directory / name for name in self.files), tensors=tensors)

    def index_json(self, original: Path | None = None) -> bytes | None:
        """The content of ``model.safetensors.index.json``; None for a model in one file, which needs none.

        The text of the file ``original`` is kept where it describes these files: the same ``weight_map``, and metadata
        that is ``index_metadata`` (whatever its ``total_size``) or contradicts none of the new. Otherwise the content
        is what transformers writes, with ``index_metadata`` and ``total_size`` in bytes of tensor data.
        """
        tensors = [(tensor, name) for name, file in self.files.items() for tensor in file.tensors]
        weight_map = {tensor.name: name for tensor, name in tensors}
        metadata = {**self.index_metadata, "total_size": sum(tensor.end - tensor.begin for tensor, _ in tensors)}
        if original is not None:
            text = documents.read_bytes(original)
            content = documents.parse_json(text, str(original))
            about = content["metadata"] if isinstance(content.get("metadata"), dict) else {}
            is_true = about == self.index_metadata or about.items() <= metadata.items()
            if is_true and content.get("weight_map") == weight_map:
                return text
        if list(self.files) == [SINGLE_FILE]:
            return None
        content = {"metadata": metadata, "weight_map": weight_map}
        return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()

    def names(self) -> list[str]:
        """The names of all tensors."""
        return [tensor.name for tensor in self.tensors()]

    @property
    def num_tensors(self) -> int:
        """Number of tensors in all files."""
        return sum(len(file.tensors) for file in self.files.values())

    def to_record(self) -> dict[str, Any]:
        """JSON values for the record in a checkpoint, from which ``from_record`` makes an equal file set."""
        headers = {name: file.header for name, file in self.files.items()}
        return {"headers": headers, "index_metadata": dict(self.index_metadata)}

    @classmethod
    def from_record(cls, record: object, where: str) -> FileSet:
        """The file set that ``to_record`` recorded in the checkpoint ``where``. Raises FormatError if it is damaged."""
        headers = record.get("headers") if isinstance(record, dict) else None
        metadata = record.get("index_metadata") if isinstance(record, dict) else None
        if not isinstance(headers, dict) or not isinstance(metadata, dict):
            raise FormatError(f"the layout of the Hugging Face files in {where} is damaged")
        for name in headers:
            _require_file_name(name, where)
        files = {
            name: parse_header(str(text).encode(), f"the header of {name} in {where}") for name, text in headers.items()
        }
        file_set = cls(files=files, index_metadata=metadata)
        if file_set.num_tensors > len({*file_set.names()}):
            raise FormatError(f"the layout of the Hugging Face files in {where} has a tensor in two files")
        return file_set


def read_directory(directory: Path) -> FileSet:
    """Read the headers of the model files in a Hugging Face directory, or of Mistral AI's consolidated files.

    Raises FormatError where the directory is neither, where files that the index names are absent (it lists all), where
    index and files disagree about which file has which tensor, and where a single file and an index are two models.
    """
    is_consolidated = locate(directory, Kind.HF, Kind.CONSOLIDATED).kind is Kind.CONSOLIDATED
    single, index_file = (CONSOLIDATED_FILE, CONSOLIDATED_INDEX_FILE) if is_consolidated else (SINGLE_FILE, INDEX_FILE)
    present = {path.name for path in directory.iterdir() if path.is_file()}
    index = _read_index(directory / index_file) if index_file in present else None
    weight_map = index["weight_map"] if index is not None else {}
    if index is not None and single in present and _is_stale(directory, single, index_file, {*weight_map.values()}):
        index = None
    _require_no_other_weights(directory, single if index is None else index_file)
    names = sorted(set(weight_map.values())) if index is not None else [single]
    absent = [name for name in names if name not in present]
    if absent and index is not None:
        raise FormatError(f"{index_file} in {directory} names files that are absent: {listed(absent)}. Get them first.")
    files = {name: _read_countable(directory / name) for name in names}
    if index is None:
        return FileSet(files=files)
    _require_as_indexed(weight_map, files, directory / index_file)
    metadata = index.get("metadata")
    return FileSet(files=files, index_metadata=metadata if isinstance(metadata, dict) else {})


def _is_stale(directory: Path, single: str, index_file: str, indexed: set[str]) -> bool:
    """Whether the index, which names the files ``indexed``, is a leftover beside the single file of the model.

    transformers loads the single file without looking at the index, even where the single file is the leftover of an
    older save (5.24, modeling_utils.py, ``_get_resolved_checkpoint_files``). Raises FormatError if the index's files
    exist too, so that either may be meant.
    """
    others = sorted(indexed - {single})
    if any((directory / name).exists() for name in others):
        raise FormatError(
            f"{directory} holds two models: {single}, which transformers loads, and {listed(others)}, which "
            f"{index_file} names. Remove {single}, or the index and its files."
        )
    if others:
        _LOG.warning("%s names files that are absent: %s is read", directory / index_file, single)
    return bool(others)


def _require_no_other_weights(directory: Path, read: str) -> None:
    """Refuse a config.json whose ``transformers_weights`` names another file than ``read``: transformers prefers it."""
    path = directory / CONFIG_FILE
    config = documents.read_json(path) if path.is_file() else {}
    named = config.get("transformers_weights")
    if named not in {None, read}:
        raise FormatError(
            f"transformers_weights in {path}: expected {read!r} or nothing, got {short(named)}. Remove it, or "
            f"give a directory in which that file is {read}."
        )


def warn_of_files_not_read(directory: Path, files: FileSet) -> None:
    """Log a warning that names the safetensors files in ``directory`` that are not among the model's ``files``."""
    names = {path.name for path in directory.iterdir() if path.name.endswith(_SAFETENSORS)} - files.files.keys()
    if names:
        _LOG.warning(
            "%s holds weights beside those of the model, which are not read: %s", directory, listed(sorted(names))
        )


def _read_countable(path: Path) -> SafetensorsFile:
    """The header of ``path``. Refuses shapes that fit in the format's 64 bits, but not in numpy's 63."""
    file = read_header(path)
    for tensor in file.tensors:
        if not is_countable(tensor.shape):
            raise FormatError(f"shape of {tensor.name!r} in {path}: {list(tensor.shape)} is too large to be counted")
    return file


def _read_index(path: Path) -> dict[str, Any]:
    """The content of an index. Raises FormatError unless its ``weight_map`` names plain safetensors files."""
    index = documents.read_json(path)
    if not isinstance(index.get("weight_map"), dict) or not index["weight_map"]:
        raise FormatError(f"{path} has no weight_map")
    for name in index["weight_map"].values():
        _require_file_name(name, f"weight_map in {path}")
    return index


def _require_file_name(name: object, where: str) -> None:
    """Raise FormatError unless ``name`` is the plain name of a safetensors file, without folders."""
    if not isinstance(name, str) or not name.endswith(_SAFETENSORS) or not paths.is_plain_name(name):
        raise FormatError(f"{where} names {short(name)}: expected the plain name of a .safetensors file")


def _require_as_indexed(weight_map: Mapping[str, str], files: Mapping[str, SafetensorsFile], index: Path) -> None:
    """Raise FormatError unless ``weight_map`` lists exactly the tensors of ``files``, each in its file."""
    stored = {(tensor.name, name) for name, file in files.items() for tensor in file.tensors}
    wrong = sorted(stored ^ set(weight_map.items()))
    if wrong:
        listing = listed([f"{tensor} ({name})" for tensor, name in wrong])
        raise FormatError(
            f"{index.name} and the files in {index.parent} disagree about {listing}. Check that they belong together."
        )


def plan_files(tensors: Sequence[tuple[str, str, Shape]], *, max_file_bytes: int) -> FileSet:
    """Distribute ``(name, dtype, shape)`` over files in order, as transformers' ``save_pretrained`` does.

    A tensor larger than ``max_file_bytes`` gets a file of its own, and the tensors after it continue the file before it
    (huggingface_hub 2.4, serialization/_base.py).
    """
    groups: list[list[tuple[str, str, Shape]]] = []
    group: list[tuple[str, str, Shape]] = []
    group_bytes = 0
    for tensor in tensors:
        num_bytes = math.prod(tensor[2]) * dtypes.itemsize_bytes(tensor[1])
        if num_bytes > max_file_bytes:
            groups.append([tensor])
            continue
        if group_bytes + num_bytes > max_file_bytes:
            groups.append(group)
            group, group_bytes = [], 0
        group.append(tensor)
        group_bytes += num_bytes
    groups += [group] if group else []
    names = [f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
    names = names if len(groups) > 1 else [SINGLE_FILE]
    return FileSet(
        files={name: new_file(group) for name, group in zip(names, groups, strict=True)},
        index_metadata={"total_parameters": sum(math.prod(shape) for _, _, shape in tensors)},
    )


def config_json(content: Mapping[str, Any], original: Path | None) -> bytes:
    """The text of a config.json with this ``content``; the text of ``original`` where its content is equal."""
    return text_of(original, content) or (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def text_of(path: Path | None, content: Mapping[str, Any]) -> bytes | None:
    """The text of the JSON file ``path`` if its content equals ``content``; otherwise, and without a path, None."""
    text = None if path is None else documents.read_bytes(path)
    return text if text is not None and documents.parse_json(text, str(path)) == content else None


def tensor_spans(files: FileSet) -> TensorSpans:
    """The byte span of every tensor's data in its file."""
    return {
        name: {tensor.name: Span(file.data_start + tensor.begin, tensor.end - tensor.begin) for tensor in file.tensors}
        for name, file in files.files.items()
    }
