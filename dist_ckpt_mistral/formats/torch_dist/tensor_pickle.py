"""Read dtype and shape from the pickle of a tensor in a ``torch.save`` archive, without torch."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from reprlib import repr as short
from typing import Any, Final

from dist_ckpt_mistral.errors import FormatError
from dist_ckpt_mistral.formats.pickles import reader
from dist_ckpt_mistral.formats.pickles.reader import as_tuple, empty_dict
from dist_ckpt_mistral.gather import dtypes
from dist_ckpt_mistral.gather.dtypes import Shape, is_countable

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


def read_tensor(content: bytes, where: str) -> tuple[str, Shape]:
    """The torch dtype name and the shape (in elements) of a pickled tensor; ``where`` names its archive in errors.

    Raises FormatError for anything but one tensor, and for a view of a larger tensor.
    """
    value = reader.loads(content, _tensor_global, where, persistent=_storage)
    if not isinstance(value, _Tensor):
        raise FormatError(f"{where} holds no tensor")
    return value.checked(where)


@dataclass(frozen=True, slots=True, eq=False)
class _Storage:
    """A storage and its dtype; None where it is untyped, so that the tensor says the dtype."""

    dtype: str | None


@dataclass(frozen=True, slots=True, eq=False)
class _Tensor:
    """The arguments of ``torch._utils._rebuild_tensor_v2`` (and ``_v3``, which adds the dtype)."""

    storage: Any
    offset: Any
    shape: Any
    strides: Any
    dtype: Any = None

    def checked(self, where: str) -> tuple[str, Shape]:
        """Dtype and shape. Raises FormatError unless the tensor is its whole storage in row-major order."""
        if isinstance(self.shape, tuple) and len(self.shape) > MAX_AXES:
            raise FormatError(f"{where} holds a tensor of {len(self.shape)} axes: expected at most {MAX_AXES}")
        is_plain = (
            isinstance(self.storage, _Storage)
            and all(
                isinstance(sizes, tuple) and all(isinstance(n, int) and n >= 0 for n in sizes)
                for sizes in (self.shape, self.strides)
            )
            and self.offset == 0
            and len(self.shape) == len(self.strides)
        )
        if is_plain and not is_countable(self.shape):
            raise FormatError(f"{where} holds a tensor {short(self.shape)}, more than any memory holds")
        if not is_plain or not self._is_row_major():
            raise FormatError(f"{where} holds a view of a larger tensor, which is not supported")
        return dtypes.require_known(self.storage.dtype or self.dtype, where), self.shape

    def _is_row_major(self) -> bool:
        """Whether the strides are those of a contiguous tensor, where they matter."""
        pairs = zip(self.shape, self.strides, row_major_strides(self.shape), strict=True)
        return all(extent <= 1 or stride == expected for extent, stride, expected in pairs) or not math.prod(self.shape)


def row_major_strides(shape: Shape) -> Shape:
    """The strides in elements of a contiguous tensor, as torch computes them (an axis of size 0 counts as 1)."""
    strides: list[int] = []
    step = 1
    for extent in reversed(shape):
        strides.append(step)
        step *= max(extent, 1)
    return tuple(reversed(strides))


def _rebuild_v2(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _Tensor:  # noqa: ANN401  (from a pickle)
    """Stands in for ``torch._utils._rebuild_tensor_v2``."""
    return _Tensor(storage, offset, shape, strides)


def _rebuild_v3(storage: Any, offset: Any, shape: Any, strides: Any, _: Any, __: Any, dtype: Any, *___: Any) -> _Tensor:  # noqa: ANN401
    """Stands in for ``torch._utils._rebuild_tensor_v3``, which also has the dtype."""
    return _Tensor(storage, offset, shape, strides, dtype)


def torch_dtype_name(module: str, name: str) -> str | None:
    """``bfloat16`` for the global ``torch.bfloat16``; None if the global is no dtype."""
    return name if module == "torch" and _DTYPE_NAME.fullmatch(name) else None


def _tensor_global(module: str, name: str) -> Any:  # noqa: ANN401  (stand-ins of any kind)
    """The stand-in of a global in a tensor's pickle. Raises KeyError for globals outside the allowlist."""
    dtype = torch_dtype_name(module, name)
    if dtype is not None:
        return dtype
    return {
        ("torch._utils", "_rebuild_tensor_v2"): _rebuild_v2,
        ("torch._utils", "_rebuild_tensor_v3"): _rebuild_v3,
        ("torch", "Size"): as_tuple,
        ("torch.storage", "UntypedStorage"): "",
        ("collections", "OrderedDict"): empty_dict,
        **{("torch", storage): dtype for storage, dtype in STORAGES.items()},
    }[module, name]


def _storage(pid: Any) -> _Storage:  # noqa: ANN401  (from a pickle)
    """The storage of torch.save's persistent id ("storage", type, key, device, elements). The only key is "0"."""
    if not (isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage" and pid[2] == "0"):  # noqa: PLR2004
        raise FormatError(f"an unexpected persistent object {short(pid)}")
    return _Storage(pid[1] if isinstance(pid[1], str) and pid[1] else None)
