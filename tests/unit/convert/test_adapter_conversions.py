"""LoRA adapters: a directory of PEFT, a Megatron adapter checkpoint and back, and the merged model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from command_line import refusal, run
from peft_adapters import ALPHA, MODULES, RANK, merged_by_hand, save_adapter
from plain_models import save_model
from safetensors.numpy import load_file, save_file

import dist_ckpt_mistral as dcm
from dist_ckpt_mistral.convert.from_hf import from_hf
from dist_ckpt_mistral.convert.to_hf import to_hf
from dist_ckpt_mistral.errors import ConfigError, FormatError, LayoutError, TensorMismatchError, UnsupportedModelError
from dist_ckpt_mistral.model.config.mistral_config import MistralConfig

LAYOUTS = {"tp1": dcm.ParallelLayout(), "tp2 pp2": dcm.ParallelLayout(tp=2, pp=2)}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The model that is adapted."""
    return save_model(tmp_path / "model")


@pytest.mark.parametrize("shared_a", [True, False], ids=["LoRA", "CanonicalLoRA"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_there_and_back(model: Path, layout: dcm.ParallelLayout, shared_a: bool, tmp_path: Path) -> None:
    """An imported adapter exports to the original files, byte for byte, and every command answers on the way."""
    adapter = save_adapter(tmp_path / "adapter", model, shared_a=shared_a)
    done = from_hf(adapter, tmp_path / "ckpt", layout=layout)
    assert done.num_tensors == 2 * 2 * len(MODULES)
    keys = {tensor.name for tensor in dcm.inspect(tmp_path / "ckpt").tensors}
    assert ("decoder.layers.self_attention.linear_qkv.adapter.linear_in.weight" in keys) is shared_a
    assert ("decoder.layers.self_attention.linear_qkv.adapter.adapter_q.linear_in.weight" in keys) is not shared_a
    to_hf(tmp_path / "ckpt", tmp_path / "out", output=dcm.Output(checksums=False))
    names = {path.name for path in adapter.iterdir()}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    assert all((tmp_path / "out" / name).read_bytes() == (adapter / name).read_bytes() for name in names)
    assert dcm.compare(tmp_path / "ckpt", adapter).is_equal
    assert dcm.check(tmp_path / "ckpt").is_sound
    assert dcm.check(adapter).is_sound
    assert dcm.plan_reading(tmp_path / "ckpt", layout).reads_only_whole_chunks
    assert not dcm.inspect(adapter).problems
    with dcm.open_checkpoint(tmp_path / "ckpt") as checkpoint:
        name = "base_model.model.model.layers.1.self_attn.k_proj.lora_B.weight"
        assert checkpoint.shape(name) == (20, RANK)


@pytest.mark.parametrize("shared_a", [True, False], ids=["LoRA", "CanonicalLoRA"])
@pytest.mark.parametrize("base", ["directory", "checkpoint", "in one checkpoint"])
def test_the_merged_model(model: Path, base: str, shared_a: bool, tmp_path: Path) -> None:
    """--merge-adapter gives W + alpha / rank * B A, wherever the model lies, and other tensors bit for bit."""
    adapter = save_adapter(tmp_path / "adapter", model, shared_a=shared_a)
    from_hf(adapter, tmp_path / "ckpt", tp=2)
    given = model
    if base == "checkpoint":
        given = tmp_path / "base"
        from_hf(model, given, tp=2, pp=2)
    run_code = run("to-hf", tmp_path / "ckpt", tmp_path / "out", "--merge-adapter", "--base", given).code
    assert run_code == 0
    expected, found = merged_by_hand(model, adapter, ALPHA / RANK), load_file(tmp_path / "out" / "model.safetensors")
    assert expected.keys() == found.keys()
    original = load_file(model / "model.safetensors")
    for name, value in expected.items():
        module = name.removesuffix(".weight").partition("layers.")[2].partition(".")[2]
        assert found[name].dtype == ml_dtypes.bfloat16
        if module not in MODULES:
            assert found[name].tobytes() == original[name].tobytes()
        else:  # one rounding to bfloat16 of a float32 sum
            np.testing.assert_allclose(found[name].astype(float), value.astype(float), rtol=2**-7, atol=1e-6)
            assert np.mean(found[name].view(np.uint16) != value.view(np.uint16)) < 0.01
    assert (tmp_path / "out" / "config.json").read_bytes() == (model / "config.json").read_bytes()


def test_a_merge_is_not_rounded_twice(model: Path, tmp_path: Path) -> None:
    """With --dtype float32 the sum itself is written; the values rounded to bfloat16 are those of the plain merge."""
    adapter = save_adapter(tmp_path / "adapter", model, shared_a=True)
    from_hf(adapter, tmp_path / "ckpt")
    to_hf(tmp_path / "ckpt", tmp_path / "wide", merge_adapter=True, base=model, dtype="float32")
    to_hf(tmp_path / "ckpt", tmp_path / "narrow", merge_adapter=True, base=model)
    wide, narrow = (load_file(tmp_path / name / "model.safetensors") for name in ("wide", "narrow"))
    for name, values in wide.items():
        assert values.dtype == np.float32
        assert values.astype(ml_dtypes.bfloat16).tobytes() == narrow[name].tobytes()


def test_resharding(model: Path, tmp_path: Path) -> None:
    """Bridge's LoRA is cut anew; a CanonicalLoRA, whose rows lie in the order of its ranks, is not."""
    fused = save_adapter(tmp_path / "fused", model, shared_a=True)
    from_hf(fused, tmp_path / "a", tp=2)
    dcm.reshard(tmp_path / "a", tmp_path / "b", dcm.ParallelLayout(pp=2))
    assert dcm.compare(tmp_path / "b", fused).is_equal
    assert dcm.plan_reading(tmp_path / "b", dcm.ParallelLayout(pp=2)).reads_only_whole_chunks
    separate = save_adapter(tmp_path / "separate", model, shared_a=False)
    from_hf(separate, tmp_path / "c", tp=2)
    dcm.reshard(tmp_path / "c", tmp_path / "d", dcm.ParallelLayout(tp=2, pp=2))
    assert dcm.compare(tmp_path / "d", separate).is_equal
    with pytest.raises(LayoutError, match=r"adapter_gate.*an order that only tp=2 loads rightly"):
        dcm.reshard(tmp_path / "c", tmp_path / "e", dcm.ParallelLayout())


def test_a_rank_that_tp_does_not_divide(tmp_path: Path) -> None:
    """Megatron-Bridge cuts A along the rank: a tp that does not divide it is refused, by name."""
    adapter = save_adapter(
        tmp_path / "adapter",
        save_model(tmp_path / "wide", num_attention_heads=8, num_key_value_heads=8, intermediate_size=16),
        shared_a=True,
    )
    with pytest.raises(LayoutError, match=r"tp=8 cannot cut decoder\.layers\.\S+linear_in\.weight \[4, 24\]"):
        from_hf(adapter, tmp_path / "ckpt", tp=8)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"peft_type": "IA3"}, "expected 'LORA', got 'IA3'"),
        ({"use_dora": True}, "use_dora=True"),
        ({"bias": "all"}, "bias='all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"layers_to_transform": [0]}, "layers_to_transform"),
        ({"target_parameters": ["x"]}, "target_parameters"),
        ({"alpha_pattern": {"q_proj": 1}}, "alpha_pattern"),
        ({"init_lora_weights": "pissa"}, "changes the weights of the model"),
        ({"lora_alpha": None}, "expected a number above 0, got None"),
        ({"base_model_name_or_path": None}, "expected the adapter's model, got none"),
    ],
)
def test_other_adapters_are_refused(change: dict[str, Any], expected: str, model: Path, tmp_path: Path) -> None:
    """What PEFT has besides plain LoRA is refused by name."""
    adapter = save_adapter(tmp_path / "adapter", model, shared_a=True, **change)
    with pytest.raises(ConfigError, match=expected.replace("(", r"\(")):
        from_hf(adapter, tmp_path / "ckpt")


@pytest.mark.parametrize("shared_a", [True, False])
def test_some_of_the_matrices_that_are_one(model: Path, shared_a: bool, tmp_path: Path) -> None:
    """Where PEFT leaves out k_proj, Bridge has zeros: the original comes back, and k_proj is merged bit for bit."""
    modules = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")
    adapter = save_adapter(tmp_path / "adapter", model, shared_a=shared_a, modules=modules)
    from_hf(adapter, tmp_path / "ckpt", tp=2)
    keys = {tensor.name for tensor in dcm.inspect(tmp_path / "ckpt").tensors}
    assert "decoder.layers.self_attention.linear_qkv.adapter.adapter_k.linear_in.weight" in keys
    to_hf(tmp_path / "ckpt", tmp_path / "out")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (adapter / name).read_bytes()
    to_hf(tmp_path / "ckpt", tmp_path / "merged", merge_adapter=True, base=model)
    merged, original = (load_file(path / "model.safetensors") for path in (tmp_path / "merged", model))
    changed = {name for name, values in merged.items() if values.tobytes() != original[name].tobytes()}
    assert changed == {f"model.layers.{layer}.{module}.weight" for layer in (0, 1) for module in modules}


def test_the_model_can_be_given(model: Path, tmp_path: Path) -> None:
    """--base gives the configuration of an adapter that does not name its model."""
    adapter = save_adapter(tmp_path / "adapter", model, shared_a=True, base_model_name_or_path="nobody/knows.json")
    assert "Give the model's config.json" in refusal(tmp_path, "from-hf", adapter, tmp_path / "ckpt")
    assert run("from-hf", adapter, tmp_path / "ckpt", "--base", model / "config.json").code == 0
    assert dcm.compare(tmp_path / "ckpt", adapter, config=MistralConfig.from_hf(model)).is_equal
    assert "goes with a PEFT directory" in refusal(tmp_path, "from-hf", model, tmp_path / "x", "--base", model)


def test_what_is_missing_is_said(model: Path, tmp_path: Path) -> None:
    """A merge without the model, without an adapter or with two is refused, as is an adapter in place of a model."""
    adapter = save_adapter(tmp_path / "adapter", model, shared_a=True)
    ckpt, base = tmp_path / "ckpt", tmp_path / "base"
    from_hf(adapter, ckpt)
    from_hf(model, base)
    with pytest.raises(TensorMismatchError, match=r"its model is needed \(.*calls it .*\)\. Give that with --base"):
        to_hf(ckpt, tmp_path / "out", merge_adapter=True)
    with pytest.raises(TensorMismatchError, match="holds no LoRA adapter"):
        to_hf(base, tmp_path / "out", merge_adapter=True)
    with pytest.raises(UnsupportedModelError, match=r"holds a LoRA adapter.*to-hf --merge-adapter"):
        to_hf(ckpt, tmp_path / "out", merge_adapter=True, base=ckpt)
    with pytest.raises(UnsupportedModelError, match="to-hf --merge-adapter"):
        dcm.megatron_args(ckpt)
    other = save_model(tmp_path / "other", hidden_size=28)
    with pytest.raises(ConfigError, match="hidden_size"):
        to_hf(ckpt, tmp_path / "out", merge_adapter=True, base=other)


def test_an_adapter_beside_its_model_stays_refused(model: Path, tmp_path: Path) -> None:
    """A directory of a model that also holds an adapter is neither."""
    adapter = save_adapter(tmp_path / "adapter", model, shared_a=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(adapter / name, model)
    with pytest.raises(FormatError, match="it holds an adapter of PEFT"):
        from_hf(model, tmp_path / "ckpt")


def test_alpha_is_what_was_said(model: Path, tmp_path: Path) -> None:
    """With rsLoRA, alpha is divided by the root of the rank, and --lora-alpha counts more than what is stored."""
    adapter = save_adapter(tmp_path / "adapter", model, shared_a=True, use_rslora=True)
    from_hf(adapter, tmp_path / "ckpt")
    name = "model.layers.0.self_attn.o_proj.weight"
    for alpha in (None, 3.0):
        out = tmp_path / f"out {alpha}"
        to_hf(tmp_path / "ckpt", out, merge_adapter=True, base=model, lora_alpha=alpha)
        expected = merged_by_hand(model, adapter, (alpha or ALPHA) / RANK**0.5)[name]
        found = load_file(out / "model.safetensors")[name]
        np.testing.assert_allclose(found.astype(float), expected.astype(float), rtol=2**-7, atol=1e-6)
    to_hf(tmp_path / "ckpt", tmp_path / "peft", lora_alpha=3.0)
    content = json.loads((tmp_path / "peft" / "adapter_config.json").read_bytes())
    assert (content["lora_alpha"], content["use_rslora"], content["r"]) == (3, True, RANK)


def test_a_missing_tensor_is_named(model: Path, tmp_path: Path) -> None:
    """An adapter without the A of one layer is incomplete."""
    adapter = save_adapter(tmp_path / "adapter", model, shared_a=True)
    tensors = load_file(adapter / "adapter_model.safetensors")
    del tensors["base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"]
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(TensorMismatchError, match=r"missing: .*layers\.1\.mlp\.down_proj\.lora_A"):
        from_hf(adapter, tmp_path / "ckpt")
