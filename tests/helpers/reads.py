"""How many bytes are read of source files."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

from dist_ckpt_mistral.gather import bands
from dist_ckpt_mistral.storage.local import SourceFiles


@contextlib.contextmanager
def counted_reads() -> Iterator[list[int]]:
    """Collect the sizes of the pieces that are gathered from files. Gaps between rows are then never read along."""
    read: list[int] = []
    read_into = SourceFiles.read_into

    def counting(files: SourceFiles, file: int, position: int, *buffers: memoryview) -> None:
        read.extend(map(len, buffers))
        read_into(files, file, position, *buffers)

    with mock.patch.object(SourceFiles, "read_into", counting), mock.patch.object(bands, "_LONG_GAP_BYTES", -1):
        yield read
