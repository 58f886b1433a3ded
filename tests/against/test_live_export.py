"""The live gather against real GPTModels of the installed megatron-core, on four gloo ranks: all from one launch.

Every model is one that transformers saved; ``gpt_stage.hf_rows`` says which of its rows each parameter must hold.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Final

import pytest
from models_of_many_layers import EXPERT_MODELS, save_hf
from packaging.version import Version
from safetensors.torch import load_file

from dist_ckpt_mistral.convert.output import Output
from dist_ckpt_mistral.convert.to_hf import to_hf
from dist_ckpt_mistral.model.config.mistral_config import MistralConfig
from dist_ckpt_mistral.model.table.table import tensor_table

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import LaunchRanks

MODELS: dict[str, dict[str, Any]] = {"untied": {}, "tied": {"tie_word_embeddings": True}, **EXPERT_MODELS}
_TP2_PP2: dict[str, Any] = {"tp": 2, "pp": 2}
#: The embedding has 250 x 32 x 2 bytes: with buckets of that size, nothing but layers shares one.
_SMALL: dict[str, Any] = {"bucket_bytes": 16000}
#: The models that are saved as a checkpoint and as a directory.
SAVED: Final = ("untied", "mistral4")
#: A model of 96 MB, whose largest tensors have 2 MB, and the buffers through which it travels, by name.
LARGE: Final = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "head_dim": 64}
SMALL_BUCKET: Final = 4 << 20
BUCKETS: Final = {"small": SMALL_BUCKET, "large": None}
#: Model, layout, and what export_live is told.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "tp2-pp2": ("untied", _TP2_PP2, _SMALL),
    "tp2-pp2, in one bucket, to one": ("untied", _TP2_PP2, {"to": 3}),
    "tp2-pp2, to two, as float32": ("untied", _TP2_PP2, _SMALL | {"to": [0, 2], "dtype": "float32"}),
    "tp2-pp2-vpp2, tied, in DDP": ("tied", {**_TP2_PP2, "vpp": 2}, _SMALL | {"wrapping": "ddp"}),
    "tp4, tied, as float16": ("tied", {"tp": 4}, {"dtype": "float16", "wrapping": "float16"}),
    "dp2-tp2": ("untied", {"tp": 2, "dp": 2}, _SMALL),
    "mixtral, ep2-pp2": ("mixtral", {"pp": 2, "ep": 2, "dp": 2}, _SMALL),
    "mixtral, tp2-ep2-etp1": ("mixtral", {"tp": 2, "ep": 2, "etp": 1, "dp": 2}, {"to": 1}),
    "mistral4, tp2-pp2": ("mistral4", _TP2_PP2, _SMALL),
    "mistral4, ep2-pp2-vpp2": ("mistral4", {"pp": 2, "vpp": 2, "ep": 2, "dp": 2}, {"wrapping": "float16"}),
}
if Version(version("megatron-core")) < Version("0.17"):
    CASES["grouped mixtral, tp2-ep2"] = ("mixtral", {"tp": 2, "ep": 2, "dp": 2}, _SMALL | {"grouped": True})


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The Hugging Face directory of every model."""
    folder = tmp_path_factory.mktemp("hf")
    return {name: save_hf(folder / name, differs) for name, differs in MODELS.items()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what the ranks save."""
    return tmp_path_factory.mktemp("saved")


@pytest.fixture(scope="module")
def results(launch_ranks: LaunchRanks, models: dict[str, Path], saved: Path) -> list[dict[str, Any]]:
    """What every rank says to every job of this module."""

    def job(task: str, model: str, layout: dict[str, Any], **more: object) -> dict[str, Any]:
        config = json.loads((models[model] / "config.json").read_text())
        return {"task": task, "config": config, "layout": layout, "hf": str(models[model]), **more}

    jobs = {name: job("export_live", model, layout, **more) for name, (model, layout, more) in CASES.items()}
    measured = {**json.loads((models["untied"] / "config.json").read_text()), **LARGE}
    jobs["measured"] = {"task": "measure_export", "config": measured, "layout": _TP2_PP2, "buckets": BUCKETS}
    jobs["refused"] = job("refuse_live", "untied", _TP2_PP2)
    for model in SAVED:
        jobs[f"checkpoint {model}"] = job(
            "save_model", model, _TP2_PP2, style="STACKED", to=str(saved / f"ckpt-{model}")
        )
        jobs[f"saved {model}"] = job("save_live", model, _TP2_PP2, to=str(saved / model))
    results: list[dict[str, Any]] = launch_ranks(4, jobs)
    return results


@pytest.mark.parametrize("case", CASES)
def test_every_rank_gets_the_tensors_of_the_model(
    case: str, models: dict[str, Path], results: list[dict[str, Any]]
) -> None:
    """Bit for bit those that transformers saved, in the order of its state dict, on the ranks that want them."""
    model, _, options = CASES[case]
    table = tensor_table(MistralConfig.from_hf(models[model]))
    names = [name for name, tensor in table.hf_tensors().items() if not tensor.is_alias]
    files = models[model].glob("*.safetensors")
    assert sorted(names) == sorted(name for path in files for name in load_file(path))
    to = options.get("to", range(4))
    for rank, told in enumerate(results):
        receives = rank == to or (not isinstance(to, int) and rank in to)
        assert told[case] == {"names": names if receives else [], "wrong": []}


def test_memory_is_bounded_by_the_bucket(results: list[dict[str, Any]]) -> None:
    """While a model of many buckets streams to all ranks, none holds more than two buckets and a tensor besides.

    An export in one bucket, which holds the whole model at once, shows that the measure would see more.
    """
    measured = [rank["measured"] for rank in results]
    model = sum(each["model"] for each in measured)
    for each in measured:
        assert each["small"] < 2 * SMALL_BUCKET + (32 << 20) < model // 2  # 32 MB: a tensor, Python, and gloo's own
        assert each["large"] > model


#: What must be in the error that every rank raises.
REFUSALS: dict[str, tuple[str, ...]] = {
    "other model": (
        "TensorMismatchError: the live model does not hold the model that its configuration describes",
        "shape of decoder.layers.mlp.linear_fc1.weight: expected [9, 56, 32], got [8, 48, 32]",
        "shape of decoder.layers.mlp.linear_fc2.weight: expected [9, 32, 28], got [8, 32, 24]",
        "belongs to this model",
    ),
    "other config": ("LayoutError: rank 2 was given another config than rank 0",),
    "small bucket": ("ConfigError: bucket_bytes: expected at least 16000, the bytes of 'model.embed_tokens.weight'",),
    "no rank": ("to: expected 'all', or ranks from 0 to 3, got 4",),
    "other arguments": ("LayoutError: rank 1 was given another to than rank 0",),
    "int8": ("dtype 'int8' is not supported",),
    "disagreeing": (
        "TensorMismatchError: the ranks disagree about 'embedding.word_embeddings.weight'",
        "rank 0: bfloat16 [256, 32]; rank 1: bfloat16 [251, 32]",
    ),
    "overlapping": ("PlanError: the parts of 'decoder.final_layernorm.weight' on ranks 2, 3 are not the whole",),
    "missing": ("PlanError: the parts of 'embedding.word_embeddings.weight' on rank 1 are not the whole", "[0:128, "),
    "late": ("LostRankError: ", "lost the others"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_every_rank_raises_the_same_error(case: str, results: list[dict[str, Any]]) -> None:
    """Whatever is wrong, on whichever rank: all ranks raise one error that says what, and none hangs."""
    for told in results:
        assert [text for text in REFUSALS[case] if text not in told["refused"][case]] == [], told["refused"][case]


def test_a_rank_that_stays_away_is_named(results: list[dict[str, Any]]) -> None:
    """All name it, also the rank itself that comes late; a rank that stops in the middle is known at once."""
    told = [rank["refused"] for rank in results]
    assert [("rank 2 did not come within 0:00:02" in each["late"]) for each in told] == [True] * 4
    assert [("rank 1 has stopped before the last" in each["stops"]) for each in told] == [True, False, True, True]
    assert told[1]["stops"] == "nothing"


@pytest.mark.parametrize("model", SAVED)
def test_a_saved_model_is_the_export_of_its_checkpoint(
    model: str, models: dict[str, Path], saved: Path, results: list[dict[str, Any]]
) -> None:
    """Every file of save_hf has the bytes that to_hf writes of the checkpoint that Megatron saved of the same model."""
    out = saved / f"exported-{model}"
    to_hf(saved / f"ckpt-{model}", out, config=models[model], output=Output(max_file_bytes=40000))
    written = {path.name: path.read_bytes() for path in out.iterdir()}
    assert {path.name: path.read_bytes() for path in (saved / model).iterdir()} == written
    files = [name for name in sorted(written) if name.endswith(".safetensors")]
    assert [rank[f"saved {model}"]["written"] for rank in results] == [files] * 4
    assert [rank[f"saved {model}"]["store"] for rank in results] == [True] * 4  # the same bytes


@pytest.mark.parametrize("model", SAVED)
def test_a_save_that_fails_publishes_nothing(model: str, saved: Path, results: list[dict[str, Any]]) -> None:
    """A full disk of the first rank, or values that the dtype cannot hold, end all ranks, and leave nothing behind."""
    for rank in results:
        told = rank[f"saved {model}"]
        assert "cannot write" in told["full"]
        assert "No space left on device" in told["full"]
        assert "the store is full" in told["full store"][0]
        assert told["full store"][1] == {}
        assert "float16 cannot hold: model.norm.weight: 1 become infinite" in told["narrow"]
    assert [*saved.glob(f"*{model}-*")] == []
