"""``reshard``: everything of a checkpoint is there afterwards, and ranks of the layout read whole chunks.

tests/against/test_optimizers.py has Megatron itself load what was resharded.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import warnings
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import layouts
import numpy as np
import pytest
import torch
from command_line import run, without_time
from genuine import GENUINE, folder, shards
from hf_models import random_model, saved
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_models import contents
from rank_threads import on_ranks
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save
from torch_reading import (
    described,
    edited_metadata,
    load_in_own_shapes,
    load_tensors,
    objects,
    read_metadata,
    stored_boxes,
)

import dist_ckpt_mistral as dcm
from dist_ckpt_mistral.errors import FormatError, LayoutError, OutputError, TensorMismatchError
from dist_ckpt_mistral.mapping import chunking
from dist_ckpt_mistral.mapping.checkpoint_map import new_checkpoint_map
from dist_ckpt_mistral.mapping.chunking import cut_chunks
from dist_ckpt_mistral.model.layout.local_tensors import local_tensors
from dist_ckpt_mistral.model.table.table import tensor_table

RESHARDABLE: Final = [case for case in GENUINE if case != "opt_dr_0161"]
LAYOUTS: Final = [
    dcm.ParallelLayout(),
    dcm.ParallelLayout(tp=4),
    dcm.ParallelLayout(tp=2, pp=2, dp=2),
    dcm.ParallelLayout(pp=2, vpp=2),
    dcm.ParallelLayout(pp=2, pp_layers=(1, 3), tp=4),
]
OPT: Final = "opt_plain_0161"


def resharded(case: str, to: Path, layout: dcm.ParallelLayout, **options: Any) -> Path:  # noqa: ANN401  (of reshard)
    """Reshard a genuine checkpoint; where the shards then lie."""
    dcm.reshard(shards(case), to, layout, config=folder(case), **options)
    return to / GENUINE[case]


@pytest.mark.parametrize("case", RESHARDABLE)
def test_nothing_is_lost(case: str, tmp_path: Path) -> None:
    """Every tensor, optimizer included, every object and every other file is there as before; so says verify."""
    old, new = shards(case), resharded(case, tmp_path / "out", dcm.ParallelLayout(tp=4, pp=2))
    assert described(load_in_own_shapes(new)) == described(load_in_own_shapes(old))
    assert objects(new) == objects(old)
    small = {name for name in contents(old) if not name.endswith(".distcp")} - {".metadata"}
    assert {name: contents(new)[name] for name in small} == {name: contents(old)[name] for name in small}
    assert {*contents(new)} == small | {".metadata"} | {f"__{rank}_0.distcp" for rank in range(8)}
    assert dcm.compare(old, new, config=folder(case)).is_equal


@pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
@pytest.mark.parametrize("case", [OPT, "opt_fsms_0140", "tied_tp2pp2_0161", "singleton_0161", "nonhomog_0192"])
def test_ranks_read_whole_chunks(case: str, layout: dcm.ParallelLayout, tmp_path: Path) -> None:
    """What a rank of the layout holds is made of whole chunks, weights and optimizer, whatever the old layout was."""
    directory = resharded(case, tmp_path / "out", layout)
    metadata: Any = read_metadata(directory).state_dict_metadata
    blocks = vars(read_metadata(directory)).get("mcore_data") or {}
    table = tensor_table(dcm.MistralConfig.from_hf(folder(case)))
    style = {"singleton_0161": dcm.KeyStyle.SINGLETON, "nonhomog_0192": dcm.KeyStyle.PER_LAYER}.get(case)
    seen = 0
    for rank in range(layout.world_size):
        at = layout.coordinates(rank)
        held = [
            box
            for chunk in layout.model_chunks(4, at.pp)
            for each in local_tensors(layout, table, chunk, at, style=style or dcm.KeyStyle.STACKED)
            for box in each.boxes
        ]
        for box in held:
            for name in (key for key in metadata if key.endswith("." + box.mcore_key) or key == box.mcore_key):
                if name.startswith("optimizer") or name == box.mcore_key:
                    own = blocks[name]["nd_reformulated_orig_global_shape"] if name in blocks else None
                    chunks = [_box(chunk, metadata[name].size, own) for chunk in metadata[name].chunks]
                    if own is not None and own[0] == 256 and layout.tp == 4:
                        continue  # 256 rows for ranks of 512: blocks must be equal, so this one is whole
                    seen += 1
                    _require_whole(box, chunks, name)
    assert seen > 20


def _box(chunk: Any, size: Any, own: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:  # noqa: ANN401  (torch's)
    """Offset and sizes of a chunk, in the shape of the parameter."""
    if own is None:
        return tuple(chunk.offsets), tuple(chunk.sizes)
    block = [whole // count for whole, count in zip(own, size[:-1], strict=True)]
    assert chunk.offsets[-1] == 0
    return tuple(at * extent for at, extent in zip(chunk.offsets, block, strict=False)), tuple(block)


def _require_whole(box: Any, chunks: list[Any], name: str) -> None:  # noqa: ANN401  (a LocalBox)
    """Every chunk that meets the box lies inside of it."""
    low, high = box.global_offset, [a + b for a, b in zip(box.global_offset, box.shape, strict=True)]
    for offset, sizes in chunks:
        ends = [a + b for a, b in zip(offset, sizes, strict=True)]
        if all(a < d and c < b for a, b, c, d in zip(low, high, offset, ends, strict=True)):
            inside = all(a <= c and d <= b for a, b, c, d in zip(low, high, offset, ends, strict=True))
            assert inside, f"{name}: {low} to {high} cut_chunks the chunk {offset} to {ends}"


@settings(max_examples=50)
@given(model=layouts.models(), more=st.integers(0, 300))
def test_chunks_tile_tensors_and_serve_ranks(model: tuple[dcm.MistralConfig, dcm.ParallelLayout], more: int) -> None:
    """Any layout, any padding: chunks cover every element once, and no rank needs a part of one."""
    config, layout = model
    table = tensor_table(config)
    found = new_checkpoint_map(table)
    padded = {stored.mcore_key for rule in table.rules if rule.padded_vocabulary for stored in found.stored(rule, ())}
    shapes = {name: (size + more * (name in padded), *rest) for name, (size, *rest) in found.shapes().items()}
    covered, chunks = {name: np.zeros(shape, int) for name, shape in shapes.items()}, defaultdict(list)
    for cut in cut_chunks(found, shapes, layout):
        covered[cut.name][tuple(slice(a, a + b) for a, b in zip(cut.offset, cut.shape, strict=True))] += 1
        chunks[cut.name].append((cut.offset, cut.shape))
    assert all((count == 1).all() for count in covered.values())
    for rank in range(layout.world_size):
        at = layout.coordinates(rank)
        for part in layout.model_chunks(table.num_layers, at.pp):
            for held in local_tensors(layout, table, part, at):
                for box in held.boxes:
                    _require_whole(box, chunks[box.mcore_key], box.mcore_key)


def test_copies_of_a_rank_are_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """With 16 times the ranks for data and context parallelism, the same chunks are cut, in as many steps."""
    config = dcm.MistralConfig.from_hf(folder("td_0161"))
    found, looked = new_checkpoint_map(tensor_table(config)), []

    def counted(layout: dcm.ParallelLayout, *args: Any, **options: Any) -> Any:  # noqa: ANN401  (passed through)
        looked.append(args)
        return local_tensors(layout, *args, **options)

    monkeypatch.setattr(chunking, "local_tensors", counted)
    shapes = found.shapes()
    alone = [replace(cut, rank=0) for cut in cut_chunks(found, shapes, dcm.ParallelLayout(tp=2, pp=2))]
    steps = len(looked)
    copied = [replace(cut, rank=0) for cut in cut_chunks(found, shapes, dcm.ParallelLayout(tp=2, pp=2, dp=8, cp=2))]
    assert (copied, len(looked)) == (alone, 2 * steps)


@pytest.mark.parametrize("case", [OPT, "opt_fsms_0140", "opt_fr_0192", "vpp_0161"])
def test_there_and_back(case: str, tmp_path: Path) -> None:
    """Resharded and resharded back, a checkpoint has the files of one that went to the second layout at once."""
    there = resharded(case, tmp_path / "there", dcm.ParallelLayout(tp=4, pp=4))
    dcm.reshard(there, tmp_path / "back", dcm.ParallelLayout(tp=2, pp=2), config=folder(case))
    direct = resharded(case, tmp_path / "direct", dcm.ParallelLayout(tp=2, pp=2))
    assert contents(tmp_path / "back") == contents(direct)


def test_blocks_cut_by_data_parallel_ranks(tmp_path: Path) -> None:
    """Blocks that data-parallel ranks cut in the middle of rows come out whole, and master weights as before."""
    case = folder("opt_fsms_cut_0140")
    dcm.reshard(case / "checkpoint", tmp_path / "out", dcm.ParallelLayout(tp=4), config=case)
    assert described(load_in_own_shapes(tmp_path / "out")) == described(load_in_own_shapes(case / "checkpoint"))
    for source in (tmp_path / "out", case / "checkpoint"):
        dcm.to_hf(source, tmp_path / f"hf_{source.name}", config=case, weights="master")
    assert contents(tmp_path / "hf_out") == contents(tmp_path / "hf_checkpoint")


def test_an_import_stays_one(tmp_path: Path) -> None:
    """What from-hf remembers of Hugging Face survives: the export of a resharded import is the original, every byte."""
    original = saved(random_model(), tmp_path / "original", max_shard_size=3000)
    (original / "tokenizer.json").write_text("{}")
    dcm.from_hf(original, tmp_path / "ckpt", iteration=12)
    done = dcm.reshard(tmp_path / "ckpt", tmp_path / "out", dcm.ParallelLayout(tp=2, pp=2))
    assert done.config_from == "the Hugging Face configuration inside the checkpoint"
    assert (tmp_path / "out" / "latest_checkpointed_iteration.txt").read_text() == "12"
    dcm.to_hf(tmp_path / "out", tmp_path / "exported")
    assert contents(tmp_path / "exported") == contents(original)
    assert objects(tmp_path / "out" / "iter_0000012") == objects(tmp_path / "ckpt" / "iter_0000012")
    dcm.from_hf(original, tmp_path / "direct", tp=2, pp=2, iteration=12)
    assert contents(tmp_path / "out").keys() == contents(tmp_path / "direct").keys()
    boxes, direct = (stored_boxes(tmp_path / name / "iter_0000012") for name in ("out", "direct"))
    assert boxes == direct
    assert len(boxes) > len({name for name, _, _ in boxes})


@pytest.mark.parametrize(("rows", "tp", "starts"), [(512, 1, [0, 256]), (512, 2, [0, 128, 256]), (256, 4, [0, 128])])
def test_vocabulary_padding_is_kept(rows: int, tp: int, starts: list[int], tmp_path: Path) -> None:
    """Rows beyond the vocabulary keep their values, be there more or fewer than the layout pads to.

    One chunk of 512 rows is no padding of 250 that Megatron makes: it takes an override.
    """
    stored = {key: tensor for key, tensor in load_tensors(shards("td_0192")).items() if "common_state" not in key}
    words = "embedding.word_embeddings.weight"
    for key in (words, "output_layer.weight"):
        stored[key] = torch.arange(rows * 64).view(rows, 64).bfloat16()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no process group
        save(stored, storage_writer=FileSystemWriter(tmp_path / "ckpt"), no_dist=True)
    shutil.copy(shards("td_0192") / "metadata.json", tmp_path / "ckpt")
    config = dcm.ConfigOverride(folder("td_0192"))
    dcm.reshard(tmp_path / "ckpt", tmp_path / "out", dcm.ParallelLayout(tp=tp), config=config)
    assert described(load_tensors(tmp_path / "out")) == described(stored)
    metadata: Any = read_metadata(tmp_path / "out")
    assert sorted(chunk.offsets[0] for chunk in metadata.state_dict_metadata[words].chunks) == starts


def test_ranks_reshard_together(tmp_path: Path) -> None:
    """Three ranks write the bytes of one."""
    one = resharded("opt_fr_0192", tmp_path / "one", dcm.ParallelLayout(tp=4))
    failures = on_ranks(
        3, lambda ranks: resharded("opt_fr_0192", tmp_path / "many", dcm.ParallelLayout(tp=4), ranks=ranks)
    )
    assert failures == [None] * 3
    assert contents(tmp_path / "many") == contents(one)


def test_flat_buffers_are_refused_or_left_behind(tmp_path: Path) -> None:
    """State in flat buffers is refused with the way out; told so, all optimizer state stays behind, and is listed."""
    case, layout = "opt_dr_0161", dcm.ParallelLayout(pp=2)
    with pytest.raises(TensorMismatchError, match=r"format dp_reshardable.*--dist-ckpt-optim-fully.*--weights-only"):
        resharded(case, tmp_path / "out", layout)
    assert list(tmp_path.iterdir()) == []
    done = dcm.reshard(shards(case), tmp_path / "out", layout, config=folder(case), weights_only=True)
    old, left = load_tensors(shards(case)), [name for name, _ in done.ignored]
    assert described(load_tensors(tmp_path / "out")) == described(
        {key: tensor for key, tensor in old.items() if not key.startswith("optimizer.")}
    )
    listed = read_metadata(shards(case)).state_dict_metadata
    assert sorted(left) == sorted(key for key in listed if key.startswith("optimizer."))
    assert sorted(read_metadata(tmp_path / "out").state_dict_metadata) == sorted(set(listed) - set(left))


def renamed(to: Path, old: str, new: str) -> Path:
    """The genuine checkpoint with optimizer, other keys in it."""
    directory = shutil.copytree(shards(OPT), to)
    with edited_metadata(directory) as metadata:
        listed, stored = metadata.state_dict_metadata, metadata.storage_data
        metadata.state_dict_metadata = {key.replace(old, new): each for key, each in listed.items()}
        metadata.storage_data = {type(i)(i.fqn.replace(old, new), i.offset): each for i, each in stored.items()}
    return directory


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("optimizer.state.exp_avg_sq.", "chained_1.optimizer.state.momentum_buffer."),
        ("optimizer.state.exp_avg_sq.", "optimizer.of_another_kind."),
        ("optimizer.state.exp_avg.output_layer", "optimizer.odd.output_layer"),
        ("decoder.", "module.decoder."),
    ],
)
def test_other_optimizers_come_along(old: str, new: str, tmp_path: Path) -> None:
    """States with other names, of some parameters only, and tensors of unknown sense: nothing is left behind."""
    directory = renamed(tmp_path / "ckpt", old, new)
    if old == "decoder.":
        directory = renamed_prefix(directory)
    done = dcm.reshard(directory, tmp_path / "out", dcm.ParallelLayout(tp=4), config=folder(OPT))
    assert described(load_tensors(tmp_path / "out")) == described(load_tensors(directory))
    assert (done.num_tensors, done.ignored) == (36, ())


def renamed_prefix(directory: Path) -> Path:
    """The same with ``module.`` before the keys of embedding and head, too."""
    with edited_metadata(directory) as metadata:
        for old in ("embedding.", "output_layer."):
            listed, stored = metadata.state_dict_metadata, metadata.storage_data
            metadata.state_dict_metadata = {key.replace(old, "module." + old): each for key, each in listed.items()}
            metadata.storage_data = {
                type(i)(i.fqn.replace(old, "module." + old), i.offset): each for i, each in stored.items()
            }
    return directory


def test_states_of_nothing_are_refused(tmp_path: Path) -> None:
    """A state of a parameter that is not there, or of another shape, is no tensor to cut by guess."""
    layout = dcm.ParallelLayout(tp=4)
    directory = renamed(tmp_path / "a", "optimizer.state.exp_avg.output_layer", "optimizer.state.exp_avg.other")
    with pytest.raises(TensorMismatchError, match=r"cannot reshard 'optimizer.state.exp_avg.other.weight' \[256, 64\]"):
        dcm.reshard(directory, tmp_path / "out", layout, config=folder(OPT))
    directory = renamed(
        tmp_path / "b", "optimizer.state.exp_avg.output_layer", "optimizer.state.x.decoder.final_layernorm"
    )
    with pytest.raises(TensorMismatchError, match=r"expected \[64\], as its parameter. Reshard .* --weights-only"):
        dcm.reshard(directory, tmp_path / "out", layout, config=folder(OPT))
    dcm.reshard(directory, tmp_path / "out", layout, config=folder(OPT), weights_only=True)


def test_what_lies_beside_comes_along(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """run_config.yaml and folders come along, so does Bridge's state at the root; what would be wrong stays behind."""
    root = tmp_path / "root"
    step = root / "iter_0000007"
    shutil.copytree(shards("common_0192"), step)
    (root / "latest_checkpointed_iteration.txt").write_text("7\n")
    torch.save({"step": torch.tensor(7)}, root / "latest_train_state.pt")
    (step / "run_config.yaml").write_text("model: {}")
    (step / "tokenizer" / "deep").mkdir(parents=True)
    (step / "tokenizer" / "deep" / "vocab.json").write_text("{}")
    (step / "__9_9.distcp").write_bytes(b"of another save")
    (step / "elsewhere").symlink_to(tmp_path)
    with caplog.at_level(logging.WARNING):
        dcm.reshard(root, tmp_path / "out", dcm.ParallelLayout(), config=folder("common_0192"))
    assert sorted(contents(tmp_path / "out")) == [
        "iter_0000007/.metadata",
        "iter_0000007/__0_0.distcp",
        "iter_0000007/metadata.json",
        "iter_0000007/run_config.yaml",
        "iter_0000007/tokenizer/deep/vocab.json",
        "latest_checkpointed_iteration.txt",
        "latest_train_state.pt",
    ]
    assert "__9_9.distcp stays behind" in caplog.text
    assert "elsewhere is a link to a directory" in caplog.text
    torch.save({"step": torch.tensor(8)}, root / "latest_train_state.pt")
    dcm.reshard(step, tmp_path / "older", dcm.ParallelLayout(), config=folder("common_0192"))
    assert (tmp_path / "older" / "latest_checkpointed_iteration.txt").read_text() == "7"
    assert not (tmp_path / "older" / "latest_train_state.pt").exists()


def test_names_that_no_tracker_can_say(tmp_path: Path) -> None:
    """``iter_00000500`` is no iteration of Megatron's: the output stands alone, and can be opened."""
    step = shutil.copytree(shards("common_0192"), tmp_path / "root" / "iter_00000500")
    dcm.reshard(step, tmp_path / "out", dcm.ParallelLayout(), config=folder("common_0192"))
    assert not (tmp_path / "out" / "latest_checkpointed_iteration.txt").exists()
    assert dcm.compare(step, tmp_path / "out", config=folder("common_0192")).is_equal


def test_a_damaged_train_state_is_told_before_copying(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read of the root is read first: nothing is written where it is damaged."""
    root = tmp_path / "root"
    shutil.copytree(shards("common_0192"), root / "iter_0000007")
    (root / "latest_train_state.pt").write_bytes(b"damaged")
    monkeypatch.setattr("dist_ckpt_mistral.convert.rewrite.write_output", lambda *_, **__: pytest.fail("it writes"))
    with pytest.raises(FormatError, match=r"latest_train_state\.pt"):
        dcm.reshard(root / "iter_0000007", tmp_path / "out", dcm.ParallelLayout(), config=folder("common_0192"))


def test_refusals(tmp_path: Path) -> None:
    """Layouts that Megatron refuses, outputs that exist, inputs that are damaged: nothing is written."""
    case = folder(OPT)
    with pytest.raises(LayoutError, match="num_hidden_layers=4"):
        dcm.reshard(shards(OPT), tmp_path / "out", dcm.ParallelLayout(pp=3), config=case)
    directory = shutil.copytree(shards("common_0192"), tmp_path / "ckpt")
    with edited_metadata(directory) as metadata:
        key = next(key for key in metadata.storage_data if "_extra_state" in key.fqn)
        metadata.storage_data[key].offset += 1 << 20
    with pytest.raises(FormatError, match="truncated"):
        dcm.reshard(directory, tmp_path / "out", dcm.ParallelLayout(), config=folder("common_0192"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    with pytest.raises(OutputError, match="exists"):
        dcm.reshard(shards(OPT), tmp_path / "full", dcm.ParallelLayout(), config=case)
    dcm.reshard(shards(OPT), tmp_path / "full", dcm.ParallelLayout(), config=case, output=dcm.Output(overwrite=True))
    assert "file" not in contents(tmp_path / "full")
    assert not (tmp_path / "out").exists()


def test_command_line(tmp_path: Path) -> None:
    """The command has the options of a layout and of an output, and says what it wrote."""
    case = folder("mlm_0161")
    options = ("--tp", 4, "--pp", 2, "--dp", 2, "--no-sync", "--workers", 1, "--memory", "1MB")
    done = run("reshard", case / "checkpoint", tmp_path / "out", *options)
    command = f"dist-ckpt-mistral megatron-args {tmp_path / 'out'} --tp 4 --pp 2 --dp 2"
    assert (done.code, done.out[1:]) == (0, [f"train it with the flags of: {command}"])
    assert re.fullmatch(rf"wrote 9 tensors \(\d+\.\d kB\) in 8 files to {tmp_path / 'out'}", without_time(done.out[0]))
    assert done.err[-1] == "configuration: the args inside the checkpoint"
    assert (tmp_path / "out" / "latest_checkpointed_iteration.txt").read_text() == "0"
    assert json.loads((tmp_path / "out" / "iter_0000000" / "metadata.json").read_text())["sharded_backend"]
    assert run("verify", case / "checkpoint", tmp_path / "out").code == 0
    again = run("reshard", case / "checkpoint", tmp_path / "out")
    assert (again.code, again.out) == (1, [])
    assert "exists" in again.err[-1]
