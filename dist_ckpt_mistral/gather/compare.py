"""Compare the tensors that two plans read, bit by bit, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from dist_ckpt_mistral.gather.execute import INTERRUPTED_WAIT_S, Effort, band_readers, run_all, threads_for
from dist_ckpt_mistral.gather.plan import BytePlan
from dist_ckpt_mistral.storage.local import SourceFiles


def compare_bits(plan_a: BytePlan, plan_b: BytePlan, names: list[str], effort: Effort) -> Iterator[tuple[str, str]]:
    """Compare tensors of equal dtypes and shapes. Segment ``i`` of both plans is tensor ``names[i]``.

    Yields the name of each tensor that differs, and its first byte that differs, in words.
    """
    with (
        SourceFiles(plan_a.source_files, plan_a.derived_files) as files_a,
        SourceFiles(plan_b.source_files, plan_b.derived_files) as files_b,
    ):
        if names:
            effort.progress.phase("compare", plan_a.num_bytes)
        reader_a, reader_b = band_readers(effort, files_a, files_b)

        def work(number: int) -> str | None:
            segment_a, segment_b = plan_a.segments[number], plan_b.segments[number]
            at = 0
            for band_a, band_b in zip(reader_a.bands(segment_a), reader_b.bands(segment_b), strict=True):
                if not _equal(band_a, band_b):
                    effort.progress.advance(segment_a.num_bytes - at)  # the rest is not read
                    return _describe(band_a, band_b, at, segment_a.source_dtype)
                at += len(band_a)
                effort.progress.advance(len(band_a))
            return None

        differences = run_all(
            work,
            range(len(names)),
            workers=threads_for(effort, files_a, files_b),
            stop=reader_a.stop,
            patience_s=INTERRUPTED_WAIT_S if files_a.is_remote or files_b.is_remote else None,
        )
    return ((name, what) for name, what in zip(names, differences, strict=True) if what is not None)


def _equal(a: memoryview, b: memoryview) -> bool:
    """Whether two bands are equal. numpy compares without the interpreter lock, in 8-byte words if possible."""
    word = np.uint64 if len(a) == len(b) and len(a) % 8 == 0 else np.uint8
    return np.array_equal(np.frombuffer(a, word), np.frombuffer(b, word))


def _describe(band_a: memoryview, band_b: memoryview, at: int, dtype: str) -> str:
    """Describe the first byte that differs. The bands begin at byte ``at`` of their tensors."""
    first = int(np.flatnonzero(np.frombuffer(band_a, np.uint8) != np.frombuffer(band_b, np.uint8))[0])
    return f"bits differ from byte {at + first} of the {dtype} data on"
