"""A stored model as a Zarr v3 group, with an array for every Hugging Face tensor, read on access by zarr-python."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final, NoReturn, Self

import ml_dtypes
import numpy as np
import zarr
from zarr.abc.store import OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.dtype import ZDType, data_type_registry

from dist_ckpt_mistral.arguments import require_types
from dist_ckpt_mistral.errors import UnsupportedFormatError
from dist_ckpt_mistral.gather import dtypes
from dist_ckpt_mistral.gather.dtypes import Shape
from dist_ckpt_mistral.model.config.mistral_config import GivenConfig
from dist_ckpt_mistral.views.lazy import LazyCheckpoint, open_checkpoint
from dist_ckpt_mistral.views.tensorstore_index import array_metadata

#: Chunks are whole rows of about this size: the least that zarr-python reads.
_CHUNK_BYTES: Final = 4 << 20
_METADATA: Final = "zarr.json"
_GROUP: Final = json.dumps({"zarr_format": 3, "node_type": "group", "attributes": {}}).encode()
#: What a data type raises for another dtype. It has moved between 3.1.6 and 3.4.2, where its old place warns.
_Unfit: Final[type[Exception]] = (
    getattr(zarr.errors, "DataTypeValidationError", None) or zarr.dtype.DataTypeValidationError
)
_BFLOAT16: Final[np.dtype[Any]] = np.dtype(ml_dtypes.bfloat16)


def zarr_store(source: str | Path, config: GivenConfig | None = None) -> ZarrStore:
    """Open a model as a store of zarr-python 3: a group with one array for every Hugging Face tensor.

    The store computes chunks when they are read, straight out of the stored ones. bfloat16 is registered with
    zarr-python, as ml_dtypes' dtype.

    Args:
        source: A Megatron checkpoint (root or iteration directory), a Hugging Face directory, or a hub id.
        config: For a checkpoint that lost its configuration: a ``MistralConfig``, a config.json, or a directory or hub
            id with one.

    Returns:
        The store, read only. It can be pickled and shared by threads. ``close`` closes its files.

    Raises:
        DistCkptMistralError: The model is damaged, contradicts its configuration, or cannot be read.

    Example:
        zarr.open_group(dcm.zarr_store("ckpt"), mode="r")["lm_head.weight"][:10]
    """
    require_types(zarr_store, **locals())
    register_bfloat16()
    return ZarrStore(open_checkpoint(source, config=config))


class ZarrStore(Store):  # type: ignore[misc]  # zarr may be missing
    """The tensors of an opened checkpoint as a read-only store of zarr-python. ``zarr_store`` makes one.

    Args:
        checkpoint: The opened checkpoint.
    """

    supports_writes: ClassVar[bool] = False
    supports_deletes: ClassVar[bool] = False
    supports_listing: ClassVar[bool] = True

    def __init__(self, checkpoint: LazyCheckpoint) -> None:
        """Read nothing yet."""
        super().__init__(read_only=True)
        self._checkpoint = checkpoint

    def __eq__(self, other: object) -> bool:
        """Whether both read the same opened checkpoint."""
        return isinstance(other, ZarrStore) and other._checkpoint is self._checkpoint

    def __hash__(self) -> int:
        """Hash like ``__eq__``."""
        return hash(self._checkpoint)

    def __str__(self) -> str:
        """Name the path."""
        return f"dist-ckpt-mistral://{self._checkpoint.path}"

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle the index, but no open files; and register bfloat16 in the other process."""
        return _unpickled, (self._checkpoint,)

    def close(self) -> None:
        """Close the files."""
        self._checkpoint.close()
        super().close()

    async def get(self, key: str, prototype: Any, byte_range: Any = None) -> Any:  # noqa: ANN401  (as zarr's Store)
        """The value of a key as a buffer, or None."""
        if not self._has(key):
            return None
        content = await asyncio.to_thread(self._value, key)
        if isinstance(byte_range, RangeByteRequest):
            content = content[byte_range.start : byte_range.end]
        elif isinstance(byte_range, OffsetByteRequest):
            content = content[byte_range.offset :]
        elif isinstance(byte_range, SuffixByteRequest):
            content = content[max(0, len(content) - byte_range.suffix) :]
        return prototype.buffer.from_bytes(content)

    async def get_partial_values(self, prototype: Any, key_ranges: Iterable[tuple[str, Any]]) -> Sequence[Any]:  # noqa: ANN401
        """The values of several keys."""
        return [await self.get(key, prototype, byte_range) for key, byte_range in key_ranges]

    async def exists(self, key: str) -> bool:
        """Whether there is a value."""
        return self._has(key)

    async def list(self) -> AsyncIterator[str]:
        """Yield all keys."""
        yield _METADATA
        for name in self._checkpoint:
            for key in self._keys(name):
                yield key

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        """Yield the keys that begin with ``prefix``."""
        async for key in self.list():
            if key.startswith(prefix):
                yield key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        """Yield the names directly below ``prefix``."""
        if not prefix.strip("/"):
            for name in (_METADATA, *self._checkpoint):
                yield name
            return
        top, seen = prefix.strip("/") + "/", set[str]()
        async for key in self.list_prefix(top):
            name = key[len(top) :].partition("/")[0]
            if name not in seen:
                seen.add(name)
                yield name

    async def set(self, key: str, value: object) -> NoReturn:  # noqa: ARG002  (as zarr's Store)
        """Refuse to write. Raises UnsupportedFormatError."""
        raise UnsupportedFormatError(f"cannot write {key}: a checkpoint is read only")

    async def delete(self, key: str) -> NoReturn:
        """Refuse to delete. Raises UnsupportedFormatError."""
        raise UnsupportedFormatError(f"cannot delete {key}: a checkpoint is read only")

    def _chunk_shape(self, hf_name: str) -> Shape:
        """The shape of the chunks of an array: as many rows of the first axes as fit."""
        shape = [*self._checkpoint.shape(hf_name)]
        itemsize = dtypes.itemsize_bytes(self._checkpoint.dtype(hf_name))
        for axis, extent in enumerate(shape):
            row_bytes = math.prod(shape[axis + 1 :]) * itemsize
            shape[axis] = max(1, min(extent, _CHUNK_BYTES // row_bytes))
            if shape[axis] > 1:
                break
        return tuple(shape)

    def _keys(self, hf_name: str) -> Iterable[str]:
        """Yield the keys of one array."""
        yield f"{hf_name}/{_METADATA}"
        for cell in np.ndindex(*self._counts(hf_name)):
            yield "/".join([hf_name, "c", *map(str, cell)])

    def _counts(self, hf_name: str) -> Shape:
        """The number of chunks of an array on every axis."""
        sizes = zip(self._checkpoint.shape(hf_name), self._chunk_shape(hf_name), strict=True)
        return tuple(-(-extent // step) for extent, step in sizes)

    def _cell(self, key: str) -> tuple[str, Shape] | None:
        """The array and the place of the chunk that a key means, or None if there is no such chunk."""
        hf_name, *rest = key.split("/")
        if hf_name not in self._checkpoint or rest[:1] != ["c"] or not all(map(str.isdecimal, rest[1:])):
            return None
        cell, counts = tuple(map(int, rest[1:])), self._counts(hf_name)
        is_inside = len(cell) == len(counts) and all(at < count for at, count in zip(cell, counts, strict=True))
        return (hf_name, cell) if is_inside else None

    def _has(self, key: str) -> bool:
        """Whether a key has a value."""
        name, _, rest = key.partition("/")
        return key == _METADATA or (rest == _METADATA and name in self._checkpoint) or self._cell(key) is not None

    def _value(self, key: str) -> bytes:
        """The value of a key that exists."""
        if key == _METADATA:
            return _GROUP
        found = self._cell(key)
        if found is None:
            name = key.partition("/")[0]
            described = array_metadata(
                self._checkpoint.shape(name), self._chunk_shape(name), self._checkpoint.dtype(name)
            )
            return json.dumps(described).encode()
        hf_name, cell = found
        steps = self._chunk_shape(hf_name)
        box = [slice(at * step, (at + 1) * step) for at, step in zip(cell, steps, strict=True)]
        values = self._checkpoint.numpy(hf_name, *box)
        whole = np.zeros(steps, values.dtype)  # the last chunk of an axis has its full size, too
        whole[tuple(map(slice, values.shape))] = values
        return whole.tobytes()


def _unpickled(checkpoint: LazyCheckpoint) -> ZarrStore:
    """The store in another process."""
    register_bfloat16()
    return ZarrStore(checkpoint)


@dataclass(frozen=True, kw_only=True)
class BFloat16(ZDType):  # type: ignore[misc]  # zarr may be missing
    """bfloat16 as a data type of zarr-python: ml_dtypes' dtype, called ``bfloat16`` in metadata, as by TensorStore."""

    dtype_cls: ClassVar[type] = type(_BFLOAT16)
    _zarr_v3_name: ClassVar[str] = "bfloat16"
    item_size: ClassVar[int] = 2

    @classmethod
    def from_native_dtype(cls, dtype: Any) -> Self:  # noqa: ANN401  (as ZDType)
        """The data type of a numpy dtype. Raises zarr's DataTypeValidationError if it is another."""
        return cls._require(matches=dtype == _BFLOAT16, data=dtype)

    def to_native_dtype(self) -> np.dtype[Any]:
        """Numpy's dtype."""
        return _BFLOAT16

    @classmethod
    def _from_json_v2(cls, data: Any) -> Self:  # noqa: ANN401
        return cls._require(matches=False, data=data)

    @classmethod
    def _from_json_v3(cls, data: Any) -> Self:  # noqa: ANN401
        return cls._require(matches=data == cls._zarr_v3_name, data=data)

    @classmethod
    def _require(cls, *, matches: bool, data: object) -> Self:
        if not matches:
            raise _Unfit(f"expected bfloat16, got {data!r}")
        return cls()

    def to_json(self, zarr_format: int) -> str:
        """The name in metadata. Raises UnsupportedFormatError for version 2, which has none."""
        if zarr_format != 3:  # noqa: PLR2004
            raise UnsupportedFormatError("bfloat16 has no name in Zarr version 2. Write version 3.")
        return self._zarr_v3_name

    def _check_scalar(self, data: object) -> bool:
        return isinstance(data, int | float | np.number | ml_dtypes.bfloat16)

    def cast_scalar(self, data: Any) -> Any:  # noqa: ANN401
        """A number as bfloat16."""
        return ml_dtypes.bfloat16(data)

    def default_scalar(self) -> Any:  # noqa: ANN401
        """Zero."""
        return ml_dtypes.bfloat16(0)

    def from_json_scalar(self, data: Any, *, zarr_format: int) -> Any:  # noqa: ANN401
        """A number of metadata, also ``NaN`` and ``Infinity``."""
        del zarr_format
        return ml_dtypes.bfloat16(float(data))

    def to_json_scalar(self, data: Any, *, zarr_format: int) -> float | str:  # noqa: ANN401
        """A number for metadata."""
        del zarr_format
        number = float(data)
        if math.isfinite(number):
            return number
        return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"


def register_bfloat16() -> None:
    """Let zarr-python know bfloat16, unless it does."""
    if BFloat16._zarr_v3_name not in data_type_registry.contents:  # noqa: SLF001  (the name of its protocol)
        data_type_registry.register(BFloat16._zarr_v3_name, BFloat16)  # noqa: SLF001
