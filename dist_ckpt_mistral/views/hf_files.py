"""The Hugging Face files of a stored model as a file system of fsspec, computed by ranges when they are read."""

from __future__ import annotations

import errno
import os
from bisect import bisect_right
from pathlib import Path
from typing import Any, ClassVar

from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

from dist_ckpt_mistral.arguments import require_types, require_whole
from dist_ckpt_mistral.convert.output import DEFAULT_OUTPUT
from dist_ckpt_mistral.convert.to_hf import hf_files, other_files
from dist_ckpt_mistral.gather.bands import BandReader
from dist_ckpt_mistral.gather.plan import Segment
from dist_ckpt_mistral.model.config.mistral_config import GivenConfig, given_directory
from dist_ckpt_mistral.storage import documents
from dist_ckpt_mistral.storage.local import SourceFiles
from dist_ckpt_mistral.views.lazy import opened


class HfFileSystem(AbstractFileSystem):  # type: ignore[misc]  # fsspec is untyped
    """The directory that ``to_hf`` would write, as a read-only file system of fsspec, without writing it.

    Every file has the bytes of the export. What is read of a safetensors file is gathered from the stored chunks at
    that moment, range by range. So programs that stream safetensors files read a Megatron checkpoint where it is.

    Args:
        source: A Megatron checkpoint (root or iteration directory), a Hugging Face directory, or a hub id.
        config: As for ``to_hf``.
        max_file_bytes: Size of the safetensors files, if those of the original model are not known.

    Raises:
        DistCkptMistralError: The model is damaged, contradicts its configuration, or cannot be read.

    Example:
        with dcm.HfFileSystem("ckpt").open("model.safetensors") as file: ...
    """

    protocol: ClassVar[str] = "dist-ckpt-mistral"
    root_marker: ClassVar[str] = ""
    #: fsspec would otherwise give the same object for the same arguments, whatever has been saved in between.
    cachable: ClassVar[bool] = False

    def __init__(
        self,
        source: str | Path,
        config: GivenConfig | None = None,
        *,
        max_file_bytes: int = DEFAULT_OUTPUT.max_file_bytes,
    ) -> None:
        """Plan the files; no tensor is read yet."""
        require_types(HfFileSystem.__init__, source=source, config=config)
        require_whole("max_file_bytes", max_file_bytes, least=1, meaning="bytes")
        super().__init__()
        model, inputs = opened(source, config)
        with inputs:
            files = hf_files(model, None, max_file_bytes)
            copied, texts = other_files(model, files, given_directory(config))
            self._copied = {name: path for name, path in copied.items() if name not in texts}
            plan = model.plan_into(files.tensor_index(Path(), model.table.usual_name))
            self._reader = BandReader(SourceFiles(plan.source_files, plan.derived_files))
        self._inputs = inputs
        self._texts = {name: text for name, text in texts.items() if text is not None}
        self._heads = {name: file.head for name, file in files.files.items()}
        self._segments: dict[str, list[Segment]] = {name: [] for name in files.files}
        for segment in plan.segments:
            self._segments[plan.target_files[segment.file].name].append(segment)
        self._sizes = {name: file.num_bytes for name, file in files.files.items()}
        self._sizes |= {name: len(text) for name, text in self._texts.items()}
        self._sizes |= {name: path.stat().st_size for name, path in self._copied.items()}

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:  # noqa: ANN401  (as fsspec)
        """List a folder, or a file.

        Args:
            path: Its name, relative to the model's directory; empty for that itself.
            detail: Give dicts with name, size and type, not names.

        Returns:
            What is there.

        Raises:
            FileNotFoundError: Nothing is.
        """
        path = self._strip_protocol(path).strip("/")
        top = f"{path}/" if path else ""
        found: dict[str, int | None] = {path: self._sizes[path]} if path in self._sizes else {}
        for name in self._sizes:
            if path not in found and name.startswith(top):
                first, _slash, rest = name[len(top) :].partition("/")
                found[top + first] = None if rest else self._sizes[name]
        if not found:
            raise FileNotFoundError(path)
        entries = [
            {"name": name, "size": size or 0, "type": "directory" if size is None else "file"}
            for name, size in sorted(found.items())
        ]
        return entries if detail else [entry["name"] for entry in entries]

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:  # noqa: ANN401
        """Read bytes ``[start, end)`` of a file.

        Args:
            path: Its name.
            start: The first byte; negative ones count from the end.
            end: The byte behind the last one, likewise.

        Returns:
            The bytes, fewer at the end of the file.

        Raises:
            FileNotFoundError: There is no such file.
            FormatError: A source file is damaged, or has changed since the file system was made.
        """
        name = self._strip_protocol(path).strip("/")
        if name not in self._sizes:
            raise FileNotFoundError(path)
        low, high, _step = slice(start, end).indices(self._sizes[name])
        if name in self._texts:
            return self._texts[name][low:high]
        if name in self._copied:
            with self._inputs:
                return documents.read_bytes(self._copied[name], most_bytes=None)[low:high]
        return self._range(name, low, high)

    def _range(self, name: str, low: int, high: int) -> bytes:
        """Bytes ``[low, high)`` of a safetensors file: of its head, and of the tensors behind it."""
        content = bytearray(max(0, high - low))
        head = self._heads[name][low:high]
        content[: len(head)] = head
        segments = self._segments[name]
        first = max(0, bisect_right(segments, low, key=lambda segment: segment.position) - 1)
        for segment in segments[first:]:
            if segment.position >= high:
                break
            begin, end = max(low, segment.position), min(high, segment.position + segment.num_bytes)
            at = begin - low
            for band in self._reader.bands(segment, begin - segment.position, max(begin, end) - segment.position):
                content[at : at + len(band)] = band
                at += len(band)
        return bytes(content)

    def _open(self, path: str, mode: str = "rb", **options: Any) -> AbstractBufferedFile:  # noqa: ANN401  (as fsspec)
        """Open a file to read. Whatever else was written to it would be lost."""
        if mode != "rb":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
        return _File(self, path, mode, size=self.info(path)["size"], **options)


class _File(AbstractBufferedFile):  # type: ignore[misc]  # fsspec is untyped
    """An opened file."""

    def _fetch_range(self, start: int, end: int) -> bytes:
        content: bytes = self.fs.cat_file(self.path, start, end)
        return content
