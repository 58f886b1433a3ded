"""Running a plan: few reads, bytes where they belong by any threads, and an end at the first failure."""

from __future__ import annotations

import itertools
import os
import threading
import time
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from drawn_chunks import (
    DTYPES,
    Disk,
    elements,
    expected_chunks,
    gathered,
    planned_tensors,
    region,
    shapes,
    stored_tensors,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded_progress import Recorded

from dist_ckpt_mistral.errors import FormatError, SourceError
from dist_ckpt_mistral.gather.bands import BandReader, best_band_bytes
from dist_ckpt_mistral.gather.execute import Effort, execute
from dist_ckpt_mistral.gather.index import IndexedTensor, TensorIndex
from dist_ckpt_mistral.gather.links import Link
from dist_ckpt_mistral.gather.plan import BytePlan, plan_gather
from dist_ckpt_mistral.storage.local import SourceFiles, TargetFile


def column_plan(disk: Disk, rows: int, source_columns: int, columns: slice) -> tuple[BytePlan, bytes]:
    """A plan that takes some columns of a uint8 matrix, and what it should bring."""
    array = elements((rows, source_columns), 1, 5)
    position = disk.store(0, 7, array.tobytes())
    width = columns.stop - columns.start
    source = IndexedTensor.whole("s", "uint8", (rows, source_columns), file=0, position=position)
    target = IndexedTensor.whole("t", "uint8", (rows, width), file=0, position=0)
    link = Link(source="s", source_offset=(0, columns.start), target="t", target_offset=(0, 0), shape=(rows, width))
    plan = plan_gather(
        TensorIndex(files=(Path("a"),), tensors={"s": source}),
        TensorIndex(files=(Path("b"),), tensors={"t": target}),
        [link],
    )
    return plan, array[:, columns].tobytes()


@pytest.mark.parametrize(
    ("rows", "source_columns", "columns", "band_bytes", "reads"),
    [
        (64, 100, slice(0, 100), 1 << 20, [(7, 6400)]),
        (64, 100, slice(0, 100), 3000, [(7, 3000), (3007, 3000), (6007, 400)]),
        (4, 100, slice(10, 20), 1 << 20, [(17, 310)]),
        (3, 70_000, slice(10, 20), 1 << 20, [(17, 10), (70_017, 10), (140_017, 10)]),
        (4, 100, slice(10, 20), 15, [(17, 10), (117, 5), (122, 5), (217, 10), (317, 10)]),
    ],
)
def test_reads_are_few_and_none_is_wasted(
    rows: int, source_columns: int, columns: slice, band_bytes: int, reads: list[tuple[int, int]]
) -> None:
    """Contiguous bytes are read at once, rows with short gaps in one span, rows with long gaps one by one."""
    disk = Disk()
    plan, expected = column_plan(disk, rows, source_columns, columns)
    assert b"".join(gathered(plan, disk, band_bytes).values()) == expected
    assert sorted((position, num_bytes) for _, position, num_bytes in disk.reads) == reads


def test_long_rows_go_to_their_places_without_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that lie together in the source and apart in the target are read by one call, into as many buffers."""
    disk, array = Disk(), elements((6, 8000), 1, 3)
    halves = [((0, 0), (6, 3000)), ((0, 3000), (6, 5000))]
    chunks = [(*half, 0, disk.store(0, 7, array[region(half)].tobytes())) for half in halves]
    source = IndexedTensor.build("s", "uint8", (6, 8000), chunks)
    target = IndexedTensor.whole("t", "uint8", (6, 8000), file=0, position=0)
    link = Link(source="s", source_offset=(0, 0), target="t", target_offset=(0, 0), shape=(6, 8000))
    plan = plan_gather(
        TensorIndex(files=(Path("a"),), tensors={"s": source}),
        TensorIndex(files=(Path("b"),), tensors={"t": target}),
        [link],
    )
    monkeypatch.setattr(np, "copyto", None)
    assert gathered(plan, disk, 1 << 20) == {(0, 0): array.tobytes()}
    assert [num_bytes for _, _, num_bytes in disk.reads] == [18_000, 30_000]


@settings(max_examples=40)
@given(
    data=st.data(),
    shape=shapes(least_axes=1, most_axes=3),
    workers=st.integers(1, 4),
    checksums=st.booleans(),
    dtype=st.sampled_from([*DTYPES]),
)
def test_files_are_written_as_planned(
    data: st.DataObject,
    shape: tuple[int, ...],
    workers: int,
    checksums: bool,
    dtype: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Real files, any number of threads: planned bytes are as numpy has them, all others untouched, checksums right."""
    folder = tmp_path_factory.mktemp("run")
    disk, ends = Disk(), [0, 0]
    array = elements(shape, DTYPES[dtype], 3)
    source = data.draw(stored_tensors(disk, "s", dtype, array))
    target = data.draw(planned_tensors(ends, "t", dtype, shape))
    sources = tuple(folder / f"source{number}" for number in range(3))
    for path, content in zip(sources, disk.files, strict=True):
        path.write_bytes(content)
    origin = (0,) * len(shape)
    plan = plan_gather(
        TensorIndex(files=sources, tensors={"s": source}),
        TensorIndex(files=(folder / "0", folder / "1"), tensors={"t": target}),
        [Link(source="s", source_offset=origin, target="t", target_offset=origin, shape=shape)],
    )
    targets = {number: TargetFile(folder / str(number), end + 5) for number, end in enumerate(ends)}
    progress = Recorded()
    copied = execute(
        plan,
        targets,
        effort=Effort(workers=workers, progress=progress),
        numbers=range(len(plan.segments)),
        checksums=checksums,
    )
    for each in targets.values():
        each.close()
    expected = expected_chunks(target, array)
    whole = [bytearray(end + 5) for end in ends]
    for (file, position), raw in expected.items():
        whole[file][position : position + len(raw)] = raw
    assert [(folder / str(number)).read_bytes() for number in (0, 1)] == whole
    assert sum(num_bytes for _, num_bytes in progress.done) == array.size
    true = {n: zlib.crc32(expected[s.file, s.position]) for n, s in enumerate(plan.segments)}
    assert {number: each.lost for number, each in copied.items()} == dict.fromkeys(true, (0, 0))
    assert not checksums or {number: each.crc32 for number, each in copied.items()} == true


def test_long_segments_are_shared_among_threads(tmp_path: Path) -> None:
    """Segments longer than what a thread takes at a time come out whole, with checksums and without."""
    rng = np.random.default_rng(0)
    content = rng.integers(0, 256, 150 << 20, dtype=np.uint8)
    content.tofile(tmp_path / "source")
    shape = (len(content) // 4,)
    index = {
        name: TensorIndex(
            files=(tmp_path / name,),
            tensors={name: IndexedTensor.whole(name, "float32", shape, file=0, position=0)},
        )
        for name in ("source", "target")
    }
    link = Link(source="source", source_offset=(0,), target="target", target_offset=(0,), shape=shape)
    plan = plan_gather(index["source"], index["target"], [link])
    for checksums in (False, True):
        target = TargetFile(tmp_path / "target", len(content))
        found = execute(plan, {0: target}, effort=Effort(workers=3), numbers=[0], checksums=checksums)
        target.close()
        assert (np.fromfile(tmp_path / "target", np.uint8) == content).all()
        assert not checksums or found[0].crc32 == zlib.crc32(content.data)
        (tmp_path / "target").unlink()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_writes_begin_where_the_page_cache_takes_them_whole(tmp_path: Path, dtype: str) -> None:
    """All writes but a segment's first begin at multiples of their length, also if values are converted on the way."""
    (tmp_path / "source").write_bytes(bytes(3 << 20))
    shape, writes = (3 << 18,), []
    source = IndexedTensor.whole("s", "float32", shape, file=0, position=0)
    target = IndexedTensor.whole("t", dtype, shape, file=0, position=1000)
    plan = plan_gather(
        TensorIndex(files=(tmp_path / "source",), tensors={"s": source}),
        TensorIndex(files=(tmp_path / "target",), tensors={"t": target}),
        [Link(source="s", source_offset=(0,), target="t", target_offset=(0,), shape=shape)],
    )
    written = SimpleNamespace(
        write=lambda position, data: writes.append((position, len(data))), start_writeback=lambda *_: None
    )
    effort = Effort(workers=1)
    execute(plan, {0: cast("TargetFile", written)}, effort=effort, numbers=[0], checksums=False)
    stored, band = shape[0] * DTYPES[dtype], best_band_bytes() // 4 * DTYPES[dtype]
    begins = [1000, *range(band, 1000 + stored, band)]
    assert writes == [(begin, end - begin) for begin, end in itertools.pairwise([*begins, 1000 + stored])]


class FailingTarget:
    """A file whose disk is full after some writes."""

    def __init__(self, good: int, seconds: float = 0) -> None:
        """Let ``good`` writes pass, each after some time."""
        self.good, self.seconds, self.writes = good, seconds, 0

    def start_writeback(self, position: int, num_bytes: int) -> None:
        """Nothing is on its way."""

    def write(self, position: int, data: memoryview) -> None:
        """Write, or fail."""
        self.writes += 1
        time.sleep(self.seconds)
        if self.writes > self.good:
            time.sleep(0.01)  # a slow disk: what is still in the queue can be cancelled
            raise OSError(28, f"no space for {len(data)} bytes at {position}")


@pytest.mark.parametrize("workers", [1, 3])
def test_the_first_failure_ends_the_run(workers: int, tmp_path: Path) -> None:
    """When a write fails that error comes out, and of a thousand segments hardly any is tried after it."""
    (tmp_path / "source").write_bytes(bytes(1000))
    source = IndexedTensor.whole("s", "uint8", (1000,), file=0, position=0)
    target = IndexedTensor.build("t", "uint8", (1000,), [((row,), (1,), 0, row) for row in range(1000)])
    plan = plan_gather(
        TensorIndex(files=(tmp_path / "source",), tensors={"s": source}),
        TensorIndex(files=(tmp_path / "target",), tensors={"t": target}),
        [Link(source="s", source_offset=(0,), target="t", target_offset=(0,), shape=(1000,))],
    )
    failing = FailingTarget(5)
    effort = Effort(workers=workers)
    with pytest.raises(OSError, match="no space for 1 bytes"):
        execute(plan, {0: cast("TargetFile", failing)}, effort=effort, numbers=range(1000), checksums=True)
    assert 6 <= failing.writes < 500


def test_threads_end_when_another_fails(tmp_path: Path) -> None:
    """A thread in the middle of a long segment ends with its band when another one fails, whose error comes out."""
    (tmp_path / "source").write_bytes(bytes(32 << 20))
    source = IndexedTensor.whole("s", "uint8", (32 << 20,), file=0, position=0)
    half = 16 << 20
    target = IndexedTensor.build("t", "uint8", (32 << 20,), [((0,), (half,), 0, 0), ((half,), (half,), 1, 0)])
    plan = plan_gather(
        TensorIndex(files=(tmp_path / "source",), tensors={"s": source}),
        TensorIndex(files=(tmp_path / "0", tmp_path / "1"), tensors={"t": target}),
        [Link(source="s", source_offset=(0,), target="t", target_offset=(0,), shape=(32 << 20,))],
    )
    long, failing = FailingTarget(10**6, seconds=0.02), FailingTarget(0)
    effort = Effort(workers=2, memory_bytes=1 << 20)
    targets = {0: cast("TargetFile", long), 1: cast("TargetFile", failing)}
    with pytest.raises(OSError, match="no space"):
        execute(plan, targets, effort=effort, numbers=[0, 1], checksums=True)
    assert long.writes < half // effort.band_bytes()


class CountingTarget:
    """A file that counts how many threads are in ``write`` at the same time, and remembers which were there."""

    def __init__(self) -> None:
        """Begin without writers."""
        self.now, self.most, self.threads = 0, 0, list[int]()
        self.lock = threading.Lock()

    def start_writeback(self, position: int, num_bytes: int) -> None:
        """Nothing is on its way."""

    def write(self, position: int, data: memoryview) -> None:  # noqa: ARG002  (only who writes, and when, matters)
        """Stay for a while."""
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
            self.threads.append(threading.get_ident())
        time.sleep(0.001)
        with self.lock:
            self.now -= 1


@pytest.mark.parametrize(("num_files", "workers"), [(1, 4), (2, 4), (2, 2)])
def test_few_threads_write_one_file(num_files: int, workers: int, tmp_path: Path) -> None:
    """At most two threads write a file at a time, and with as many files as threads each begins in its own."""
    size = 256 << 20
    (tmp_path / "source").touch()
    os.truncate(tmp_path / "source", size)
    source = IndexedTensor.whole("s", "uint8", (size,), file=0, position=0)
    step = size // num_files
    target = IndexedTensor.build("t", "uint8", (size,), [((n * step,), (step,), n, 0) for n in range(num_files)])
    plan = plan_gather(
        TensorIndex(files=(tmp_path / "source",), tensors={"s": source}),
        TensorIndex(files=(Path("t"),) * num_files, tensors={"t": target}),
        [Link(source="s", source_offset=(0,), target="t", target_offset=(0,), shape=(size,))],
    )
    files = {number: CountingTarget() for number in range(num_files)}
    targets = {number: cast("TargetFile", file) for number, file in files.items()}
    execute(plan, targets, effort=Effort(workers=workers), numbers=range(num_files), checksums=False)
    assert all(file.most <= 2 for file in files.values())
    assert max(file.most for file in files.values()) == 2 or workers == num_files
    assert workers > num_files or len({file.threads[0] for file in files.values()}) == num_files


def test_a_source_that_shrinks_is_named(tmp_path: Path) -> None:
    """A file that has become shorter, or is gone, since the plan was made is an error that names it."""
    disk = Disk()
    plan, _ = column_plan(disk, 4, 100, slice(10, 20))
    path = tmp_path / "a"
    path.write_bytes(disk.files[0][:-81])
    with (
        SourceFiles([path]) as sources,
        pytest.raises(FormatError, match=rf"{path} is truncated: expected at least 327"),
    ):
        list(BandReader(sources).bands(plan.segments[0]))
    path.unlink()
    with SourceFiles([path]) as sources, pytest.raises(SourceError, match=f"cannot open {path}: No such file"):
        list(BandReader(sources).bands(plan.segments[0]))


def test_short_reads_and_writes_are_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the operating system gives or takes a few bytes at a time, all of them arrive, into several buffers too."""
    preadv, pwrite = os.preadv, os.pwrite

    def short_read(descriptor: int, buffers: list[memoryview], position: int) -> int:
        return preadv(descriptor, [buffers[0][:7]], position)

    monkeypatch.setattr(os, "preadv", short_read)
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, position: pwrite(descriptor, data[:5], position))
    content = bytes(range(200))
    target = TargetFile(tmp_path / "file", 300)
    target.write(50, memoryview(content))
    target.close()
    assert (tmp_path / "file").read_bytes() == bytes(50) + content + bytes(50)
    buffer = bytearray(200)
    with SourceFiles([tmp_path / "file"]) as sources:
        sources.read_into(0, 50, memoryview(buffer))
        assert buffer == content
        with pytest.raises(FormatError, match="expected at least 301 bytes, got 300"):
            sources.read(0, 101, 200)


def test_effort_bounds_memory() -> None:
    """Buffers of all threads together stay within what is allowed, and bands hold whole elements."""
    for workers in (1, 2, 3, 8):
        for memory_bytes in (1 << 20, 32 << 20, 1 << 30):
            effort = Effort(workers=workers, memory_bytes=memory_bytes)
            assert effort.threads == workers
            for readers in (1, 2):
                band_bytes = effort.band_bytes(readers)
                assert 64 << 10 <= band_bytes * readers <= 2 << 20
                assert band_bytes % 64 == 0
                assert band_bytes * readers * workers * 5 / 4 <= memory_bytes  # with the buffer for gaps
