"""Torch's distributed checkpoint reads genuine Megatron checkpoints by Hugging Face name, in one process."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from genuine import GENUINE, ZARR, folder, truth
from reads import counted_reads
from safetensors.torch import save_file
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from transformers import AutoConfig, AutoModelForCausalLM

import dist_ckpt_mistral as dcm

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


def reader(case: str) -> dcm.HfNamedReader:
    """A reader of a genuine checkpoint."""
    return dcm.HfNamedReader(folder(case) / "checkpoint", folder(case) / "config.json")


def load(state: dict[str, torch.Tensor], reader: dcm.HfNamedReader) -> None:
    """Load without a process group."""
    dcp_load(state, storage_reader=reader, no_dist=True)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors have the same bits."""
    return one.dtype == other.dtype and torch.equal(one.contiguous().view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize("case", [*GENUINE, *ZARR])
def test_all_tensors_of_every_case(case: str) -> None:
    """Every tensor of the live model, bit for bit, from as many bytes as it has."""
    expected = truth(case)
    state = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    with counted_reads() as read:
        load(state, reader(case))
    assert [name for name in expected if not same(state[name], expected[name])] == []
    assert sum(read) == sum(tensor.nbytes for tensor in expected.values())


def test_a_few_tensors_are_read_alone() -> None:
    """What is not asked for is not read."""
    name = "model.layers.2.self_attn.k_proj.weight"
    state = {name: torch.zeros_like(truth("td_0192")[name])}
    with counted_reads() as read:
        load(state, reader("td_0192"))
    assert sum(read) == state[name].nbytes
    assert same(state[name], truth("td_0192")[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes_and_strides(dtype: torch.dtype) -> None:
    """Tensors of another dtype, and those that are not contiguous, get the values that ``copy_`` gives them."""
    expected = truth("td_0192")
    state = {
        name: torch.zeros_like(tensor, dtype=dtype).mT if tensor.dim() > 1 else torch.zeros_like(tensor)
        for name, tensor in expected.items()
    }
    state = {name: tensor.mT if tensor.dim() > 1 else tensor for name, tensor in state.items()}
    state["model.embed_tokens.weight"] = torch.zeros(64, 250, dtype=dtype).T
    load(state, reader("td_0192"))
    for name, tensor in state.items():
        assert same(tensor, expected[name].to(tensor.dtype)), name


@pytest.mark.parametrize("case", ["td_0192", "tied_tp2pp2_0161", "te_moe_0192"])
def test_models_of_transformers_take_it(case: str) -> None:
    """The state dict of a model of transformers, tied heads and packed experts included, with its own names."""
    expected = truth(case)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder(case))).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    state = model.state_dict()
    load(state, reader(case))
    assert not any(parameter.isnan().any() for parameter in model.parameters())
    for name in expected.keys() & state.keys():
        assert same(state[name], expected[name].to(torch.bfloat16)), name
    packed = [name for name in state if name not in expected]
    for name in packed:
        if name == "lm_head.weight":
            assert same(state[name], expected["model.embed_tokens.weight"])
            continue
        layer, experts = name.partition(".mlp.")[0], len(state[name])
        of = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",), "weight": ("gate",)}[name.rpartition(".")[2]]
        if of == ("gate",):
            assert same(state[name], expected[f"{layer}.block_sparse_moe.gate.weight"])
            continue
        for expert in range(experts):
            parts = [expected[f"{layer}.block_sparse_moe.experts.{expert}.{part}.weight"] for part in of]
            assert same(state[name][expert], torch.cat(parts)), name
    assert packed or case == "td_0192"


def test_hugging_face_files_are_read_too(tmp_path: Path) -> None:
    """The same reader takes a Hugging Face directory."""
    expected = truth("td_0192")
    save_file(expected, tmp_path / "model.safetensors", {"format": "pt"})
    shutil.copyfile(folder("td_0192") / "config.json", tmp_path / "config.json")
    state = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    load(state, dcm.HfNamedReader(tmp_path))
    assert [name for name in expected if not same(state[name], expected[name])] == []


def test_what_is_not_there_is_an_error() -> None:
    """A name that the model has not is DCP's error, another shape too; an object is ours."""
    with pytest.raises(CheckpointException, match=r"Missing key in checkpoint state_dict: other\.weight"):
        load({"other.weight": torch.zeros(1)}, reader("td_0192"))
    with pytest.raises(CheckpointException, match="Size mismatch"):
        load({"model.norm.weight": torch.zeros(3)}, reader("td_0192"))
    planner = DefaultLoadPlanner()
    planner.set_up_planner(
        {"model.norm.weight": torch.zeros(64)}, reader("td_0192").read_metadata(), is_coordinator=True
    )
    plan = planner.create_local_plan()
    objects = LoadPlan([_as_object(item) for item in plan.items])
    with pytest.raises(dcm.PlanError, match=r"holds tensors alone.*model\.norm\.weight"):
        reader("td_0192").read_data(objects, planner)
    assert not dcm.HfNamedReader.validate_checkpoint_id("anything")


def _as_object(item: ReadItem) -> ReadItem:
    """The same item of a plan, asking for bytes."""
    return dataclasses.replace(item, type=LoadItemType.BYTE_IO)
