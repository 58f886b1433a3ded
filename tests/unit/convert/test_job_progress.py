"""What a conversion tells of its progress: phases whose bytes add up, for one process and for ranks that share it."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from failing_writes import ALONE, begun
from plain_models import save_model
from rank_threads import on_ranks
from recorded_progress import Recorded
from safetensors.numpy import load_file, save_file

import dist_ckpt_mistral as dcm
from dist_ckpt_mistral.convert import job_progress
from dist_ckpt_mistral.gather.execute import Effort
from dist_ckpt_mistral.storage import local


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    """A small model in several files."""
    return save_model(tmp_path / "hf", max_shard_size=6000)


def test_phases_of_conversions_add_up(hf: Path, tmp_path: Path) -> None:
    """What a conversion does with all bytes is a phase each; in each exactly the announced bytes are done."""
    root, layout = tmp_path / "ckpt", dcm.ParallelLayout(tp=2)
    for convert, arguments in (
        (dcm.from_hf, (hf, root)),
        (dcm.reshard, (root, tmp_path / "cut", layout)),
        (dcm.to_hf, (root, tmp_path / "out")),
    ):
        told = Recorded()
        convert(*arguments, effort=Effort(progress=told), output=dcm.Output(sha256=True))
        assert [name for name, _ in told.phases] == ["copy", "checksum", "sync"]
        assert told.sums() == told.phases
        assert min(total for _, total in told.phases) > 20_000
    told = Recorded()
    dcm.to_hf(root, tmp_path / "fast", effort=Effort(progress=told), output=dcm.Output(durable=False))
    assert [name for name, _ in told.phases] == ["copy"]


def test_a_resumed_run_counts_what_is_kept(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an interrupted run has copied is done, too, so that the phase ends at its total."""
    begun(hf, tmp_path / "out", monkeypatch)
    told = Recorded()
    dcm.from_hf(hf, tmp_path / "out", output=dcm.Output(resume=True), effort=Effort(progress=told))
    assert told.sums() == told.phases


def test_phases_of_comparisons_add_up(hf: Path, tmp_path: Path) -> None:
    """Comparing and checking tell their bytes; a tensor that differs is done where its first difference is found."""
    dcm.from_hf(hf, tmp_path / "ckpt")
    told = Recorded()
    assert dcm.check(tmp_path / "ckpt", effort=Effort(progress=told)).is_sound
    assert dcm.compare(hf, tmp_path / "ckpt", effort=Effort(progress=told)).is_equal
    file = next(hf.glob("model-*"))
    save_file({name: -tensor for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    assert told.sums() == told.phases
    different = Recorded()
    assert not dcm.compare(hf, tmp_path / "ckpt", effort=Effort(progress=different)).is_equal
    assert different.sums() == different.phases
    assert {name for name, _ in told.phases + different.phases} == {"check", "compare"}


class _Watched(Recorded):
    """Tells when more than its rank's share is copied."""

    def __init__(self, share_bytes: int) -> None:
        super().__init__()
        self._share_bytes = share_bytes
        self.has_seen_others = threading.Event()

    def advance(self, num_bytes: int) -> None:
        super().advance(num_bytes)
        if dict(self.sums()).get("copy", 0) > self._share_bytes:
            self.has_seen_others.set()


def test_the_first_rank_tells_of_the_whole_job(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first rank tells what all have copied, while they copy; the others, and later phases, name their shares."""
    monkeypatch.setattr(job_progress, "_LOOK_S", 0.01)
    shares = [Recorded() for _ in range(3)]
    efforts = [Effort(workers=1, progress=share) for share in shares]
    done = on_ranks(3, lambda ranks: dcm.from_hf(hf, tmp_path / "a", tp=2, effort=efforts[ranks.rank], ranks=ranks))
    assert done == [None] * 3
    totals: list[dict[str, int]] = [dict(share.phases) for share in shares]
    others = [totals[rank][f"copy (rank {rank} of 3)"] for rank in (1, 2)]
    first = totals[0]["copy"] - sum(others)
    assert min(first, *others) > 5000
    assert all(share.sums() == share.phases for share in shares)
    assert [[*told][-1] for told in totals] == [f"sync (rank {rank} of 3)" for rank in range(3)]

    watched, write, victim = _Watched(first), local.TargetFile.write, threading.local()
    waited: list[bool] = []

    def waiting(self: local.TargetFile, *arguments: Any) -> None:  # noqa: ANN401  (as of write)
        if getattr(victim, "chosen", False):
            waited.append(watched.has_seen_others.wait(30))
        write(self, *arguments)

    monkeypatch.setattr(local.TargetFile, "write", waiting)
    efforts[0] = Effort(workers=1, progress=watched)

    def work(ranks: dcm.Ranks) -> None:
        victim.chosen = ranks.rank == 2
        dcm.from_hf(hf, tmp_path / "b", tp=2, effort=efforts[ranks.rank], ranks=ranks)

    assert on_ranks(3, work) == [None] * 3
    assert waited
    assert all(waited)
    assert dict(watched.sums())["copy"] == totals[0]["copy"]


def test_a_resumed_job_counts_what_others_keep(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first rank counts the parts that an earlier run noted once, whoever checks or copies them now."""
    begun(hf, tmp_path / "out", monkeypatch)
    monkeypatch.setattr(job_progress, "_LOOK_S", 0.01)
    told, resumed = Recorded(), dcm.Output(resume=True)
    efforts = [Effort(workers=1, progress=told), ALONE]
    done = on_ranks(
        2, lambda ranks: dcm.from_hf(hf, tmp_path / "out", output=resumed, effort=efforts[ranks.rank], ranks=ranks)
    )
    assert done == [None] * 2
    assert told.sums() == told.phases
