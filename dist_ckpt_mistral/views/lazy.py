"""A stored model as a mapping from Hugging Face names to tensors, read one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from dist_ckpt_mistral import libraries
from dist_ckpt_mistral.errors import DistCkptMistralError
from dist_ckpt_mistral.gather.bands import BandReader
from dist_ckpt_mistral.mapping.source import ModelSource, completed, open_source, require_equal_twins
from dist_ckpt_mistral.model.config.mistral_config import GivenConfig, MistralConfig, chosen_config, given_directory
from dist_ckpt_mistral.storage.local import SourceFiles, Sources

if TYPE_CHECKING:
    import torch


class LazyCheckpoint(Mapping[str, "torch.Tensor"]):
    """The tensors of a Megatron checkpoint or Hugging Face directory by Hugging Face name, read when asked for.

    Every access gathers the tensor anew from the stored chunks, in its stored dtype, on the CPU. Safe to use from
    several threads, and in forked processes. A copy, also a pickled one, opens the same files anew, on first use. Where
    a file was changed or replaced since ``open_checkpoint`` looked at it, reading is an error. Equal is only the object
    itself: ``compare`` compares what checkpoints hold.
    """

    def __init__(self, source: ModelSource, seen: Sources | None = None) -> None:
        """Wrap an opened source. ``seen`` knows what its files were like when it was opened."""
        self._source, self._seen = source, seen or Sources()
        self._tensors = {tensor.hf_name: tensor for tensor in source.tensors}
        with self._seen:
            self._files = SourceFiles(source.index.files, source.index.derived)
        self._reader = BandReader(self._files)
        self._is_closed = False

    @property
    def config(self) -> MistralConfig:
        """The configuration of the model."""
        return self._source.config

    def __getitem__(self, hf_name: str) -> torch.Tensor:
        """Read one whole tensor.

        Raises KeyError for an unknown name, FormatError for a damaged file or one that was changed or replaced,
        MissingLibraryError without torch, and DistCkptMistralError after ``close``.
        """
        with libraries.needed("reading a tensor", "torch", extra="megatron"):
            import torch  # noqa: PLC0415  (only who wants tensors needs torch)

        self._require_open()
        tensor = self._tensors[hf_name]
        value = torch.empty(tensor.shape, dtype=getattr(torch, self._source.dtype_of(tensor)))
        target = value.reshape(-1).view(torch.uint8).numpy().data
        at = 0
        for band in self._reader.bands(self._source.plan_of([tensor]).segments[0]):
            target[at : at + len(band)] = band
            at += len(band)
        return value

    def __contains__(self, hf_name: object) -> bool:
        """Whether there is a tensor of this name, without reading it."""
        return hf_name in self._tensors

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

    def close(self) -> None:
        """Close the files: names, shapes and dtypes are still known, but no tensor can be read any more."""
        self._is_closed = True
        self._files.__exit__(None, None, None)

    def _require_open(self) -> None:
        if self._is_closed:
            raise DistCkptMistralError(f"{self._source.path} was closed. Read its tensors before, or open it again.")

    def __enter__(self) -> Self:
        """Files are opened on first use."""
        self._require_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the files."""
        self.close()

    def __eq__(self, other: object) -> bool:
        """Whether it is the same object: a mapping's own comparison would read all tensors, to compare them singly."""
        return self is other

    def __hash__(self) -> int:
        """Hash as an object that equals only itself."""
        return object.__hash__(self)

    def __reduce__(self) -> tuple[type[Self], tuple[ModelSource, Sources]]:
        """What a copy is made from: the plan, which any process can carry out, but no open file."""
        self._require_open()
        return type(self), (self._source, self._seen)

    def __repr__(self) -> str:
        """Say which model it is."""
        return f"<LazyCheckpoint of {len(self)} tensors in {self._source.path}>"


def open_checkpoint(path: str | Path, *, config: GivenConfig | None = None) -> LazyCheckpoint:
    """Open a Megatron checkpoint, Hugging Face directory or hub id for lazy reading; use it as a context manager.

    ``config`` is for checkpoints that do not tell theirs; a directory also gives the vision tower and projector that
    they lack. Raises DistCkptMistralError if it cannot be read.
    """
    with Sources() as seen:
        source, directory = open_source(path, config=chosen_config(config)), given_directory(config, vision=True)
        require_equal_twins(source, only_hidden=True)
        return LazyCheckpoint(source if directory is None else completed(source, directory), seen)
