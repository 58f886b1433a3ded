"""Tensors in the pickles of ``torch.save``: what stands in for them, and what it says of the bytes, without torch."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from reprlib import repr as short
from typing import Any, Final

from dist_ckpt_mistral.errors import FormatError
from dist_ckpt_mistral.formats.pickles import reader
from dist_ckpt_mistral.formats.pickles.reader import as_tuple, empty_dict
from dist_ckpt_mistral.gather import dtypes
from dist_ckpt_mistral.gather.dtypes import Shape, TorchDtype, is_countable

#: The most axes that most operations of torch take (2.6 to 2.15, ``dim_bitset_size`` in ATen/WrapDimUtilsMulti.h).
MAX_AXES: Final = 64
#: torch's typed storages, as pickles name them -> torch dtype name.
STORAGES: Final = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
_DTYPE_NAME: Final = re.compile(r"(u?int\d+|b?float\d+\w*|complex\d+|bool|qu?int\d+\w*|bits\w+)")


@dataclass(frozen=True, slots=True, eq=False)
class PickledStorage:
    """A storage: its key in the archive, and its torch dtype name (empty where it is untyped: the tensor says it)."""

    key: str
    dtype: str


@dataclass(frozen=True, slots=True, eq=False)
class PickledTensor:
    """The arguments of ``torch._utils._rebuild_tensor_v2`` (and ``_v3``, which adds the dtype), as the pickle has them.

    A pickle may pass anything: ask ``is_sound`` before all else.
    """

    storage: Any
    offset: Any
    shape: Any
    strides: Any
    dtype: Any = None

    @property
    def is_sound(self) -> bool:
        """Whether the arguments are those of a tensor, of any strides."""
        return (
            isinstance(self.storage, PickledStorage)
            and all(
                type(sizes) is tuple and len(sizes) <= MAX_AXES and all(type(n) is int and n >= 0 for n in sizes)
                for sizes in (self.shape, self.strides)
            )
            and len(self.shape) == len(self.strides)
            and type(self.offset) is int
            and self.offset >= 0
        )

    def dtype_name(self, where: str) -> str:
        """The torch dtype name. Raises FormatError for one that is not known."""
        given = self.dtype.name if isinstance(self.dtype, TorchDtype) else None
        return dtypes.require_known(self.storage.dtype or given, where)

    @property
    def is_row_major(self) -> bool:
        """Whether the strides are those of a contiguous tensor, where they matter."""
        pairs = zip(self.shape, self.strides, row_major_strides(self.shape), strict=True)
        return all(extent <= 1 or stride == expected for extent, stride, expected in pairs) or not math.prod(self.shape)


def read_tensor(content: bytes, where: str) -> tuple[str, Shape]:
    """The torch dtype name and the shape (in elements) of a pickled tensor; ``where`` names its archive in errors.

    Raises FormatError for anything but one tensor, and for a view of a larger tensor.
    """
    tensor = reader.loads(content, _tensor_global, where, persistent=_only_storage)
    if not isinstance(tensor, PickledTensor):
        raise FormatError(f"{where} holds no tensor")
    shape = tensor.shape
    if isinstance(shape, tuple) and len(shape) > MAX_AXES:
        raise FormatError(f"{where} holds a tensor of {len(shape)} axes: expected at most {MAX_AXES}")
    is_whole = tensor.is_sound and tensor.offset == 0
    if is_whole and not is_countable(shape):
        raise FormatError(f"{where} holds a tensor {short(shape)}, more than any memory holds")
    if not is_whole or not tensor.is_row_major:
        raise FormatError(f"{where} holds a view of a larger tensor, which is not supported")
    return tensor.dtype_name(where), shape


def _tensor_global(module: str, name: str) -> Any:  # noqa: ANN401  (stand-ins of any kind)
    """The stand-in of a global in a tensor's pickle. Raises KeyError for globals outside the allowlist."""
    if (module, name) == ("collections", "OrderedDict"):
        return empty_dict
    return TorchDtype(name) if torch_dtype_name(module, name) else TENSOR_GLOBALS[module, name]


def _only_storage(pid: Any) -> PickledStorage:  # noqa: ANN401  (from a pickle)
    """The storage of a persistent id in the archive of one tensor, whose only key is "0"."""
    storage = storage_of(pid)
    if storage.key != "0":
        raise FormatError(f"an unexpected persistent object {short(pid)}")
    return storage


def storage_of(pid: Any) -> PickledStorage:  # noqa: ANN401  (from a pickle)
    """The storage of torch.save's persistent id ("storage", type, key, device, elements)."""
    is_storage = isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage"  # noqa: PLR2004
    if not is_storage or not (isinstance(pid[2], str) and pid[2].isascii() and pid[2].isdecimal()):
        raise FormatError(f"an unexpected persistent object {short(pid)}")
    return PickledStorage(pid[2], pid[1] if isinstance(pid[1], str) else "")


def row_major_strides(shape: Shape) -> Shape:
    """The strides in elements of a contiguous tensor, as torch computes them (an axis of size 0 counts as 1)."""
    strides: list[int] = []
    step = 1
    for extent in reversed(shape):
        strides.append(step)
        step *= max(extent, 1)
    return tuple(reversed(strides))


def torch_dtype_name(module: str, name: str) -> str | None:
    """``bfloat16`` for the global ``torch.bfloat16``; None if the global is no dtype."""
    return name if module == "torch" and _DTYPE_NAME.fullmatch(name) else None


def _v2(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> PickledTensor:  # noqa: ANN401  (from a pickle)
    """Stands in for ``torch._utils._rebuild_tensor_v2``."""
    return PickledTensor(storage, offset, shape, strides)


def _v3(storage: Any, offset: Any, shape: Any, strides: Any, _: Any, __: Any, dtype: Any, *___: Any) -> PickledTensor:  # noqa: ANN401
    """Stands in for ``torch._utils._rebuild_tensor_v3``, which also has the dtype."""
    return PickledTensor(storage, offset, shape, strides, dtype)


#: The globals of a tensor and its storage -> what stands in for them. Dtypes (``torch_dtype_name``) come besides.
TENSOR_GLOBALS: Final[Mapping[tuple[str, str], Any]] = {
    ("torch._utils", "_rebuild_tensor_v2"): _v2,
    ("torch._utils", "_rebuild_tensor_v3"): _v3,
    ("torch", "Size"): as_tuple,
    ("torch.storage", "UntypedStorage"): "",
    **{("torch", storage): dtype for storage, dtype in STORAGES.items()},
}
