"""Against real GPTModels of the installed megatron-core, on four gloo ranks: all from one launch.

Every model is one that transformers saved; ``gpt_stage.hf_rows`` says which of its rows each parameter must hold.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import MistralConfig, MistralForCausalLM

from dist_ckpt_mistral.convert import from_hf

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
}
#: Layout, whether embeddings are tied, and key style.
CASES = {
    f"{layout}{'-tied' * tied}-{style.lower()}": (layout, tied, style)
    for layout, tied, style in [
        *((layout, tied, "STACKED") for layout in LAYOUTS for tied in (False, True)),
        *(("tp2-pp2", False, style) for style in ("PER_LAYER", "SINGLETON")),
        *(("tp2-pp2-vpp4", True, style) for style in ("PER_LAYER", "SINGLETON")),
    ]
}


#: What from_hf is told about cutting a checkpoint.
CUTS: dict[str, dict[str, int]] = {"uncut": {}, "cut-tp4-pp2": {"tp": 4, "pp": 2, "iteration": 7}}


@torch.no_grad()
def save_hf(folder: Path, *, tied: bool) -> Path:
    """Save a small Mistral model in several files, with values that tell every row apart."""
    config = MistralConfig(
        vocab_size=250,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=6,
        sliding_window=None,
        tie_word_embeddings=tied,
    )
    model = MistralForCausalLM(config).bfloat16()
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.normal_()
    model.save_pretrained(folder, max_shard_size="40KB")
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """The Hugging Face directory of an untied and of a tied model."""
    folder = tmp_path_factory.mktemp("hf")
    return {tied: save_hf(folder / f"tied_{tied}", tied=tied) for tied in (False, True)}


@pytest.fixture(scope="module")
def results(
    launch_ranks: LaunchRanks, models: dict[bool, Path], tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """What every rank says to every job of this module."""
    folder = tmp_path_factory.mktemp("checkpoints")

    def job(task: str, layout: str, *, tied: bool, style: str = "STACKED", **more: str) -> dict[str, Any]:
        config = json.loads((models[tied] / "config.json").read_text())
        hf = str(models[tied])
        return {"task": task, "config": config, "layout": LAYOUTS[layout], "style": style, "hf": hf, **more}

    jobs = {
        name: job("compare_entries", layout, tied=tied, style=style) for name, (layout, tied, style) in CASES.items()
    }
    for tied, directory in models.items():
        for name, cut in CUTS.items():
            root = folder / f"{name}-{tied}"
            from_hf(directory, root, **cut)  # type: ignore[arg-type]  # these are all int
            at = str(root / ("iter_0000007" if "iteration" in cut else "release"))
            jobs |= {f"{name} {tied} {layout}": job("load_into_model", layout, tied=tied, at=at) for layout in LAYOUTS}
    jobs = dict(sorted(jobs.items(), key=lambda each: str(each[1]["layout"])))  # one parallel state after the other
    jobs["save model"] = job("save_model", "tp2-pp2", tied=False, to=str(folder / "model"))
    jobs["load model"] = job("load_entries", "dp4", tied=False, at=str(folder / "model"))
    jobs["save entries"] = job("save_entries", "tp2-dp2", tied=True, style="SINGLETON", to=str(folder / "entries"))
    jobs["load entries"] = job("load_into_model", "pp4", tied=True, style="SINGLETON", at=str(folder / "entries"))
    return launch_ranks(4, jobs)


@pytest.mark.parametrize("case", CASES)
def test_entries_equal_those_of_a_real_model(case: str, results: list[dict[str, Any]]) -> None:
    """On every rank the factory makes what GPTModel makes, before and after factories are applied, tensors included."""
    for rank in results:
        assert rank[case]["entries"]
        assert rank[case]["different"] == []


@pytest.mark.parametrize("case", CASES)
def test_metadata_names_the_hf_rows(case: str, models: dict[bool, Path], results: list[dict[str, Any]]) -> None:
    """Every row that the metadata names holds the values of that HF row, and main replicas name every HF row once."""
    files = models[CASES[case][1]].glob("*.safetensors")
    assert [rank[case]["wrong_rows"] for rank in results] == [[]] * 4
    assert sum(rank[case]["hf_elems"] for rank in results) == sum(
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


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("cut", CUTS)
def test_from_hf_loads_into_any_layout(cut: str, tied: bool, layout: str, results: list[dict[str, Any]]) -> None:
    """However from_hf cut a checkpoint, Megatron loads it into a real model of any layout, all rows in their places."""
    assert [rank[f"{cut} {tied} {layout}"] for rank in results] == [[]] * 4
