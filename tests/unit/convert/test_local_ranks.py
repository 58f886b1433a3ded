"""Ranks of one machine meet over sockets: late, many, dead, or in the place of somebody else."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from processes import until

from dist_ckpt_mistral import local_ranks
from dist_ckpt_mistral.errors import DistCkptMistralError, LostRankError
from dist_ckpt_mistral.local_ranks import join, meeting_point

pytestmark = pytest.mark.ranks

#: Exchanges twice; the rank of the first argument is killed in between.
EXCHANGES = """
import os, signal, sys
from dist_ckpt_mistral.ranks import from_environment
ranks = from_environment()
print(ranks.exchange(ranks.rank), flush=True)
if ranks.rank == int(sys.argv[1]):
    os.kill(os.getpid(), signal.SIGKILL)
print(ranks.exchange(ranks.rank), flush=True)
"""
#: No rank is killed.
NOBODY = -1


@pytest.fixture(autouse=True)
def _own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test's ranks meet at a name of their own, as those of a job that torchrun started."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(tmp_path))


def listens(name: str) -> bool:
    """Whether any process listens at a name: the kernel's own list shows its first NUL as @."""
    return any(line.split()[-1] == name.replace("\0", "@") for line in Path("/proc/net/unix").read_text().splitlines())


@contextlib.contextmanager
def started(world_size: int, ranks: Iterable[int], *, victim: int) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that are some ranks of one job, and exchange as above; none is left after the block."""
    job = os.environ | {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    with contextlib.ExitStack() as stack:
        processes = []
        for rank in ranks:
            command, pipe = [sys.executable, "-c", EXCHANGES, str(victim)], subprocess.PIPE
            process = subprocess.Popen(command, env=job | {"RANK": str(rank)}, stdout=pipe, stderr=pipe, text=True)
            processes.append(stack.enter_context(process))
            stack.callback(process.kill)
        yield processes


def test_everyone_gets_every_value() -> None:
    """Thirty ranks exchange small and large values, several times; each gets all of them, in rank order."""
    count, sizes = 30, (1, 300_000, 2)

    def work(rank: int) -> list[list[bytes]]:
        exchange = join(rank, count)
        return [exchange(bytes([rank]) * size) for size in sizes]

    with ThreadPoolExecutor(count) as pool:
        for found in pool.map(work, range(count)):
            assert found == [[bytes([rank]) * size for rank in range(count)] for size in sizes]


@pytest.mark.parametrize("first", [0, 1])
def test_ranks_come_when_they_come(first: int) -> None:
    """Whichever rank is there first waits for the other."""
    with ThreadPoolExecutor(1) as pool:
        early = pool.submit(lambda: join(first, 2)("early"))
        time.sleep(0.2)
        assert not early.done()
        assert sorted(join(1 - first, 2)("late")) == sorted(early.result(10)) == ["early", "late"]


@pytest.mark.parametrize("victim", [0, 2])
def test_a_dead_rank_fails_the_others(victim: int) -> None:
    """A rank is killed in the middle: all others end soon, and each can say who it was."""
    with started(4, range(4), victim=victim) as processes:
        outputs = [process.communicate(timeout=30) for process in processes]
        codes = [process.returncode for process in processes]
    assert [out for out, _ in outputs] == ["[0, 1, 2, 3]\n"] * 4
    assert codes == [-signal.SIGKILL if rank == victim else 1 for rank in range(4)]
    words = "rank 0 ended before" if victim == 0 else "rank 2 of 4 ended before"
    assert [words in err for _, err in outputs] == [rank != victim for rank in range(4)]


def test_a_killed_job_leaves_nothing() -> None:
    """The first rank is killed while it waits for the others: the next job of that name finds its own."""
    with started(2, [0], victim=NOBODY):
        until(lambda: listens(meeting_point(2)), seconds=20)
    with started(2, range(2), victim=NOBODY) as processes:
        outputs = [process.communicate(timeout=30) for process in processes]
    assert outputs == [("[0, 1]\n" * 2, "")] * 2


def test_a_second_job_at_the_same_place_is_refused() -> None:
    """A first rank does not take the place of another that still waits, and says what to change."""
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(meeting_point(2))
        other.listen()
        with pytest.raises(DistCkptMistralError, match=r"Address already in use.*MASTER_PORT"):
            join(0, 2)


def test_a_rank_that_is_there_twice_is_refused() -> None:
    """Of two processes that call themselves the same rank, neither's values stand for a rank that is missing."""
    with ThreadPoolExecutor(3) as pool:
        others = [pool.submit(lambda: join(1, 3)("twice")) for _ in range(2)]
        with pytest.raises(DistCkptMistralError, match="two processes call themselves rank 1 of 3"):
            join(0, 3)
        assert [type(other.exception(10)) for other in others] == [LostRankError] * 2


def test_a_place_that_another_user_took_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank sends nothing to a process of another user that listens under its job's name, and names that user."""
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with socket.socket(socket.AF_UNIX) as squatter:
        squatter.bind(meeting_point(2))
        squatter.listen()
        with pytest.raises(DistCkptMistralError, match=f"rank 1 reached a process of user {owner} in place of rank 0"):
            join(1, 2)
        accepted, _ = squatter.accept()
        with accepted:
            assert accepted.recv(1) == b""


def test_a_caller_of_another_user_is_turned_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first rank reads nothing from a process of another user, and goes on to meet its own ranks."""
    users = iter([os.geteuid() + 1, os.geteuid(), os.geteuid()])
    monkeypatch.setattr(local_ranks, "_user_of", lambda _: next(users))
    with ThreadPoolExecutor(2) as pool, socket.socket(socket.AF_UNIX) as stranger:
        first = pool.submit(lambda: join(0, 2)("first"))
        until(lambda: listens(meeting_point(2)), seconds=10)
        stranger.connect(meeting_point(2))
        assert stranger.recv(1) == b""
        assert join(1, 2)("second") == first.result(10) == ["first", "second"]


@pytest.mark.parametrize(("rank", "missing"), [(0, r"ranks \[1, 2\] of 3"), (2, "rank 0")])
def test_patience_ends(rank: int, missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank does not wait for ever for one that never starts, and says which."""
    monkeypatch.setattr(local_ranks, "_PATIENCE_S", 0.1)
    with pytest.raises(LostRankError, match=f"{missing} did not come"):
        join(rank, 3)
