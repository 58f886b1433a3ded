"""A stored model as a mapping from Hugging Face names to tensors, each read on access."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import EllipsisType
from typing import TYPE_CHECKING, Any, NamedTuple, Self, SupportsIndex, TypeAlias

import numpy as np

from dist_ckpt_mistral import libraries
from dist_ckpt_mistral.arguments import require_types
from dist_ckpt_mistral.errors import DistCkptMistralError
from dist_ckpt_mistral.gather import dtypes
from dist_ckpt_mistral.gather.bands import BandReader
from dist_ckpt_mistral.gather.dtypes import Shape
from dist_ckpt_mistral.mapping.rank_plan import box_array, plan_arrays
from dist_ckpt_mistral.mapping.source import ModelSource, open_source
from dist_ckpt_mistral.mapping.twins import require_equal_twins
from dist_ckpt_mistral.mapping.vision import completed
from dist_ckpt_mistral.messages import counted
from dist_ckpt_mistral.model.config.mistral_config import GivenConfig, MistralConfig, chosen_config, given_directory
from dist_ckpt_mistral.storage.local import SourceFiles
from dist_ckpt_mistral.storage.sources import Sources

if TYPE_CHECKING:
    import torch

#: What selects elements along one axis. Slices have no step.
Index: TypeAlias = SupportsIndex | slice | EllipsisType
#: The name of a tensor, or the name and what to read of it.
Key: TypeAlias = str | tuple[str | Index, ...]


class _Box(NamedTuple):
    """A box of a tensor, in elements, and the shape in which it is given out: without the axes that have one index."""

    offset: Shape
    shape: Shape
    shown: Shape


class LazyCheckpoint(Mapping[str, "torch.Tensor"]):
    """The tensors of a Megatron checkpoint or Hugging Face directory by Hugging Face name, read on access.

    Every access gathers a tensor from the stored chunks, in its stored dtype, on the CPU. With an index only that part
    is read: ``checkpoint[name, 0:128]`` are the first 128 rows. ``numpy`` does the same without torch. Several threads
    and forked processes may use the object. A copy, also a pickled one, opens the files again on first use. Reading a
    file that was changed or replaced since ``open_checkpoint`` is an error. Two objects are never equal; use
    ``compare`` to compare the tensors of two checkpoints.

    Args:
        source: An opened model source. Call ``open_checkpoint`` to make one from a path.
        inputs: Stamps of the source's files when it was opened.

    Example:
        with dcm.open_checkpoint("ckpt") as checkpoint:
            shape = checkpoint.shape("model.norm.weight")  # reads no tensor
            weight = checkpoint["model.norm.weight"]
            rows = checkpoint["lm_head.weight", 1000:1010]  # reads ten rows
    """

    def __init__(self, source: ModelSource, inputs: Sources | None = None) -> None:
        """Open no file yet."""
        self._source, self._inputs = source, inputs or Sources()
        self._tensors = {tensor.hf_name: tensor for tensor in source.tensors}
        with self._inputs:
            self._files = SourceFiles(source.index.files, source.index.derived)
        self._reader = BandReader(self._files)
        self._is_closed = False

    @property
    def config(self) -> MistralConfig:
        """The configuration of the model."""
        return self._source.config

    @property
    def path(self) -> Path:
        """The directory of the model; of a checkpoint root, the iteration's directory."""
        return self._source.path

    def __getitem__(self, key: Key) -> torch.Tensor:
        """Read one tensor, or a part of it.

        Args:
            key: Its Hugging Face name, for example ``model.norm.weight``; or the name and, as for numpy, what to read
                of it: slices without a step, integers and ``...``.

        Returns:
            A new tensor on the CPU, with the shape and dtype that ``shape`` and ``dtype`` give.

        Raises:
            KeyError: There is no such tensor.
            IndexError: The tensor has no such part.
            FormatError: A file is damaged, or was changed or replaced since ``open_checkpoint``.
            MissingLibraryError: torch is not installed.
            DistCkptMistralError: The checkpoint was closed.
        """
        with libraries.needed("reading a tensor", "torch", extra="megatron"):
            import torch  # noqa: PLC0415  (optional: names, shapes and dtypes are available without torch)

        hf_name, box = self._box(key)
        value = torch.empty(box.shape, dtype=getattr(torch, self.dtype(hf_name)))
        self._read_into(value.reshape(-1).view(torch.uint8).numpy().data, hf_name, box)
        return value.reshape(box.shown)

    def numpy(self, hf_name: str, *index: Index) -> np.ndarray[Any, Any]:
        """Read one tensor, or a part of it, without torch.

        Args:
            hf_name: Its Hugging Face name.
            index: What to read of it, as in ``checkpoint[name, 0:128]``: ``checkpoint.numpy(name, slice(0, 128))``.

        Returns:
            A new array. Of bfloat16 and float8 it has ml_dtypes' dtype.

        Raises:
            KeyError: There is no such tensor.
            IndexError: The tensor has no such part.
            FormatError: A file is damaged, or was changed or replaced since ``open_checkpoint``.
            DistCkptMistralError: The checkpoint was closed.

        Example:
            ``checkpoint.numpy("model.norm.weight").dtype  # dtype(bfloat16)``
        """
        hf_name, box = self._box((hf_name, *index))
        value = np.empty(box.shape, dtypes.to_numpy(self.dtype(hf_name)))
        self._read_into(value.reshape(-1).view(np.uint8).data, hf_name, box)
        return value.reshape(box.shown)

    def slices(self) -> dict[str, LazyTensor]:
        """Give every tensor as an object that is read when it is indexed.

        Returns:
            By Hugging Face name what safetensors' ``get_slice`` gives, for code that reads such slices: transformers
            takes them for a ``state_dict``, and reads each when its parameter is filled, or only a rank's part of it.

        Example:
            ``AutoModelForCausalLM.from_pretrained(None, config=config, state_dict=checkpoint.slices())``
        """
        return {hf_name: LazyTensor(self, hf_name) for hf_name in self}

    def _box(self, key: Key) -> tuple[str, _Box]:
        """The name and the box that ``key`` stands for. Raises KeyError, IndexError, DistCkptMistralError."""
        self._require_open()
        hf_name, *index = key if isinstance(key, tuple) else (key,)
        return str(hf_name), _selected(self._tensors[str(hf_name)].shape, index, str(hf_name))

    def _read_into(self, target: memoryview, hf_name: str, box: _Box) -> None:
        """Fill ``target`` with the bytes of a box."""
        if not math.prod(box.shape):
            return
        plan = plan_arrays(self._source, [box_array(hf_name, self.dtype(hf_name), hf_name, box.offset, box.shape)])
        position = 0
        for band in self._reader.bands(plan.segments[0]):
            target[position : position + len(band)] = band
            position += len(band)

    def __contains__(self, hf_name: object) -> bool:
        """Whether there is a tensor of this name."""
        return hf_name in self._tensors

    def __iter__(self) -> Iterator[str]:
        """Yield the names in state-dict order."""
        return iter(self._tensors)

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self._tensors)

    def shape(self, hf_name: str) -> tuple[int, ...]:
        """Return the shape of a tensor in elements, without reading it. Raises KeyError."""
        return self._tensors[hf_name].shape

    def dtype(self, hf_name: str) -> str:
        """Return the torch dtype name of a tensor, such as ``bfloat16``, without reading it. Raises KeyError."""
        return self._source.dtype_of(self._tensors[hf_name])

    def close(self) -> None:
        """Close the files. Names, shapes and dtypes stay available, but tensors can no longer be read."""
        self._is_closed = True
        self._files.__exit__()

    def _require_open(self) -> None:
        """Raise DistCkptMistralError after ``close``."""
        if self._is_closed:
            raise DistCkptMistralError(
                f"{self._source.path} was closed. Read its tensors before closing it, or open it again."
            )

    def __enter__(self) -> Self:
        """Open no file yet: each is opened on first use."""
        self._require_open()
        return self

    def __exit__(self, *_: object) -> None:
        """Close the files."""
        self.close()

    def __eq__(self, other: object) -> bool:
        """Whether both are the same object. ``Mapping`` would read and compare all tensors."""
        return self is other

    def __hash__(self) -> int:
        """Hash by identity, like ``__eq__``."""
        return object.__hash__(self)

    def __reduce__(self) -> tuple[type[Self], tuple[ModelSource, Sources]]:
        """Copy and pickle the index and the links, but no open files."""
        self._require_open()
        return type(self), (self._source, self._inputs)

    def __repr__(self) -> str:
        """Name the path and the number of tensors."""
        return f"<LazyCheckpoint of {counted(len(self), 'tensor')} in {self._source.path}>"


class LazyTensor:
    """One tensor of an open checkpoint, with the methods of a slice of safetensors (0.8): indexing reads.

    Args:
        checkpoint: The open checkpoint.
        hf_name: The Hugging Face name of the tensor.
    """

    def __init__(self, checkpoint: LazyCheckpoint, hf_name: str) -> None:
        """Read nothing yet."""
        self._checkpoint, self._hf_name = checkpoint, hf_name

    def get_shape(self) -> list[int]:
        """Return the shape in elements."""
        return [*self._checkpoint.shape(self._hf_name)]

    def get_dtype(self) -> str:
        """Return the dtype's name in safetensors, such as ``BF16``."""
        return dtypes.to_safetensors(self._checkpoint.dtype(self._hf_name))

    def __getitem__(self, index: Index | tuple[Index, ...]) -> torch.Tensor:
        """Read the tensor (``[...]``), or a part of it, as ``LazyCheckpoint`` does."""
        parts = index if isinstance(index, tuple) else (index,)
        return self._checkpoint[(self._hf_name, *parts)]


def _selected(shape: Shape, index: list[Any], hf_name: str) -> _Box:
    """The box of a tensor of ``shape`` that ``index`` selects. Raises IndexError."""
    if index.count(...) > 1 or len(index) - index.count(...) > len(shape):
        raise IndexError(f"{hf_name} has {counted(len(shape), 'axis', 'axes')}: got the index {index}")
    if ... not in index:
        index = [*index, ...]
    gap = index.index(...)
    filled = [*index[:gap], *[slice(None)] * (len(shape) - len(index) + 1), *index[gap + 1 :]]
    offset, extents, shown = list[int](), list[int](), list[int]()
    for axis, (extent, part) in enumerate(zip(shape, filled, strict=True)):
        if isinstance(part, slice):
            low, high, step = part.indices(extent)
            if step != 1:
                raise IndexError(f"{hf_name}: expected a slice without a step, got {part}. Apply the step afterwards.")
            shown.append(max(0, high - low))
        else:
            low = operator.index(part)
            if not -extent <= low < extent:
                raise IndexError(f"{hf_name} has {extent} elements on axis {axis}: got the index {low}")
            low, high = low % extent, low % extent + 1
        offset.append(low)
        extents.append(max(0, high - low))
    return _Box(tuple(offset), tuple(extents), tuple(shown))


def open_checkpoint(source: str | Path, *, config: GivenConfig | None = None) -> LazyCheckpoint:
    """Open a model for lazy reading under Hugging Face names.

    Args:
        source: A Megatron checkpoint (its root, or one ``iter_*`` or ``release`` directory in it), a Hugging Face
            directory, or a hub id such as ``mistralai/Mistral-7B-v0.3``.
        config: For checkpoints that lost their configuration: a ``MistralConfig``, a config.json, or a directory or hub
            id with one. A directory also gives the vision tower and projector of a multimodal model, which training in
            Megatron drops.

    Returns:
        A mapping from Hugging Face names to tensors. Use it as a context manager, or call ``close``.

    Raises:
        DistCkptMistralError: The model is damaged, contradicts its configuration, or cannot be read.

    Example:
        with dcm.open_checkpoint("ckpt") as checkpoint:
            q = checkpoint["model.layers.0.self_attn.q_proj.weight"]
            some = checkpoint["model.embed_tokens.weight", 100:110]  # reads these rows alone
    """
    require_types(open_checkpoint, **locals())
    return LazyCheckpoint(*opened(source, config))


def opened(path: str | Path, config: GivenConfig | None) -> tuple[ModelSource, Sources]:
    """Open a model as ``open_checkpoint`` does: the model, and the stamps of its files when it was opened."""
    with Sources() as inputs:
        source = open_source(path, config=chosen_config(config), adapters=True)
        directory = given_directory(config)
        require_equal_twins(source, only_hidden=True)
        return source if directory is None else completed(source, directory), inputs
