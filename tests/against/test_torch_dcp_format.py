"""Megatron's formats torch_dcp and fsdp_dtensor, as its own code saves them, and what else torch's DCP saves."""

from __future__ import annotations

import argparse
import json
import shutil
import warnings
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from command_line import run
from genuine import FSDP, described_file, folder, shards, true_bytes, truth
from torch.distributed.checkpoint import state_dict_saver
from torch_reading import described, load_tensors

import dist_ckpt_mistral as dcm
from dist_ckpt_mistral.errors import FormatError, TensorMismatchError, UnsupportedFormatError

CASE: Final = "dcp_0192"
#: The configuration of each case: its args do not tell the tokens of a vocabulary.
CONFIGS: Final = {case: folder(case) / "config.json" for case in FSDP}
OPTIONS: Final[dict[str, Any]] = {"config": CONFIGS[CASE]}
QKV: Final = "decoder.layers.0.self_attention.linear_qkv.weight"


@pytest.mark.parametrize("case", FSDP)
def test_lazy_reading(case: str) -> None:
    """Parameters in the chunks of two data-parallel ranks, even or not, are a mapping like any other format."""
    with dcm.open_checkpoint(shards(case), config=CONFIGS[case]) as checkpoint:
        assert described(dict(checkpoint)) == described(truth(case))


@pytest.mark.parametrize("case", FSDP)
def test_migration(case: str, tmp_path: Path) -> None:
    """It becomes torch_dist with Megatron's keys, with its args, and gives the same model."""
    done = dcm.migrate(folder(case) / "checkpoint", tmp_path / "new", config=CONFIGS[case])
    assert done.num_tensors == 9
    new = tmp_path / "new" / "iter_0000007"
    assert {name.split(".")[0] for name in load_tensors(new)} == {"embedding", "decoder", "output_layer"}
    dcm.to_hf(new, tmp_path / "hf", config=CONFIGS[case])
    assert described_file(tmp_path / "hf" / "model.safetensors") == true_bytes(case)
    common = torch.load(new / "common.pt", weights_only=False)
    assert (common["iteration"], common["args"].num_layers, common["args"].ckpt_format) == (7, 2, "torch_dist")
    assert dict(done.ignored)["args"] == "no part of the model"


@pytest.mark.parametrize("case", FSDP)
def test_verify_and_inspect(case: str, tmp_path: Path) -> None:
    """It is sound by its checksums until a bit is flipped, and is listed under the keys of torch_dist."""
    config = ("--config", str(CONFIGS[case]))
    assert run("verify", folder(case) / "checkpoint", *config).code == 0
    report = json.loads("".join(run("inspect", shards(case), "--json", *config).out))
    assert report["problems"] == []
    assert report["kind"] == "Megatron torch_dcp checkpoint"
    assert {each["name"] for each in report["tensors"]} > {"decoder.layers.mlp.linear_fc1.weight"}
    spoiled = shutil.copytree(shards(case), tmp_path / "it")
    data = bytearray((spoiled / "__0_0.distcp").read_bytes())
    data[len(data) // 2] ^= 1
    (spoiled / "__0_0.distcp").write_bytes(data)
    assert run("verify", spoiled, *config).code == 3


def saved(state: dict[str, Any], to: Path) -> Path:
    """What torch's own DCP makes of a state dict."""
    with warnings.catch_warnings(action="ignore"):  # that there is one process
        state_dict_saver.save(state, checkpoint_id=to, no_dist=True)
    return to


ARGS: Final = argparse.Namespace(num_layers=1)
#: What is no checkpoint that is read -> its state dict, and what is said of it.
OTHERS: Final[dict[str, tuple[dict[str, Any], str]]] = {
    "a model by itself": (
        {"model": {"module": {"weight": torch.zeros(4)}}},
        r"is not a Megatron checkpoint: .*It holds model\.module\.weight\. Load it with what saved it",
    ),
    "a model in a wrapper": (
        {"args": 1, "state": {"model.module.weight": torch.zeros(4)}},
        r"is not a Megatron checkpoint: .*It holds state\.model\.module\.weight",
    ),
    "a model of torchtitan": (
        {"layers.0.attention.wq.weight": torch.zeros(4, 4), "train_state": {"step": torch.tensor(3)}},
        "is not a Megatron checkpoint",
    ),
}


@pytest.mark.parametrize("other", OTHERS)
def test_what_others_save(other: str, tmp_path: Path) -> None:
    """What other programs save by DCP is told apart, and what to do is said."""
    state, expected = OTHERS[other]
    directory = saved(state, tmp_path / "it")
    for refuse in (dcm.inspect, dcm.open_checkpoint, lambda path: dcm.migrate(path, tmp_path / "new")):
        with pytest.raises(UnsupportedFormatError, match=expected):
            refuse(directory)


def test_a_save_of_today_that_has_not_finished(tmp_path: Path) -> None:
    """Without metadata.json, what megatron-core 0.19 writes looks alike; it is called unfinished."""
    directory = shutil.copytree(shards("mlm_moe_0192"), tmp_path / "it")
    (directory / "metadata.json").unlink()
    with pytest.raises(FormatError, match=r"has no metadata\.json, which Megatron writes last"):
        dcm.inspect(directory)


def parameters() -> dict[str, torch.Tensor]:
    """The parameters of the genuine case, as torch reads them."""
    loaded = load_tensors(shards(CASE))
    return {name.removeprefix("model."): tensor for name, tensor in loaded.items() if name.startswith("model.")}


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    """Parameters that are missing, unknown or of another shape are all named, with their keys."""
    model = parameters()
    del model["decoder.final_layernorm.weight"]
    state = {"args": ARGS, "checkpoint_version": 3.0, "iteration": 7}
    half = {"decoder.layers.1.mlp.linear_fc1.weight_w": model.pop("decoder.layers.1.mlp.linear_fc1.weight")[:96]}
    model |= half | {QKV: model[QKV][1:], "bias": torch.zeros(3)}
    directory = saved(state | {"model": model}, tmp_path / "it")
    with pytest.raises(TensorMismatchError) as raised:
        dcm.to_hf(directory, tmp_path / "hf", config=dcm.ConfigOverride(OPTIONS["config"]))
    for part in (
        f"shape of model.{QKV}: expected [256, 64] (one rank), got [255, 64]",
        "2 tensors are missing: model.decoder.layers.1.mlp.linear_fc1.weight, model.decoder.final_layernorm.weight",
        "2 tensors are unknown to the table",
        "model.bias [3]",
        "model.decoder.layers.1.mlp.linear_fc1.weight_w [96, 64]",
    ):
        assert part in str(raised.value)
