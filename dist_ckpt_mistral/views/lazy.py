"""A stored model as a mapping from Hugging Face names to tensors, each read on access."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Self

from dist_ckpt_mistral import libraries
from dist_ckpt_mistral.errors import DistCkptMistralError
from dist_ckpt_mistral.gather.bands import BandReader
from dist_ckpt_mistral.mapping.source import ModelSource, completed, open_source, require_equal_twins
from dist_ckpt_mistral.messages import counted
from dist_ckpt_mistral.model.config.mistral_config import GivenConfig, MistralConfig, chosen_config, given_directory
from dist_ckpt_mistral.storage.local import SourceFiles, Sources

if TYPE_CHECKING:
    import torch


class LazyCheckpoint(Mapping[str, "torch.Tensor"]):
    """The tensors of a Megatron checkpoint or Hugging Face directory by Hugging Face name, read on access.

    Every access gathers the whole tensor from the stored chunks, in its stored dtype, on the CPU. Several threads and
    forked processes may use the object. A copy, also a pickled one, opens the files again on first use. Reading a file
    that was changed or replaced since ``open_checkpoint`` is an error. Two objects are never equal; use ``compare`` to
    compare the tensors of two checkpoints.

    Args:
        source: An opened model source. Call ``open_checkpoint`` to make one from a path.
        inputs: Stamps of the source's files when it was opened.

    Example:
        with dcm.open_checkpoint("ckpt") as checkpoint:
            shape = checkpoint.shape("model.norm.weight")  # reads no tensor
            weight = checkpoint["model.norm.weight"]
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

    def __getitem__(self, hf_name: str) -> torch.Tensor:
        """Read one tensor.

        Args:
            hf_name: Its Hugging Face name, for example ``model.norm.weight``.

        Returns:
            A new tensor on the CPU, with the shape and dtype that ``shape`` and ``dtype`` give.

        Raises:
            KeyError: There is no such tensor.
            FormatError: A file is damaged, or was changed or replaced since ``open_checkpoint``.
            MissingLibraryError: torch is not installed.
            DistCkptMistralError: The checkpoint was closed.
        """
        with libraries.needed("reading a tensor", "torch", extra="megatron"):
            import torch  # noqa: PLC0415  (optional: names, shapes and dtypes are available without torch)

        self._require_open()
        tensor = self._tensors[hf_name]
        value = torch.empty(tensor.shape, dtype=getattr(torch, self._source.dtype_of(tensor)))
        target = value.reshape(-1).view(torch.uint8).numpy().data
        position = 0
        for band in self._reader.bands(self._source.plan_of([tensor]).segments[0]):
            target[position : position + len(band)] = band
            position += len(band)
        return value

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


def open_checkpoint(path: str | Path, *, config: GivenConfig | None = None) -> LazyCheckpoint:
    """Open a model for lazy reading under Hugging Face names.

    Args:
        path: A Megatron checkpoint (its root, or one ``iter_*`` or ``release`` directory in it), a Hugging Face
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
    """
    with Sources() as inputs:
        source = open_source(path, config=chosen_config(config), adapters=True)
        directory = given_directory(config, vision=True)
        require_equal_twins(source, only_hidden=True)
        return LazyCheckpoint(source if directory is None else completed(source, directory), inputs)
