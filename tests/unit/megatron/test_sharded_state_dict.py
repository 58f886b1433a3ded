"""The sharded state dict factory and its Hugging Face metadata, in one process.

tests/against/test_gpt_model.py holds the same against real models.
"""

from __future__ import annotations

import copy
import importlib
import pickle
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from dist_ckpt_mistral.errors import ConfigError, LayoutError, TensorMismatchError
from dist_ckpt_mistral.model.config.mistral_config import MistralConfig
from dist_ckpt_mistral.model.layout.layout import ParallelLayout
from dist_ckpt_mistral.model.layout.local_tensors import LocalTensor
from dist_ckpt_mistral.model.table.rules import KeyStyle

pytestmark = pytest.mark.megatron

CONFIG = MistralConfig(
    vocab_size=250,
    hidden_size=32,
    intermediate_size=24,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=6,
    dtype="bfloat16",
)
TP2 = ParallelLayout(tp=2)
FC1 = "decoder.layers.3.mlp.linear_fc1.weight"
QKV = "decoder.layers.3.self_attention.linear_qkv.weight"


@pytest.fixture(scope="module")
def api() -> SimpleNamespace:
    """The functions under test, and Megatron's. Importing megatron warns of much that is not ours to mend."""
    names = {
        "dist_ckpt_mistral.megatron.sharded_state_dict": ("optimizer_state_dict", "sharded_state_dict"),
        "dist_ckpt_mistral.megatron.hf_metadata": ("add_hf_metadata",),
        "megatron.core.dist_checkpointing.mapping": ("ShardedObject", "ShardedTensor"),
        "megatron.core.dist_checkpointing.optimizer": ("make_sharded_optimizer_tensor",),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        modules = {importlib.import_module(module): each for module, each in names.items()}
    return SimpleNamespace(**{name: getattr(module, name) for module, each in modules.items() for name in each})


class Recorder:
    """A supplier that remembers what it was asked for."""

    def __init__(self) -> None:
        """Start with nothing asked."""
        self.asked: list[str] = []

    def __call__(self, held: LocalTensor, dtype: torch.dtype) -> torch.Tensor:
        """Supply rows that tell themselves apart."""
        self.asked.append(held.module_name)
        rows, *columns = held.local_shape
        return torch.arange(rows, dtype=dtype).reshape(rows, *(1 for _ in columns)).expand(held.local_shape)


def test_a_factory_splits_and_merges_linear_fc1(api: SimpleNamespace) -> None:
    """linear_fc1 is built into gate and up, also where there is no data yet, and merged into the whole again."""
    supplier = Recorder()
    whole = api.sharded_state_dict(CONFIG, TP2, 1, data=supplier)[FC1]
    gate, up = whole.build()
    assert torch.equal(whole.merge_fn([gate.data, up.data]), whole.data)
    assert [each.hf_names for each in (gate, up)] == [
        ("model.layers.3.mlp.gate_proj.weight",),
        ("model.layers.3.mlp.up_proj.weight",),
    ]
    assert [each.data for each in api.sharded_state_dict(CONFIG, TP2, 1)[FC1].build()] == [None, None]


def test_nothing_is_supplied_before_it_is_touched(api: SimpleNamespace) -> None:
    """Building, validating and stripping entries asks for nothing; both halves of linear_fc1 ask for it once."""
    supplier = Recorder()
    entries = api.sharded_state_dict(CONFIG, TP2, 1, data=supplier)
    gate, up = entries[FC1].build()
    entries[QKV].validate_metadata_integrity()
    assert entries[QKV].without_data().data is None
    assert gate.without_data().data is None
    assert supplier.asked == []
    assert torch.equal(torch.cat([gate.data, up.data])[:, 0], torch.arange(24).bfloat16())
    assert entries[QKV].data is entries[QKV].data
    assert supplier.asked == [FC1, QKV]


def test_what_is_supplied_is_checked(api: SimpleNamespace) -> None:
    """A supplier that gives another shape or dtype is found out when the tensor is touched."""
    entries = api.sharded_state_dict(CONFIG, TP2, 1, data=lambda _held, _dtype: torch.zeros(3))
    with pytest.raises(TensorMismatchError, match=rf"(?s)shape mismatch for '{QKV}': .*dtype mismatch for '{QKV}'"):
        _ = entries[QKV].data


def test_names_survive_copies(api: SimpleNamespace) -> None:
    """Replacing, stripping, copying and pickling an entry keeps its Hugging Face names and its data."""
    entry = api.sharded_state_dict(CONFIG, TP2, 1, data=Recorder())[QKV]
    copies = [replace(entry, key="other"), copy.copy(entry), copy.deepcopy(entry), pickle.loads(pickle.dumps(entry))]  # noqa: S301
    assert [each.hf_boxes for each in [*copies, entry.without_data()]] == [entry.hf_boxes] * 5
    assert all(torch.equal(each.data, entry.data) for each in copies)


@pytest.mark.parametrize(
    ("style", "key"),
    [
        (KeyStyle.STACKED, "decoder.layers.mlp.linear_fc1.weight"),
        (KeyStyle.PER_LAYER, "decoder.layers.3.mlp.linear_fc1.weight"),
        (KeyStyle.SINGLETON, "decoder.layers.3.mlp.linear_fc1.weight_v"),
    ],
)
def test_boxes_are_the_same_in_every_key_style(api: SimpleNamespace, style: KeyStyle, key: str) -> None:
    """The second rank of two holds the second half of up's rows, whether up is stored below gate or on its own."""
    up = api.sharded_state_dict(CONFIG, TP2, 1, style=style)[FC1].build()[1]
    (box,) = up.hf_boxes
    assert (up.key, box.hf_name, box.hf_shape) == (key, "model.layers.3.mlp.up_proj.weight", (24, 32))
    assert (box.hf_slices, box.local_slices) == ((slice(12, 24), slice(0, 32)), (slice(0, 12), slice(0, 32)))


def test_boxes_have_columns(api: SimpleNamespace) -> None:
    """A tensor that is cut by columns is a box of the Hugging Face tensor; query, key and value are many boxes."""
    entries = api.sharded_state_dict(CONFIG, TP2, 1)
    (box,) = entries["decoder.layers.3.mlp.linear_fc2.weight"].hf_boxes
    assert (box.hf_shape, box.hf_offset, box.shape, box.local_offset) == ((32, 24), (0, 12), (32, 12), (0, 0))
    names = [box.hf_name.split(".")[4] for box in entries[QKV].hf_boxes]
    assert names == ["q_proj"] * 2 + ["k_proj"] * 2 + ["v_proj"] * 2  # of two groups


def test_padding_has_no_names(api: SimpleNamespace) -> None:
    """Of 512 rows for a vocabulary of 250, the last ranks hold none of Hugging Face's; other paddings work."""
    name = "embedding.word_embeddings.weight"
    entries = [api.sharded_state_dict(CONFIG, ParallelLayout(tp=4), rank)[name] for rank in range(4)]
    assert [each.hf_names for each in entries] == [("model.embed_tokens.weight",)] * 2 + [()] * 2
    own = api.sharded_state_dict(CONFIG, ParallelLayout(tp=4), 3, padded_vocab_size=252)[name]
    assert (own.local_shape, own.global_shape, own.allow_shape_mismatch) == ((63, 32), (252, 32), True)
    assert own.hf_names == ("model.embed_tokens.weight",)


def test_what_does_not_fit_is_refused(api: SimpleNamespace) -> None:
    """A layout that Megatron refuses, a rank outside it, a vocabulary too small, and a model without dtype."""
    with pytest.raises(LayoutError, match=r"num_key_value_heads .num_query_groups.=4 is not divisible by tp=3"):
        api.sharded_state_dict(CONFIG, ParallelLayout(tp=3), 0)
    with pytest.raises(LayoutError, match="rank 2 is outside a layout of 2 ranks"):
        api.sharded_state_dict(CONFIG, TP2, 2)
    with pytest.raises(LayoutError, match="padded vocabulary size 249 must be a multiple of tp=2, at least 250"):
        api.sharded_state_dict(CONFIG, TP2, 0, padded_vocab_size=249)
    with pytest.raises(ConfigError, match="Give dtype"):
        api.sharded_state_dict(replace(CONFIG, dtype=None), TP2, 0)
    with pytest.raises(ConfigError, match="dtype 'int8' is not supported"):
        api.sharded_state_dict(replace(CONFIG, dtype="int8"), TP2, 0)
    with pytest.raises(ConfigError, match="dtype 'float8' is not supported"):
        api.sharded_state_dict(CONFIG, TP2, 0, dtype="float8")
    assert api.sharded_state_dict(replace(CONFIG, dtype=None), TP2, 0, dtype=torch.half)[QKV].dtype == torch.half


def test_all_problems_of_given_tensors_are_told_together(api: SimpleNamespace) -> None:
    """Missing and unknown tensors, wrong shapes, dtypes and types: all are named, with their model chunk."""
    layout = ParallelLayout(pp=2, vpp=2)
    expected = api.sharded_state_dict(CONFIG, layout, 0, data=Recorder())
    given = {chunk: {name: each.data for name, each in entries.items()} for chunk, entries in expected.items()}
    name = "decoder.layers.1.mlp.linear_fc2.weight"
    assert api.sharded_state_dict(CONFIG, layout, 0, data=given)["model1"][name].data is given["model1"][name]
    given["model0"][name] = given["model0"][name].T
    given["model1"] |= {name: given["model1"][name].float(), "lora": given["model1"].pop(FC1.replace("3", "0"))}
    given["model1"][QKV.replace("3", "1")] = None
    with pytest.raises(TensorMismatchError) as caught:
        api.sharded_state_dict(CONFIG, layout, 0, data=given)
    told, advice = str(caught.value).split(". ")
    assert advice == "Give the state dict of this rank's model."
    assert told.split("; ") == [
        "shape mismatch for 'model0/decoder.layers.1.mlp.linear_fc2.weight': expected (32, 24), got (24, 32)",
        "unknown tensor 'model1/lora'",
        "wrong type for 'model1/decoder.layers.1.self_attention.linear_qkv.weight': expected a tensor, got NoneType",
        "no tensor for 'model1/decoder.layers.0.mlp.linear_fc1.weight'",
        "dtype mismatch for 'model1/decoder.layers.1.mlp.linear_fc2.weight': expected torch.bfloat16, got torch.float32",  # noqa: E501
    ]
    with pytest.raises(TensorMismatchError, match=r"unknown model chunk 'embedding.*no tensor for 'model1/"):
        api.sharded_state_dict(CONFIG, layout, 0, data=given["model0"])


def test_optimizer_state_takes_the_names_along(api: SimpleNamespace) -> None:
    """Megatron's optimizers derive their entries from the model's, with a key prefix and float32 data of their own."""
    entries = api.sharded_state_dict(CONFIG, TP2, 1)
    moments = torch.zeros(24, 32)
    gate, up = api.make_sharded_optimizer_tensor(entries[FC1], moments, "optimizer.state.exp_avg").build()
    assert gate.key == up.key == "optimizer.state.exp_avg.decoder.layers.mlp.linear_fc1.weight"
    assert (gate.dtype, up.dtype) == (torch.float32, torch.float32)
    assert up.hf_names == ("model.layers.3.mlp.up_proj.weight",)
    with pytest.raises(TensorMismatchError, match=r"data: expected the states .*exp_avg_sq.*, got momentum$"):
        api.optimizer_state_dict(CONFIG, TP2, 1, data={"momentum": {}})


def test_live_entries_of_another_model_are_refused(api: SimpleNamespace) -> None:
    """Adding names to entries that the configuration does not have, or has in another shape, names all of them."""
    tensor = api.ShardedTensor.from_rank_offsets
    live = {
        "norm": tensor("decoder.final_layernorm.weight", torch.zeros(33)),
        "layers": [
            tensor("decoder.layers.mlp.linear_fc2.weight", torch.zeros(32, 24), (0, layer, 9), prepend_axis_num=1)
            for layer in (0, 8)
        ],
    }
    with pytest.raises(TensorMismatchError) as caught:
        api.add_hf_metadata(live, CONFIG)
    told, advice = str(caught.value).split(". ")
    assert advice == "Check that the configuration is this model's."
    assert told.split("; ") == [
        "shape mismatch for 'decoder.final_layernorm.weight': expected (32,), got (33,)",
        "shape mismatch for 'decoder.layers.mlp.linear_fc2.weight': expected (8, 32, 24), got (9, 32, 24)",
        "unknown tensor 'decoder.layers.mlp.linear_fc2.weight' with global_offset (8, 0, 0)",
    ]


def test_what_is_not_the_models_passes_through(api: SimpleNamespace) -> None:
    """Adding names leaves the given dict, its objects, plain values and optimizer state as they are."""
    tensor = api.ShardedTensor.from_rank_offsets
    live = {
        "model": {"norm": tensor("decoder.final_layernorm.weight", torch.zeros(32))},
        "optimizer": tensor("optimizer.state.exp_avg.decoder.final_layernorm.weight", torch.zeros(32)),
        "rng_state": api.ShardedObject("rng_state", [1], (1,), (0,)),
        "iteration": 3,
    }
    named = api.add_hf_metadata(live, CONFIG)
    assert named["model"]["norm"].hf_names == ("model.norm.weight",)
    assert named["model"]["norm"].data is live["model"]["norm"].data
    assert type(live["model"]["norm"]) is api.ShardedTensor
    assert {name: each for name, each in named.items() if name != "model"} == {
        name: each for name, each in live.items() if name != "model"
    }
    again = api.add_hf_metadata(named, CONFIG)
    assert again["model"]["norm"] is named["model"]["norm"]
