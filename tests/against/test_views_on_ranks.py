"""``dcm.load`` and torch DCP's reader on four gloo ranks, against Megatron's own load and the tensors of live models.

All from one launch. What is loaded are genuine checkpoints of the versions that the installed megatron-core reads.
"""

from __future__ import annotations

import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
from genuine import folder, shards, truth
from models_of_many_layers import EXPERT_MODELS, save_hf
from packaging.version import Version
from safetensors.torch import save_file

from dist_ckpt_mistral.convert.from_hf import from_hf

if TYPE_CHECKING:
    from conftest import LaunchRanks

_DENSE: Final = ({"dp": 4}, {"tp": 2, "pp": 2}, {"tp": 4})
_EXPERTS: Final = ({"tp": 2, "dp": 2, "ep": 2, "etp": 1}, {"tp": 2, "pp": 2, "ep": 1})
#: Genuine case -> key style, layer spec, layouts of four ranks.
GENUINE: Final[dict[str, tuple[str, str, tuple[dict[str, Any], ...]]]] = {
    "td_0123": ("STACKED", "LOCAL", _DENSE[1:2]),
    "td_0161": ("STACKED", "LOCAL", _DENSE),
    "td_0192": ("STACKED", "LOCAL", _DENSE),
    "tied_tp2pp2_0161": ("STACKED", "LOCAL", _DENSE[:2]),
    "mlm_0161": ("STACKED", "LOCAL", _DENSE[2:]),
    "singleton_0161": ("SINGLETON", "LOCAL", _DENSE[1:]),
    "nonhomog_0192": ("PER_LAYER", "LOCAL", _DENSE[1:]),
    "moe_grouped_0161": ("STACKED", "LOCAL", _EXPERTS),
    "moe_seq_0192": ("STACKED", "LOCAL", _EXPERTS),
    "te_moe_0192": ("STACKED", "TRANSFORMER_ENGINE", _EXPERTS),
    "mistral4_0192": ("STACKED", "LOCAL", _EXPERTS[:1]),
}
_INSTALLED: Final = Version(version("megatron-core"))
ENTRIES: Final = {
    f"{case} {layout}": (case, layout)
    for case, (_, _, layouts) in GENUINE.items()
    if Version(f"0.{case[-3:-1]}") <= _INSTALLED
    for layout in layouts
}
#: Live models: what differs from the model of models_of_many_layers, layout, key style, grouped experts.
LIVE: Final[dict[str, tuple[dict[str, Any], dict[str, Any], str, bool]]] = {
    "dense": ({}, {"tp": 2, "pp": 2}, "STACKED", False),
    "tied, virtual stages": ({"tie_word_embeddings": True}, {"pp": 2, "vpp": 2, "dp": 2}, "STACKED", False),
    "tensor parallel": ({}, {"tp": 4}, "STACKED", False),
    "experts": (EXPERT_MODELS["mixtral"], {"tp": 2, "dp": 2, "ep": 2, "etp": 1}, "STACKED", False),
    "grouped": (EXPERT_MODELS["mixtral"], {"tp": 2, "dp": 2, "ep": 2}, "STACKED", True),
    "latent attention": (EXPERT_MODELS["mistral4"], {"tp": 2, "pp": 2}, "STACKED", False),
}
if Version("0.17") <= _INSTALLED:  # which has no GroupedMLP
    del LIVE["grouped"]


def hf_of(case: str, place: Path) -> Path:
    """A Hugging Face directory of a genuine case."""
    place.mkdir()
    save_file(truth(case), place / "model.safetensors", {"format": "pt"})
    shutil.copyfile(folder(case) / "config.json", place / "config.json")
    return place


@pytest.fixture(scope="module")
def results(launch_ranks: LaunchRanks, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What every rank says to every job of this module."""
    place = tmp_path_factory.mktemp("models")
    hf = {case: hf_of(case, place / case) for case in {case for case, _ in ENTRIES.values()}}
    jobs: dict[str, dict[str, Any]] = {}
    for name, (case, layout) in ENTRIES.items():
        style, spec, _ = GENUINE[case]
        jobs[name] = {
            "task": "load_entries_anywhere",
            "config": json.loads((folder(case) / "config.json").read_text()),
            "layout": layout,
            "style": style,
            "spec": spec,
            "hf": str(hf[case]),
            "at": str(shards(case)),
            "stored_rows": 256,
        }
    for name, (differs, layout, style, grouped) in LIVE.items():
        source = save_hf(place / name / "hf", differs)
        from_hf(source, place / name / "ckpt", iteration=7)
        jobs[name] = {
            "task": "load_live_anywhere",
            "config": json.loads((source / "config.json").read_text()),
            "layout": layout,
            "style": style,
            "hf": str(source),
            "grouped": grouped,
            "at": str(place / name / "ckpt" / "iter_0000007"),
        }
    first = "td_0161"
    jobs["dcp"] = {
        "task": "load_by_dcp",
        "layout": {"dp": 4},
        "truth": str(folder(first) / "truth.safetensors"),
        "config": str(folder(first) / "config.json"),
        "sources": [str(shards(first)), str(hf[first])],
    }
    return launch_ranks(4, jobs)


@pytest.mark.parametrize("name", ENTRIES)
def test_entries_are_loaded_as_megatron_loads_them(name: str, results: list[dict[str, Any]]) -> None:
    """From a genuine checkpoint at any layout: the same bits, by ``load`` and by the strategy, padding included."""
    for rank in results:
        assert rank[name]["tensors"]
        assert rank[name]["different"] == []
        assert rank[name]["padding"] == []


@pytest.mark.parametrize("name", ENTRIES)
def test_ranks_read_what_they_need(name: str, results: list[dict[str, Any]]) -> None:
    """What a rank reads is as long as its stored part: not a byte more. Applied factories make no difference."""
    for rank in results:
        assert rank[name]["read_bytes"] == rank[name]["needed_bytes"] > 0
        assert rank[name]["parts"] == 0


@pytest.mark.parametrize("name", LIVE)
def test_live_models_get_what_megatron_gives_them(name: str, results: list[dict[str, Any]]) -> None:
    """The entries of a live model, factories and all, out of a checkpoint and out of Hugging Face files."""
    for rank in results:
        assert rank[name]["tensors"]
        assert rank[name]["different"] == []
        assert rank[name]["wrong"] == []


def test_dcp_reads_parts_of_dtensors(results: list[dict[str, Any]]) -> None:
    """DTensors cut along any axis, and the parameters of an FSDP2 model, get the bits of the live Megatron model."""
    for rank in results:
        assert rank["dcp"]["parameters"]
        assert rank["dcp"]["different"] == []


def test_dcp_reads_no_more_than_the_parts(results: list[dict[str, Any]]) -> None:
    """Every rank reads the bytes of its own parts, from a checkpoint and from Hugging Face files."""
    for rank in results:
        assert rank["dcp"]["read"] == rank["dcp"]["local"]
        assert rank["dcp"]["sharded"] == [0, 0]
