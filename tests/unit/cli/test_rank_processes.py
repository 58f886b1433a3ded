"""``run_ranks`` and ``run_forked_ranks``: ranks as processes, and that nothing of them is left. No torch is needed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import processes_about, until, until_none_is_left

from dist_ckpt_mistral.cli.processes import run_forked_ranks, run_ranks
from dist_ckpt_mistral.errors import DistCkptMistralError

pytestmark = pytest.mark.ranks

#: Starts a process that would outlive it by far.
LEAVES_A_CHILD = (
    "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)', {0!r}]);"
)


def python(code: str, folder: Path) -> list[str]:
    """A command that runs ``code`` and can be found by its folder."""
    return [sys.executable, "-c", code.format(str(folder)), str(folder)]


def test_every_rank_knows_its_place(tmp_path: Path) -> None:
    """Ranks get torchrun's variables, one port for all; what they print is in their logs."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    code = f"import os; print(*(os.environ[name] for name in {names}))"
    run_ranks([python(code, tmp_path)] * 3, tmp_path, timeout_s=60)
    lines = [(tmp_path / f"rank{rank}.log").read_text().split() for rank in range(3)]
    assert [line[:-1] for line in lines] == [[str(rank)] * 2 + ["3"] * 2 + ["127.0.0.1"] for rank in range(3)]
    assert len({line[-1] for line in lines}) == 1


def test_ranks_choose_for_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Megatron notes in the environment when it builds a model here is not passed on; all else is."""
    monkeypatch.setenv("NVTE_FLASH_ATTN", "1")
    monkeypatch.setenv("OF_THE_USER", "kept")
    code = "import os; print(os.environ.get('NVTE_FLASH_ATTN'), os.environ['OF_THE_USER'])"
    run_ranks([python(code, tmp_path)], tmp_path, timeout_s=60)
    assert (tmp_path / "rank0.log").read_text().split() == ["None", "kept"]


def test_the_port_is_kept_for_the_first_rank(tmp_path: Path) -> None:
    """Nobody else gets the port while the ranks start; a rank that binds it as torch's store does may listen on it."""
    code = """
import os, socket
place = ("127.0.0.1", int(os.environ["MASTER_PORT"]))
with socket.socket() as other:
    try:
        other.bind(place)
    except OSError:
        print("kept")
with socket.socket() as store:
    store.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    store.bind(place)
    store.listen()
    socket.create_connection(place).close()
    print("mine")
"""
    run_ranks([python(code, tmp_path)], tmp_path, timeout_s=60)
    assert (tmp_path / "rank0.log").read_text().split() == ["kept", "mine"]


def test_nothing_is_left_of_ranks_that_end_well(tmp_path: Path) -> None:
    """Processes that a rank started and left behind are ended with it."""
    run_ranks([python(LEAVES_A_CHILD, tmp_path)] * 2, tmp_path, timeout_s=60)
    until_none_is_left(tmp_path)
    assert processes_about(tmp_path) == []


def test_a_failing_rank_is_named(tmp_path: Path) -> None:
    """The error has rank, exit code and last words; ranks that wait for it are ended, and all of theirs."""
    waits = python(LEAVES_A_CHILD + "import time; time.sleep(600)", tmp_path)
    fails = python("import sys; print('why'); sys.exit(3)", tmp_path)
    started = time.monotonic()
    with pytest.raises(DistCkptMistralError, match=r"rank 1 ended with 3 .*why"):
        run_ranks([waits, fails], tmp_path, timeout_s=300)
    assert time.monotonic() - started < 60
    until_none_is_left(tmp_path)


def test_a_rank_that_hangs_is_ended(tmp_path: Path) -> None:
    """When time is up, the rank that is not done is named and ended."""
    with pytest.raises(DistCkptMistralError, match="rank 1 was not done after 5 s"):
        # the other rank has 5 s to start and to end, on a busy machine too
        run_ranks([python("", tmp_path), python("import time; time.sleep(600)", tmp_path)], tmp_path, timeout_s=5)
    until_none_is_left(tmp_path)


#: A module of ranks: what it imports is slow, and must happen once.
MODULE = """
import os, sys, multiprocessing, subprocess, threading, time
from pathlib import Path
folder = Path(sys.argv[1])
with (folder / "imports").open("a") as imports:
    imports.write("once ")

def main():
    rank = os.environ["RANK"]
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OF_THE_USER")
    (folder / f"rank{rank}").write_text(" ".join([*sys.argv[2:], *(os.environ[name] for name in names)]))
    WHAT
"""
CHILD = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)', str(folder)]); "


def forked(tmp_path: Path, what: str) -> str:
    """The name of a new module whose ranks do ``what``; it is found beside the tests of the same folder."""
    name = f"ranks_of_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(MODULE.replace("WHAT", what))
    return name


def test_forked_ranks_know_their_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One import serves all ranks, and what they spawn; they have the environment and ``sys.path`` of the starter."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("OF_THE_USER", "kept")
    spawn = "child = multiprocessing.get_context('spawn').Process(target=time.sleep, args=[0]); child.start(); "
    module = forked(tmp_path, spawn + "child.join(); assert child.exitcode == 0; print('said', rank)")
    run_forked_ranks(module, [tmp_path, "--word"], 3, tmp_path, imports=["colorsys"], timeout_s=60)
    assert (tmp_path / "imports").read_text() == "once "
    told = [(tmp_path / f"rank{rank}").read_text().split() for rank in range(3)]
    port = told[0][-2]
    assert told == [["--word", str(rank), str(rank), "3", "3", "127.0.0.1", port, "kept"] for rank in range(3)]
    assert sorted((tmp_path / "ranks.log").read_text().splitlines()) == [f"said {rank}" for rank in range(3)]


def test_nothing_is_left_of_forked_ranks_that_end_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that a rank started and left behind are ended with it."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("OF_THE_USER", "")
    run_forked_ranks(forked(tmp_path, CHILD), [tmp_path], 2, tmp_path, timeout_s=60)
    until_none_is_left(tmp_path)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        (
            "sys.exit('why') if rank == '1' else time.sleep(600)",
            r"the ranks ended with 1: .*SystemExit: why +rank 1 ended with 1",
        ),
        ("os._exit(3) if rank == '1' else time.sleep(600)", "rank 1 ended with 3"),
        ("os.kill(os.getpid(), 9) if rank == '1' else time.sleep(600)", "rank 1 ended with -9"),
    ],
)
def test_a_failing_fork_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, said: str) -> None:
    """The error has rank, exit code and last words; ranks that wait for it are ended, and all of theirs."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("OF_THE_USER", "")
    with pytest.raises(DistCkptMistralError, match=said):
        run_forked_ranks(forked(tmp_path, CHILD + what), [tmp_path], 2, tmp_path, timeout_s=300)
    until_none_is_left(tmp_path)


def test_a_fork_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When time is up all ranks are ended, and what they said is in the error."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("OF_THE_USER", "")
    what = "print('I wait', flush=True) if rank == '1' else None; time.sleep(600 * int(rank))"
    with pytest.raises(DistCkptMistralError, match="the ranks were not done after 6 s: I wait"):
        run_forked_ranks(forked(tmp_path, CHILD + what), [tmp_path], 2, tmp_path, timeout_s=6)
    until_none_is_left(tmp_path)


def test_forked_ranks_end_with_who_started_them(tmp_path: Path) -> None:
    """Where the starter is killed, the process that imported, its forks and what those started end within seconds."""
    program = f"""
from pathlib import Path
from dist_ckpt_mistral.cli.processes import run_forked_ranks
folder = Path({str(tmp_path)!r})
run_forked_ranks({forked(tmp_path, CHILD + "time.sleep(600)")!r}, [folder], 2, folder, timeout_s=600)
"""
    path = os.pathsep.join([str(tmp_path), *sys.path])
    environment = os.environ | {"PYTHONPATH": path, "OF_THE_USER": ""}
    with subprocess.Popen([sys.executable, "-c", program], env=environment) as started:
        try:
            until(
                lambda: len(processes_about(tmp_path)) == 6, seconds=60
            )  # program, importer, two forks, their children
        finally:
            started.kill()
    try:
        until_none_is_left(tmp_path)
    finally:
        for process_id in processes_about(tmp_path):
            os.kill(process_id, signal.SIGKILL)
