"""One model, spelled in several ways: other names of transformers, packed experts, a head alone, tensors twice."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest
import torch
from command_line import refusal, run
from family_models import family_model
from hf_models import megatron_tensors, random_model, saved
from multimodal_models import MULTIMODAL
from plain_models import SIZES, contents
from safetensors.torch import load_file, save_file, save_model
from small_models import small_model
from torch.distributed import checkpoint as dcp
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

import dist_ckpt_mistral as dcm
from dist_ckpt_mistral.errors import TensorMismatchError
from dist_ckpt_mistral.model.table.table import tensor_table

WORDS: Final = "model.embed_tokens.weight"
HEAD: Final = "lm_head.weight"
MODELS: Final[dict[str, Callable[[], PreTrainedModel]]] = {
    **{name: lambda name=name: small_model(name) for name in ("full attention", "tied", "mixtral", "mistral4")},  # type: ignore[misc]
    **{name: lambda case=case: case.model() for name, case in MULTIMODAL.items()},  # type: ignore[misc]
}
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
BEGINNINGS: Final = (
    *("", "model.", "model.model.", "model.model.model.", "transformer."),
    *("language_model.", "model.language_model.", "model.model.language_model."),
    *("language_model.model.", "language_model.model.model.", "language_model.model.model.model."),
    *("model.language_model.model.", "model.language_model.model.model."),
)
MIDDLES: Final = ("mlp", "block_sparse_moe")


def in_transformers(model: PreTrainedModel) -> Callable[[str], str | None]:
    """What ``from_pretrained`` makes of a name in a file: the parameter that it fills, or part of it; None for none."""
    transforms = get_model_conversion_mapping(model)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    state, base = model.state_dict(), model.base_model_prefix

    def parameter(name: str) -> str | None:
        found, _ = rename_source_key(name, renamings, converters, base, state)
        return found if found in state else None

    return parameter


@pytest.mark.parametrize("case", MODELS)
def test_names_that_transformers_takes(case: str) -> None:
    """Every name in a file that fills a parameter in transformers is understood as a tensor that fills the same."""
    model = MODELS[case]()
    table = tensor_table(dcm.MistralConfig.from_hf(model.config.to_dict()))
    parameter, known = in_transformers(model), table.hf_tensors()
    ends = {name.rpartition("model.")[2].removeprefix("language_model.") for name in known}
    other_ends = {end.replace(f".{a}.", f".{b}.") for end in ends for a, b in itertools.product(MIDDLES, MIDDLES)}
    taken = 0
    for beginning, end in itertools.product(BEGINNINGS, sorted(other_ends)):
        name = beginning + end
        fills = parameter(name)
        if fills is not None:
            usual = table.usual_name(name)
            assert usual in known, name
            assert parameter(usual) == fills, name
            taken += name not in known
        elif name in known:
            raise AssertionError(f"transformers does not take the usual {name}")
    assert taken > len(known)  # at least one more spelling of each
    assert all(table.usual_name(name) == name for name in known)


@pytest.mark.parametrize("original_format", [True, False])
def test_packed_experts(original_format: bool, tmp_path: Path) -> None:
    """Mixtral in the names of transformers' memory is the same model, and comes back with these names."""
    model = family_model("mixtral")
    model.save_pretrained(tmp_path / "usual")
    model.save_pretrained(tmp_path / "hf", save_original_format=original_format)
    assert ("model.layers.3.mlp.experts.gate_up_proj" in load_file(tmp_path / "hf" / "model.safetensors")) is not (
        original_format
    )
    assert dcm.inspect(tmp_path / "hf").problems == ()
    dcm.from_hf(tmp_path / "hf", tmp_path / "ckpt", tp=2, ep=2)
    dcm.from_hf(tmp_path / "usual", tmp_path / "of usual")
    for a, b in itertools.combinations([tmp_path / each for each in ("hf", "usual", "ckpt", "of usual")], 2):
        assert dcm.compare(a, b).is_equal
    dcm.to_hf(tmp_path / "ckpt", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "hf")
    with dcm.open_checkpoint(tmp_path / "hf") as lazily:
        expected = load_file(tmp_path / "usual" / "model.safetensors")
        assert lazily.keys() == expected.keys()
        assert all(torch.equal(lazily[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("middle", MIDDLES)
def test_experts_in_half_the_names_of_memory(middle: str, tmp_path: Path) -> None:
    """Some layers packed, others not, the block called either way: as transformers loads it, and it comes back."""
    model = family_model("mixtral")
    model.save_pretrained(tmp_path / "usual")
    model.save_pretrained(tmp_path / "hf", save_original_format=False)
    single, packed = (load_file(tmp_path / each / "model.safetensors") for each in ("usual", "hf"))
    mixed = {name: tensor for name, tensor in packed.items() if ".layers.2." not in name}
    mixed |= {name: tensor for name, tensor in single.items() if ".layers.2." in name}
    mixed = {name.replace(".mlp.", f".{middle}."): tensor for name, tensor in mixed.items()}
    save_file(mixed, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").state_dict()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in model.state_dict().items())
    dcm.from_hf(tmp_path / "hf", tmp_path / "ckpt")
    assert dcm.compare(tmp_path / "ckpt", tmp_path / "usual").is_equal
    dcm.to_hf(tmp_path / "ckpt", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "hf")


def test_experts_stored_twice(tmp_path: Path) -> None:
    """Packed experts beside single ones must be the same; one that differs is found and refused, by both names."""
    family_model("mixtral").save_pretrained(tmp_path / "hf")
    family_model("mixtral").save_pretrained(tmp_path / "packed", save_original_format=False)
    name = "model.layers.1.mlp.experts.down_proj"
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    extra = load_file(tmp_path / "packed" / "model.safetensors")[name]
    save_file(tensors | {name: extra}, tmp_path / "hf" / "model.safetensors")
    dcm.from_hf(tmp_path / "hf", tmp_path / "ckpt")
    assert dcm.compare(tmp_path / "ckpt", tmp_path / "packed").is_equal
    extra[2, 0, 0] += 1
    save_file(tensors | {name: extra}, tmp_path / "hf" / "model.safetensors")
    line = refusal(tmp_path, "from-hf", tmp_path / "hf", tmp_path / "again")
    assert f"'{name}' differs from 'model.layers.1.block_sparse_moe.experts.0.w2.weight'" in line
    assert [finding.tensor for finding in dcm.check(tmp_path / "hf").findings] == [name]


def test_a_head_alone(tmp_path: Path) -> None:
    """Tied embeddings that ``save_model`` of safetensors stores as the head alone are read, and come back so."""
    model = random_model(tie_word_embeddings=True)
    usual = saved(model, tmp_path / "usual")
    shutil.copytree(usual, tmp_path / "hf")
    save_model(model, str(tmp_path / "hf" / "model.safetensors"), metadata={"format": "pt"})
    stored = load_file(tmp_path / "hf" / "model.safetensors")
    assert HEAD in stored
    assert WORDS not in stored
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "hf").model.embed_tokens.weight, stored[HEAD])
    dcm.from_hf(tmp_path / "hf", tmp_path / "ckpt")
    assert dcm.compare(tmp_path / "ckpt", usual).is_equal
    dcm.to_hf(tmp_path / "ckpt", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "hf")


def with_head(original: Path, folder: Path, head: torch.Tensor | None) -> Path:
    """A copy of a tied model with ``head`` stored besides."""
    shutil.copytree(original, folder)
    tensors = load_file(original / "model.safetensors") | ({} if head is None else {HEAD: head})
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_stored_heads_are_compared(tmp_path: Path) -> None:
    """Heads beside tied embeddings count bit for bit: against each other, and against an embedding without one."""
    model = random_model(tie_word_embeddings=True)
    original = saved(model, tmp_path / "hf")
    words = model.state_dict()[WORDS]
    heads = {"none": None, "same": words.clone(), "twice": words * 2, "other": words * 3}
    at = {name: with_head(original, tmp_path / name, head) for name, head in heads.items()}
    for a, b in itertools.product(at, at):
        equal = a == b or {a, b} == {"none", "same"}
        done = run("verify", at[a], at[b], "--json")
        assert done.code == (0 if equal else 3)
        found = json.loads("".join(done.out))["differences"]
        assert [each["hf_name"] for each in found] == ([] if equal else [HEAD])
    for name, is_sound in (("none", True), ("same", True), ("other", False)):
        findings = dcm.check(at[name]).findings
        assert [each.tensor for each in findings] == ([] if is_sound else [HEAD])
        assert all(WORDS in each.what for each in findings)


def stored(folder: Path, tensors: dict[str, torch.Tensor], config: Path) -> tuple[Path, str, Path]:
    """A checkpoint of these tensors that torch itself saves, and how to name its configuration."""
    dcp.save(tensors, checkpoint_id=str(folder), no_dist=True)  # type: ignore[attr-defined]  # torch does export it
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    return folder, "--config", config


PLAIN_NORM: Final = "decoder.layers.input_layernorm.weight"
FUSED_NORM: Final = "decoder.layers.self_attention.linear_qkv.layer_norm_weight"
EMBEDDING: Final = "embedding.word_embeddings.weight"
OUTPUT: Final = "output_layer.weight"


@pytest.mark.parametrize(("second", "first"), [(OUTPUT, EMBEDDING), (PLAIN_NORM, FUSED_NORM)])
def test_keys_of_a_checkpoint_that_say_the_same(second: str, first: str, tmp_path: Path) -> None:
    """What a checkpoint stores under two keys is exported where both are equal, else an error and a finding by name."""
    original = saved(random_model(tie_word_embeddings=True), tmp_path / "hf")
    tensors = megatron_tensors(load_file(original / "model.safetensors"), SIZES | {"tie_word_embeddings": True})
    same = stored(tmp_path / "same", tensors | {second: tensors[first].clone()}, original)
    assert run("verify", *same).code == 0
    assert run("to-hf", same[0], tmp_path / "out", *same[1:]).code == 0
    assert dcm.compare(tmp_path / "out", original).is_equal
    assert dcm.compare(same[0], original, config=original).is_equal
    other = stored(tmp_path / "other", tensors | {second: tensors[first] * 2}, original)
    line = refusal(tmp_path, "to-hf", other[0], tmp_path / "never", *other[1:])
    for told in (line, "".join(run("verify", *other).out), "".join(run("verify", other[0], original, *other[1:]).out)):
        assert first in told
        assert second in told
    assert run("verify", *other).code == run("verify", other[0], original, *other[1:]).code == 3
    with pytest.raises(TensorMismatchError, match=second):
        dcm.open_checkpoint(other[0], config=original)


def test_only_the_output_layer_of_a_tied_model(tmp_path: Path) -> None:
    """A checkpoint that stores tied embeddings as the output layer alone has them."""
    original = saved(random_model(tie_word_embeddings=True), tmp_path / "hf")
    tensors = megatron_tensors(load_file(original / "model.safetensors"), SIZES | {"tie_word_embeddings": True})
    tensors[OUTPUT] = tensors.pop(EMBEDDING)
    folder, *options = stored(tmp_path / "ckpt", tensors, original)
    assert run("to-hf", folder, tmp_path / "out", *options).code == 0
    assert dcm.compare(tmp_path / "out", original).is_equal


ADAPTERS: Final = (
    "decoder.layers.self_attention.adapter_layer.lora_kqv_adapter.linear_in.weight",
    "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
    "model.layers.0.self_attn.q_proj.lora_B.default.weight",
    "model.layers.0.self_attn.q_proj.base_layer.weight",
    "layers.0.attention.wq.lora_A.weight",
)


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("alone", [True, False])
def test_adapters_are_refused(name: str, alone: bool, tmp_path: Path) -> None:
    """Tensors of an adapter, alone or beside those of the model, are called that, with what to do."""
    original = saved(random_model(), tmp_path / "hf")
    tensors = load_file(original / "model.safetensors")
    adapter = {name: torch.ones(4, 24)}
    if name.startswith("decoder."):
        of_megatron = {} if alone else megatron_tensors(tensors, SIZES)
        folder, *options = stored(tmp_path / "ckpt", of_megatron | adapter, original)
        line = refusal(tmp_path, "to-hf", folder, tmp_path / "out", *options)
    else:
        save_file(({} if alone else tensors) | adapter, original / "model.safetensors")
        line = refusal(tmp_path, "from-hf", original, tmp_path / "out")
    assert "LoRA" in line
    assert "Merge it into its model first" in line
