"""How many bytes conversions fetch from a store, to those that they need."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from plain_models import save_model
from remote_folders import files_of, put_folder

import dist_ckpt_mistral as dcm
from dist_ckpt_mistral.model.table.rules import KeyStyle
from dist_ckpt_mistral.storage.memory import MemoryStore
from dist_ckpt_mistral.storage.remote_path import forget_stores

_SIZES = {"vocab_size": 3000, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 3}
_HEADS = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64}


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The length of every read from a store."""
    forget_stores()
    lengths: list[int] = []
    read = MemoryStore.read

    def counted(self: MemoryStore, key: str, start: int, stop: int, version: str | None) -> memoryview:
        lengths.append(stop - start)
        return read(self, key, start, stop, version)

    monkeypatch.setattr(MemoryStore, "read", counted)
    yield lengths
    forget_stores()


@pytest.fixture(scope="module")
def models() -> ModuleType:
    """The maker of large checkpoints of the benchmarks."""
    pytest.importorskip("torch")
    path = Path(__file__).parents[3] / "tools/bench/models.py"
    spec = importlib.util.spec_from_file_location("bench_models", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


def test_an_export_leaves_optimizer_state_where_it_is(models: ModuleType, tmp_path: Path, fetched: list[int]) -> None:
    """Of a checkpoint that is seven times as large as its weights, at most 1.02 times the weights are fetched.

    Besides, the first page of each file, which outweighs nothing in a large checkpoint.
    """
    hf = save_model(tmp_path / "hf", **_SIZES, **_HEADS)
    config, folder = dcm.MistralConfig.from_hf(hf), tmp_path / "ckpt"
    layout = dcm.ParallelLayout(tp=2)
    models.make_sparse_checkpoint(folder, config, layout, style=KeyStyle.STACKED, with_optimizer=True)
    weights = models.model_bytes(config)
    url = put_folder(folder, "memory://bucket/ckpt")
    assert sum(path.stat().st_size for path in folder.iterdir()) > 6 * weights
    dcm.to_hf(url, "memory://bucket/out", config=hf)
    assert weights <= sum(fetched) <= 1.02 * weights + len([*folder.iterdir()]) * (128 << 10)


def test_rows_that_eight_ranks_cut_are_fetched_once(tmp_path: Path, fetched: list[int]) -> None:
    """An import for eight tensor-parallel ranks fetches at most 1.1 times the model, into a store and into a folder."""
    hf = save_model(tmp_path / "hf", **_SIZES, **_HEADS)
    url, model_bytes = put_folder(hf, "memory://bucket/hf"), (hf / "model.safetensors").stat().st_size
    for out in ("memory://bucket/out", tmp_path / "out"):
        fetched.clear()
        dcm.from_hf(url, out, tp=8)
        assert model_bytes <= sum(fetched) <= 1.1 * model_bytes
    dcm.from_hf(hf, tmp_path / "local", tp=8)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "local")
