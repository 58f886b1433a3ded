"""Megatron's legacy per-rank torch format: what Megatron-LM's own save_checkpoint wrote, read bit for bit."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
import torch
from command_line import run
from genuine import LEGACY, described_file, folder, shards, true_bytes, truth
from legacy_files import STEP, inert_pickle, options
from safetensors.torch import load_file
from torch_reading import described, load_tensors

import dist_ckpt_mistral as dcm
from dist_ckpt_mistral.errors import (
    TensorMismatchError,
)
from dist_ckpt_mistral.formats.stored_checkpoint import open_stored

if TYPE_CHECKING:
    from conftest import LaunchRanks


#: The layouts at which the installed Megatron loads what was migrated.
LOADS: Final[dict[str, dict[str, int]]] = {
    "legacy_tp2pp2_0192": {"tp": 4},
    "legacy_vpp_tied_0192": {"tp": 2, "pp": 2},
    "legacy_moe_0192": {"tp": 2, "pp": 2},
    "legacy_old_0080": {"tp": 4},
    "legacy_plain_0192": {"tp": 2, "pp": 2},
}
#: Tensors that several ranks of a case hold: norms on every tensor parallel rank, a tied head, all but experts with EP.
COPIES: Final = {
    "legacy_tp2pp2_0192": 9,
    "legacy_vpp_tied_0192": 1,
    "legacy_old_0080": 5,
    "legacy_old_tied_0080": 1,
}


@pytest.fixture(scope="module")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every genuine case, migrated; its new iteration."""
    where = tmp_path_factory.mktemp("migrated")
    for case in LEGACY:
        dcm.migrate(folder(case) / "checkpoint", where / case, **options(case))
    return {case: where / case / STEP for case in LEGACY}


@pytest.mark.parametrize("case", LEGACY)
def test_migrated_tensors_are_the_live_model(case: str, migrated: dict[str, Path], tmp_path: Path) -> None:
    """What torch's own DCP loads from the new checkpoint exports, by our links, to the tensors of the live model."""
    assert (migrated[case].parent / "latest_checkpointed_iteration.txt").read_text() == "7"
    dcm.to_hf(migrated[case], tmp_path / "hf", **options(case))
    assert described_file(tmp_path / "hf" / "model.safetensors") == true_bytes(case)
    loaded = load_tensors(migrated[case])
    index = open_stored(migrated[case])
    assert {name: tuple(tensor.shape) for name, tensor in loaded.items()} == {
        name: tensor.global_shape for name, tensor in index.tensors.items()
    }


@pytest.mark.parametrize("case", LEGACY)
def test_common_state_comes_along(case: str, migrated: dict[str, Path]) -> None:
    """Args and iteration are the old ones where they are plain values, and the args say the new format."""
    first = min(shards(case).glob("mp_rank_*")) / "model_optim_rng.pt"
    old = torch.load(first, map_location="cpu", weights_only=False, pickle_module=inert_pickle())
    new = torch.load(migrated[case] / "common.pt", weights_only=False)
    assert (new["iteration"], new["checkpoint_version"]) == (old["iteration"], 3.0) == (7, 3.0)
    before, after = vars(old["args"]), vars(new["args"])
    changed = {name for name, value in after.items() if before[name] != value}
    assert changed <= {"ckpt_format", "dist_ckpt_format", "use_dist_ckpt"}
    assert after["num_layers"] == json.loads((folder(case) / "config.json").read_bytes())["num_hidden_layers"]
    assert after.get("ckpt_format", "torch_dist") == "torch_dist"
    plain = (type(None), bool, int, float, str)
    assert {name for name, value in before.items() if type(value) in plain} <= after.keys()


@pytest.mark.parametrize("case", LEGACY)
def test_verify_and_inspect(case: str, migrated: dict[str, Path]) -> None:
    """Both are sound and equal, every copy is compared, and the tensors are listed under the keys of torch_dist."""
    config = ("--config", str(folder(case) / "config.json"))
    old = run("verify", folder(case) / "checkpoint", *config)
    assert old.code == 0, old
    if case in COPIES:
        assert any(f"{COPIES[case]} tensor" in line and "second time" in line for line in old.out), old.out
    assert run("verify", migrated[case], *config).code == 0
    assert run("verify", shards(case), migrated[case], *config).code == 0
    before, after = (
        json.loads("".join(run("inspect", at, "--json", *config).out)) for at in (shards(case), migrated[case])
    )
    assert before["problems"] == after["problems"] == []
    assert before["kind"] == "Megatron torch checkpoint"
    also = {"decoder.layers.pre_mlp_layernorm.weight"} if "moe" in case else set()  # for Transformer Engine's layers
    named = [{each["name"] for each in report["tensors"]} for report in (before, after)]
    assert named[0] == named[1] - also


@pytest.mark.parametrize("case", LEGACY)
def test_lazy_reading(case: str) -> None:
    """It is a mapping like any other format, without a byte of it read in advance."""
    with dcm.open_checkpoint(shards(case), **options(case)) as checkpoint:
        assert described(dict(checkpoint)) == described(truth(case))


@pytest.mark.parametrize("case", ["legacy_tp2pp2_0192", "legacy_moe_0192"])
def test_resharding_needs_no_migration(case: str, tmp_path: Path) -> None:
    """``reshard`` cuts new chunks straight from the files of the ranks."""
    dcm.reshard(shards(case), tmp_path / "new", dcm.ParallelLayout(tp=4), weights_only=True, **options(case))
    dcm.to_hf(tmp_path / "new", tmp_path / "hf", **options(case))
    assert described_file(tmp_path / "hf" / "model.safetensors") == true_bytes(case)


@pytest.mark.parametrize("command", ["plan", "megatron-args"])
def test_what_megatron_could_not_do(command: str) -> None:
    """What is about Megatron's own loading at any layout refuses the old format, and says what to do first."""
    outcome = run(command, shards("legacy_tp2pp2_0192"))
    assert (outcome.code, outcome.out) == (1, [])
    assert "is in Megatron's legacy torch format" in outcome.err[-1]
    assert outcome.err[-1].endswith("with migrate.")


def test_what_stays_behind_is_named(tmp_path: Path) -> None:
    """Flat buffers and generators are listed with the reason, by export and migration alike."""
    case = "legacy_distrib_0192"
    for done in (
        dcm.to_hf(shards(case), tmp_path / "hf", **options(case)),
        dcm.migrate(shards(case), tmp_path / "new", **options(case)),
    ):
        ignored = dict(done.ignored)
        assert ignored["optimizer.distributed.mp_rank_00/distrib_optim.pt"] == (
            "optimizer state in flat buffers (distrib_optim.pt)"
        )
        assert ignored["optimizer.mp_rank_00"] == "optimizer state"
        assert ignored["rng_state/mp_rank_00"] == "random number generator state"


#: Name of a parameter in a layer, and its key.
OF_LAYERS: Final = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}


def test_plain_optimizer_state_is_that_of_the_live_optimizer(migrated: dict[str, Path]) -> None:
    """Master weights and both moments of every parameter are, bit for bit, what the optimizer of each rank held."""
    case = "legacy_plain_0192"
    loaded = load_tensors(migrated[case])
    compared = set()
    for rank in range(2):
        for place, true in load_file(folder(case) / f"optimizer.rank{rank}.safetensors").items():
            _, name, state = place.split("/")
            match = re.fullmatch(r"decoder\.layers\.0\.(.*)", name)  # one layer a stage
            found = name if match is None else f"decoder.layers.{OF_LAYERS.get(match[1], match[1])}"
            tensor = loaded[f"optimizer.state.{state}.{found}"]
            assert torch.equal(tensor[rank] if match is not None else tensor, true), place
            compared.add(f"optimizer.state.{state}.{found}")
    assert compared == {name for name in loaded if name.startswith("optimizer.")}
    assert len(compared) == 3 * 9
    common = torch.load(migrated[case] / "common.pt", weights_only=False)["optimizer"]["optimizer"]
    assert common["state"] == {"common_step": 1.0}
    assert [(group["wd_mult"], "params" in group) for group in common["param_groups"]] == [(1.0, False), (0.0, False)]


def test_master_weights_round_to_the_weights(tmp_path: Path) -> None:
    """The master weights of plain optimizer state, exported from the ranks' files, are the weights once rounded."""
    case = "legacy_plain_0192"
    dcm.to_hf(shards(case), tmp_path / "hf", weights="master", dtype="bfloat16", **options(case))
    assert described_file(tmp_path / "hf" / "model.safetensors") == true_bytes(case)


def test_reshard_refuses_flat_state(tmp_path: Path) -> None:
    """Flat buffers of the distributed optimizer cannot be cut: ``--weights-only`` says that they stay behind."""
    with pytest.raises(TensorMismatchError, match=r"in the format distrib_optim\.pt, flat buffers"):
        dcm.reshard(
            shards("legacy_distrib_0192"), tmp_path / "new", dcm.ParallelLayout(), **options("legacy_distrib_0192")
        )


@pytest.fixture(scope="module")
def results(launch_ranks: LaunchRanks, migrated: dict[str, Path]) -> list[dict[str, Any]]:
    """What every rank of the installed Megatron says to what was migrated."""
    jobs = {
        case: {
            "task": "load_into_model",
            "config": json.loads((folder(case) / "config.json").read_bytes()),
            "layout": {**layout, "dp": 4 // (layout.get("tp", 1) * layout.get("pp", 1))},
            "style": "STACKED",
            "at": str(migrated[case]),
            "hf": str(folder(case) / "truth.safetensors"),
        }
        for case, layout in LOADS.items()
    }
    training = {name: value for name, value in jobs["legacy_plain_0192"].items() if name != "hf"}
    training |= {"task": "load_training", "distributed": False, "true": str(migrated["legacy_plain_0192"])}
    return launch_ranks(4, jobs | {"training": training})


def test_megatron_loads_plain_optimizer_state(results: list[dict[str, Any]]) -> None:
    """A real Float16Optimizer, at another layout than the old one, gets every tensor of the state bit for bit."""
    for rank in results:
        assert [each["wrong"] for each in rank["training"].values()] == [[], []]
        assert rank["training"]["real"]["tensors"] == rank["training"]["factory"]["tensors"] > 20


@pytest.mark.parametrize("case", LOADS)
def test_megatron_loads_it(case: str, results: list[dict[str, Any]]) -> None:
    """Megatron's own load fills a real model full of NaN with the weights, at another layout than the old one."""
    assert [rank[case] for rank in results] == [[]] * 4
