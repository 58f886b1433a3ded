"""The demo: that it tells its story, that its check by Megatron can fail, and that nothing of it stays behind."""

from __future__ import annotations

import filecmp
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import pytest
from processes import processes_about, until

from dist_ckpt_mistral.cli import demo
from dist_ckpt_mistral.errors import DistCkptMistralError

pytestmark = [pytest.mark.megatron, pytest.mark.ranks, pytest.mark.slow]

_CLI = [sys.executable, "-m", "dist_ckpt_mistral"]
_CHECK = [sys.executable, "-m", "dist_ckpt_mistral.megatron.load_check"]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """One whole run of ``demo --keep``: what it said, and its directory."""
    folder = tmp_path_factory.mktemp("demo") / "kept"
    done = subprocess.run([*_CLI, "demo", "--keep", folder], capture_output=True, text=True, timeout=570, check=False)
    return done, folder


def test_the_story(told: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    """The demo ends well, says so rank by rank on stdout, and no library talks in between."""
    done, folder = told
    assert (done.returncode, done.stderr) == (0, "")
    for rank in range(4):
        assert f"rank {rank} (tensor {rank % 2}, pipeline {rank // 2})" in done.stdout
    assert "All 4 hold the right rows, bit for bit" in done.stdout
    assert "equal: 39 tensors, 34.0 MB, bit for bit" in done.stdout
    assert "and Megatron loaded the checkpoint, and transformers computes the same from both" in done.stdout
    assert str(folder) in done.stdout


def test_what_is_kept(told: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    """The kept export has the very files that went in, several of weights and the tokenizer among them."""
    original, export = told[1] / "original", told[1] / "export"
    names = sorted(path.name for path in original.iterdir())
    assert sorted(path.name for path in export.iterdir()) == sorted([*names, "checksums.json"])
    assert filecmp.cmpfiles(original, export, names, shallow=False) == (names, [], [])
    assert {"model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json"} < set(names)
    assert sorted(path.name for path in told[1].iterdir()) == ["checkpoint", "export", "original", "resharded"]


def test_no_rank_is_left(told: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    """When the demo is over, no process has anything to do with its files."""
    assert processes_about(told[1]) == []


def test_the_check_can_fail(told: tuple[subprocess.CompletedProcess[str], Path], tmp_path: Path) -> None:
    """One bit of one row in the original files: the check names the Megatron tensor with that row, and no other."""
    altered = tmp_path / "altered"
    shutil.copytree(told[1] / "original", altered)
    _flip_last_bit(altered, "model.layers.2.self_attn.v_proj.weight")
    _flip_last_bit(altered, "model.layers.1.mlp.up_proj.weight")
    reports = tmp_path / "reports"
    reports.mkdir()
    arguments = _check_arguments(altered, told[1] / "checkpoint" / "release", reports, pp=1)
    done = subprocess.run(
        [*_CHECK, *arguments], env=_environment(), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    outcome = json.loads((reports / "rank0.json").read_bytes())
    assert sorted(outcome["different"]) == [
        "decoder.layers.1.mlp.linear_fc1.weight",
        "decoder.layers.2.self_attention.linear_qkv.weight",
    ]
    assert (outcome["layers"], outcome["num_tensors"]) == ([0, 1, 2, 3], 27)


def _flip_last_bit(directory: Path, hf_name: str) -> None:
    index = json.loads((directory / "model.safetensors.index.json").read_bytes())
    path = directory / index["weight_map"][hf_name]
    content = bytearray(path.read_bytes())
    data_at = 8 + int.from_bytes(content[:8], "little")
    content[data_at + json.loads(content[8:data_at])[hf_name]["data_offsets"][1] - 1] ^= 1
    path.write_bytes(content)


def test_a_rank_does_not_outlive_its_parent(
    told: tuple[subprocess.CompletedProcess[str], Path], tmp_path: Path
) -> None:
    """A rank that waits for one that never comes ends when the process that started it is killed."""
    arguments = _check_arguments(told[1] / "original", told[1] / "checkpoint" / "release", tmp_path, pp=2)
    program = f"""
import sys
from pathlib import Path
from dist_ckpt_mistral.cli.processes import run_forked_ranks
run_forked_ranks({_CHECK[-1]!r}, sys.argv[1:], 1, Path(sys.argv[-1]), timeout_s=600)
"""
    with subprocess.Popen([sys.executable, "-c", program, *arguments], stderr=subprocess.DEVNULL) as parent:
        try:
            until((tmp_path / "rendezvous").exists, seconds=120)
            left = processes_about(tmp_path)
        finally:
            parent.kill()
    assert len(left) == 3, "the parent, the process that imports, and its fork, the rank"
    try:
        until(lambda: not processes_about(tmp_path), seconds=20)
    finally:
        for process_id in processes_about(tmp_path):
            os.kill(process_id, signal.SIGKILL)


def _check_arguments(hf: Path, checkpoint: Path, reports: Path, *, pp: int) -> list[str]:
    return ["--tp=1", f"--pp={pp}", str(hf), str(checkpoint), str(reports)]


def _environment() -> Mapping[str, str]:
    return os.environ | {
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "RANK": "0",
    }


def test_a_failing_rank_fails_the_demo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """If a rank ends badly the demo says how, and takes its files along."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    said: list[str] = []
    with pytest.raises(DistCkptMistralError, match="the ranks ended with 1"):
        demo.run(None, said.append)
    assert not any("Done" in line for line in said)
    assert list(tmp_path.rglob("config.json")) == []
