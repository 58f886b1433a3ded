"""Rows that tensor parallelism cuts are read once for all files that want a piece of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_ckpt_mistral.gather.execute import Effort, execute
from dist_ckpt_mistral.gather.index import IndexedTensor, TensorIndex
from dist_ckpt_mistral.gather.links import Link
from dist_ckpt_mistral.gather.plan import BytePlan, plan_gather
from dist_ckpt_mistral.storage.local import SourceFiles, TargetFile
from dist_ckpt_mistral.storage.remote_reads import Wanted
from dist_ckpt_mistral.storage.shared_rows import SharedRows

ROWS, COLUMNS, FILES = 3000, 4096, 8


def cut_by_columns(folder: Path) -> tuple[BytePlan, np.ndarray]:
    """A plan that gives each of eight files an eighth of every row of a matrix, and the matrix."""
    matrix = np.random.default_rng(0).integers(0, 256, (ROWS, COLUMNS), dtype=np.uint8)
    (folder / "source").write_bytes(b"head" + matrix.tobytes())
    width = COLUMNS // FILES
    pieces = [((0, file * width), (ROWS, width), file, 0) for file in range(FILES)]
    source = IndexedTensor.whole("s", "uint8", matrix.shape, file=0, position=4)
    target = IndexedTensor.build("t", "uint8", matrix.shape, pieces)
    plan = plan_gather(
        TensorIndex(files=(folder / "source",), tensors={"s": source}),
        TensorIndex(files=tuple(folder / str(file) for file in range(FILES)), tensors={"t": target}),
        [Link(source="s", source_offset=(0, 0), target="t", target_offset=(0, 0), shape=matrix.shape)],
    )
    return plan, matrix


@pytest.mark.parametrize(
    ("effort", "times"),
    [
        (Effort(workers=1), 1.01),
        (Effort(workers=3), 1.01),
        (Effort(workers=2, memory_bytes=1 << 20), FILES),  # too little memory to keep rows for others
    ],
)
def test_shared_rows_are_read_once(
    effort: Effort, times: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight files with an eighth of every row read a matrix once, where the memory allows it, and are right anyway."""
    plan, matrix = cut_by_columns(tmp_path)
    read_bytes, read_into = [], SourceFiles.read_into

    def counted(files: SourceFiles, file: int, position: int, *buffers: memoryview) -> None:
        read_bytes.append(sum(map(len, buffers)))
        read_into(files, file, position, *buffers)

    monkeypatch.setattr(SourceFiles, "read_into", counted)
    targets = {file: TargetFile(tmp_path / str(file), matrix.nbytes // FILES) for file in range(FILES)}
    execute(plan, targets, effort=effort, numbers=range(FILES), checksums=True)
    for file, columns in enumerate(np.split(matrix, FILES, axis=1)):
        assert targets[file].read(0, matrix.nbytes) == columns.tobytes()
        targets[file].close()
    assert times * 0.9 <= sum(read_bytes) / matrix.nbytes <= times


RANGES = st.lists(
    st.tuples(st.integers(0, 1), st.integers(0, 90), st.integers(1, 40), st.booleans()), min_size=1, max_size=12
)


@given(ranges=RANGES, most_bytes=st.integers(1, 60))
def test_a_block_has_what_the_files_have(ranges: list[tuple[int, int, int, bool]], most_bytes: int) -> None:
    """Whatever ranges come one after the other, a block gives the bytes of the file, or none."""
    files = [bytes(range(file, file + 130)) for file in (0, 100)]

    def read_into(file: int, position: int, *buffers: memoryview) -> None:
        for buffer in buffers:
            buffer[:] = files[file][position : position + len(buffer)]
            position += len(buffer)

    rows = SharedRows(read_into, most_bytes)
    for file, start, size, is_shared in ranges:
        held = rows.hold([Wanted(file, start, start + size, is_shared)])
        view = held.view(file, start, size)
        assert view is None or bytes(view) == files[file][start : start + size]
        assert view is not None or not is_shared or size > most_bytes


def test_a_failed_read_leaves_no_block() -> None:
    """After an error while a block grows, nothing of it is taken for the file's bytes."""
    calls = []

    def read_into(file: int, position: int, *buffers: memoryview) -> None:
        calls.append((file, position))
        if len(calls) > 1:
            raise OSError(5, "Input/output error")
        for buffer in buffers:
            buffer[:] = bytes(len(buffer))

    rows = SharedRows(read_into, 100)
    rows.hold([Wanted(0, 0, 10, is_shared=True)])
    with pytest.raises(OSError, match="Input/output"):
        rows.hold([Wanted(0, 5, 20, is_shared=True)])
    assert rows.view(0, 0, 10) is None
