"""A Megatron checkpoint as Hugging Face's own code sees it: models of transformers, and the files of an export."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from genuine import folder, shards, truth
from plain_models import contents, save_model
from reads import counted_reads

import dist_ckpt_mistral as dcm

#: Case -> the class of transformers.
MODELS = {
    "td_0192": transformers.MistralForCausalLM,
    "tied_tp2pp2_0161": transformers.MistralForCausalLM,
    "te_moe_0192": transformers.MixtralForCausalLM,
    "mistral4_0192": transformers.Mistral4ForCausalLM,
}


def opened(case: str) -> dcm.LazyCheckpoint:
    """A genuine checkpoint, opened."""
    return dcm.open_checkpoint(folder(case) / "checkpoint", config=folder(case))


@pytest.mark.parametrize("case", MODELS)
@pytest.mark.parametrize("lazy", [False, True])
def test_models_of_transformers_are_filled(case: str, lazy: bool, tmp_path: Path) -> None:
    """``from_pretrained`` takes an open checkpoint, or its slices, for a state dict: every weight, each read once."""
    config, expected = transformers.AutoConfig.from_pretrained(folder(case)), truth(case)
    with opened(case) as checkpoint, counted_reads() as read:
        state = checkpoint.slices() if lazy else checkpoint
        model, info = MODELS[case].from_pretrained(None, config=config, state_dict=state, output_loading_info=True)
        assert sum(read) == sum(tensor.nbytes for tensor in expected.values())
    assert {kind: names for kind, names in info.items() if names} == {}
    model.save_pretrained(tmp_path)
    saved = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert saved.keys() == expected.keys()
    for name, tensor in saved.items():
        assert torch.equal(tensor, expected[name].to(tensor.dtype)), name


def test_slices_are_read_when_a_parameter_is_filled() -> None:
    """Before a model asks for it, nothing is read; one layer of a model reads what it has."""
    config = transformers.AutoConfig.from_pretrained(folder("td_0192"))
    config.num_hidden_layers = 1
    with opened("td_0192") as checkpoint, counted_reads() as read:
        slices = checkpoint.slices()
        assert read == []
        model = transformers.MistralForCausalLM.from_pretrained(None, config=config, state_dict=slices)
    names = model.state_dict().keys()
    assert sum(read) == sum(tensor.nbytes for name, tensor in truth("td_0192").items() if name in names)
    assert torch.equal(model.lm_head.weight, truth("td_0192")["lm_head.weight"].to(model.lm_head.weight.dtype))


@pytest.mark.parametrize("case", ["td_0123", "mlm_moe_0192", "mistral4_0192", "opt_fsms_0140", "bridge_0062"])
def test_files_are_those_of_the_export(case: str, tmp_path: Path) -> None:
    """Every file has the name, the size and the bytes that ``to_hf`` writes, also in parts and across tensors."""
    dcm.to_hf(
        folder(case) / "checkpoint", tmp_path / "out", config=folder(case), output=dcm.Output(max_file_bytes=100_000)
    )
    files = dcm.HfFileSystem(folder(case) / "checkpoint", folder(case), max_file_bytes=100_000)
    exported = contents(tmp_path / "out")
    assert set(files.find("")) == set(exported)
    for name, content in exported.items():
        assert files.info(name)["size"] == len(content)
        assert files.cat_file(name) == content
        step = 7777
        parts = [files.cat_file(name, start, start + step) for start in range(0, len(content), step)]
        assert b"".join(parts) == content
        with files.open(name, block_size=1000) as file:
            file.seek(len(content) // 2)
            assert file.read(5000) == content[len(content) // 2 :][:5000]
        assert files.cat_file(name, -50) == content[-50:]


def test_safetensors_loads_the_file_as_it_is(tmp_path: Path) -> None:
    """An imported file comes back byte for byte, and safetensors parses it; a range is read alone."""
    hf = save_model(tmp_path / "hf")
    dcm.from_hf(hf, tmp_path / "ckpt", layout=dcm.ParallelLayout(tp=2))
    files = dcm.HfFileSystem(tmp_path / "ckpt")
    original = (hf / "model.safetensors").read_bytes()
    assert files.cat("model.safetensors") == original
    assert {*safetensors.torch.load(files.cat("model.safetensors"))} == {*safetensors.torch.load(original)}
    assert files.cat("config.json") == (hf / "config.json").read_bytes()
    with counted_reads() as read:
        assert files.cat_file("model.safetensors", 5000, 6000) == original[5000:6000]
    assert sum(read) <= 1000


def test_a_directory_as_fsspec_lists_it(tmp_path: Path) -> None:
    """Listing, existence, and what is not there."""
    hf = save_model(tmp_path / "hf")
    (hf / "additional_chat_templates").mkdir()
    (hf / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    dcm.from_hf(hf, tmp_path / "ckpt")
    files = dcm.HfFileSystem(tmp_path / "ckpt")
    assert "model.safetensors" in files.ls("", detail=False)
    assert files.isdir("additional_chat_templates")
    assert files.cat("additional_chat_templates/tools.jinja") == b"{{ tools }}"
    assert files.ls("config.json", detail=False) == ["config.json"]
    for name in ("nothing", "config.json/x"):
        assert not files.exists(name)
        with pytest.raises(FileNotFoundError):
            files.cat_file(name)
    with pytest.raises(OSError, match="Read-only file system"):
        files.open("config.json", "wb")  # what was written there was lost
    with pytest.raises(dcm.ConfigError, match="max_file_bytes: expected a whole number of at least 1"):
        dcm.HfFileSystem(tmp_path / "ckpt", max_file_bytes=0)


def test_a_changed_source_is_not_read(tmp_path: Path) -> None:
    """A shard that is saved again after the file system was made is an error, not other bytes."""
    work = tmp_path / "ckpt"
    shutil.copytree(shards("td_0192"), work)
    files = dcm.HfFileSystem(work, folder("td_0192"))
    for shard in work.glob("*.distcp"):
        content = shard.read_bytes()
        shard.unlink()
        shard.write_bytes(content)
    with pytest.raises(dcm.SourceError, match="changed while it was read"):
        files.cat("model.safetensors")
