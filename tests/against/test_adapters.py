"""LoRA adapters against those who make and use them: Megatron-Bridge's own saves and exports, and peft."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from genuine import ADAPTERS, described_file, folder, shards_of_adapter, true_bytes
from hf_models import random_model, saved
from multimodal_models import MULTIMODAL
from peft import LoraConfig, PeftModel, get_peft_model
from peft_adapters import ALPHA, save_adapter
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

import dist_ckpt_mistral as dcm
from dist_ckpt_mistral.convert.from_hf import from_hf
from dist_ckpt_mistral.convert.to_hf import to_hf

#: What peft 0.21 asks of transformers is deprecated there; and it warns where it cannot ask the hub for a model.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:peft.*")
EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def loaded(model: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model as transformers loads it."""
    return AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    """What a model says to some tokens."""
    tokens = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        result: torch.Tensor = model(tokens).logits
    return result


@pytest.mark.parametrize("shared_a", [True, False], ids=["LoRA", "CanonicalLoRA"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peft_merges_alike(dtype: torch.dtype, shared_a: bool, tmp_path: Path) -> None:
    """The export loads in peft, whose merge_and_unload is --merge-adapter bit for bit; both models say the same."""
    model = saved(random_model(dtype), tmp_path / "model")
    from_hf(save_adapter(tmp_path / "adapter", model, shared_a=shared_a), tmp_path / "ckpt", tp=2, pp=2)
    to_hf(tmp_path / "ckpt", tmp_path / "out")
    to_hf(tmp_path / "ckpt", tmp_path / "merged", merge_adapter=True, base=model)
    adapted = PeftModel.from_pretrained(loaded(model, dtype), str(tmp_path / "out")).eval()
    said, merged = logits(adapted), loaded(tmp_path / "merged", dtype)
    if dtype is torch.float32:
        torch.testing.assert_close(logits(merged), said, rtol=1e-3, atol=1e-3 * said.abs().max().item())
    assert not torch.allclose(logits(loaded(model, dtype)), said, rtol=1e-1)
    by_peft = adapted.merge_and_unload().state_dict()
    ours = merged.state_dict()
    assert ours.keys() == by_peft.keys()
    assert [name for name, tensor in ours.items() if not torch.equal(tensor, by_peft[name])] == []


@pytest.mark.parametrize("rank", [8, 64])
def test_peft_merges_alike_at_larger_sizes(rank: int, tmp_path: Path) -> None:
    """The same with matrices that are computed in several blocks, and with rsLoRA's factor."""
    sizes = {
        "hidden_size": 512,
        "intermediate_size": 1100,
        "num_hidden_layers": 1,
        "head_dim": 64,
        "sliding_window": None,
    }
    model = saved(random_model(torch.float32, **sizes), tmp_path / "model")
    config = LoraConfig(r=rank, lora_alpha=24, use_rslora=True, target_modules=EVERY, init_lora_weights=False)
    get_peft_model(loaded(model), config).save_pretrained(str(tmp_path / "adapter"))
    from_hf(tmp_path / "adapter", tmp_path / "ckpt", tp=2)
    assert dcm.compare(tmp_path / "ckpt", tmp_path / "adapter").is_equal
    to_hf(tmp_path / "ckpt", tmp_path / "merged", merge_adapter=True, base=model)
    by_peft = PeftModel.from_pretrained(loaded(model), str(tmp_path / "adapter")).merge_and_unload().state_dict()
    ours = loaded(tmp_path / "merged").state_dict()
    assert [name for name, tensor in ours.items() if not torch.equal(tensor, by_peft[name])] == []


def test_what_peft_saved_comes_back(tmp_path: Path) -> None:
    """The files that peft itself saved come back byte for byte, adapter_config.json included."""
    model = saved(random_model(), tmp_path / "model")
    config = LoraConfig(r=4, lora_alpha=ALPHA, lora_dropout=0.1, target_modules=EVERY, init_lora_weights=False)
    get_peft_model(loaded(model), config).save_pretrained(str(tmp_path / "adapter"))
    from_hf(tmp_path / "adapter", tmp_path / "ckpt", tp=2)
    to_hf(tmp_path / "ckpt", tmp_path / "out")
    for name in ("adapter_model.safetensors", "adapter_config.json", "README.md"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "adapter" / name).read_bytes()
    assert peft.PeftConfig.from_pretrained(str(tmp_path / "out")).lora_dropout == 0.1


def test_a_multimodal_model(tmp_path: Path) -> None:
    """An adapter of the language model has the names of the model in memory, and leaves the vision tower alone."""
    model = MULTIMODAL["mistral small 3"].model()
    model.save_pretrained(tmp_path / "model")
    only_text = rf".*language_model.*\.({'|'.join(EVERY)})"
    config = LoraConfig(r=4, lora_alpha=8, target_modules=only_text, init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(str(tmp_path / "adapter"))
    from_hf(tmp_path / "adapter", tmp_path / "ckpt", base=tmp_path / "model")
    to_hf(tmp_path / "ckpt", tmp_path / "out", lora_alpha=8)  # adapter_config.json is made anew
    to_hf(tmp_path / "ckpt", tmp_path / "merged", merge_adapter=True, base=tmp_path / "model")
    name = "adapter_model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "adapter" / name).read_bytes()
    base = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    adapted = PeftModel.from_pretrained(base, str(tmp_path / "out"))
    assert not [each for each, _ in adapted.named_parameters() if "vision_tower" in each and "lora_" in each]
    by_peft = adapted.merge_and_unload().state_dict()
    ours = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").state_dict()
    assert ours.keys() == by_peft.keys()
    assert [each for each, tensor in ours.items() if not torch.equal(tensor, by_peft[each])] == []


#: What some of the genuine adapters do not say themselves: their alpha, and the configuration of their model.
UNSAID: dict[str, dict[str, Any]] = {
    "both_0062": {"lora_alpha": 20},
    "swift_0192": {"config": folder("bridge_0062") / "config.json"},
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_genuine_saves(case: str, tmp_path: Path) -> None:
    """What Bridge and ms-swift saved exports to the live adapter, bit for bit: for Bridge, to its own export."""
    root, unsaid = shards_of_adapter(case), UNSAID.get(case, {})
    to_hf(root, tmp_path / "out", **unsaid)
    assert described_file(tmp_path / "out" / "adapter_model.safetensors") == true_bytes(case)
    content = json.loads((tmp_path / "out" / "adapter_config.json").read_bytes())
    if case != "swift_0192":
        theirs = json.loads((folder(case) / "adapter_config.json").read_bytes())
        unknown = {"base_model_name_or_path"} | ({"lora_dropout"} if case == "both_0062" else set())
        assert {name for name in content | theirs if content.get(name) != theirs.get(name)} <= unknown
    assert (content["r"], content["lora_alpha"]) == (8, 20)
    config = unsaid.get("config")
    assert not dcm.inspect(root, config=config).problems
    assert dcm.check(root, config=config).is_sound
    layout = dcm.ParallelLayout(tp=2, pp=1 if case == "both_0062" else 2)
    assert dcm.plan_reading(root, layout, config=config).reads_only_whole_chunks


@pytest.mark.parametrize("case", ADAPTERS)
def test_genuine_saves_merge(case: str, tmp_path: Path) -> None:
    """Their merged export is what peft merges, bit for bit; a checkpoint with the model needs no other."""
    model, root, unsaid = tmp_path / "model", shards_of_adapter(case), UNSAID.get(case, {})
    to_hf(folder("bridge_0062") / "checkpoint", model, config=folder("bridge_0062") / "config.json")
    base = None if case == "both_0062" else model
    to_hf(root, tmp_path / "out", **unsaid)
    to_hf(root, tmp_path / "merged", merge_adapter=True, base=base, **unsaid)
    if base is None:
        with dcm.open_checkpoint(root) as checkpoint:
            original = load_file(model / "model.safetensors")
            assert all(torch.equal(checkpoint[name], tensor) for name, tensor in original.items())
    adapted = PeftModel.from_pretrained(loaded(model, torch.bfloat16), str(tmp_path / "out"))
    by_peft = adapted.merge_and_unload().state_dict()
    ours = loaded(tmp_path / "merged", torch.bfloat16).state_dict()
    assert [name for name, tensor in ours.items() if not torch.equal(tensor, by_peft[name])] == []


@pytest.mark.parametrize("case", ["lora_0062", "canonical_0062"])
@pytest.mark.parametrize("tp", [1, 2])
def test_imports_are_stored_as_bridge_stores_them(case: str, tp: int, tmp_path: Path) -> None:
    """An import of Bridge's own export at its layout has the keys, shapes, chunks and bits of Bridge's save."""
    exported = tmp_path / "exported"
    exported.mkdir()
    for name, file in (("truth.safetensors", "adapter_model.safetensors"), ("adapter_config.json",) * 2):
        (exported / file).write_bytes((folder(case) / name).read_bytes())
    from_hf(exported, tmp_path / "ckpt", tp=tp, pp=2, base=folder("bridge_0062") / "config.json")
    assert dcm.compare(tmp_path / "ckpt", shards_of_adapter(case)).is_equal
    if tp == 2:
        again = dcm.compare_stored(tmp_path / "ckpt", shards_of_adapter(case))
        assert {each.name for each in again.differences} <= {"common.pt", "common_state/shard_0_1"}
        ours, theirs = (dcm.inspect(path).tensors for path in (tmp_path / "ckpt", shards_of_adapter(case)))
        assert {(t.name, t.shape, t.num_chunks) for t in ours} == {(t.name, t.shape, t.num_chunks) for t in theirs}


def test_numpy_is_enough() -> None:
    """The products of torch and of this package are the same bits, whatever block they are computed in."""
    from dist_ckpt_mistral.gather.low_rank import Product  # noqa: PLC0415

    random = np.random.default_rng(0)
    a, b = (random.standard_normal(shape).astype(np.float32) for shape in ((24, 700), (333, 24)))
    expected = (torch.from_numpy(b) @ torch.from_numpy(a)) * 1.5
    for first, last in ((0, 333), (7, 12), (100, 333)):
        values = np.zeros((last - first, 700), dtype=np.float32)
        Product(row=0, column=0, scale=1.5, b=b, a=a).add_to(values, first)
        assert values.tobytes() == expected[first:last].numpy().tobytes()
