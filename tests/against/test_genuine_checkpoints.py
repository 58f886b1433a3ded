"""What real Megatron releases wrote: exported bit for bit, and read as torch reads it."""

from __future__ import annotations

import json
import logging
import re
import shutil
import sys
import types
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from genuine import GENUINE, folder, shards, truth
from safetensors.torch import load_file
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan
from torch_reading import described, edited_metadata, load_in_own_shapes, load_tensors, read_metadata
from transformers import AutoModelForCausalLM

import dist_ckpt_mistral as dcm
from dist_ckpt_mistral.analysis.compare import compare
from dist_ckpt_mistral.convert.to_hf import to_hf
from dist_ckpt_mistral.formats.stored_checkpoint import open_stored
from dist_ckpt_mistral.views.lazy import open_checkpoint

PADDING = "rows that pad the vocabulary"
OPTIMIZER_KEYS = {"opt_fr_0192": 27, "opt_plain_0161": 27, "opt_fsms_0140": 27, "opt_dr_0161": 6}
FLAT_BUFFERS = {"opt_dr_0161": 6}
EXTRA_STATES = {
    **dict.fromkeys(("moe_seq_0192", "moe_grouped_0161", "mlm_moe_0192"), 40),
    "te_moe_0192": 45,
    "mistral4_0192": 60,
}


@pytest.mark.parametrize("case", GENUINE)
def test_whatever_stays_behind_is_listed_with_its_reason(case: str, tmp_path: Path) -> None:
    """Each stored entry is a weight or is ignored for a reason; padded vocabulary rows are named by their numbers."""
    done = to_hf(
        folder(case) / "checkpoint",
        tmp_path / "hf",
        config=folder(case) / "config.json",
        output=dcm.Output(dry_run=True),
    )
    assert not (tmp_path / "hf").exists()
    stored = read_metadata(shards(case)).state_dict_metadata
    padding = [entry for entry, reason in done.ignored if reason == PADDING]
    ignored = [entry for entry, reason in done.ignored if reason != PADDING]
    heads = ["embedding.word_embeddings.weight[250:256]", "output_layer.weight[250:256]"]
    assert padding == {"tied_tp2pp2_0161": heads[:1], "bridge_0062": []}.get(case, heads)
    weights = [key for key in stored if not key.startswith(("optimizer", "common_state")) and "_extra" not in key]
    assert sorted(ignored) == sorted(set(stored) - set(weights))
    expected = Counter(
        {"Transformer Engine extra state": EXTRA_STATES.get(case, 16), "optimizer state": OPTIMIZER_KEYS.get(case, 0)}
    )
    expected["optimizer state in flat buffers (dp_reshardable)"] = FLAT_BUFFERS.get(case, 0)
    expected["common state, read on its own"] = int(case.endswith(("_0192", "_0062")))
    assert Counter(reason for _, reason in done.ignored if reason != PADDING) == +expected


@pytest.mark.parametrize("case", GENUINE)
def test_stored_bytes_lie_where_torch_finds_them(case: str) -> None:
    """Chunk by chunk, the bytes that the index points to are those that torch's own DCP loads, optimizer included."""
    checkpoint = open_stored(shards(case))
    index = checkpoint.index(checkpoint.tensors)
    found = {}
    for name, tensor in index.tensors.items():
        itemsize = getattr(torch, tensor.dtype).itemsize
        whole = np.zeros((*tensor.global_shape, itemsize), np.uint8)
        for offset, shape, file, at in zip(tensor.offsets, tensor.shapes, tensor.files, tensor.positions, strict=True):
            data = np.fromfile(index.files[file], np.uint8, count=shape.prod() * itemsize, offset=at)
            whole[tuple(map(slice, offset, offset + shape))] = data.reshape(*shape, itemsize)
        found[name] = (getattr(torch, tensor.dtype), tensor.global_shape, whole.tobytes())
    assert found == described(load_in_own_shapes(shards(case)))


@pytest.mark.parametrize("case", ["td_0123", "singleton_0161", "td_0192", "moe_grouped_0161", "mistral4_0192"])
def test_lazy_reading_gives_the_live_model(case: str) -> None:
    """The same checkpoints as a mapping: names, shapes and dtypes unread, tensors bit for bit."""
    expected = truth(case)
    with open_checkpoint(folder(case) / "checkpoint", config=folder(case)) as checkpoint:
        assert sorted(checkpoint) == sorted(expected)
        assert len(checkpoint) == len(expected)
        assert {name: checkpoint.shape(name) for name in checkpoint} == {n: tuple(t.shape) for n, t in expected.items()}
        assert {name: f"torch.{checkpoint.dtype(name)}" for name in checkpoint} == {
            name: str(tensor.dtype) for name, tensor in expected.items()
        }
        assert described(dict(checkpoint)) == described(expected)
        with pytest.raises(KeyError):
            checkpoint["model.layers.4.mlp.gate_proj.weight"]


@pytest.mark.parametrize(
    ("a", "b", "differences"),
    [("td_0123", "td_0192", 0), ("common_0192", "fullpar_0192", 30), ("td_0161", "mlm_0161", 9)],
)
def test_comparison_agrees_with_the_truth(a: str, b: str, differences: int) -> None:
    """Two checkpoints differ in exactly those tensors in which their live models differed, in bits or in dtype."""
    true_a, true_b = described(truth(a)), described(truth(b))
    differing = sorted(name for name in true_a if true_a[name] != true_b[name])
    assert len(differing) == differences
    outcome = compare(folder(a) / "checkpoint", folder(b) / "checkpoint", config=folder(a))
    assert [difference.name for difference in outcome.differences] == differing
    comparable = [name for name in true_a if true_a[name][:2] == true_b[name][:2]]
    assert outcome.num_tensors == len(comparable)
    assert outcome.num_bytes == sum(len(true_a[name][2]) for name in comparable)


def renamed(case: str, folder_to: Path, names: dict[str, str]) -> Path:
    """A copy of a genuine checkpoint in which keys have other names: each pattern is replaced."""
    directory = shutil.copytree(shards(case), folder_to)

    def rename(key: str) -> str:
        for pattern, replacement in names.items():
            key = re.sub(pattern, replacement, key)
        return key

    with edited_metadata(directory) as metadata:
        described_as, stored = metadata.state_dict_metadata, metadata.storage_data
        metadata.state_dict_metadata = {rename(key): entry for key, entry in described_as.items()}
        metadata.storage_data = {type(index)(rename(index.fqn), index.offset): at for index, at in stored.items()}
        assert set(metadata.state_dict_metadata) != set(described_as)
    return directory


@pytest.mark.parametrize("case", ["td_0161", "nonhomog_0192", "singleton_0161", "tied_tp2pp2_0161", "opt_fr_0192"])
@pytest.mark.parametrize(
    "names",
    [
        {r"^(embedding|decoder|output_layer)": r"module.\1"},
        {r"^(embedding|decoder|output_layer)": r"model.language_model.\1"},
        {r"^(decoder\.layers\.(\d+\.)?)mlp\.linear_fc1\.layer_norm_weight": r"\1pre_mlp_layernorm.weight"},
        {
            r"^(decoder\.layers\.(\d+\.)?)mlp\.linear_fc1\.layer_norm_weight": r"\1pre_mlp_layernorm.weight",
            r"^(decoder\.layers\.(\d+\.)?)self_attention\.linear_qkv\.layer_norm_weight": r"\1input_layernorm.weight",
            r"^(embedding|decoder|output_layer)": r"module.\1",
        },
    ],
    ids=["NeMo's prefix", "a longer prefix", "the other layer spec", "all at once"],
)
def test_other_spellings_of_keys(case: str, names: dict[str, str], tmp_path: Path) -> None:
    """Prefixes of other writers and norms under the names of other layer specs change nothing of the export."""
    to_hf(renamed(case, tmp_path / "ckpt", names), tmp_path / "hf", config=folder(case) / "config.json")
    assert described(load_file(tmp_path / "hf" / "model.safetensors")) == described(truth(case))


def test_metadata_of_megatron_0_15(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """megatron-core 0.15 pickled subclasses of its own: read as well, and Megatron is not imported for it."""
    directory = shutil.copytree(shards("td_0161"), tmp_path / "ckpt")
    name = "megatron.core.dist_checkpointing.strategies.torch"
    module = types.ModuleType(name)
    for parent in (Metadata, SavePlan):
        own = type(f"MCore{parent.__name__}", (parent,), {"__module__": name})
        setattr(module, own.__name__, own)
    with edited_metadata(directory) as metadata:
        metadata.__class__ = module.MCoreMetadata
        metadata.mcore_data = {"decoder.final_layernorm.weight": {"nd_reformulated_orig_global_shape": (64,)}}
        metadata.all_local_plans = [module.MCoreSavePlan([])]
        for part in (
            "megatron.core.dist_checkpointing.strategies",
            "megatron.core.dist_checkpointing",
            "megatron.core",
        ):
            monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
        monkeypatch.setitem(sys.modules, "megatron", types.ModuleType("megatron"))
        monkeypatch.setitem(sys.modules, name, module)
    assert b"MCoreMetadata" in (directory / ".metadata").read_bytes()
    monkeypatch.undo()
    to_hf(directory, tmp_path / "hf", config=folder("td_0161") / "config.json")
    assert described(load_file(tmp_path / "hf" / "model.safetensors")) == described(truth("td_0161"))


def test_many_threads_read_one_checkpoint() -> None:
    """A lazily opened checkpoint gives every thread its tensors, whatever the others read meanwhile."""
    expected = truth("td_0123")
    with open_checkpoint(folder("td_0123") / "checkpoint", config=folder("td_0123")) as checkpoint:
        names = [*checkpoint] * 8
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(checkpoint.__getitem__, names))
    wanted = described(expected)
    assert [described({"t": tensor})["t"] for tensor in found] == [wanted[name] for name in names]


def test_an_export_loads_with_transformers(tmp_path: Path) -> None:
    """AutoModelForCausalLM takes an export, and every parameter is the live model's."""
    to_hf(folder("td_0192") / "checkpoint", tmp_path / "hf", config=folder("td_0192"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    expected = {name: tensor.float() for name, tensor in truth("td_0192").items()}
    assert described(dict(model.named_parameters())) == described(expected)
    logits = model(torch.tensor([[1, 2, 3]])).logits
    assert (logits.shape, bool(logits.isfinite().all())) == ((1, 3, 250), True)


def test_megatrons_own_args_serve(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Without a config, Megatron-LM's args are the configuration: all 256 rows leave, and a warning says so."""
    with caplog.at_level(logging.WARNING):
        done = to_hf(folder("mlm_0161") / "checkpoint", tmp_path / "hf")
    assert done.config_from == "the args inside the checkpoint"
    assert "do not tell the vocabulary size before padding: all 256 rows are taken" in caplog.text
    expected, stored = truth("mlm_0161"), load_tensors(shards("mlm_0161"))
    expected["model.embed_tokens.weight"] = stored["embedding.word_embeddings.weight"]
    expected["lm_head.weight"] = stored["output_layer.weight"]
    assert expected["lm_head.weight"].shape == (256, 64)
    assert described(load_file(tmp_path / "hf" / "model.safetensors")) == described(expected)
    written = json.loads((tmp_path / "hf" / "config.json").read_bytes())
    true = json.loads((folder("mlm_0161") / "config.json").read_bytes())
    keys = [key for key in true if key not in ("vocab_size", "dtype", "bos_token_id", "eos_token_id")]
    assert {key: written[key] for key in keys} == {key: true[key] for key in keys}
    assert (written["vocab_size"], written["torch_dtype"]) == (256, "bfloat16")


def test_a_checkpoint_without_any_configuration_asks_for_one(tmp_path: Path) -> None:
    """Without args and without config there is nothing to go by, and nothing is guessed."""
    with pytest.raises(
        Exception,
        match=r"neither a Hugging Face configuration nor Megatron's args nor run_config\.yaml\. Give .* --config",
    ):
        to_hf(folder("td_0192") / "checkpoint", tmp_path / "hf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["directory", "file", "text", "record"])
def test_a_config_is_given_in_any_way(kind: str, tmp_path: Path) -> None:
    """Everything that takes a configuration takes it as a directory, a config.json or a MistralConfig."""
    at, case, one = shards("td_0192"), folder("td_0192"), dcm.ParallelLayout()
    record = dcm.MistralConfig.from_hf(case)
    ways = {"directory": case, "file": case / "config.json", "text": str(case), "record": record}
    config: Any = ways[kind]
    done = dcm.to_hf(at, tmp_path / "hf", config=config)
    assert dcm.MistralConfig.from_hf(tmp_path / "hf") == record
    found = [
        done.config_from,
        dcm.reshard(at, tmp_path / "out", one, config=config).config_from,
        dcm.plan_reading(at, one, config=config).config_from,
        dcm.inspect(at, config=config).config_from,
        dcm.megatron_args(tmp_path / "hf", config=config).config_from,
    ]
    source = "the given configuration"
    assert found == [source if kind == "record" else f"{source} {case / 'config.json'}"] * len(found)
    assert dcm.compare(at, at, config=config).is_equal
    with dcm.open_checkpoint(at, config=config) as tensors:
        assert tensors.config == record
