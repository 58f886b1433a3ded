"""Hugging Face model directories: which files hold which tensors, and the small files that travel with the weights."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from reprlib import repr as short
from typing import TYPE_CHECKING, Any, Final

from dist_ckpt_mistral import dtypes, paths, storage, strict_json
from dist_ckpt_mistral.errors import FormatError
from dist_ckpt_mistral.formats.integrity import MANIFEST_FILE
from dist_ckpt_mistral.formats.safetensors import FileTensor, SafetensorsFile, new_file, parse_header, read_header
from dist_ckpt_mistral.name_ranges import listed
from dist_ckpt_mistral.shapes import Shape, is_countable

if TYPE_CHECKING:
    from dist_ckpt_mistral.gather.tensor_index import TensorIndex

_LOG = logging.getLogger(__name__)

SINGLE_FILE: Final = "model.safetensors"
INDEX_FILE: Final = "model.safetensors.index.json"
#: The same of Mistral AI's own rendering of a release, beside ``params.json``.
OWN_SINGLE_FILE: Final = "consolidated.safetensors"
OWN_INDEX_FILE: Final = "consolidated.safetensors.index.json"
CONFIG_FILE: Final = "config.json"
#: Other renderings of weights, which an error names.
_OTHER_WEIGHTS: Final = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
#: Weights and what only describes them: rebuilt on export, never carried.
_NOT_CARRIED: Final = (
    *_OTHER_WEIGHTS,
    ".safetensors.index.json",
    ".bin.index.json",
    ".h5",
    ".msgpack",
    ".onnx",
    ".distcp",
)
#: A tokenizer is at most some 20 MB; anything much larger is not a small file.
_MAX_CARRIED_BYTES: Final = 256 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class FileSet:
    """The files of one model by name, and the ``metadata`` of their index (empty for a single file)."""

    files: Mapping[str, SafetensorsFile]
    index_metadata: Mapping[str, Any] = field(default_factory=dict)

    def tensors(self, name_of: Callable[[str], str] = str) -> Iterator[FileTensor]:
        """The tensors of all files, under the names that ``name_of`` makes of theirs."""
        return (replace(each, name=name_of(each.name)) for file in self.files.values() for each in file.tensors)

    def by_name(
        self, where: str, name_of: Callable[[str], str] = str
    ) -> dict[str, tuple[int, SafetensorsFile, FileTensor]]:
        """The tensors, each with its file and that file's number, under the names that ``name_of`` makes of theirs.

        Raises FormatError if two would get the same.
        """
        found: dict[str, tuple[int, SafetensorsFile, FileTensor]] = {}
        for number, file in enumerate(self.files.values()):
            for tensor in file.tensors:
                _, _, other = found.setdefault(name_of(tensor.name), (number, file, tensor))
                if other is not tensor:
                    raise FormatError(f"{where} holds the same tensor as {other.name!r} and as {tensor.name!r}")
        return found

    def tensor_index(self, directory: Path, name_of: Callable[[str], str] = str) -> TensorIndex:
        """Where every tensor lies, with the files under ``directory``: existing or planned.

        ``name_of`` is as in ``by_name``, and so is what is raised.
        """
        from dist_ckpt_mistral.gather.tensor_index import (  # noqa: PLC0415  (inspect must not wait for numpy)
            IndexedTensor,
            TensorIndex,
        )

        tensors = {
            name: IndexedTensor.whole(
                name, tensor.dtype, tensor.shape, file=number, position=file.data_start + tensor.begin
            )
            for name, (number, file, tensor) in self.by_name(str(directory), name_of).items()
        }
        return TensorIndex(files=tuple(directory / name for name in self.files), tensors=tensors)

    def index_json(self) -> bytes | None:
        """The text of ``model.safetensors.index.json`` as transformers writes it; None for a model in one file.

        ``total_size`` is in bytes of data, whatever an original index said; its other metadata is kept.
        """
        if list(self.files) == [SINGLE_FILE]:
            return None
        tensors = [(tensor, name) for name, file in self.files.items() for tensor in file.tensors]
        content = {
            "metadata": {**self.index_metadata, "total_size": sum(tensor.end - tensor.begin for tensor, _ in tensors)},
            "weight_map": {tensor.name: name for tensor, name in tensors},
        }
        return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()

    @property
    def num_tensors(self) -> int:
        """Of all files."""
        return sum(len(file.tensors) for file in self.files.values())

    def to_record(self) -> dict[str, Any]:
        """Plain values from which ``from_record`` makes the same file set."""
        headers = {name: file.header for name, file in self.files.items()}
        return {"headers": headers, "index_metadata": dict(self.index_metadata)}

    @classmethod
    def from_record(cls, record: object, where: str) -> FileSet:
        """Read what ``to_record`` gave, after a journey. Raises FormatError if it is not that any more."""
        headers = record.get("headers") if isinstance(record, dict) else None
        metadata = record.get("index_metadata") if isinstance(record, dict) else None
        if not isinstance(headers, dict) or not isinstance(metadata, dict):
            raise FormatError(f"the layout of the Hugging Face files in {where} is damaged")
        for name in headers:
            _require_file_name(name, where)
        found = cls(
            files={
                name: parse_header(str(text).encode(), f"the header of {name} in {where}")
                for name, text in headers.items()
            },
            index_metadata=metadata,
        )
        if found.num_tensors > len({tensor.name for file in found.files.values() for tensor in file.tensors}):
            raise FormatError(f"the layout of the Hugging Face files in {where} has a tensor in two files")
        return found


def is_tokenizer_file(name: str) -> bool:
    """Whether a file of this name belongs to a tokenizer: transformers' own, SentencePiece's, or Mistral's tekken."""
    return "tokenizer" in name or name.startswith("tekken")


def _is_gguf(name: str) -> bool:
    return name.endswith(".gguf")


def require_directory(path: Path) -> None:
    """Raise FormatError, which says what ``path`` is instead, unless it is a directory."""
    if not path.is_dir():
        what = "there is no such directory"
        if path.is_file():
            what = "it is a GGUF file, of quantized weights" if _is_gguf(path.name) else "it is a file"
        raise FormatError(f"{path} is not a Hugging Face model directory: {what}")


def is_model_directory(path: Path) -> bool:
    """Whether ``path`` looks like a Hugging Face model directory."""
    return path.is_dir() and any((path / name).is_file() for name in (SINGLE_FILE, INDEX_FILE, CONFIG_FILE))


def is_own_directory(path: Path) -> bool:
    """Whether ``path`` holds a model in Mistral AI's own rendering ("consolidated") and none in Hugging Face's."""
    if not path.is_dir() or any((path / name).is_file() for name in (SINGLE_FILE, INDEX_FILE)):
        return False
    return any((path / name).is_file() for name in (OWN_SINGLE_FILE, OWN_INDEX_FILE))


def read_directory(directory: Path) -> FileSet:
    """Read the headers of the model files of a Hugging Face directory, or of one in Mistral AI's own rendering.

    Raises FormatError for files that the index names and that are absent (all of them), and where index and files
    disagree about what is where.
    """
    single, index_file = (OWN_SINGLE_FILE, OWN_INDEX_FILE) if is_own_directory(directory) else (SINGLE_FILE, INDEX_FILE)
    index = _read_index(directory, single, index_file)
    weight_map = index["weight_map"] if index is not None else {}
    names = sorted(set(weight_map.values())) if index is not None else [single]
    present = {path.name for path in directory.iterdir() if path.is_file()}
    absent = [name for name in names if name not in present]
    if absent:
        raise FormatError(f"{index_file} in {directory} names files that are absent: {listed(absent)}. Get them first.")
    files = {name: _countable(read_header(directory / name), directory / name) for name in names}
    if index is None:
        return FileSet(files=files)
    _require_as_indexed(weight_map, files, directory / index_file)
    metadata = index.get("metadata")
    return FileSet(files=files, index_metadata=metadata if isinstance(metadata, dict) else {})


def _countable(file: SafetensorsFile, path: Path) -> SafetensorsFile:
    """The format has numbers of 64 bits: empty tensors may exceed what can be counted here."""
    for tensor in file.tensors:
        if not is_countable(tensor.shape):
            raise FormatError(f"shape of {tensor.name!r} in {path}: {list(tensor.shape)} is too large to be counted")
    return file


def _read_index(directory: Path, single: str, index_file: str) -> dict[str, Any] | None:
    """The index with a sound ``weight_map``, or None for a model in one file."""
    path = directory / index_file
    if not path.is_file():
        if (directory / single).is_file():
            return None
        other = sorted(entry.name for entry in directory.iterdir() if entry.name.endswith(_OTHER_WEIGHTS))
        hint = f" It holds {', '.join(other[:5])}, which is not supported." if other else ""
        hint += " GGUF files hold quantized weights." if any(map(_is_gguf, other)) else ""
        raise FormatError(
            f"{directory} holds neither {SINGLE_FILE} nor {INDEX_FILE}.{hint} Give a Hugging Face model directory."
        )
    index = strict_json.loads_object(storage.read_bytes(path), str(path))
    if not isinstance(index.get("weight_map"), dict) or not index["weight_map"]:
        raise FormatError(f"{path} has no weight_map")
    for name in index["weight_map"].values():
        _require_file_name(name, f"weight_map in {path}")
    return index


def _require_file_name(name: object, where: str) -> None:
    if not isinstance(name, str) or not name.endswith(".safetensors") or not paths.is_plain_name(name):
        raise FormatError(f"{where} names {short(name)}: expected the plain name of a .safetensors file")


def _require_as_indexed(weight_map: Mapping[str, str], files: Mapping[str, SafetensorsFile], index: Path) -> None:
    held = {(tensor.name, name) for name, file in files.items() for tensor in file.tensors}
    wrong = sorted(held ^ set(weight_map.items()))
    if wrong:
        listing = listed([f"{tensor} ({name})" for tensor, name in wrong])
        raise FormatError(
            f"{index.name} and the files in {index.parent} disagree about {listing}. Check that they belong together."
        )


def plan_files(tensors: Sequence[tuple[str, str, Shape]], *, max_file_bytes: int) -> FileSet:
    """Distribute ``(name, dtype, shape)`` over files in order, as transformers' ``save_pretrained`` does.

    A tensor larger than a file gets one of its own, and the file before it goes on being filled (huggingface_hub 2.4,
    serialization/_base.py).
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


def carried_files(directory: Path) -> tuple[list[Path], list[str]]:
    """The small files directly in ``directory``, sorted, and the names of those that are left behind for their size.

    Links out of the directory stay behind, too, with a warning.
    """
    carried, left = [], []
    for path in sorted(directory.iterdir()):
        if path.name.startswith(".") or path.name.endswith(_NOT_CARRIED) or not path.is_file():
            continue
        if path.name == MANIFEST_FILE:  # it tells of the files that lie beside it here, not of any others
            continue
        if paths.leads_outside(path, directory):
            _LOG.warning("%s is a link out of its directory: it stays behind", path)
        elif path.stat().st_size <= _MAX_CARRIED_BYTES:
            carried.append(path)
        else:
            left.append(path.name)
    return carried, left


def config_json(content: Mapping[str, Any], original: Path | None) -> bytes:
    """The text of a config.json with this ``content``: that of ``original`` where it says the same."""
    if original is not None:
        text = storage.read_bytes(original)
        if strict_json.loads_object(text, str(original)) == content:
            return text
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
