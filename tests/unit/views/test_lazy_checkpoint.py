"""A lazy checkpoint as an object of Python: closed, forgotten, copied, compared, shared by threads and forks."""

from __future__ import annotations

import copy
import gc
import multiprocessing
import os
import pickle
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import TypeAlias

import pytest
import torch
from genuine import folder, truth
from hf_models import random_model, saved

import dist_ckpt_mistral as dcm
from dist_ckpt_mistral.gather.bands import aligned_buffer

#: torch_dist of several files, legacy zarr.
CASES = ("td_0192", "zarr_ckpt")
#: Python 3.12 warns where there are threads: torch's, here.
FORKING = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
Copy: TypeAlias = Callable[[dcm.LazyCheckpoint], dcm.LazyCheckpoint]


def opened(case: str = "td_0192") -> dcm.LazyCheckpoint:
    """A genuine checkpoint, opened."""
    return dcm.open_checkpoint(folder(case) / "checkpoint", config=folder(case))


@pytest.fixture
def checkpoint() -> Iterator[dcm.LazyCheckpoint]:
    """The same, closed at the end of the test."""
    with opened() as checkpoint:
        yield checkpoint


def is_true(checkpoint: dcm.LazyCheckpoint, case: str = "td_0192") -> bool:
    """Whether all tensors are those of the live model."""
    expected = truth(case)
    return set(checkpoint) == set(expected) and all(torch.equal(checkpoint[name], expected[name]) for name in expected)


def open_files() -> set[str]:
    """The files of checkpoints that this process has open."""
    links = {link for link in Path("/proc/self/fd").iterdir() if link.is_symlink()}  # the listing's own is gone
    return {str(link.readlink()) for link in links if "checkpoint" in str(link.readlink())}


@pytest.mark.parametrize("copied", [lambda each: each, copy.copy, lambda each: pickle.loads(pickle.dumps(each))])  # noqa: S301
def test_a_replaced_file_is_refused(copied: Copy, tmp_path: Path) -> None:
    """A file of the same size and times in the place of one that was opened is not read as if it were that one."""
    hf = saved(random_model(), tmp_path / "hf")
    name, file = "model.norm.weight", hf / "model.safetensors"
    with dcm.open_checkpoint(hf) as checkpoint:
        whole = checkpoint[name]
        status = file.stat()
        other = tmp_path / "other"
        other.write_bytes(file.read_bytes())
        os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert torch.equal(copied(checkpoint)[name], whole)
        unread = copied(dcm.open_checkpoint(hf))
        other.replace(file)
        with pytest.raises(dcm.SourceError, match=r"model\.safetensors changed while it was read"):
            unread[name]


def test_after_close() -> None:
    """No tensor can be read any more, which is this package's error; names, shapes and dtypes are still known."""
    with opened() as checkpoint:
        name = next(iter(checkpoint))
        shape = checkpoint[name].shape
    assert open_files() == set()
    for use in (lambda: checkpoint[name], lambda: checkpoint["?"], checkpoint.__enter__, lambda: copy.copy(checkpoint)):
        with pytest.raises(dcm.DistCkptMistralError, match=r"checkpoint was closed\. Read its tensors before closing"):
            use()
    assert (checkpoint.shape(name), len(checkpoint), name in checkpoint) == (tuple(shape), len(truth("td_0192")), True)
    checkpoint.close()


def test_without_close() -> None:
    """A checkpoint that nobody closes is closed with its last reference, and no warning is given (all are errors)."""
    checkpoint = opened()
    assert is_true(checkpoint)
    assert open_files()
    del checkpoint
    gc.collect()
    assert open_files() == set()


def test_equality(checkpoint: dcm.LazyCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Comparing, hashing, asking for a name and listing names read nothing; equal is only the same object."""
    monkeypatch.setattr(dcm.LazyCheckpoint, "__getitem__", None)
    with opened() as other:
        assert checkpoint == checkpoint  # noqa: PLR0124  (the point of it)
        assert checkpoint != other
        assert checkpoint != {}
        assert len({checkpoint, other, checkpoint}) == 2
        assert "?" not in checkpoint
        assert [*checkpoint][0] in checkpoint.keys()  # noqa: RUF015, SIM118  (the view, too)
        assert repr(checkpoint).startswith(f"<LazyCheckpoint of {len(checkpoint)} tensors in {folder('td_0192')}")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("made", [copy.copy, copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])  # noqa: S301
def test_copies(made: Copy, case: str) -> None:
    """A copy reads the same tensors, also where the first is closed before, and closing it leaves the first open."""
    first = opened(case)
    before, second = made(first), made(first)
    with second:
        assert is_true(second, case)
    assert is_true(first, case)
    first.close()
    assert is_true(before, case)
    before.close()
    assert open_files() == set()


@FORKING
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers(start: str, checkpoint: dcm.LazyCheckpoint) -> None:
    """Worker processes get a checkpoint that was read from, as data loaders hand it over, and read the truth."""
    assert is_true(checkpoint)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context(start)) as pool:
        assert pool.submit(is_true, checkpoint).result(timeout=120)


@FORKING
def test_forks_read_at_once(checkpoint: dcm.LazyCheckpoint) -> None:
    """A forked child reads into memory of its own: what it gathers does not end up in its parent's tensors."""
    buffer = aligned_buffer(4096)
    buffer[:] = 1
    child = os.fork()
    if child == 0:
        buffer[:] = 2
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert set(buffer.tolist()) == {1}
    is_true(checkpoint)  # this thread's buffers are there before the fork
    child = os.fork()
    if child == 0:
        os._exit(0 if all(is_true(checkpoint) for _ in range(20)) else 1)
    assert all(is_true(checkpoint) for _ in range(20))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_threads_that_read_while_another_closes() -> None:
    """A tensor that is read meanwhile is the true one, or there is this package's error: never another file's bytes."""
    expected = truth("td_0192")
    decoys: list[int] = []
    for _ in range(20):
        checkpoint, started = opened(), threading.Barrier(5)

        def read(checkpoint: dcm.LazyCheckpoint = checkpoint, started: threading.Barrier = started) -> list[str]:
            started.wait()
            wrong = []
            try:
                for name, tensor in expected.items():
                    wrong += [] if torch.equal(checkpoint[name], tensor) else [name]
            except dcm.DistCkptMistralError as error:
                assert "was closed" in str(error)  # noqa: PT017  (one outcome of two)
            return wrong

        with ThreadPoolExecutor(4) as pool:
            readers = [pool.submit(read) for _ in range(4)]
            started.wait()
            checkpoint.close()
            decoys += [os.open("/dev/zero", os.O_RDONLY) for _ in range(8)]  # they would get the numbers
            assert [reader.result() for reader in readers] == [[]] * 4
        while decoys:
            os.close(decoys.pop())
