"""Read and plan the headers of safetensors files.

A file is 8 bytes of header length (little-endian), the header, and the data of all tensors without gaps. The header is
JSON, ``{name: {dtype, shape, data_offsets}, __metadata__}``, padded with spaces to a multiple of 8 bytes (safetensors
0.8, ``safetensors/src/tensor.rs``).
"""

from __future__ import annotations

import itertools
import json
import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import Any, Final, TypeGuard

from dist_ckpt_mistral.errors import FormatError
from dist_ckpt_mistral.gather import dtypes
from dist_ckpt_mistral.gather.dtypes import Shape
from dist_ckpt_mistral.messages import command_line
from dist_ckpt_mistral.storage import documents, local

_LENGTH_BYTES: Final = 8
_METADATA_KEY: Final = "__metadata__"
#: The limit of the safetensors library itself.
_MAX_HEADER_BYTES: Final = 100_000_000
#: A genuine entry has three opening brackets in at least 50 bytes. A parsed bracket takes some 60 bytes of memory, so
#: headers with more brackets are refused unparsed.
_BYTES_OF_A_BRACKET: Final = 12
_FEW_BRACKETS: Final = 1000
#: The library multiplies sizes in 64 bits, also where a later size of 0 makes the product 0.
_TOO_MANY: Final = 1 << 64
#: The order of dtypes in the ``Dtype`` enum of safetensors 0.8, by which the library orders tensors.
_DTYPE_ORDER: Final = (
    *("bool", "uint8", "int8", "float8_e5m2", "float8_e4m3fn", "int16", "float16", "bfloat16"),
    *("int32", "float32", "float64", "int64"),
)
_COPY_AGAIN: Final = "Copy the file again from where it came from."


@dataclass(frozen=True, slots=True, kw_only=True)
class FileTensor:
    """One tensor of a file: torch dtype name, shape in elements, bytes ``[begin, end)`` of the data part."""

    name: str
    dtype: str
    shape: Shape
    begin: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SafetensorsFile:
    """A parsed header. ``header`` is its JSON text, verbatim and with padding, to write the same file again."""

    header: str
    tensors: tuple[FileTensor, ...]

    @property
    def data_start(self) -> int:
        """Byte of the file where the data part begins."""
        return len(self.head)

    @property
    def num_bytes(self) -> int:
        """Size of the whole file."""
        return self.data_start + max((tensor.end for tensor in self.tensors), default=0)

    @property
    def head(self) -> bytes:
        """The bytes before the data part: header length and header."""
        text = self.header.encode()
        return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def read_header(path: Path) -> SafetensorsFile:
    """Read and check the header of ``path``. Raises FormatError if the file is damaged or truncated."""
    if documents.is_lfs_pointer(path):
        remedy = command_line(["git", "-C", str(path.parent), "lfs", "pull"])
        raise FormatError(f"{path} is a pointer of Git LFS, not the file itself. Get that with: {remedy}")
    with local.SourceFiles([path]) as files:
        size = files.size_bytes(0)
        if size < _LENGTH_BYTES:
            raise FormatError(f"{path} is not a safetensors file: it has {size} bytes. {_COPY_AGAIN}")
        length = int.from_bytes(files.read(0, 0, _LENGTH_BYTES), "little")
        if length > min(_MAX_HEADER_BYTES, size - _LENGTH_BYTES):
            raise FormatError(
                f"{path} is not a whole safetensors file: its header of {length} bytes does not fit in {size}. "
                f"{_COPY_AGAIN}"
            )
        text = files.read(0, _LENGTH_BYTES, length)
    return parse_header(text, str(path), data_bytes=size - _LENGTH_BYTES - length)


def parse_header(text: bytes, where: str, *, data_bytes: int | None = None) -> SafetensorsFile:
    """Parse and check a header; ``where`` names it in errors.

    ``data_bytes`` is the size of the data part in bytes, which must be what the header says; None skips that check.
    """
    if text.count(b"[") + text.count(b"{") > _FEW_BRACKETS + len(text) // _BYTES_OF_A_BRACKET:
        raise FormatError(f"{where} is not a safetensors header: it has more brackets than entries of its length need")
    header = documents.parse_json(text, where)
    tensors = [_file_tensor(name, entry, where) for name, entry in header.items() if name != _METADATA_KEY]
    tensors.sort(key=lambda tensor: (tensor.begin, tensor.end))
    ends = [0, *(tensor.end for tensor in tensors)]
    misplaced = [
        f"data_offsets of {tensor.name!r} in {where} overlap or leave a gap: expected {end}, got {tensor.begin}"
        for tensor, end in zip(tensors, ends, strict=False)
        if tensor.begin != end
    ]
    if misplaced:
        raise FormatError("; ".join(misplaced))
    end = ends[-1]
    if data_bytes is not None and end != data_bytes:
        raise FormatError(
            f"{where} is truncated or too long: expected {end} bytes of data, got {data_bytes}. {_COPY_AGAIN}"
        )
    return SafetensorsFile(header=text.decode(), tensors=tuple(tensors))


def _file_tensor(name: str, entry: object, where: str) -> FileTensor:
    """One entry of a header. Raises FormatError unless its dtype, shape and data_offsets are sound and agree."""
    what = f"{name!r} in {where}"
    if not isinstance(entry, dict):
        raise FormatError(f"bad header entry of {what}: {short(entry)}")
    dtype = dtypes.from_safetensors(entry.get("dtype"), what)
    shape, span = entry.get("shape"), entry.get("data_offsets")
    if not (_is_sizes(shape) and _is_sizes(span)) or len(span) != 2:  # noqa: PLR2004  (begin and end)
        raise FormatError(f"bad shape or data_offsets of {what}: got {short(shape)} and {short(span)}")
    if any(count >= _TOO_MANY for count in (*shape, *itertools.accumulate(shape, operator.mul))):
        raise FormatError(f"bad shape of {what}: {short(shape)} has more elements than can be counted")
    if span[1] - span[0] != math.prod(shape) * dtypes.itemsize_bytes(dtype):
        raise FormatError(
            f"size mismatch for {what}: expected {math.prod(shape) * dtypes.itemsize_bytes(dtype)} bytes "
            f"({dtype} {short(shape)}), got data_offsets {span}"
        )
    return FileTensor(name=name, dtype=dtype, shape=tuple(shape), begin=span[0], end=span[1])


def _is_sizes(value: object) -> TypeGuard[list[int]]:
    """Whether ``value`` is a list of non-negative integers."""
    return isinstance(value, list) and all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in value)


def new_file(tensors: Iterable[tuple[str, str, Shape]]) -> SafetensorsFile:
    """Lay out a file of ``(name, dtype, shape)`` as the safetensors library does: by descending dtype, then by name."""
    ordered = sorted(tensors, key=lambda tensor: (-_DTYPE_ORDER.index(tensor[1]), tensor[0]))
    header: dict[str, Any] = {_METADATA_KEY: {"format": "pt"}}
    begin = 0
    for name, dtype, shape in ordered:
        end = begin + math.prod(shape) * dtypes.itemsize_bytes(dtype)
        header[name] = {"dtype": dtypes.to_safetensors(dtype), "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return parse_header(text + b" " * (-len(text) % 8), "a planned header")
