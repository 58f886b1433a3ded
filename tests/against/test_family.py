"""Mixtral, Ministral, Ministral 3 and Mistral Small 4 to Megatron and back, against transformers and torch DCP."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import refusal
from family_models import FAMILY, family_model, model_class
from genuine import folder, shards
from plain_models import contents
from safetensors.torch import load_file
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch_reading import described, load_tensors, read_metadata
from transformers import AutoConfig

import dist_ckpt_mistral as dcm
from dist_ckpt_mistral.errors import LayoutError
from dist_ckpt_mistral.model.table.table import tensor_table

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4]])
WITH_EXPERTS = [case for case in FAMILY if "experts_per_tok" in str(FAMILY[case])]


@dataclass(frozen=True, kw_only=True)
class Trip:
    """A model's journey: saved by transformers, imported for TP2 x PP2 (x EP2), exported."""

    case: str
    original: Path
    checkpoint: Path
    exported: Path

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The original tensors, as the safetensors library reads them."""
        files = self.original.glob("*.safetensors")
        return {name: tensor for path in files for name, tensor in load_file(path).items()}


@pytest.fixture(scope="module", params=FAMILY)
def trip(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trip:
    """Every model, there and back."""
    where, case = tmp_path_factory.mktemp("trip"), request.param
    family_model(case).save_pretrained(where / "original", max_shard_size=20_000)
    dcm.from_hf(where / "original", where / "checkpoint", tp=2, pp=2, ep=2 if case in WITH_EXPERTS else 1)
    dcm.to_hf(where / "checkpoint", where / "exported")
    return Trip(case=case, original=where / "original", checkpoint=where / "checkpoint", exported=where / "exported")


def test_every_file_comes_back_byte_for_byte(trip: Trip) -> None:
    """Weights, index and configs are what they were, and nothing else is there."""
    original = contents(trip.original)
    assert sum(name.endswith(".safetensors") for name in original) > 1
    assert contents(trip.exported) == original


def test_names_and_shapes_are_those_of_transformers(trip: Trip) -> None:
    """The table has exactly the tensors that transformers saves."""
    table = tensor_table(dcm.MistralConfig.from_hf(trip.original)).hf_tensors()
    saved = {name: tuple(tensor.shape) for name, tensor in trip.tensors.items()}
    assert {name: tensor.shape for name, tensor in table.items() if not tensor.is_alias} == saved


def test_logits_are_those_of_the_original(trip: Trip, tmp_path: Path) -> None:
    """An export without a trace of the import, laid out anew, loads in transformers and says the same."""
    for number, dtype in enumerate(("float32", "bfloat16")):
        output = tmp_path / str(number)
        dcm.to_hf(trip.checkpoint, output, config=replace(dcm.MistralConfig.from_hf(trip.original)), dtype=dtype)
    said = [
        model_class(AutoConfig.from_pretrained(where)).from_pretrained(where, dtype=torch.float32).eval()(TOKENS).logits
        for where in (trip.original, tmp_path / "0", tmp_path / "1")
    ]
    assert torch.isfinite(said[0]).all()
    assert torch.equal(said[0], said[1])
    assert torch.equal(said[0], said[2])


def test_a_config_made_by_hand_means_the_same(trip: Trip, tmp_path: Path) -> None:
    """The config.json for a model that came without one gives transformers the same model."""
    config = dcm.MistralConfig.from_hf(trip.original)
    (tmp_path / "config.json").write_text(json.dumps(replace(config, hf_config=None).to_hf()))
    own, theirs = (AutoConfig.from_pretrained(where).to_dict() for where in (tmp_path, trip.original))
    ignored = {"transformers_version", "use_cache", "rope_parameters", "_name_or_path"}
    assert {name: own[name] for name in theirs if name not in ignored} == {
        name: value for name, value in theirs.items() if name not in ignored
    }
    rope = {name: value for name, value in theirs["rope_parameters"].items() if name != "partial_rotary_factor"}
    assert rope.items() <= own["rope_parameters"].items()
    assert dcm.MistralConfig.from_hf(tmp_path) == config


def megatron_experts(hf: dict[str, torch.Tensor], layers: int, experts: int) -> dict[str, torch.Tensor]:
    """What a checkpoint must hold of experts and router, in torch operations."""
    there = "model.layers.{}.block_sparse_moe."
    if any("gate_up_proj" in name for name in hf):
        there = "model.layers.{}.mlp."
        fc1, fc2 = (
            [hf[f"{there}experts.{which}".format(n)] for n in range(layers)] for which in ("gate_up_proj", "down_proj")
        )
    else:
        each = [[f"{there}experts.{e}.".format(n) for e in range(experts)] for n in range(layers)]
        fc1 = [torch.stack([torch.cat([hf[e + "w1.weight"], hf[e + "w3.weight"]]) for e in layer]) for layer in each]
        fc2 = [torch.stack([hf[e + "w2.weight"] for e in layer]) for layer in each]
    return {
        "decoder.layers.mlp.experts.experts.linear_fc1.weight": torch.stack(fc1),
        "decoder.layers.mlp.experts.experts.linear_fc2.weight": torch.stack(fc2),
        "decoder.layers.mlp.router.weight": torch.stack([hf[f"{there}gate.weight".format(n)] for n in range(layers)]),
    }


def test_torch_loads_what_megatron_needs(trip: Trip) -> None:
    """DCP finds experts, router and norms where Megatron looks for them; norms under the key of either layer spec."""
    loaded, hf = load_tensors(trip.checkpoint / "release"), trip.tensors
    norms = torch.stack([hf[f"model.layers.{n}.post_attention_layernorm.weight"] for n in range(4)])
    if trip.case not in WITH_EXPERTS:
        assert torch.equal(loaded["decoder.layers.mlp.linear_fc1.layer_norm_weight"], norms)
        return
    expected = megatron_experts(hf, layers=4, experts=4)
    assert described({name: loaded[name] for name in expected}) == described(expected)
    assert torch.equal(loaded["decoder.layers.pre_mlp_layernorm.weight"], norms)
    if trip.case == "mixtral":
        assert torch.equal(loaded["decoder.layers.mlp.linear_fc1.layer_norm_weight"], norms)
    else:
        latent = torch.stack([hf[f"model.layers.{n}.self_attn.kv_a_layernorm.weight"] for n in range(4)])
        assert torch.equal(loaded["decoder.layers.self_attention.kv_layernorm.weight"], latent)
        assert torch.equal(loaded["decoder.layers.self_attention.linear_kv_up_proj.layer_norm_weight"], latent)


def test_weights_under_a_second_key_are_told(tmp_path: Path) -> None:
    """An export names the norms that lie there twice, once for each layer spec, as what it leaves out, and why."""
    family_model("mixtral").save_pretrained(tmp_path / "hf")
    dcm.from_hf(tmp_path / "hf", tmp_path / "ckpt")
    done = dcm.to_hf(tmp_path / "ckpt", tmp_path / "back", output=dcm.Output(dry_run=True))
    again = [name for name, reason in done.ignored if reason.startswith("the same weights again")]
    assert again == ["decoder.layers.mlp.linear_fc1.layer_norm_weight"]


@pytest.mark.parametrize("case", ["moe_seq_0192", "mistral4_0192"])
def test_imports_hold_every_key_of_a_genuine_checkpoint(case: str, tmp_path: Path) -> None:
    """The truth of a genuine checkpoint, imported: all its keys are there, in its shapes, objects included."""
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_bytes((folder(case) / "config.json").read_bytes())
    (tmp_path / "hf" / "model.safetensors").write_bytes((folder(case) / "truth.safetensors").read_bytes())
    dcm.from_hf(tmp_path / "hf", tmp_path / "ckpt", tp=2, pp=2, ep=2)
    genuine, own = (read_metadata(path).state_dict_metadata for path in (shards(case), tmp_path / "ckpt" / "release"))
    missing = {key for key in genuine if key not in own and not key.startswith("common_state")}
    assert missing == set()
    shapes = [{key: tuple(each.size) for key, each in held.items() if hasattr(each, "size")} for held in (own, genuine)]
    padded = {"embedding.word_embeddings.weight", "output_layer.weight"}
    assert {key: shapes[0][key] for key in shapes[1] if key not in padded} == {
        key: shape for key, shape in shapes[1].items() if key not in padded
    }


def test_resharding_keeps_every_tensor(trip: Trip, tmp_path: Path) -> None:
    """Cut for another layout, with its experts on other ranks, the checkpoint holds the same model."""
    layout = dcm.ParallelLayout(pp=4, ep=4, etp=1) if trip.case in WITH_EXPERTS else dcm.ParallelLayout(pp=4)
    dcm.reshard(trip.checkpoint, tmp_path / "cut", layout)
    dcm.to_hf(tmp_path / "cut", tmp_path / "hf")
    assert contents(tmp_path / "hf") == contents(trip.original)
    before, after = (load_tensors(root / "release") for root in (trip.checkpoint, tmp_path / "cut"))
    assert described(after) == described(before)


def test_every_expert_is_a_chunk(tmp_path: Path) -> None:
    """With expert parallelism each rank saves its own experts, one chunk each, in the file of that rank."""
    family_model("mixtral").save_pretrained(tmp_path / "hf")
    dcm.from_hf(tmp_path / "hf", tmp_path / "ckpt", ep=2)
    metadata = read_metadata(tmp_path / "ckpt" / "release")
    key = "decoder.layers.mlp.experts.experts.linear_fc2.weight"
    stored = metadata.state_dict_metadata[key]
    assert isinstance(stored, TensorStorageMetadata)
    found = {tuple(chunk.offsets)[:2]: tuple(chunk.sizes) for chunk in stored.chunks}
    assert found == {(layer, expert): (1, 1, 24, 20) for layer in range(4) for expert in range(4)}
    files = {
        tuple(index.offset)[1]: at.relative_path for index, at in metadata.storage_data.items() if index.fqn == key
    }
    assert files == {0: "__0_0.distcp", 1: "__0_0.distcp", 2: "__1_0.distcp", 3: "__1_0.distcp"}


@pytest.mark.parametrize(
    ("case", "layout", "reason"),
    [
        ("mixtral", {"ep": 3}, "num_experts=4 is not divisible by ep=3"),
        (
            "mixtral",
            {"tp": 4, "etp": 8, "ep": 1, "dp": 2},
            "the experts' intermediate_size=20 is not divisible by etp=8",
        ),
        ("mistral4", {"tp": 8}, "num_attention_heads=4 is not divisible by tp=8"),
        ("mistral4", {"tp": 4}, "kv_lora_rank + qk_rope_head_dim=14 is not divisible by tp=4"),
        ("ministral", {"ep": 2}, "ep=2 needs experts"),
    ],
)
def test_layouts_that_do_not_fit(case: str, layout: dict[str, Any], reason: str) -> None:
    """What Megatron could not share evenly is refused by name."""
    config = dcm.MistralConfig.from_hf(family_model(case).config.to_dict())
    with pytest.raises(LayoutError, match=reason.replace("+", r"\+")):
        dcm.ParallelLayout(**layout).check(config)


@pytest.mark.parametrize(
    ("case", "changes", "expected"),
    [
        ("mixtral", {"num_local_experts": None}, "lacks num_local_experts"),
        ("mixtral", {"num_experts_per_tok": 5}, "experts_per_token=5 of num_experts=4"),
        ("mixtral", {"num_local_experts": 0}, "num_experts must be a positive integer, got 0"),
        ("ministral", {"layer_types": ["sliding_attention"]}, "layer_types must name one of"),
        ("ministral", {"sliding_window": None}, "layer_types name sliding_attention, but sliding_window is null"),
        ("mistral4", {"first_k_dense_replace": 1}, "first_k_dense_replace=1"),
        ("mistral4", {"rope_interleave": False}, "rope_interleave=False"),
        ("mistral4", {"kv_lora_rank": -1}, "kv_lora_rank must be a positive integer, got -1"),
        ("mistral4", {"n_group": 3}, "groups_per_token=1 of num_groups=3 among num_experts=4"),
        (
            "mistral4",
            {"rope_parameters": {"rope_type": "yarn", "factor": 2, "partial_rotary_factor": 0.9}},
            "rotates 0.4",
        ),
    ],
)
def test_configs_that_cannot_be(case: str, changes: dict[str, Any], expected: str, tmp_path: Path) -> None:
    """A config.json of the family that does not fit is refused with its reason."""
    family_model(case).save_pretrained(tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text()) | changes
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    assert expected in refusal(tmp_path, "from-hf", tmp_path / "hf", tmp_path / "out")


def test_an_unknown_model_is_told_what_is_known(tmp_path: Path) -> None:
    """Another model type gets the list of those that the table knows, and a known one that is refused its reason."""
    (tmp_path / "hf").mkdir()
    known = "the tensor table knows mistral, mixtral, ministral, ministral3, mistral4, mistral3"
    for model_type, reason in (
        ("llama", ""),
        ("mistral_large4", "(Megatron-core (0.19) has no layers"),
        ("voxtral", "speech"),
    ):
        (tmp_path / "hf" / "config.json").write_text(json.dumps({"model_type": model_type}))
        line = refusal(tmp_path, "megatron-args", tmp_path / "hf")
        assert known in line
        assert reason in line
