"""Megatron-Bridge itself, on four gloo ranks: its live models, what it loads of ours, and what it saves.

All from one launch, where Megatron-Bridge is installed. What its saves must be read as is tested against genuine ones
in test_bridge_saves.py, which needs no Bridge.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import pytest
from hf_models import random_model, saved
from multimodal_models import MULTIMODAL
from safetensors.torch import load_file
from torch_reading import described, hf_tensors

from dist_ckpt_mistral.convert.from_hf import from_hf
from dist_ckpt_mistral.convert.to_hf import to_hf

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import LaunchRanks

_TP2_PP2: Final = {"tp": 2, "pp": 2}
#: Live models: the model and its layout.
LIVE: Final[dict[str, tuple[str, dict[str, int]]]] = {
    "dense, tp2-pp2": ("dense", _TP2_PP2),
    "dense, tp4": ("dense", {"tp": 4}),
    "ministral 3, tp2-pp2": ("ministral 3", _TP2_PP2),
}
#: What from_hf writes, and the layout at which Bridge loads it.
LOADED: Final[dict[str, tuple[dict[str, int], dict[str, int]]]] = {
    "release at tp2-pp2": ({}, _TP2_PP2),
    "cut for tp2-pp2, at tp4": (_TP2_PP2, {"tp": 4}),
    "iteration at tp2": ({"iteration": 7}, {"tp": 2, "dp": 2}),
}
#: What Bridge saves: the model, and what training froze.
SAVED: Final[dict[str, tuple[str, list[str]]]] = {
    "dense": ("dense", []),
    "ministral 3": ("ministral 3", []),
    "ministral 3, frozen": ("ministral 3", ["freeze_vision_model", "freeze_vision_projection"]),
}


@dataclass(frozen=True, kw_only=True)
class Told:
    """The Hugging Face models, what the ranks say, and the folder of what they wrote."""

    models: dict[str, Path]
    ranks: list[dict[str, Any]]
    folder: Path


@pytest.fixture(scope="module")
def told(launch_bridge: LaunchRanks, tmp_path_factory: pytest.TempPathFactory) -> Told:
    """Everything that Bridge does for this module."""
    folder = tmp_path_factory.mktemp("bridge")
    models = {
        "dense": saved(random_model(vocab_size=256), folder / "dense"),
        "ministral 3": MULTIMODAL["ministral 3"].save(folder / "ministral3"),
    }
    jobs: dict[str, dict[str, Any]] = {
        name: {"task": "stream", "hf": str(models[model]), "layout": layout} for name, (model, layout) in LIVE.items()
    }
    for name, (written, layout) in LOADED.items():
        from_hf(models["dense"], folder / name / "root", **written)  # type: ignore[arg-type]  # all are numbers
        jobs[name] = {
            "task": "load",
            "hf": str(models["dense"]),
            "root": str(folder / name / "root"),
            "layout": layout,
            "out": str(folder / name / "out.safetensors"),
        }
    for name, (model, frozen) in SAVED.items():
        jobs[f"save {name}"] = {
            "task": "save",
            "hf": str(models[model]),
            "layout": _TP2_PP2,
            "root": str(folder / "saved" / name),
            "out": str(folder / f"{name}.safetensors"),
            "frozen": frozen,
            "optimizer": True,
        }
    return Told(models=models, ranks=launch_bridge(4, jobs), folder=folder)


@pytest.mark.parametrize("name", LIVE)
def test_live_models_of_bridge(name: str, told: Told) -> None:
    """``export_weights`` and Bridge's own export agree bit for bit with the files, as does what load_weights fills."""
    names = sorted(hf_tensors(told.models[LIVE[name][0]]))
    for rank in told.ranks:
        assert sorted(rank[name]["names"]) == names
        assert (rank[name]["wrong"], rank[name]["lost"], rank[name]["unfilled"]) == ([], [], [])


@pytest.mark.parametrize("name", LOADED)
def test_auto_bridge_loads_what_from_hf_wrote(name: str, told: Told) -> None:
    """The real AutoBridge opens the root at another layout, and exports every tensor of the original bit for bit."""
    assert described(load_file(told.folder / name / "out.safetensors")) == described(hf_tensors(told.models["dense"]))


@pytest.mark.parametrize("name", SAVED)
def test_what_bridge_saves_exports_as_bridge_does(name: str, told: Told, tmp_path: Path) -> None:
    """A trained model, saved on four ranks with its optimizer: ``to_hf`` writes what Bridge exports of the live one."""
    to_hf(told.folder / "saved" / name, tmp_path / "hf")
    exported = load_file(told.folder / f"{name}.safetensors")
    assert described(hf_tensors(tmp_path / "hf")) == described(exported)
    assert described(exported) != described(hf_tensors(told.models[SAVED[name][0]]))  # it was trained
