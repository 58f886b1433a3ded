"""``load_weights`` into live models of the installed megatron-core on four gloo ranks: all from one launch.

The oracle is Megatron's own ``dist_checkpointing.load`` of what ``from_hf`` made of the same model.
"""

from __future__ import annotations

import importlib
import json
import warnings
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final

import pytest
import torch
from genuine import folder, shards, truth
from models_of_many_layers import EXPERT_MODELS, save_hf
from packaging.version import Version
from safetensors.torch import save_file
from torch_reading import load_tensors

import dist_ckpt_mistral as dcm
from dist_ckpt_mistral.convert.conversion import LossPolicy
from dist_ckpt_mistral.convert.from_hf import from_hf
from dist_ckpt_mistral.convert.to_hf import to_hf
from dist_ckpt_mistral.gather.execute import DEFAULT_EFFORT
from dist_ckpt_mistral.mapping.source import open_source
from dist_ckpt_mistral.model.layout.local_tensors import LocalTensor, local_tensors
from dist_ckpt_mistral.model.table.table import tensor_table

if TYPE_CHECKING:
    from conftest import LaunchRanks

#: What differs from the model that is not named.
MODELS: Final[dict[str, dict[str, Any]]] = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "5 layers": {"num_hidden_layers": 5},
    "other heads": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12},
    **EXPERT_MODELS,
}
#: Case -> model, layout of four ranks, what it is filled from, and how the model is given.
CASES: Final[dict[str, tuple[str, dict[str, Any], str, dict[str, bool]]]] = {
    "dense": ("untied", {"tp": 2, "pp": 2}, "hf", {"wrapped": True}),
    "dense, replicas": ("untied", {"tp": 2, "dp": 2}, "checkpoint", {"wrapped": True}),
    "dense, context": ("untied", {"cp": 2, "tp": 2, "order": "cp-tp-dp-pp"}, "hf", {}),
    "vpp": ("untied", {"tp": 2, "pp": 2, "vpp": 4}, "hf", {"wrapped": True}),
    "vpp, tied": ("tied", {"pp": 2, "vpp": 2, "dp": 2}, "export", {"one_by_one": True}),
    "uneven": ("tied", {"tp": 2, "pp": 2, "pp_layers": [3, 5]}, "checkpoint", {"wrapped": True}),
    "ends of their own": (
        "untied",
        {"tp": 2, "pp": 2, "pipeline_model_parallel_layout": "E|t|(tt|)*2,t*3|L"},
        "hf",
        {},
    ),
    "tied": ("tied", {"pp": 4}, "hf", {}),
    "mixtral, etp1": ("mixtral", {"tp": 2, "dp": 2, "ep": 2, "etp": 1}, "hf", {"wrapped": True}),
    "mixtral, etp2": ("mixtral", {"dp": 4, "etp": 2}, "export", {}),
    "mixtral, vpp": ("mixtral", {"pp": 2, "vpp": 2, "dp": 2, "ep": 2}, "checkpoint", {}),
    "mistral4": ("mistral4", {"tp": 2, "pp": 2}, "hf", {}),
    "mistral4, experts": ("mistral4", {"tp": 2, "dp": 2, "ep": 2}, "checkpoint", {"wrapped": True}),
    "grouped": ("mixtral", {"tp": 2, "dp": 2, "ep": 2}, "hf", {"grouped": True}),
}
if Version(version("megatron-core")) >= Version("0.17"):  # which has no GroupedMLP
    del CASES["grouped"]
WRONG: Final = (
    *(
        "another model",
        "no model on rank 1",
        "another model on rank 1",
        "half a model on rank 1",
        "reads fail on rank 1",
    ),
    "rank 1 stays away",
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """Every model as a Hugging Face directory, a checkpoint that is cut for other ranks, and an export of that."""
    root = tmp_path_factory.mktemp("models")
    places = {}
    for name, differs in MODELS.items():
        hf = save_hf(root / name / "hf", differs)
        from_hf(hf, root / name / "ckpt", tp=4, iteration=7)
        to_hf(root / name / "ckpt", root / name / "export")
        at = root / name / "ckpt" / "iter_0000007"
        places[name] = {"hf": str(hf), "checkpoint": str(at), "export": str(root / name / "export")}
    return places


@pytest.fixture(scope="module")
def results(launch_ranks: LaunchRanks, models: dict[str, dict[str, str]]) -> list[dict[str, Any]]:
    """What every rank says to every job of this module."""

    def job(task: str, model: str, layout: dict[str, Any], **more: object) -> dict[str, Any]:
        config = json.loads((Path(models[model]["hf"]) / "config.json").read_text())
        return {"task": task, "config": config, "layout": layout, "style": "STACKED", "hf": models[model]["hf"], **more}

    jobs = {
        name: job("fill_live", model, layout, at=models[model]["checkpoint"], source=models[model][kind], **more)
        for name, (model, layout, kind, more) in CASES.items()
    }
    others = {"another model on rank 1": "5 layers", "another model": "other heads"}
    for why in WRONG:
        other = models[others.get(why, "untied")]["hf"]
        jobs[why] = job("refuse_to_fill", "untied", {"tp": 2, "dp": 2}, why=why, other=other)
    jobs["fill again"] = jobs["dense, replicas"]
    return launch_ranks(4, jobs)


@pytest.mark.parametrize("case", [*CASES, "fill again"])
def test_parameters_are_those_that_megatron_loads(case: str, results: list[dict[str, Any]]) -> None:
    """Every parameter on every rank holds the bits that Megatron's own load gives it, and padding is zero."""
    for rank in results:
        assert rank[case]["parameters"]
        assert rank[case]["different"] == []


@pytest.mark.parametrize("case", CASES)
def test_every_rank_reads_the_bytes_of_its_parameters(case: str, results: list[dict[str, Any]]) -> None:
    """What a rank reads of the files is as long as what it holds: not a byte more."""
    for rank in results:
        assert rank[case]["read_bytes"] == rank[case]["needed_bytes"] > 0


def test_the_optimizer_needs_a_call(results: list[dict[str, Any]]) -> None:
    """An optimizer's own weights stay as they are until it reads the model's again, as the docstring says."""
    for rank in results:
        for case in ("dense", "mixtral, etp1"):
            assert rank[case]["main_weights"] == [False, True]


def test_another_model_is_refused_before_a_value_is_written(results: list[dict[str, Any]]) -> None:
    """A model whose heads differ though no shape does, on all ranks: named."""
    for rank in results:
        error = rank["another model"]
        assert (error["kind"], error["written"]) == ("TensorMismatchError", False)
        for text in ("num_attention_heads: the weights have 4, the model has 8", "num_query_groups", "kv_channels"):
            assert text in error["error"]


@pytest.mark.parametrize(
    ("why", "kind", "own", "others"),
    [
        ("no model on rank 1", "FormatError", "-absent", "rank 1 of 4: "),
        (
            "half a model on rank 1",
            "TensorMismatchError",
            "1 parameter has no entry",
            "rank 1 of 4: the weights are not this model's",
        ),
    ],
)
def test_a_failure_on_one_rank_fails_all(
    why: str, kind: str, own: str, others: str, results: list[dict[str, Any]]
) -> None:
    """A rank that cannot read its part, or has none: all ranks say which it was, and no value is written on any."""
    for number, rank in enumerate(results):
        error = rank[why]
        assert not error["written"]
        assert error["kind"] == (kind if number == 1 else "DistCkptMistralError")
        assert (own if number == 1 else others) in error["error"]


def test_ranks_of_two_models_are_refused(results: list[dict[str, Any]]) -> None:
    """Ranks that read different models, each fitting, get one error that names one of them."""
    for rank in results:
        error = rank["another model on rank 1"]
        assert (error["kind"], error["written"]) == ("ConfigError", False)
        assert "different models: rank 0" in error["error"]


def test_a_failure_while_writing_says_so(results: list[dict[str, Any]]) -> None:
    """Where reading breaks off on one rank, all fail, and say that parameters were overwritten."""
    for number, rank in enumerate(results):
        error = rank["reads fail on rank 1"]
        assert error["error"].endswith("fill the model again before you use it.")
        assert ("rank 1 of 4: " in error["error"]) == (number != 1)


def test_a_rank_that_stays_away_is_named(results: list[dict[str, Any]]) -> None:
    """The others wait as long as they were told, and no longer."""
    for rank in (results[0], results[2], results[3]):
        error = rank["rank 1 stays away"]
        assert (error["kind"], error["written"]) == ("LostRankError", False)
        assert "rank 1 did not come within 0:00:02" in error["error"]


def test_models_of_transformer_engine_are_filled(tmp_path: Path) -> None:
    """A model with the names of Transformer Engine's layers holds what a genuine one saved, from Hugging Face files.

    No machine of the tests can build one. Its entries are those that tests/against/test_recorded_entries.py holds
    against the recorded ones.
    """
    case, layout = "te_moe_0192", dcm.ParallelLayout(tp=2, dp=2, ep=2, etp=1)
    save_file(truth(case), tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((folder(case) / "config.json").read_bytes())
    source, stored = open_source(tmp_path), load_tensors(shards(case))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        subject = importlib.import_module("dist_ckpt_mistral.megatron.load_weights")
    elements = 0
    for rank in range(layout.world_size):
        model, tensors = _stand_in(source.config, layout, rank)
        filling = subject.Filling.planned([model], source)
        filling.run(LossPolicy(), DEFAULT_EFFORT)
        elements += sum(filling.main_elements.values())
        for local in tensors:
            expected = torch.cat([_in_box(stored[box.mcore_key], box) for box in local.boxes])[: local.live_rows]
            actual = model.tensors[local.module_name].detach()
            assert torch.equal(actual[: local.live_rows].reshape(-1), expected.reshape(-1)), local.module_name
            assert not actual[local.live_rows :].any()
    assert elements == sum(tensor.numel() for tensor in truth(case).values())


def _stand_in(config: dcm.MistralConfig, layout: dcm.ParallelLayout, rank: int) -> tuple[Any, list[LocalTensor]]:
    """A module with the parameters of a rank's model with Transformer Engine's layers, all NaN, and their places."""
    at, table = layout.coordinates(rank), tensor_table(config)
    (chunk,) = layout.model_chunks(table.num_layers, at.pp)
    tensors = [*local_tensors(layout, table, chunk, at, spec=dcm.LayerSpec.TRANSFORMER_ENGINE)]
    gpt_model = importlib.import_module("megatron.core.models.gpt.gpt_model").GPTModel

    class StandIn(gpt_model):  # type: ignore[misc,valid-type]
        """What ``load_weights`` asks of a GPTModel."""

        share_embeddings_and_output_weights = config.tie_word_embeddings

        def __init__(self) -> None:
            torch.nn.Module.__init__(self)
            self.tensors = {
                each.module_name: torch.nn.Parameter(torch.full(each.local_shape, torch.nan)) for each in tensors
            }

        def named_parameters(self) -> Any:  # noqa: ANN401  (as torch.nn.Module)
            return self.tensors.items()

        def sharded_state_dict(self) -> dict[str, Any]:
            return dcm.sharded_state_dict(
                config, layout, rank, data=self.tensors, dtype=torch.float32, spec=dcm.LayerSpec.TRANSFORMER_ENGINE
            )

    model = StandIn()
    model.config = SimpleNamespace(
        num_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_key_value_heads,
        kv_channels=config.head_dim,
    )
    return model, tensors


def _in_box(tensor: torch.Tensor, box: dcm.LocalBox) -> torch.Tensor:
    """The part of a stored tensor in a box, without the axes that only the stored tensor has."""
    places = zip(box.global_offset, box.shape, strict=True)
    part = tensor[tuple(slice(low, low + size) for low, size in places)].float()
    return part.reshape([size for size in box.shape if size > 1])
