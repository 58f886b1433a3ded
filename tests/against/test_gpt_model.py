"""Against real GPTModels of the installed megatron-core, on four gloo ranks: all from one launch.

Every model is one that transformers saved; ``gpt_stage.hf_rows`` says which of its rows each parameter must hold.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import pytest
from models_of_many_layers import EXPERT_MODELS, save_hf
from packaging.version import Version
from safetensors.torch import load_file

from dist_ckpt_mistral.convert.from_hf import from_hf

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import LaunchRanks

#: Four ranks each; vocabulary 250 is padded to a multiple of 128 tp.
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp4": {"dp": 4},
    "tp2-dp2": {"tp": 2, "dp": 2},
    "tp4": {"tp": 4},
    "pp4": {"pp": 4},
    "tp2-pp2": {"tp": 2, "pp": 2},
    "pp2-vpp2-dp2": {"pp": 2, "vpp": 2, "dp": 2},
    "tp2-pp2-vpp4": {"tp": 2, "pp": 2, "vpp": 4},
    "tp2-pp3,5": {"tp": 2, "pp": 2, "pp_layers": [3, 5]},
    "pp1,3,3,1": {"pp": 4, "pp_layers": [1, 3, 3, 1]},
    "cp2-tp2": {"cp": 2, "tp": 2, "order": "cp-tp-dp-pp"},
    "pp2-dp2-last": {"pp": 2, "dp": 2, "order": "tp-cp-ep-pp-dp"},
    "tp2-pp2-vpp2-first2": {"tp": 2, "pp": 2, "vpp": 2, "num_layers_in_first_pipeline_stage": 2},
    "tp2-pp2-vpp5": {
        "tp": 2,
        "pp": 2,
        "vpp": 5,
        "account_for_embedding_in_pipeline_split": True,
        "account_for_loss_in_pipeline_split": True,
    },
    "tp2-standalone-ends": {"tp": 2, "pp": 2, "pipeline_model_parallel_layout": "E|t|(tt|)*2,t*3|L"},
}
#: The same for experts.
EXPERT_LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2-pp2": LAYOUTS["tp2-pp2"],
    "ep4": {"dp": 4, "ep": 4},
    "tp2-ep2-etp1": {"tp": 2, "dp": 2, "ep": 2, "etp": 1},
    "tp2-ep2": {"tp": 2, "dp": 2, "ep": 2},
    "etp2": {"dp": 4, "etp": 2},
    "pp2-vpp2-ep2": {"pp": 2, "vpp": 2, "dp": 2, "ep": 2},
}
#: What differs from the model that is not named; of the last one, tensor parallelism also cuts the groups.
MODELS: dict[str, dict[str, Any]] = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "2-groups": {"num_key_value_heads": 2},
}
#: Layout, model and key style.
CASES = {
    f"{layout}-{model}-{style.lower()}": (layout, model, style)
    for layout, model, style in [
        *((layout, model, "STACKED") for layout in LAYOUTS for model in ("untied", "tied")),
        *(("tp2-pp2", "untied", style) for style in ("PER_LAYER", "SINGLETON")),
        *(("tp2-pp2-vpp4", "tied", style) for style in ("PER_LAYER", "SINGLETON")),
        ("tp4", "2-groups", "STACKED"),
        *((layout, model, "STACKED") for layout in EXPERT_LAYOUTS for model in EXPERT_MODELS),
        *(("tp2-ep2-etp1", model, style) for model in EXPERT_MODELS for style in ("PER_LAYER", "SINGLETON")),
    ]
}
#: Layout and key style with grouped experts.
GROUPED = [*((layout, "STACKED") for layout in EXPERT_LAYOUTS), ("tp2-ep2", "PER_LAYER"), ("tp2-ep2", "SINGLETON")]
#: The layouts into which each model is loaded from what from_hf made.
LOADS = {
    "untied": tuple(LAYOUTS),
    "tied": tuple(LAYOUTS),
    "2-groups": ("tp4",),
    **dict.fromkeys(EXPERT_MODELS, tuple(EXPERT_LAYOUTS)),
}
#: What from_hf is told about cutting a checkpoint.
CUTS: dict[str, dict[str, int]] = {"uncut": {}, "cut-tp4-pp2": {"tp": 4, "pp": 2, "iteration": 7}}


def has_grouped_mlp() -> bool:
    """Whether the installed megatron-core has GroupedMLP: up to 0.16."""
    return Version(version("megatron-core")) < Version("0.17")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The Hugging Face directory of every model."""
    folder = tmp_path_factory.mktemp("hf")
    return {name: save_hf(folder / name, differs) for name, differs in (MODELS | EXPERT_MODELS).items()}


@pytest.fixture(scope="module")
def results(
    launch_ranks: LaunchRanks, models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """What every rank says to every job of this module."""
    folder = tmp_path_factory.mktemp("checkpoints")

    def job(task: str, layout: str, model: str, style: str = "STACKED", **more: str) -> dict[str, Any]:
        config = json.loads((models[model] / "config.json").read_text())
        hf = str(models[model])
        ranks = (LAYOUTS | EXPERT_LAYOUTS)[layout]
        return {"task": task, "config": config, "layout": ranks, "style": style, "hf": hf, **more}

    jobs = {name: job("compare_entries", layout, model, style) for name, (layout, model, style) in CASES.items()}
    if has_grouped_mlp():
        jobs |= {f"{layout} {style}": job("compare_grouped", layout, "mixtral", style) for layout, style in GROUPED}
    for model, directory in models.items():
        for name, cut in CUTS.items():
            root = folder / f"{name}-{model}"
            ep = 2 if cut and model in EXPERT_MODELS else 1
            from_hf(directory, root, ep=ep, **cut)  # type: ignore[arg-type]  # these are all int
            at = str(root / ("iter_0000007" if "iteration" in cut else "release"))
            jobs |= {
                f"{name} {model} {layout}": job("load_into_model", layout, model, at=at) for layout in LOADS[model]
            }
    jobs = dict(sorted(jobs.items(), key=lambda each: str(each[1]["layout"])))  # one parallel state after the other
    jobs["save model"] = job("save_model", "tp2-pp2", "untied", to=str(folder / "model"))
    jobs["load model"] = job("load_entries", "dp4", "untied", at=str(folder / "model"))
    jobs["save entries"] = job("save_entries", "tp2-dp2", "tied", "SINGLETON", to=str(folder / "entries"))
    jobs["load entries"] = job("load_into_model", "pp4", "tied", "SINGLETON", at=str(folder / "entries"))
    return launch_ranks(4, jobs)


@pytest.mark.parametrize("case", CASES)
def test_entries_equal_those_of_a_real_model(case: str, results: list[dict[str, Any]]) -> None:
    """On every rank the factory makes what GPTModel makes, before and after factories are applied, tensors included."""
    for rank in results:
        assert rank[case]["entries"]
        assert rank[case]["different"] == []


@pytest.mark.parametrize("case", CASES)
def test_metadata_names_the_hf_rows(case: str, models: dict[str, Path], results: list[dict[str, Any]]) -> None:
    """Every row that the metadata names holds the values of that HF row, and main replicas name every HF row once."""
    files = models[CASES[case][1]].glob("*.safetensors")
    assert [rank[case]["wrong_rows"] for rank in results] == [[]] * 4
    assert sum(rank[case]["hf_elems"] for rank in results) == sum(
        tensor.numel() for file in files for tensor in load_file(file).values()
    )


@pytest.mark.skipif(not has_grouped_mlp(), reason="needs megatron-core up to 0.16, which has GroupedMLP")
@pytest.mark.parametrize(("layout", "style"), GROUPED)
def test_grouped_experts(layout: str, style: str, models: dict[str, Path], results: list[dict[str, Any]]) -> None:
    """Entries of a real model with GroupedMLP get names, and expert by expert are the factory's; rows hold."""
    told = [rank[f"{layout} {style}"] for rank in results]
    assert [(each["different"], each["wrong_rows"], each["entries"] > 0) for each in told] == [([], [], True)] * 4
    files = models["mixtral"].glob("*.safetensors")
    assert sum(each["hf_elems"] for each in told) == sum(
        tensor.numel() for file in files for tensor in load_file(file).values()
    )


def test_loads_what_a_real_model_saved(results: list[dict[str, Any]]) -> None:
    """Megatron saves a real TP2 x PP2 model, and loads it resharded into the factory's entries of a single stage."""
    assert [rank["load model"] for rank in results] == [[]] * 4


def test_saves_what_a_real_model_loads(results: list[dict[str, Any]]) -> None:
    """Megatron saves the factory's TP2 x DP2 entries, and loads them resharded into real models at PP4."""
    assert [rank["load entries"] for rank in results] == [[]] * 4


def test_tensors_are_supplied_on_demand(results: list[dict[str, Any]]) -> None:
    """Until the save no tensor is asked for; then those of main replicas, each once, and none of the others."""
    for rank in results:
        told = rank["save entries"]
        assert told["asked_before"] == []
        assert sorted(told["asked"]) == sorted(told["main"])
    assert [bool(rank["save entries"]["main"]) for rank in results] == [True, True, False, False]


@pytest.mark.parametrize(("model", "layout"), [(model, layout) for model, loads in LOADS.items() for layout in loads])
@pytest.mark.parametrize("cut", CUTS)
def test_from_hf_loads_into_any_layout(cut: str, model: str, layout: str, results: list[dict[str, Any]]) -> None:
    """However from_hf cut a checkpoint, Megatron loads it into a real model of any layout, all rows in their places."""
    assert [rank[f"{cut} {model} {layout}"] for rank in results] == [[]] * 4
