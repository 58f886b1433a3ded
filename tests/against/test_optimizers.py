"""Against Megatron's real optimizers, on four gloo ranks: entries, resharding and loading, all from one launch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
from models_of_many_layers import EXPERT_MODELS, save_hf
from plain_models import contents
from torch_reading import described, load_tensors

import dist_ckpt_mistral as dcm

if TYPE_CHECKING:
    from conftest import LaunchRanks

#: The models that are trained.
MODELS: Final[dict[str, dict[str, Any]]] = {"untied": {}, "tied": {"tie_word_embeddings": True}, **EXPERT_MODELS}
#: Layout (of four ranks), model, key style, whether the optimizer is distributed.
TRAININGS: Final[dict[str, tuple[dict[str, Any], str, str, bool]]] = {
    "distributed": ({"tp": 2, "dp": 2}, "untied", "STACKED", True),
    "plain": ({"pp": 2, "tp": 2}, "untied", "STACKED", False),
    "distributed, tied": ({"pp": 2, "dp": 2}, "tied", "STACKED", True),
    "plain, interleaved, tied": ({"pp": 2, "vpp": 2, "dp": 2}, "tied", "STACKED", False),
    "distributed, keys per layer": ({"tp": 2, "pp": 2}, "untied", "PER_LAYER", True),
    "distributed, singleton": ({"tp": 4}, "untied", "SINGLETON", True),
    "distributed, experts": ({"tp": 2, "dp": 2, "ep": 2, "etp": 1}, "mixtral", "STACKED", True),
    "plain, experts": ({"pp": 2, "dp": 2, "ep": 2}, "mixtral", "STACKED", False),
    "distributed, latents": ({"tp": 2, "dp": 2, "ep": 2}, "mistral4", "STACKED", True),
    "distributed, singleton experts": ({"dp": 4, "ep": 2}, "mixtral", "SINGLETON", True),
}
#: What is saved and resharded, for which layout, and the layouts that load the result.
JOURNEYS: Final[dict[str, tuple[str, dict[str, Any], list[dict[str, Any]]]]] = {
    "to TP4": ("distributed", {"tp": 4}, [{"tp": 4}, {"tp": 2, "pp": 2}]),
    "to PP4": ("distributed", {"pp": 4}, [{"pp": 4}]),
    "plain to TP2 x DP2": ("plain", {"tp": 2, "dp": 2}, [{"tp": 2, "dp": 2}, {"pp": 2, "dp": 2}]),
    "experts to EP4": ("distributed, experts", {"dp": 4, "ep": 4}, [{"dp": 4, "ep": 4}, {"tp": 2, "pp": 2}]),
    "plain experts to PP4": ("plain, experts", {"pp": 4}, [{"pp": 4}]),
    "latents to PP2 x EP2": ("distributed, latents", {"pp": 2, "dp": 2, "ep": 2}, [{"pp": 2, "dp": 2, "ep": 2}]),
}
LOADS: Final = [(name, layout) for name, (_, _, layouts) in JOURNEYS.items() for layout in layouts]


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where checkpoints lie: of the trainings and of the journeys, under their names."""
    return tmp_path_factory.mktemp("optimizers")


@pytest.fixture(scope="module")
def results(launch_ranks: LaunchRanks, where: Path) -> list[dict[str, Any]]:
    """What every rank says to every job of this module."""
    models = {name: save_hf(where / "models" / name, differs) for name, differs in MODELS.items()}
    config = {name: json.loads((folder / "config.json").read_text()) for name, folder in models.items()}
    saved = {training for training, _, _ in JOURNEYS.values()}
    jobs: dict[str, dict[str, Any]] = {}
    for name, (layout, model, style, distributed) in TRAININGS.items():
        to = str(where / name / "iter_0000007") if name in saved else None
        same = {"config": config[model], "layout": layout, "style": style, "distributed": distributed}
        jobs[name] = {"task": "save_training", "hf": str(models[model]), "to": to, **same}
    jobs["counted"] = jobs["plain, experts"] | {"counted": True, "to": str(where / "counted" / "iter_0000007")}
    for name, (training, target, layouts) in JOURNEYS.items():
        _, model, style, distributed = TRAININGS[training]
        at, to = str(where / training / "iter_0000007"), str(where / name)
        jobs[name] = {"task": "reshard_checkpoint", "hf": str(models[model]), "layout": {"dp": 4}, "at": at, "to": to}
        jobs[name]["target"] = target
        for layout in layouts:
            same = {"config": config[model], "layout": layout, "style": style, "distributed": distributed}
            jobs[f"{name} {layout}"] = {"task": "load_training", "at": f"{to}/iter_0000007", "true": at, **same}
    return launch_ranks(4, jobs)


@pytest.mark.parametrize("name", TRAININGS)
def test_entries_equal_those_of_real_optimizers(name: str, results: list[dict[str, Any]]) -> None:
    """On every rank the factory describes what Megatron's optimizer describes, replicas and all."""
    assert [rank[name]["different"] for rank in results] == [[]] * 4
    assert all(rank[name]["entries"] for rank in results)


def test_entries_have_hf_names(results: list[dict[str, Any]]) -> None:
    """Master weights and moments tell the Hugging Face names of their rows, as the weights do."""
    names = [name for rank in results for each in rank["plain"]["names"] for name in each]
    assert names.count("model.layers.7.mlp.up_proj.weight") == 2 * 3
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.layers.0.self_attn.k_proj.weight"} <= {*names}


@pytest.mark.parametrize(("name", "layout"), LOADS)
def test_megatron_loads_what_was_resharded(name: str, layout: dict[str, Any], results: list[dict[str, Any]]) -> None:
    """Megatron loads weights and optimizer, with the factory's entries and with a real optimizer's own, bit for bit."""
    for rank in results:
        loaded = rank[f"{name} {layout}"]
        assert [each["wrong"] for each in loaded.values()] == [[], []]
        assert loaded["factory"]["tensors"] == loaded["real"]["tensors"] > 40


@pytest.mark.parametrize("name", JOURNEYS)
def test_dcp_loads_what_was_resharded(name: str, where: Path, results: list[dict[str, Any]]) -> None:
    """Torch's own DCP loads the same tensors before and after, optimizer included; the tracker names the iteration."""
    before, after = where / JOURNEYS[name][0] / "iter_0000007", where / name
    weights = 4 * len({key for key in load_tensors(before) if not key.startswith("optimizer.")})
    assert [rank[name]["num_tensors"] for rank in results] == [weights] * 4
    assert described(load_tensors(after / "iter_0000007")) == described(load_tensors(before))
    assert (after / "latest_checkpointed_iteration.txt").read_text() == "7"
    assert dcm.compare(before, after, config=where / "models" / TRAININGS[JOURNEYS[name][0]][1]).is_equal


def test_counted_optimizers(where: Path, tmp_path: Path, results: list[dict[str, Any]]) -> None:
    """Keys with numbers of optimizers before them are exported, planned and resharded as those without."""
    assert all(rank["counted"]["different"] for rank in results)
    before, same = where / "counted" / "iter_0000007", where / "plain, experts" / "iter_0000007"
    stored = load_tensors(before)
    states = {key: tensor for key, tensor in stored.items() if "optimizer.state." in key}
    assert {key.partition(".")[0] for key in states} == {"chained_0", "chained_1"}
    options: dict[str, Any] = {"config": where / "models" / "mixtral"}
    dcm.to_hf(before, tmp_path / "counted", weights="master", **options)
    dcm.to_hf(same, tmp_path / "same", weights="master", **options)
    assert contents(tmp_path / "counted") == contents(tmp_path / "same")
    dcm.to_hf(before, tmp_path / "rounded", weights="master", dtype="bfloat16", **options)
    dcm.to_hf(before, tmp_path / "weights", **options)
    assert contents(tmp_path / "rounded") == contents(tmp_path / "weights")
    total = dcm.plan_reading(before, dcm.ParallelLayout(ep=2), **options).to_json()["total"]
    assert total["optimizer"]["needed_bytes"] >= sum(tensor.nbytes for tensor in states.values())
    dcm.reshard(before, tmp_path / "cut", dcm.ParallelLayout(dp=4, ep=4), **options)
    assert described(load_tensors(tmp_path / "cut" / "iter_0000007")) == described(stored)
