"""What an import would make ranks read, planned before it is written: against Megatron's and torch's own loading."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from megatron_reads import reads_of_rank
from models_of_many_layers import EXPERT_MODELS, save_hf
from plain_models import save_model
from torch.distributed.checkpoint import filesystem, utils
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch_reading import read_metadata

from dist_ckpt_mistral.analysis.read_planner import plan_reading
from dist_ckpt_mistral.convert import from_hf
from dist_ckpt_mistral.convert.output import Output
from dist_ckpt_mistral.mapping.read_plan import ReadingPlan
from dist_ckpt_mistral.model.config.mistral_config import MistralConfig
from dist_ckpt_mistral.model.layout.layout import ParallelLayout
from dist_ckpt_mistral.model.layout.local_tensors import local_tensors
from dist_ckpt_mistral.model.table.table import tensor_table

#: Sizes that 8 ranks can share, and an archive whose data outweighs what is around it.
SIZES = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
}


def costly_load(monkeypatch: pytest.MonkeyPatch, hf: Path, **options: Any) -> ReadingPlan | None:  # noqa: ANN401
    """What a dry run says of a load at a larger tensor parallelism, as if the model were large."""
    monkeypatch.setattr(from_hf, "_LARGE_MODEL_PARAMETERS", 0)
    return from_hf.from_hf(hf, hf.parent / "not-written", output=Output(dry_run=True), **options).costly_load


@pytest.mark.megatron
def test_megatron_reads_what_the_import_announced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The dry run's bytes at tp=8 are those of Megatron's own loading of the import; cut as advised, it wastes none."""
    hf = save_model(tmp_path / "hf", **SIZES)
    config = MistralConfig.from_hf(hf)
    planned = costly_load(monkeypatch, hf)
    assert planned is not None
    assert planned.layout == ParallelLayout(tp=8)
    from_hf.from_hf(hf, tmp_path / "one")
    ranks = [reads_of_rank(tmp_path / "one" / "release", config, planned.layout, rank) for rank in range(8)]
    for name in ("needed_bytes", "read_bytes", "num_reads"):
        assert getattr(planned.total, name) == sum(rank[name] for rank in ranks)
    assert planned.total.read_bytes > 7.9 * planned.total.needed_bytes
    from_hf.from_hf(hf, tmp_path / "cut", tp=8)
    for layout in (planned.layout, ParallelLayout(tp=2, pp=2)):
        for rank in range(layout.world_size):
            read = reads_of_rank(tmp_path / "cut" / "release", config, layout, rank)
            assert read["read_bytes"] == read["needed_bytes"] > 0


@contextlib.contextmanager
def counted_bytes() -> Iterator[list[int]]:
    """Count the bytes that torch takes from files, one number a call."""
    counts: list[int] = []
    view: Any = vars(utils)["_ReaderView"]

    class Counting(view):  # type: ignore[misc]  # torch's own view of a part of a file
        def read(self, size: int = -1) -> bytes:
            content: bytes = super().read(size)
            counts.append(len(content))
            return content

        def readinto(self, buffer: Any) -> int:  # noqa: ANN401  (any buffer)
            count: int = super().readinto(buffer)
            counts.append(count)
            return count

    with mock.patch.object(utils, "_ReaderView", Counting):
        yield counts


class _Planner(DefaultLoadPlanner):
    """Gives each read a tensor of its own."""

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        return torch.empty(tuple(read_item.lengths), dtype=torch.bfloat16)

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Nothing is kept."""


@pytest.mark.parametrize("layout", [ParallelLayout(tp=2, pp=2), ParallelLayout(tp=4)], ids=str)
def test_torch_takes_as_many_bytes_from_the_files(layout: ParallelLayout, tmp_path: Path) -> None:
    """For the boxes of all ranks, torch's own planner and reader take the planned bytes, and little around them."""
    hf = save_model(tmp_path / "hf", **SIZES)
    from_hf.from_hf(hf, tmp_path / "ckpt")
    plan = plan_reading(tmp_path / "ckpt", layout)
    metadata = read_metadata(tmp_path / "ckpt" / "release")
    reader = filesystem.FileSystemReader(tmp_path / "ckpt" / "release")
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    table = tensor_table(MistralConfig.from_hf(hf))
    with counted_bytes() as counts:
        items: list[ReadItem] = []
        for rank in range(layout.world_size):
            at = layout.coordinates(rank)
            for chunk in layout.model_chunks(table.num_layers, at.pp):
                for tensor in local_tensors(layout, table, chunk, at):
                    for box in tensor.boxes:
                        wanted = ChunkStorageMetadata(torch.Size(box.global_offset), torch.Size(box.shape))
                        stored: Any = metadata.state_dict_metadata[box.mcore_key]
                        items += create_read_items_for_chunk_list(box.mcore_key, stored, [wanted])
        reader.read_data(LoadPlan(items), _Planner()).wait()
    assert len(items) == plan.total.num_reads
    around = sum(counts) - plan.total.read_bytes
    assert 0 <= around < 0.1 * plan.total.read_bytes
    assert sum(counts) > 1.8 * plan.total.needed_bytes


@pytest.mark.parametrize("kind", ["mistral", *EXPERT_MODELS])
def test_only_tensor_parallelism_makes_ranks_read_too_much(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever pp and ep, an uncut import wastes nothing; cut for the advised tp it serves smaller ones, pp and ep."""
    hf = save_hf(tmp_path / "hf", EXPERT_MODELS.get(kind, {}))
    experts = kind in EXPERT_MODELS
    from_hf.from_hf(hf, tmp_path / "one")
    for layout in (ParallelLayout(pp=4), ParallelLayout(pp=2, ep=2 if experts else 1)):
        plan = plan_reading(tmp_path / "one", layout)
        assert plan.reads_only_whole_chunks
        assert (plan.reads_much_more, plan.remedy) == (False, None)
    planned = costly_load(monkeypatch, hf)
    assert planned is not None
    assert plan_reading(tmp_path / "one", planned.layout).total == planned.total
    tp = planned.layout.tp
    from_hf.from_hf(hf, tmp_path / "cut", tp=tp)
    others = [ParallelLayout(tp=2, ep=4, etp=1), ParallelLayout(tp=2, pp=2, ep=2)] if experts else []
    for layout in (ParallelLayout(), ParallelLayout(tp=tp // 2), ParallelLayout(tp=tp, pp=4), *others):
        assert (plan_reading(tmp_path / "cut", layout).total.amplification or 0) < 1.1


def test_who_is_advised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody who gives a layout, nor with a small model; a model that 8 ranks cannot share is planned for fewer."""
    hf = save_model(tmp_path / "hf", **SIZES | {"num_attention_heads": 4, "num_key_value_heads": 2})
    assert from_hf.from_hf(hf, tmp_path / "not-written", output=Output(dry_run=True)).costly_load is None
    planned = costly_load(monkeypatch, hf)
    assert planned is not None
    assert planned.layout == ParallelLayout(tp=4)
    assert costly_load(monkeypatch, hf, pp=2) is None
    odd = save_model(tmp_path / "odd", **SIZES | {"num_attention_heads": 3, "num_key_value_heads": 1})
    assert costly_load(monkeypatch, odd) is None
