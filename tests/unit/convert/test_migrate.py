"""``migrate``: everything of a legacy zarr checkpoint is there afterwards, as torch and Megatron read it.

tests/unit/formats/test_legacy_zarr.py has what is refused.
"""

from __future__ import annotations

import collections
import json
import logging
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pytest
import torch
from command_line import refusal, run, tree
from failing_writes import ALONE, at_write, full
from flipped_bytes import damaged, some
from genuine import ZARR, folder, shards, truth
from plain_models import contents
from rank_threads import on_ranks
from safetensors.torch import load_file
from torch_reading import described, load_tensors, objects, stored_boxes
from zarr_checkpoints import (
    chunk_files,
    copied,
    in_words,
    load_objects,
    new_checkpoint,
    numbered,
    read_arrays,
    save_objects,
    unlisted,
    write_array,
)

import dist_ckpt_mistral as dcm
from dist_ckpt_mistral.convert.ranks import Ranks
from dist_ckpt_mistral.errors import ConfigError

if TYPE_CHECKING:
    from conftest import LaunchRanks

STEP: Final = "iter_0000010"
DENSE: Final = "zarr_ckpt"
#: What ``verify``, ``to-hf`` and so on are told of a case.
OPTIONS: Final[dict[str, dict[str, Any]]] = {case: {"config": folder(case) / "config.json"} for case in ZARR}
#: The layouts at which the installed Megatron loads what was migrated, and of which optimizer state, too.
LOADS: Final[dict[str, list[dict[str, int]]]] = {
    "optzarr_0123": [{"tp": 4}, {"pp": 4}],
    "fsms_zarr_0153": [{"tp": 4}, {"tp": 2, "dp": 2}],
    "moe_zarr_0153": [{"dp": 4, "ep": 4}, {"tp": 2, "pp": 2}],
}
STATES: Final = ("optzarr_0123", "fsms_zarr_0153")


@pytest.fixture(scope="module")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every genuine case migrated from Megatron-LM's layout, where it lies in ``iter_0000010``; its new iteration."""
    where, found = tmp_path_factory.mktemp("migrated"), {}
    for case in ZARR:
        old = where / "old" / case
        shutil.copytree(shards(case), old / STEP)
        (old / "latest_checkpointed_iteration.txt").write_text("10")
        done = dcm.migrate(old, where / case)
        assert (done.ignored, done.num_tensors) == ((), len(read_arrays(shards(case))))
        found[case] = where / case / STEP
    return found


@pytest.mark.parametrize("case", ZARR)
def test_tensors_are_those_of_tensorstore(case: str, migrated: dict[str, Path]) -> None:
    """Torch's DCP loads from the new checkpoint what tensorstore reads in the old one, and as many chunks lie there."""
    assert described(load_tensors(migrated[case])) == described(read_arrays(shards(case)))
    assert collections.Counter(name for name, _, _ in stored_boxes(migrated[case])) == chunk_files(shards(case))


@pytest.mark.parametrize("case", ZARR)
def test_objects_keep_their_values(case: str, migrated: dict[str, Path]) -> None:
    """Each object is in a list, as torch_dist has them, and is what torch loads from the old file, tensors included."""
    assert in_words(unlisted(objects(migrated[case]))) == in_words(load_objects(shards(case)))


def test_the_genuine_objects_hold_tensors(migrated: dict[str, Path]) -> None:
    """The test above looked at flat optimizer state, and at generators in two shards."""
    found = unlisted(objects(migrated["dpzero_zarr_0153"]))
    state = found["optimizer.distributed.dp_group_idx_1.param_state/shard_0_1"][0][torch.bfloat16, torch.float32]
    tensors = {name: tensor.dtype for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}
    assert tensors == dict.fromkeys(("param", "exp_avg", "exp_avg_sq"), torch.float32)
    assert [type(found[f"rng_state/shard_0.{tp}_1.2"][0]["np_rng_state"][1]) for tp in (0, 1)] == [np.ndarray] * 2


@pytest.mark.parametrize("case", ZARR)
def test_the_rest_keeps_its_bytes(case: str, migrated: dict[str, Path]) -> None:
    """Common state comes along as it is, under a tracker; no array, no lock and no word of zarr is left."""
    new, old = migrated[case], shards(case)
    assert (new.parent / "latest_checkpointed_iteration.txt").read_text() == "10"
    assert (new / "common.pt").read_bytes() == (old / "common.pt").read_bytes()
    assert json.loads((new / "metadata.json").read_bytes())["sharded_backend"] == "torch_dist"
    assert {*contents(new)} == {"common.pt", "metadata.json", ".metadata", "__0_0.distcp"}


@pytest.mark.parametrize("case", ZARR)
def test_exports_stay_the_same(case: str, migrated: dict[str, Path], tmp_path: Path) -> None:
    """The old checkpoint and the new one leave in the same files; test_genuine_exports.py has what is in them."""
    dcm.to_hf(shards(case), tmp_path / "old", **OPTIONS[case])
    dcm.to_hf(migrated[case], tmp_path / "new", **OPTIONS[case])
    assert contents(tmp_path / "old") == contents(tmp_path / "new")


@pytest.mark.parametrize("case", ["optzarr_0123", "fsms_zarr_0153"])
def test_master_weights_round_to_the_weights(case: str, migrated: dict[str, Path], tmp_path: Path) -> None:
    """The master weights, also those that two ranks wrote into one array, are the weights once they are rounded."""
    for source in (shards(case), migrated[case]):
        to = tmp_path / source.name
        dcm.to_hf(source, to, weights="master", dtype="bfloat16", **OPTIONS[case])
        assert described(load_file(to / "model.safetensors")) == described(truth(case))


@pytest.mark.parametrize("case", ZARR)
def test_verify_and_inspect_read_both(case: str, migrated: dict[str, Path]) -> None:
    """Both are sound, hold the same tensors, and are described alike, but for the format."""
    old, new, config = shards(case), migrated[case], ("--config", OPTIONS[case]["config"])
    assert run("verify", old, new, *config).code == 0
    assert (run("verify", old, *config).code, run("verify", new, *config).code) == (0, 0)
    reports = [dcm.inspect(directory, **OPTIONS[case]).to_json() for directory in (old, new)]
    assert [(report["kind"], report["problems"]) for report in reports] == [
        ("Megatron zarr checkpoint", ()),
        ("Megatron torch_dist checkpoint", ()),
    ]
    tensors = [[each | {"files": ()} for each in report["tensors"]] for report in reports]
    assert tensors[0] == tensors[1]
    assert sorted(each["name"] for each in reports[0]["objects"]) == sorted(
        each["name"] for each in reports[1]["objects"]
    )
    assert sum(reports[0]["files"].values()) == sum(
        path.stat().st_size for path in old.rglob("[0-9s]*") if path.is_file()
    )


@pytest.mark.parametrize("case", ["zarr_ckpt", "moe_zarr_0153"])
def test_lazy_reading(case: str) -> None:
    """A zarr checkpoint is a mapping like any other."""
    with dcm.open_checkpoint(shards(case), **OPTIONS[case]) as tensors:
        assert described(dict(tensors)) == described(truth(case))


@pytest.mark.parametrize("case", [case for case in ZARR if case != "dpzero_zarr_0153"])
def test_resharding_needs_no_migration(case: str, migrated: dict[str, Path], tmp_path: Path) -> None:
    """``reshard`` of the old checkpoint writes what it writes of the new one, byte for byte."""
    for name, source in {"old": shards(case), "new": migrated[case]}.items():
        root = tmp_path / name / "root"
        shutil.copytree(source, root / STEP)
        dcm.reshard(root / STEP, tmp_path / name / "out", dcm.ParallelLayout(tp=2, pp=1), **OPTIONS[case])
    assert described(load_tensors(tmp_path / "new" / "out" / STEP)) == described(read_arrays(shards(case)))
    assert contents(tmp_path / "old" / "out") == contents(tmp_path / "new" / "out")


def test_flat_state_is_refused_by_reshard_alone(tmp_path: Path) -> None:
    """State in flat buffers cannot be cut anew, in neither format; ``migrate`` takes it along as it is."""
    case = "dpzero_zarr_0153"
    arguments = ("reshard", shards(case), tmp_path / "out", "--tp", 2, "--config", OPTIONS[case]["config"])
    outcome = run(*arguments)
    assert outcome.code == 1
    assert "is in the format dp_zero_gather_scatter" in outcome.err[-1]
    assert list(tmp_path.iterdir()) == []
    assert run(*arguments, "--weights-only").code == 0
    assert described(load_tensors(tmp_path / "out")) == described(read_arrays(shards(case)))
    assert [key for key in objects(tmp_path / "out") if key.startswith("optimizer")] == []


@pytest.mark.parametrize("command", ["plan", "megatron-args"])
def test_what_megatron_could_not_do(command: str) -> None:
    """What is about Megatron's own loading refuses the old format, and says what to do first."""
    outcome = run(command, shards("moe_zarr_0153"))
    assert (outcome.code, outcome.out) == (1, [])
    assert "is a legacy zarr checkpoint, which Megatron does not load since megatron-core 0.16" in outcome.err[-1]
    assert outcome.err[-1].endswith("with migrate.")


@pytest.fixture(scope="module")
def results(launch_ranks: LaunchRanks, migrated: dict[str, Path]) -> list[dict[str, Any]]:
    """What every rank of the installed Megatron says to what was migrated."""
    jobs: dict[str, dict[str, Any]] = {}
    for case, layouts in LOADS.items():
        config = json.loads((folder(case) / "config.json").read_bytes())
        for layout in layouts:
            same = {"config": config, "layout": layout, "style": "STACKED", "at": str(migrated[case])}
            hf = str(folder(case) / "truth.safetensors")
            jobs[f"{case} {layout}"] = {"task": "load_into_model", "hf": hf, **same}
            if case in STATES:
                training = {"task": "load_training", "distributed": False, "true": str(migrated[case])}
                jobs[f"{case} {layout} training"] = training | same
    return launch_ranks(4, jobs)


@pytest.mark.parametrize(("case", "layout"), [(case, layout) for case in LOADS for layout in LOADS[case]])
def test_megatron_loads_it(case: str, layout: dict[str, int], results: list[dict[str, Any]]) -> None:
    """Megatron's own load fills a real model full of NaN with the weights, at another layout than the old one."""
    assert [rank[f"{case} {layout}"] for rank in results] == [[]] * 4


@pytest.mark.parametrize(("case", "layout"), [(case, layout) for case in STATES for layout in LOADS[case]])
def test_megatron_loads_optimizer_state(case: str, layout: dict[str, int], results: list[dict[str, Any]]) -> None:
    """A real Float16Optimizer, and the factory's entries, get the tensors that tensorstore read, bit for bit."""
    for rank in results:
        loaded = rank[f"{case} {layout} training"]
        assert [each["wrong"] for each in loaded.values()] == [[], []]
        assert loaded["real"]["tensors"] == loaded["factory"]["tensors"] > 20


def test_files_are_filled(tmp_path: Path) -> None:
    """A data file ends before it would hold more than asked for; what is larger by itself has one of its own."""
    old = new_checkpoint(tmp_path / "old")
    for name, rows, step in (("a", 8, 2), ("b", 100, 100), ("c", 4, 4)):
        write_array(old / name, numbered([rows]), (step,))
    save_objects(old, {"z/shard_0_1": None})
    outcome = run("migrate", old, tmp_path / "new", "--max-file-size", "17B")
    assert outcome.code == 0, outcome
    boxes = stored_boxes(tmp_path / "new")
    assert sorted((name, offset[0], file) for (name, offset, _), file in boxes.items()) == [
        *(("a", 2 * chunk, f"__{chunk // 2}_0.distcp") for chunk in range(4)),
        ("b", 0, "__2_0.distcp"),
        ("c", 0, "__3_0.distcp"),
    ]
    assert described(load_tensors(tmp_path / "new")) == described(read_arrays(old))
    with pytest.raises(ConfigError, match="max_file_bytes: expected a whole number of at least 1"):
        dcm.migrate(old, tmp_path / "again", output=dcm.Output(max_file_bytes=0))


@pytest.mark.parametrize("case", ["moe_zarr_0153", "dpzero_zarr_0153"])
def test_ranks_write_the_same(case: str, tmp_path: Path) -> None:
    """Two ranks, and three, write the bytes of one."""
    dcm.migrate(shards(case), tmp_path / "1", output=dcm.Output(max_file_bytes=100_000))
    for count in (2, 3):
        to = tmp_path / str(count)

        def work(ranks: Ranks, to: Path = to) -> object:
            return dcm.migrate(shards(case), to, output=dcm.Output(max_file_bytes=100_000), ranks=ranks)

        failures = on_ranks(count, work)
        assert failures == [None] * count
        assert tree(to) == tree(tmp_path / "1")


def test_a_run_that_failed_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --resume, what was copied is not copied again, chunks and objects alike; the result is that of one run."""
    old = shards("dpzero_zarr_0153")
    with monkeypatch.context() as patch:
        at_write(24, full, patch)
        with pytest.raises(dcm.OutputError, match="No space left on device"):
            dcm.migrate(old, tmp_path / "new", effort=ALONE)
    sizes = at_write(0, full, monkeypatch)
    dcm.migrate(old, tmp_path / "new", output=dcm.Output(resume=True), effort=ALONE)
    resumed, sizes[:] = sum(sizes), []
    dcm.migrate(old, tmp_path / "again", effort=ALONE)
    assert tree(tmp_path / "new") == tree(tmp_path / "again")
    assert resumed < sum(sizes) - 50_000


@pytest.mark.parametrize("case", ["moe_zarr_0153", "dpzero_zarr_0153"])
def test_any_change_is_found_afterwards(case: str, migrated: dict[str, Path], tmp_path: Path) -> None:
    """One bit of any byte of what was migrated: of data, objects, metadata or the checksums themselves."""
    new = shutil.copytree(migrated[case], tmp_path / "new")
    for name, content in tree(new).items():
        for position in some(range(len(content or b"")), 25):
            assert damaged(new, name, position, **OPTIONS[case])


def test_what_lies_beside_comes_along(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Small files and folders of others keep their bytes; locks, stale metadata and links to elsewhere stay behind."""
    old = copied(DENSE, tmp_path / "old")
    (old / "notes" / "deep").mkdir(parents=True)
    (old / "notes" / "deep" / "a.txt").write_text("kept")
    (old / "run_config.yaml").write_text("kept: too")
    (old / "output_layer.weight.sync").mkdir()
    (old / "output_layer.weight.sync" / "0.0").touch()
    (tmp_path / "secret").write_text("none of your business")
    (old / "link").symlink_to(tmp_path / "secret")
    (old / "integrity.json").write_text('{"algorithm": "sha256", "files": {}}')
    with caplog.at_level(logging.WARNING):
        dcm.migrate(old, tmp_path / "new")
    assert "link is no file, or a link out of the checkpoint: it stays behind" in caplog.text
    assert {*contents(tmp_path / "new")} == {
        *("common.pt", "metadata.json", ".metadata", "__0_0.distcp", "run_config.yaml", "notes/deep/a.txt")
    }
    assert set(json.loads((tmp_path / "new" / "checksums.json").read_bytes())["files"]) == {*contents(tmp_path / "new")}


def test_common_state_must_be_there(tmp_path: Path) -> None:
    """Without common.pt no Megatron would load the new checkpoint: the old one was not copied whole."""
    old = copied(DENSE, tmp_path / "old")
    (old / "common.pt").unlink()
    assert "has no common.pt, and Megatron does not load a checkpoint without it" in refusal(
        tmp_path, "migrate", old, tmp_path / "new"
    )


def test_a_comparison_says_what_it_leaves_out(migrated: dict[str, Path], tmp_path: Path) -> None:
    """Who deletes the old checkpoint because the new one is equal is told that optimizer state was not compared."""
    case = "optzarr_0123"
    old = copied(case, tmp_path / "old")
    path = old / "optimizer.state.exp_avg.decoder.final_layernorm.weight" / "0"
    path.write_bytes(path.read_bytes()[::-1])
    outcome = run("verify", old, migrated[case], "--config", folder(case))
    assert outcome.code == 0
    assert "not compared: optimizer state: 27 entries in A, 27 in B" in outcome.out
    said = json.loads("\n".join(run("verify", old, migrated[case], "--config", folder(case), "--json").out))
    assert said["not_compared"] == [line.removeprefix("not compared: ") for line in outcome.out[:-1]]
    exported = tmp_path / "hf"
    dcm.to_hf(old, exported, config=folder(case))
    assert len(run("verify", exported, old).out) == 1


def test_links_of_the_hub_cache_are_followed(migrated: dict[str, Path], tmp_path: Path) -> None:
    """A checkpoint as the hub's cache holds it, where every file is a link into the blobs beside, is like any other."""
    snapshot, blobs = (
        copied("optzarr_0123", tmp_path / "models--x" / "snapshots" / STEP),
        tmp_path / "models--x" / "blobs",
    )
    blobs.mkdir()
    for number, path in enumerate(sorted(path for path in snapshot.rglob("*") if path.is_file())):
        path.symlink_to(path.rename(blobs / str(number)))
    dcm.migrate(snapshot, tmp_path / "new")
    assert tree(tmp_path / "new") == tree(migrated["optzarr_0123"].parent)


def test_what_is_torch_dist_is_not_migrated(tmp_path: Path) -> None:
    """Another format is refused with the command that is meant; so is an output inside the input, which stays."""
    line = refusal(tmp_path, "migrate", shards("td_0192"), tmp_path / "new")
    assert re.search(r"is a torch_dist checkpoint: expected one in zarr, torch or an FSDP format\. .* reshard\.", line)
    old = copied(DENSE, tmp_path / "old")
    for output in (old / "new", old, tmp_path):
        assert "must lie apart" in refusal(tmp_path, "migrate", old, output, "--overwrite")
    assert "no such directory" in refusal(tmp_path, "migrate", tmp_path / "none", tmp_path / "new")
