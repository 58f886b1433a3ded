"""A stored model as a mapping from Hugging Face names to tensors, read one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from dist_ckpt_mistral.gather.bands import BandReader
from dist_ckpt_mistral.model.config import GivenConfig, MistralConfig, given_config, given_directory
from dist_ckpt_mistral.model_source import ModelSource, completed, open_source
from dist_ckpt_mistral.storage import SourceFiles
from dist_ckpt_mistral.verify import require_equal_twins

if TYPE_CHECKING:
    import torch


class LazyCheckpoint(Mapping[str, "torch.Tensor"]):
    """The tensors of a Megatron checkpoint or Hugging Face directory by Hugging Face name, read when asked for.

    Every access gathers the tensor anew from the stored chunks, in its stored dtype, on the CPU. Safe to use from
    several threads.
    """

    def __init__(self, source: ModelSource) -> None:
        """Wrap an opened source."""
        self._source = source
        self._tensors = {tensor.hf_name: tensor for tensor in source.tensors}
        self._files = SourceFiles(source.index.files, source.index.derived)
        self._reader = BandReader(self._files)

    @property
    def config(self) -> MistralConfig:
        """The configuration of the model."""
        return self._source.config

    def __getitem__(self, hf_name: str) -> torch.Tensor:
        """Read one whole tensor. Raises KeyError for an unknown name, FormatError for a damaged file."""
        import torch  # noqa: PLC0415  (only who wants tensors needs torch)

        tensor = self._tensors[hf_name]
        value = torch.empty(tensor.shape, dtype=getattr(torch, self._source.dtype_of(tensor)))
        target = value.reshape(-1).view(torch.uint8).numpy().data
        at = 0
        for band in self._reader.bands(self._source.plan_of([tensor]).segments[0]):
            target[at : at + len(band)] = band
            at += len(band)
        return value

    def __iter__(self) -> Iterator[str]:
        """Yield the names in state-dict order."""
        return iter(self._tensors)

    def __len__(self) -> int:
        """Count the tensors."""
        return len(self._tensors)

    def shape(self, hf_name: str) -> tuple[int, ...]:
        """Shape of a tensor in elements, without reading it."""
        return self._tensors[hf_name].shape

    def dtype(self, hf_name: str) -> str:
        """Torch dtype name of a tensor, without reading it."""
        return self._source.dtype_of(self._tensors[hf_name])

    def __enter__(self) -> Self:
        """Files are opened on first use."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the files."""
        self._files.__exit__(kind, error, trace)


def open_checkpoint(path: str | Path, *, config: GivenConfig | None = None) -> LazyCheckpoint:
    """Open a Megatron checkpoint or a Hugging Face directory for lazy reading; use it as a context manager.

    ``config`` is for checkpoints that do not tell theirs; a directory also gives the vision tower and projector that
    they lack. Raises DistCkptMistralError if it cannot be read.
    """
    source, directory = open_source(Path(path), config=given_config(config)), given_directory(config)
    require_equal_twins(source, only_hidden=True)
    return LazyCheckpoint(source if directory is None else completed(source, directory))
