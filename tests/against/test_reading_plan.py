"""What ranks read: against loads of Megatron's own, against a mask of elements, and as people and programs see it."""

from __future__ import annotations

import json
import math
import shutil
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import refusal, run
from genuine import folder, shards
from hf_models import random_model, saved
from hypothesis import given
from hypothesis import strategies as st
from megatron_reads import reads_of_rank
from safetensors.torch import load_file
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_saver import save
from torch_reading import edited_metadata, load_tensors, read_metadata

from dist_ckpt_mistral.analysis.read_planner import plan_reading
from dist_ckpt_mistral.convert.from_hf import from_hf
from dist_ckpt_mistral.gather.chunk_reads import ChunkList, ChunkReads, WantedBox, chunk_list, chunk_reads
from dist_ckpt_mistral.gather.dtypes import Shape
from dist_ckpt_mistral.gather.index import IndexedTensor, TensorIndex
from dist_ckpt_mistral.mapping.read_plan import OPTIMIZER, WEIGHTS, RankReads, ReadingPlan
from dist_ckpt_mistral.model.config.mistral_config import MistralConfig
from dist_ckpt_mistral.model.layout.layout import ParallelLayout
from dist_ckpt_mistral.model.table.rules import KeyStyle


@pytest.mark.megatron
@pytest.mark.parametrize(
    ("case", "style", "layout"),
    [
        ("td_0192", KeyStyle.STACKED, ParallelLayout()),
        ("td_0161", KeyStyle.STACKED, ParallelLayout(tp=4, dp=2)),
        ("vpp_0161", KeyStyle.STACKED, ParallelLayout(pp=4)),
        ("tied_tp2pp2_0161", KeyStyle.STACKED, ParallelLayout(tp=4, pp=2)),
        ("nonhomog_0192", KeyStyle.PER_LAYER, ParallelLayout(tp=4, pp=2, vpp=2)),
        ("singleton_0161", KeyStyle.SINGLETON, ParallelLayout(tp=4, pp=2)),
        ("td_0123", KeyStyle.STACKED, ParallelLayout(tp=2, cp=2, pp=2, pp_layers=(3, 1), order="cp-tp-dp-pp")),
    ],
)
def test_megatron_reads_just_that(case: str, style: KeyStyle, layout: ParallelLayout) -> None:
    """Megatron's own loading of every rank loads so many chunks and bytes of these files, and keeps so much of them."""
    require_megatron_agrees(shards(case), folder(case), layout, style)


def require_megatron_agrees(
    directory: Path,
    config: Path,
    layout: ParallelLayout,
    style: KeyStyle = KeyStyle.STACKED,
    states: Sequence[str] = (),
) -> dict[str, Any]:
    """Compare every rank's numbers with those of Megatron's own loading; gives the plan as JSON."""
    told: dict[str, Any] = plan_reading(directory, layout, config=config).to_json()
    assert [each["rank"] for each in told["ranks"]] == list(range(layout.world_size))
    for each in told["ranks"]:
        weights = reads_of_rank(directory, MistralConfig.from_hf(config), layout, each["rank"], style)
        assert each["weights"] == weights
        optimizer = None
        if states:
            optimizer = reads_of_rank(directory, MistralConfig.from_hf(config), layout, each["rank"], style, states)
        assert each["optimizer"] == optimizer
        for name in ("needed_bytes", "read_bytes", "num_reads", "num_chunks"):
            assert each[name] == weights[name] + (optimizer[name] if optimizer else 0)
    return told


@pytest.mark.megatron
@pytest.mark.parametrize(
    ("case", "states"),
    [
        ("opt_fr_0192", ("param", "exp_avg", "exp_avg_sq")),
        ("opt_plain_0161", ("fp32_param", "exp_avg", "exp_avg_sq")),
    ],
)
def test_megatron_reads_just_that_of_the_optimizer(case: str, states: tuple[str, ...]) -> None:
    """The same for optimizer state in both formats that go with any layout."""
    require_megatron_agrees(shards(case), folder(case), ParallelLayout(tp=4, pp=2, dp=2), states=states)


@pytest.mark.megatron
def test_a_chunk_that_two_boxes_meet_is_read_twice(tmp_path: Path) -> None:
    """Torch's own writer stores each tensor in one chunk: Megatron loads it once for gate and once for up."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no process group
        save(load_tensors(shards("td_0161")), checkpoint_id=tmp_path / "whole", no_dist=True)
    (tmp_path / "whole" / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    told = require_megatron_agrees(tmp_path / "whole", folder("td_0161"), ParallelLayout(tp=2, pp=2))
    assert told["ranks"][0]["num_reads"] > told["ranks"][0]["num_chunks"] == 7


@st.composite
def tilings(draw: st.DrawFn) -> tuple[Shape, list[tuple[Shape, Shape]]]:
    """A shape, and boxes (offset, shape) that tile it: any that come of cutting it in two again and again."""
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    boxes: list[tuple[Shape, Shape]] = [((0,) * len(shape), shape)]
    for _ in range(draw(st.integers(0, 8))):
        offset, extent = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        axis = draw(st.integers(0, len(shape) - 1))
        at = draw(st.integers(0, extent[axis]))
        sizes = (at, extent[axis] - at) if 0 < at < extent[axis] else (extent[axis],)
        for number, size in enumerate(sizes):
            begin = offset[axis] + (at if number else 0)
            moved = tuple(begin if each == axis else old for each, old in enumerate(offset))
            boxes.append((moved, tuple(size if each == axis else old for each, old in enumerate(extent))))
    return shape, boxes


@given(st.data())
def test_reads_are_those_that_a_mask_of_elements_shows(data: st.DataObject) -> None:
    """Each box loads whole every chunk of which it has an element, also where it reaches outside the tensor."""
    shape, tiling = data.draw(tilings())
    low = st.tuples(*(st.integers(0, size) for size in shape))
    boxes = [WantedBox("it", data.draw(low), data.draw(low)) for _ in range(data.draw(st.integers(0, 4)))]
    order = data.draw(st.permutations(range(len(tiling))))
    located = [(*box, place % 2, place) for box, place in zip(tiling, order, strict=True)]
    index = TensorIndex(
        files=(Path("a"), Path("b")), tensors={"it": IndexedTensor.build("it", "float32", shape, located)}
    )
    chunks = chunk_list(index)
    found = chunk_reads(index, chunks, boxes)
    expected = []
    in_order = sorted(located, key=lambda chunk: (chunk[2], chunk[3]))
    for box in boxes:
        wanted = np.zeros(tuple(2 * size for size in shape), dtype=bool)  # with room outside
        wanted[tuple(map(slice, box.offset, np.add(box.offset, box.shape)))] = True
        for number, (offset, extent, _, _) in enumerate(in_order):
            needed = int(wanted[tuple(map(slice, offset, np.add(offset, extent)))].sum())
            if needed:
                expected.append((number, 4 * needed, 4 * math.prod(extent)))
    assert sorted(found) == sorted(expected)
    assert chunks.files.tolist() == [chunk[2] for chunk in in_order]
    assert chunks.num_bytes.tolist() == [4 * math.prod(chunk[1]) for chunk in in_order]


def planned(case: str, *arguments: object) -> Any:  # noqa: ANN401  (parsed JSON)
    """What ``plan --json`` prints of a genuine checkpoint."""
    outcome = run("plan", folder(case) / "checkpoint", "--config", folder(case), "--json", *arguments)
    assert (outcome.code, outcome.err) == (0, [])
    return json.loads("\n".join(outcome.out))


def test_the_plan_as_json() -> None:
    """The JSON has these keys and no others; totals are those of the ranks, and copies say whom they read like."""
    told = planned("td_0192", "--tp", 4, "--dp", 2)
    amount = ["needed_bytes", "read_bytes", "amplification", "num_reads", "num_chunks", "files"]
    assert list(told) == [
        *("json_version", "path", "config_from", "layout", "verdict", "remedy", "left_out", "stored_bytes", "total"),
        *("ranks", "warnings"),
    ]
    parts = [*amount, "weights", "optimizer"]
    assert list(told["total"]) == parts
    assert all(list(each) == ["rank", "pipeline_stage", "layers", "reads_like", *parts] for each in told["ranks"])
    assert list(told["total"]["weights"]) == amount
    assert told["total"]["weights"] == {name: told["total"][name] for name in amount}
    assert (told["total"]["optimizer"], told["left_out"]) == (None, None)
    assert [each["reads_like"] for each in told["ranks"]] == [0, 1, 2, 3, 0, 1, 2, 3]
    assert (told["layout"]["tp"], told["layout"]["dp"], told["ranks"][0]["layers"]) == (4, 2, [0, 1, 2, 3])
    for name in ("needed_bytes", "read_bytes", "num_reads"):
        assert told["total"][name] == sum(each[name] for each in told["ranks"])
    for name, num_bytes in told["total"]["files"].items():
        assert num_bytes == sum(each["files"].get(name, 0) for each in told["ranks"])
    described_as = read_metadata(shards("td_0192")).state_dict_metadata.values()
    tensors = [each for each in described_as if isinstance(each, TensorStorageMetadata)]
    assert told["stored_bytes"] == sum(each.size.numel() * each.properties.dtype.itemsize for each in tensors)
    assert told["total"]["num_chunks"] == sum(len(each.chunks) for each in tensors)
    assert told["verdict"] == (
        "The ranks read 1.8 times what they need (the worst 2.0 times); that is much more than necessary, and "
        "`dist-ckpt-mistral reshard` would make it 1.0."
    )


def test_optimizer_state_is_told_or_left_out() -> None:
    """--weights-only leaves it out; flat buffers cannot be planned, and it is said why and what to do."""
    whole, weights = planned("opt_fr_0192"), planned("opt_fr_0192", "--weights-only")
    assert whole["total"]["optimizer"]["needed_bytes"] == 6 * whole["total"]["weights"]["needed_bytes"]  # 3 in float32
    assert weights["total"]["optimizer"] is None
    assert weights["total"]["weights"] == whole["total"]["weights"]
    assert (whole["left_out"], weights["left_out"]) == (None, None)
    flat = planned("opt_dr_0161")
    assert flat["total"]["optimizer"] is None
    assert flat["left_out"].startswith("its optimizer state is in the format dp_reshardable, flat buffers")
    blocks = planned("opt_fsms_0140")
    assert blocks["total"]["optimizer"] is None
    assert "fully_sharded_model_space, which only megatron-core 0.12 to 0.14 load" in blocks["left_out"]
    case = folder("opt_dr_0161")
    assert any(
        line.startswith("Not in the plan: its") for line in run("plan", shards("opt_dr_0161"), "--config", case).out
    )


def test_a_checkpoint_stored_for_the_layout_is_read_without_loss(tmp_path: Path) -> None:
    """What from-hf cuts for a layout, each rank of it reads whole, each of its own file, norms and padding included."""
    hf = saved(random_model(), tmp_path / "hf")
    from_hf(hf, tmp_path / "ckpt", tp=2, pp=2)
    plan = plan_reading(tmp_path / "ckpt", ParallelLayout(tp=2, pp=2))
    assert plan.verdict() == "Every rank reads only what it needs: whole chunks."
    assert [amount.amplification for amount in plan.amounts] == [1] * 4
    weights = load_file(hf / "model.safetensors").values()
    assert plan.stored_bytes == sum(tensor.nbytes for tensor in weights)
    assert plan_reading(tmp_path / "ckpt", ParallelLayout()).total.needed_bytes == plan.stored_bytes


@pytest.mark.parametrize("case", ["opt_fr_0192", "tied_tp2pp2_0161"])
def test_reshard_makes_it_so(case: str, tmp_path: Path) -> None:
    """After ``reshard`` every rank of the layout reads whole chunks, as the verdict promises, optimizer included."""
    layout = ("--config", folder(case), "--tp", 4, "--pp", 2)
    before = planned(case, *layout[2:])
    assert before["total"]["amplification"] > 1.5
    assert before["verdict"].endswith("`dist-ckpt-mistral reshard` would make it 1.0.")
    assert run("reshard", folder(case) / "checkpoint", tmp_path / "new", *layout).code == 0
    after = json.loads("\n".join(run("plan", tmp_path / "new", *layout, "--json").out))
    assert after["verdict"] == "Every rank reads only what it needs: whole chunks."
    assert after["total"]["needed_bytes"] == after["total"]["read_bytes"] == before["total"]["needed_bytes"]
    assert (after["total"]["optimizer"] is None) == (before["total"]["optimizer"] is None)


@pytest.mark.parametrize("case", ["td_0161", "td_0192"])
def test_only_the_metadata_is_read(case: str, tmp_path: Path) -> None:
    """Where no data file is there, the plan is the same; common state that lies in one is said to be not compared."""
    bare = shutil.copytree(folder(case) / "checkpoint", tmp_path / "bare", ignore=shutil.ignore_patterns("*.distcp"))
    outcome = run("plan", bare, "--config", folder(case), "--tp", 4, "--json")
    assert outcome.code == 0
    assert ["the common state" in line for line in outcome.err] == [True] * (case == "td_0192")
    told = json.loads("\n".join(outcome.out))
    assert [bool(told["warnings"])] == [case == "td_0192"]
    named = {"path": None, "remedy": None, "warnings": None}
    assert told | named == planned(case, "--tp", 4) | named


def test_a_thousand_ranks_fit_on_a_page() -> None:
    """Ranks of a stage that read equally much share a row; the last row is all of them together."""
    arguments = ("plan", folder("td_0161") / "checkpoint", "--config", folder("td_0161"))
    outcome = run(*arguments, "--tp", 4, "--pp", 4, "--dp", 64)
    assert (outcome.code, outcome.err) == (0, [])
    assert outcome.out[3].split() == ["layout", "1024", "ranks:", "tp=4,", "pp=4,", "dp=64"]
    rows = [line.split("  ") for line in outcome.out[6:-4]]
    assert len(rows) <= 9
    assert rows[-1][0] == "all together"
    assert outcome.out[-2].startswith("Up to 64 ranks read the same")
    told = planned("td_0161", "--tp", 4, "--pp", 4, "--dp", 64)
    assert len(told["ranks"]) == 1024
    narrow = run(*arguments, "--tp", 4, "--pp", 2)
    first, second = ([cell.strip() for cell in line.split("  ") if cell] for line in narrow.out[6:8])
    assert first == ["0, 1", "0, 1", "60.4 kB", "103.4 kB", "1.7", "15", "2 to 3"]
    assert second == ["2, 3", "0, 1", "44.0 kB", "87.0 kB", "2.0", "14", "4"]


def test_amounts_cost_what_is_read_and_are_exact() -> None:
    """64 groups of a million chunks are summed up in no time, to the byte even where floats could not tell."""
    count, size = 1_000_000, (1 << 53) + 1
    tensors = np.arange(count, dtype=np.int64) % 2
    chunks = ChunkList(
        names=("a", "b"), tensors=tensors, files=np.arange(count) // 10_000, num_bytes=np.full(count, size), places={}
    )
    groups = []
    for number in range(64):
        read = np.array([number, number, 15_000 + number, 999_999])
        needed, whole = np.full(4, 3), np.full(4, size)
        reads = ChunkReads(chunks=read, needed_bytes=needed, read_bytes=whole)
        groups.append(RankReads(ranks=(2 * number, 2 * number + 1), stage=0, layers=(), reads=reads))
    plan = ReadingPlan(
        path=Path("ckpt"),
        config_from="",
        layout=ParallelLayout(dp=128),
        files=tuple(f"f{number}" for number in range(100)),
        chunks=chunks,
        kinds=("norms", "norms"),
        parts=(WEIGHTS, OPTIMIZER),
        groups=tuple(groups),
    )
    began = time.process_time()
    told = plan.to_json()
    assert time.process_time() - began < 2  # each group listing all chunks: 17 s
    assert plan.amounts[1].to_json() == {
        "needed_bytes": 12,
        "read_bytes": 4 * size,
        "amplification": 4 * size / 12,
        "num_reads": 4,
        "num_chunks": 3,
        "files": {"f0": 2 * size, "f1": size, "f99": size},
    }
    assert (told["ranks"][2]["weights"]["files"], told["ranks"][3]["optimizer"]["num_reads"]) == ({}, 4)
    assert (told["total"]["num_chunks"], told["total"]["num_reads"]) == (64 * 2 + 1, 64 * 4 * 2)
    assert told["total"]["files"] == {"f0": 256 * size, "f1": 128 * size, "f99": 128 * size}
    assert told["total"]["weights"]["num_chunks"] == 64


def test_what_cannot_be_planned_is_refused(tmp_path: Path) -> None:
    """A layout that Megatron refuses, chunks that are not whole, no configuration, nowhere to draw: one line each."""
    ckpt, config = shards("td_0161"), folder("td_0161")
    arguments = ("plan", ckpt, "--config", config)
    assert "num_attention_heads=8 is not divisible by tp=3" in refusal(tmp_path, *arguments, "--tp", 3)
    assert "Give the model's config.json with --config, or leave it" in refusal(tmp_path, "plan", ckpt)
    assert "there is no such directory" in refusal(tmp_path, "plan", tmp_path / "none")
    nowhere = tmp_path / "none" / "plan.svg"
    assert f"cannot write {nowhere}: No such file or directory" in refusal(tmp_path, *arguments, "--svg", nowhere)
    broken = shutil.copytree(ckpt, tmp_path / "broken")
    key = "decoder.layers.mlp.linear_fc2.weight"
    with edited_metadata(broken) as metadata:
        lost = metadata.state_dict_metadata[key].chunks.pop()
        metadata.storage_data = {
            index: place
            for index, place in metadata.storage_data.items()
            if (index.fqn, index.offset) != (key, lost.offsets)
        }
    told = refusal(tmp_path, "plan", broken, "--config", config)
    assert f"the stored chunks of '{key}' are not whole: nothing is stored for [3:4" in told
    with edited_metadata(broken) as metadata:
        metadata.state_dict_metadata[key].chunks.append(lost)
    told = refusal(tmp_path, "plan", broken, "--config", config)
    assert f".metadata is damaged: chunks of '{key}': 1 stored nowhere, at [3, 0, 48]" in told
    with edited_metadata(broken) as metadata:
        metadata.state_dict_metadata[key].chunks[-1] = replace(lost, offsets=torch.Size((1 << 62, 0, 0)))
        metadata.storage_data[MetadataIndex(key, torch.Size((1 << 62, 0, 0)))] = _StorageInfo(
            "__0_0.distcp", 1 << 70, 1
        )
    assert ".metadata is not sound torch_dist metadata: " in refusal(tmp_path, "plan", broken, "--config", config)
    assert run("plan", ckpt, "--tp", 0).code == 2
