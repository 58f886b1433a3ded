"""safetensors files and Hugging Face model directories.

Format: 8 bytes little-endian header length, a JSON header ``{name: {dtype, shape, data_offsets}, __metadata__}`` padded
with spaces to 8 bytes, then the data without gaps (safetensors 0.8, ``safetensors/src/tensor.rs``).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dist_ckpt_mistral import dtypes, storage, strict_json
from dist_ckpt_mistral.errors import FormatError, OutputError
from dist_ckpt_mistral.gather.boxes import Shape
from dist_ckpt_mistral.gather.tensor_index import IndexedTensor, TensorIndex

SINGLE_FILE: Final = "model.safetensors"
INDEX_FILE: Final = "model.safetensors.index.json"
_LENGTH_BYTES: Final = 8
_METADATA_KEY: Final = "__metadata__"
#: The limit of the safetensors library itself.
_MAX_HEADER_BYTES: Final = 100_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class FileTensor:
    """One tensor of a safetensors file: torch dtype name, shape in elements, bytes ``[begin, end)`` of the data part."""

    name: str
    dtype: str
    shape: Shape
    begin: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SafetensorsFile:
    """A parsed header. ``header`` is its JSON text verbatim, padding included, so that a file can be made again."""

    header: str
    tensors: tuple[FileTensor, ...]

    @property
    def data_start(self) -> int:
        """Byte of the file where the data part begins."""
        return _LENGTH_BYTES + len(self.header.encode())

    @property
    def num_bytes(self) -> int:
        """Size of the whole file."""
        return self.data_start + max((tensor.end for tensor in self.tensors), default=0)

    @property
    def head(self) -> bytes:
        """The bytes before the data part."""
        text = self.header.encode()
        return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def read_header(path: Path) -> SafetensorsFile:
    """Read and check the header of ``path``. Raises FormatError that names the file and what is wrong."""
    with storage.SourceFiles([path]) as files:
        size = files.size_bytes(0)
        if size < _LENGTH_BYTES:
            raise FormatError(f"{path} is not a safetensors file: it has {size} bytes")
        length = int.from_bytes(files.read(0, 0, _LENGTH_BYTES), "little")
        if length > min(_MAX_HEADER_BYTES, size - _LENGTH_BYTES):
            raise FormatError(f"{path} is not a whole safetensors file: its header of {length} bytes does not fit in {size}")
        text = files.read(0, _LENGTH_BYTES, length)
    return parse_header(text, str(path), data_bytes=size - _LENGTH_BYTES - length)


def parse_header(text: bytes, where: str, *, data_bytes: int | None = None) -> SafetensorsFile:
    """Parse a header; ``data_bytes`` is the size of the data part, if there is one to compare with."""
    header = strict_json.loads_object(text, where)
    tensors = [_file_tensor(name, entry, where) for name, entry in header.items() if name != _METADATA_KEY]
    tensors.sort(key=lambda tensor: (tensor.begin, tensor.end))
    end = 0
    for tensor in tensors:
        if tensor.begin != end:
            raise FormatError(f"data_offsets of {tensor.name!r} in {where} overlap or leave a gap: expected {end}, got {tensor.begin}")
        end = tensor.end
    if data_bytes is not None and end != data_bytes:
        raise FormatError(
            f"{where} is truncated or has bytes too many: its header describes {end} bytes of data, the file has {data_bytes}. "
            "Copy the file again from where it came from."
        )
    return SafetensorsFile(header=text.decode(), tensors=tuple(tensors))


def _file_tensor(name: str, entry: object, where: str) -> FileTensor:
    what = f"{name!r} in {where}"
    if not isinstance(entry, dict):
        raise FormatError(f"bad header entry of {what}: {entry!r}")
    dtype = dtypes.from_safetensors(entry.get("dtype"), what)
    shape, span = entry.get("shape"), entry.get("data_offsets")
    if not (_is_sizes(shape) and _is_sizes(span) and len(span) == 2):  # noqa: PLR2004  (begin and end)
        raise FormatError(f"bad shape or data_offsets of {what}: got {shape!r} and {span!r}")
    if span[1] - span[0] != math.prod(shape) * dtypes.itemsize_bytes(dtype):
        raise FormatError(
            f"size mismatch for {what}: expected {math.prod(shape) * dtypes.itemsize_bytes(dtype)} bytes "
            f"({dtype} {shape}), got data_offsets {span}"
        )
    return FileTensor(name=name, dtype=dtype, shape=tuple(shape), begin=span[0], end=span[1])


def _is_sizes(value: Any) -> bool:  # noqa: ANN401  (straight from JSON)
    return isinstance(value, list) and all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in value)


def read_directory(directory: Path) -> tuple[TensorIndex, dict[str, SafetensorsFile]]:
    """Index the model files of a Hugging Face directory: the tensors, and the parsed header of every file by name.

    Raises FormatError for files that the index names and that are absent (all of them), tensors that the index places
    elsewhere, or tensors that two files hold.
    """
    weight_map = _weight_map(directory)
    names = sorted(set(weight_map.values())) if weight_map is not None else [SINGLE_FILE]
    absent = [name for name in names if not (directory / name).is_file()]
    if absent:
        raise FormatError(f"{INDEX_FILE} in {directory} names files that are absent: {', '.join(absent)}. Get them first.")
    files = {name: read_header(directory / name) for name in names}
    if weight_map is not None:
        _require_as_indexed(weight_map, files, directory)
    return index_files(directory, files), files


def _weight_map(directory: Path) -> dict[str, str] | None:
    """The ``weight_map`` of the index, or None for a model in one file."""
    path = directory / INDEX_FILE
    if not path.is_file():
        if (directory / SINGLE_FILE).is_file():
            return None
        found = sorted(entry.name for entry in directory.iterdir()) if directory.is_dir() else []
        other = [name for name in found if name.endswith((".safetensors", ".bin", ".pt", ".pth", ".gguf"))]
        hint = f" It holds {', '.join(other[:5])}, which is not supported." if other else ""
        raise FormatError(f"{directory} holds neither {SINGLE_FILE} nor {INDEX_FILE}.{hint} Give a Hugging Face model directory.")
    weight_map = strict_json.loads_object(storage.read_bytes(path), str(path)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{path} has no weight_map")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise FormatError(f"weight_map in {path} names {name!r}: expected the plain name of a .safetensors file beside it")
    return weight_map


def _require_as_indexed(weight_map: Mapping[str, str], files: Mapping[str, SafetensorsFile], directory: Path) -> None:
    held = {(tensor.name, name) for name, file in files.items() for tensor in file.tensors}
    wrong = sorted(held ^ set(weight_map.items()))
    if wrong:
        listing = ", ".join(f"{tensor} ({name})" for tensor, name in wrong)
        raise FormatError(f"{INDEX_FILE} and the files in {directory} disagree about {listing}. Check that they belong together.")


def index_files(directory: Path, files: Mapping[str, SafetensorsFile]) -> TensorIndex:
    """The tensor index of ``files`` (by name, under ``directory``), existing or planned."""
    tensors = {
        tensor.name: IndexedTensor.whole(
            tensor.name, tensor.dtype, tensor.shape, file=number, position=file.data_start + tensor.begin
        )
        for number, file in enumerate(files.values())
        for tensor in file.tensors
    }
    return TensorIndex(files=tuple(directory / name for name in files), tensors=tensors)


def plan_files(tensors: Sequence[tuple[str, str, Shape]], *, max_file_bytes: int) -> dict[str, SafetensorsFile]:
    """Distribute ``(name, dtype, shape)`` over files as transformers' ``save_pretrained`` does: in order, first come.

    Within a file tensors are ordered as the safetensors library orders them: largest dtype first, then by name.
    """
    groups: list[list[tuple[str, str, Shape]]] = [[]]
    group_bytes = 0
    for tensor in tensors:
        num_bytes = math.prod(tensor[2]) * dtypes.itemsize_bytes(tensor[1])
        if groups[-1] and group_bytes + num_bytes > max_file_bytes:
            groups.append([])
            group_bytes = 0
        groups[-1].append(tensor)
        group_bytes += num_bytes
    names = [f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
    return {name: _new_file(group) for name, group in zip(names if len(groups) > 1 else [SINGLE_FILE], groups, strict=True)}


def _new_file(tensors: Iterable[tuple[str, str, Shape]]) -> SafetensorsFile:
    ordered = sorted(tensors, key=lambda tensor: (-_dtype_rank(tensor[1]), tensor[0]))
    header: dict[str, Any] = {_METADATA_KEY: {"format": "pt"}}
    begin = 0
    for name, dtype, shape in ordered:
        end = begin + math.prod(shape) * dtypes.itemsize_bytes(dtype)
        header[name] = {"dtype": dtypes.to_safetensors(dtype), "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return parse_header(text + b" " * (-len(text) % 8), "a planned header")


def _dtype_rank(dtype: str) -> int:
    """Rank of a dtype in the ``Dtype`` enum of safetensors 0.8, by which it orders tensors."""
    order = ("bool", "uint8", "int8", "float8_e5m2", "float8_e4m3fn", "int16", "float16", "bfloat16", "int32", "float32", "float64", "int64")
    return order.index(dtype)


def index_json(files: Mapping[str, SafetensorsFile], original: Mapping[str, Any] | None) -> bytes:
    """The text of ``model.safetensors.index.json`` as transformers writes it.

    ``total_size`` is in bytes of data; other metadata of an ``original`` index is kept.
    """
    metadata = dict((original or {}).get("metadata") or {})
    metadata["total_size"] = sum(tensor.end - tensor.begin for file in files.values() for tensor in file.tensors)
    weight_map = {tensor.name: name for name, file in files.items() for tensor in file.tensors}
    return (json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n").encode()


def require_planned(value: object, where: str) -> dict[str, SafetensorsFile]:
    """Headers that travelled inside a checkpoint, by file name. Raises FormatError if they are not what we wrote."""
    if not isinstance(value, dict):
        raise FormatError(f"the layout of the Hugging Face files in {where} is not an object")
    for name in value:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise OutputError(f"the layout of the Hugging Face files in {where} names {name!r}, which is not a plain file name")
    return {name: parse_header(str(header).encode(), f"the layout of {name} in {where}") for name, header in value.items()}
