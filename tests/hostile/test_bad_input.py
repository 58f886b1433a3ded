"""Bad input on the command line: one clear line, exit code 1, nothing executed, nothing left behind."""

from __future__ import annotations

import builtins
import functools
import io
import json
import math
import operator
import os
import pickle
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import refusal, run
from genuine import folder
from hf_models import random_model, saved
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_models import SIZES, contents
from safetensors.torch import load_file, save_file
from torch_reading import edited_metadata
from transformers import LlamaConfig

import dist_ckpt_mistral as dcm
from dist_ckpt_mistral.convert.from_hf import from_hf
from dist_ckpt_mistral.storage import local

FC1 = "decoder.layers.mlp.linear_fc1.weight"
FC2 = "decoder.layers.mlp.linear_fc2.weight"
NORM = "decoder.final_layernorm.weight"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model: ``hf`` as transformers saves it in one file, ``many`` in many files, ``ckpt`` its import."""
    where = tmp_path_factory.mktemp("pristine")
    saved(random_model(), where / "hf")
    saved(random_model(), where / "many", max_shard_size=4000)
    from_hf(where / "hf", where / "ckpt", tp=2, pp=2)
    return where


@pytest.fixture
def hf(pristine: Path, tmp_path: Path) -> Path:
    """A Hugging Face directory of one file, to spoil."""
    return shutil.copytree(pristine / "hf", tmp_path / "hf")


@pytest.fixture
def many(pristine: Path, tmp_path: Path) -> Path:
    """A Hugging Face directory of many files, to spoil."""
    return shutil.copytree(pristine / "many", tmp_path / "many")


@pytest.fixture
def ckpt(pristine: Path, tmp_path: Path) -> Path:
    """A checkpoint root that this package wrote, to spoil."""
    return shutil.copytree(pristine / "ckpt", tmp_path / "ckpt")


@pytest.fixture
def genuine(tmp_path: Path) -> Path:
    """A checkpoint of Megatron's own with common.pt, to spoil; ``config`` beside it belongs to it."""
    shutil.copy(folder("td_0161") / "config.json", tmp_path / "config.json")
    return shutil.copytree(folder("td_0161") / "checkpoint", tmp_path / "genuine")


def edit_json(path: Path, **changes: object) -> None:
    """Change or, with ``...``, remove keys of a JSON file."""
    content = json.loads(path.read_bytes()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def edit_header(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change the header of a safetensors file, not its data."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


# What it is


@pytest.mark.parametrize("command", ["to-hf", "inspect"])
@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (None, "there is no such directory"),
        ({}, "it is empty"),
        (
            {"iter_0000001/metadata.json": "", "iter_0000002/metadata.json": "", "release/x": ""},
            "nor metadata.json, but iterations. Give one of its folders iter_0000001, iter_0000002",
        ),
        ({"latest_checkpointed_iteration.txt": "12"}, "names iter_0000012, which is absent"),
        ({"latest_checkpointed_iteration.txt": "../../etc"}, "should hold an iteration or 'release', got '../../etc'"),
        ({"latest_checkpointed_iteration.txt": ""}, "should hold an iteration or 'release', got ''"),
        ({".metadata": "x"}, ".metadata is not a readable pickle"),
        ({"metadata.json": '{"sharded_backend": []}'}, "says sharded_backend []: expected 'torch_dist'"),
        ({"metadata.json": "{}"}, "says sharded_backend None: expected 'torch_dist'"),
        (
            {"metadata.json": '{"sharded_backend": "zip"}'},
            "says sharded_backend 'zip': expected 'torch_dist' or",
        ),
        ({"metadata.json": '{"sharded_backend": "torch_dist"}'}, ".metadata is missing: the save was not finished"),
        ({"metadata.json": "[1]"}, "invalid JSON in {path}/metadata.json: expected an object, got list"),
        ({"metadata.json": '{"sharded_backend": "torch_dist"}', ".metadata": ""}, ".metadata is not a readable pickle"),
    ],
)
def test_no_checkpoint(command: str, files: dict[str, str] | None, expected: str, tmp_path: Path) -> None:
    """Whatever is no checkpoint is told apart and named."""
    path = tmp_path / "given"
    for name, content in (files or {}).items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(content)
    if files == {}:
        path.mkdir()
    line = refusal(tmp_path, command, path, *([tmp_path / "out"] if command == "to-hf" else []))
    assert str(path) in line
    assert expected.replace("{path}", str(path)) in line


def test_no_hugging_face_directory(hf: Path, tmp_path: Path) -> None:
    """A missing directory, a lone file, a directory without weights, and one with weights in another format."""
    assert "there is no such directory" in refusal(tmp_path, "from-hf", tmp_path / "none", tmp_path / "out")
    line = refusal(tmp_path, "from-hf", hf / "model.safetensors", tmp_path / "out")
    assert "model.safetensors is not a Hugging Face model directory" in line
    (hf / "model.safetensors").rename(hf / "pytorch_model.bin")
    line = refusal(tmp_path, "from-hf", hf, tmp_path / "out")
    assert "holds neither model.safetensors nor model.safetensors.index.json" in line
    assert "weights in a format that is not read (pytorch_model.bin)" in line
    (hf / "pytorch_model.bin").rename(hf / "model.safetensors")
    (hf / "config.json").unlink()
    assert f"there is no config.json at {hf} (" in refusal(tmp_path, "from-hf", hf, tmp_path / "out")


def test_mixed_up_directions(hf: Path, ckpt: Path, tmp_path: Path) -> None:
    """A Hugging Face directory is not exported, and a checkpoint is not imported."""
    for command in ("to-hf", "reshard", "migrate"):
        line = refusal(tmp_path, command, hf, tmp_path / "out")
        assert f"{hf} is not a Megatron checkpoint" in line
        assert line.endswith("it is a Hugging Face directory. from-hf makes a checkpoint of it.")
    for path in (ckpt, ckpt / "release"):
        line = refusal(tmp_path, "from-hf", path, tmp_path / "out")
        assert f"{ckpt / 'release'} is not a Hugging Face model directory: it is a Megatron checkpoint. to-hf " in line


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "mistral_large4"}, "has no layers that share latents"),
        (LlamaConfig().to_dict(), "model_type 'llama'"),
        ({"model_type": ["mistral"]}, "model_type ['mistral']"),
        ({"model_type": None}, "model_type None"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"architectures": ["MistralForSequenceClassification"]}, "'MistralForSequenceClassification'"),
        ({"is_causal": False}, "is_causal=False"),
    ],
)
def test_another_architecture(config: dict[str, Any], expected: str, hf: Path, genuine: Path, tmp_path: Path) -> None:
    """Another model type, activation, head or attention is refused by name, from files and as --config."""
    edit_json(hf / "config.json", **config)
    for arguments in (("from-hf", hf, "out"), ("to-hf", genuine, tmp_path / "out", "--config", hf)):
        line = refusal(tmp_path, *arguments)
        assert expected in line
        assert str(hf / "config.json") in line


def test_a_checkpoint_of_another_architecture(genuine: Path, tmp_path: Path) -> None:
    """A genuine mixture of experts is no dense model: each tensor that differs is named."""
    moe = folder("moe_grouped_0161")
    line = refusal(tmp_path, "to-hf", moe / "checkpoint", tmp_path / "out", "--config", tmp_path / "config.json")
    assert f"2 tensors are missing: {FC1}, decoder.layers.mlp.linear_fc2.weight" in line
    assert "3 tensors are unknown to the table" in line
    for name in ("experts.experts.linear_fc1", "experts.experts.linear_fc2", "router"):
        assert f"decoder.layers.mlp.{name}.weight [" in line
    assert genuine.is_dir()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_experts": 8, "moe_latent_size": 8}, "moe_latent_size=8"),
        ({"multi_latent_attention": True}, "multi_latent_attention=True"),
        ({"normalization": "LayerNorm", "swiglu": False}, "normalization='LayerNorm', swiglu=False"),
        ({"add_qkv_bias": True}, "add_qkv_bias=True"),
        ({"num_layers": None, "norm_epsilon": None}, "lack num_layers, norm_epsilon. Give the model's config.json"),
        (
            {"vocab_size": None, "padded_vocab_size": None},
            "do not tell the vocabulary size. Give config.json with --config",
        ),
        ({"window_size": "wide"}, "window_size in the checkpoint's args: expected (before, after), got 'wide'"),
        ({"hidden_size": 64.0}, "hidden_size must be a positive integer, got 64.0"),
    ],
)
def test_args_of_another_architecture(changes: dict[str, object], expected: str, tmp_path: Path) -> None:
    """Where Megatron's own args are the configuration, whatever is not Mistral in them is named."""
    root = shutil.copytree(folder("mlm_0161") / "checkpoint", tmp_path / "ckpt")
    common_file = root / "iter_0000000" / "common.pt"
    common = torch.load(common_file, weights_only=False)
    vars(common["args"]).update({"vocab_size": 250} | changes)
    torch.save(common, common_file)
    assert expected in refusal(tmp_path, "to-hf", root, tmp_path / "out")


# Whether it is whole


def test_missing_data_files(genuine: Path, tmp_path: Path) -> None:
    """All data files that are missing are named, and those that are cut as well."""
    arguments = ("to-hf", genuine, tmp_path / "out", "--config", tmp_path / "config.json")
    (genuine / "__1_0.distcp").unlink()
    line = refusal(tmp_path, *arguments)
    assert "missing: __1_0.distcp. Copy the checkpoint again, whole." in line
    (genuine / "__3_1.distcp").unlink()
    size = (genuine / "__2_0.distcp").stat().st_size
    os.truncate(genuine / "__2_0.distcp", size - 1)
    line = refusal(tmp_path, *arguments)
    assert "missing: __1_0.distcp, __3_1.distcp" in line
    assert f"truncated: __2_0.distcp (expected at least {size} bytes, got {size - 1})" in line
    outcome = run("inspect", genuine, "--config", tmp_path / "config.json")
    assert outcome.code == 1
    assert f"problem: files in {genuine} are missing: __1_0.distcp, __3_1.distcp; truncated: __2_0" in " ".join(
        outcome.out
    )


@pytest.fixture(scope="module")
def to_cut(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copies of everything for tests that cut files and mend them again."""
    where = shutil.copytree(pristine, tmp_path_factory.mktemp("cut") / "all", symlinks=True)
    for case in ("td_0123", "common_0192"):
        shutil.copytree(folder(case) / "checkpoint", where / case / "checkpoint")
        shutil.copy(folder(case) / "config.json", where / case)
    return where


@settings(max_examples=150)
@given(data=st.data())
def test_a_file_cut_short_anywhere(data: st.DataObject, to_cut: Path) -> None:
    """Every prefix of every file that is read is refused, and the file or what is wrong with it is named."""
    case = data.draw(st.sampled_from(["ckpt", "td_0123", "common_0192", "hf", "many"]))
    where = to_cut / case
    files = [path for path in where.rglob("*") if path.is_file() and str(path.relative_to(where)) not in NOT_READ]
    path = data.draw(st.sampled_from(sorted(files)))
    whole = path.read_bytes()
    end = len(whole.rstrip(b"\n") if path.suffix == ".json" else whole)
    size = data.draw(st.integers(0, end - 1) | st.integers(max(0, end - 70), end - 1))
    if case in ("hf", "many"):
        arguments: tuple[object, ...] = ("from-hf", where, to_cut / "out")
    elif case == "ckpt":
        arguments = ("to-hf", where, to_cut / "out")
    else:
        arguments = ("to-hf", where / "checkpoint", to_cut / "out", "--config", where)
    path.write_bytes(whole[:size])
    try:
        line = refusal(to_cut, *arguments)
    finally:
        path.write_bytes(whole)
        shutil.rmtree(to_cut / "out", ignore_errors=True)
    assert str(where) in line


#: Files that only travel along, or of which a part may say nothing wrong.
NOT_READ = (
    "release/run_config.yaml",
    "release/train_state.pt",
    "generation_config.json",
    "release/hf/generation_config.json",
    "release/hf/config.json",
    "hf/generation_config.json",
    "hf/config.json",  # a warning says that it cannot be compared
    "hf/dist_ckpt_mistral.json",
    "checkpoint/integrity.json",
    "release/checksums.json",
)


def test_a_damaged_config_that_travelled_along(ckpt: Path, tmp_path: Path) -> None:
    """A config.json inside the checkpoint that was cut short is not exported as if it were whole."""
    config = ckpt / "release" / "hf" / "config.json"
    config.write_bytes(config.read_bytes()[:-3])
    outcome = run("to-hf", ckpt, tmp_path / "out")
    assert outcome.code == 1
    assert outcome.err[-1].startswith(f"error: invalid JSON in {config}: ")
    assert not (tmp_path / "out").exists()


# What .metadata says


def test_missing_and_unknown_tensors_are_all_listed(genuine: Path, tmp_path: Path) -> None:
    """Two tensors gone, one under another name, one too many: one line names the four."""
    with edited_metadata(genuine) as metadata:
        described = metadata.state_dict_metadata
        del described["output_layer.weight"], described["decoder.layers.mlp.linear_fc2.weight"]
        described["decoder.layers.mlp.linear_fc9.weight"] = described.pop(FC1)
        for index, info in list(metadata.storage_data.items()):
            if index.fqn == FC1:
                metadata.storage_data[type(index)("decoder.layers.mlp.linear_fc9.weight", index.offset)] = info
            if index.fqn not in described:
                del metadata.storage_data[index]
    line = refusal(tmp_path, "to-hf", genuine, tmp_path / "out", "--config", tmp_path / "config.json")
    assert f"3 tensors are missing: {FC1}, decoder.layers.mlp.linear_fc2.weight, output_layer.weight" in line
    assert "1 tensor is unknown to the table: decoder.layers.mlp.linear_fc9.weight [4, 192, 64]" in line


def test_missing_hugging_face_tensors_are_all_listed(hf: Path, tmp_path: Path) -> None:
    """The same for a Hugging Face file: missing, unknown and misshapen tensors in one line."""
    tensors = load_file(hf / "model.safetensors")
    tensors["lm_head.bias"] = tensors.pop("model.norm.weight")
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(20, 23)
    del tensors["model.layers.0.self_attn.k_proj.weight"]
    save_file(tensors, hf / "model.safetensors")
    line = refusal(tmp_path, "from-hf", hf, tmp_path / "out")
    assert "2 tensors are missing: model.layers.0.self_attn.k_proj.weight, model.norm.weight" in line
    assert "1 tensor is unknown to the table: lm_head.bias [24]" in line
    assert "shape of model.layers.1.mlp.up_proj.weight: expected [20, 24], got [20, 23]" in line


def test_shapes_against_the_config(genuine: Path, hf: Path, tmp_path: Path) -> None:
    """A config of other sizes is refused with every tensor that it does not fit; a larger vocabulary too."""
    edit_json(tmp_path / "config.json", intermediate_size=97, vocab_size=257)
    line = refusal(tmp_path, "to-hf", genuine, tmp_path / "out", "--config", tmp_path / "config.json")
    assert f"shape of {FC1}: expected [4, 194, 64], got [4, 192, 64]" in line
    assert "shape of decoder.layers.mlp.linear_fc2.weight: expected [4, 64, 97], got [4, 64, 96]" in line
    for key in ("embedding.word_embeddings.weight", "output_layer.weight"):
        assert f"shape of {key}: expected at least [257, 64], got [256, 64]" in line
    edit_json(hf / "config.json", num_key_value_heads=1, num_hidden_layers=3)
    line = refusal(tmp_path, "from-hf", hf, tmp_path / "out")
    assert "shape of model.layers.0.self_attn.k_proj.weight: expected [10, 24], got [20, 24]" in line
    assert "9 tensors are missing: model.layers.2." in line
    edit_json(hf / "config.json", num_key_value_heads=2, num_hidden_layers=1)
    assert "9 tensors are unknown to the table: model.layers.1." in refusal(tmp_path, "from-hf", hf, tmp_path / "out")


def entry_of(metadata: Any, fqn: str, number: int = 0) -> Any:  # noqa: ANN401  (torch's record)
    """The place of one stored entry, to edit."""
    return sorted(
        ((index, info) for index, info in metadata.storage_data.items() if index.fqn == fqn),
        key=lambda pair: tuple(pair[0].offset or ()),
    )[number][1]


def drop_chunk(metadata: Any) -> None:  # noqa: ANN401  (torch's record)
    """Leave one chunk out of the description and of the storage."""
    chunk = metadata.state_dict_metadata[FC1].chunks.pop(3)
    metadata.storage_data = {
        index: info
        for index, info in metadata.storage_data.items()
        if (index.fqn, index.offset) != (FC1, chunk.offsets)
    }


def drop_storage(metadata: Any) -> None:  # noqa: ANN401  (torch's record)
    """Describe a chunk and say nowhere where it is."""
    metadata.storage_data = {index: info for index, info in metadata.storage_data.items() if index.fqn != NORM}


def double_chunk(metadata: Any) -> None:  # noqa: ANN401  (torch's record)
    """Describe a chunk twice."""
    metadata.state_dict_metadata[FC1].chunks.append(metadata.state_dict_metadata[FC1].chunks[0])


def move_chunk(metadata: Any) -> None:  # noqa: ANN401  (torch's record)
    """Let a chunk begin one row too early: it overlaps its neighbour, and leaves a gap behind itself."""
    chunk = next(chunk for chunk in metadata.state_dict_metadata[FC1].chunks if chunk.offsets[1] == 48)
    index, info = next(
        (index, info)
        for index, info in metadata.storage_data.items()
        if (index.fqn, index.offset) == (FC1, chunk.offsets)
    )
    del metadata.storage_data[index]
    chunk.offsets = torch.Size([chunk.offsets[0], 47, 0])
    metadata.storage_data[type(index)(FC1, chunk.offsets)] = info


def move_outside(metadata: Any) -> None:  # noqa: ANN401  (torch's record)
    """Let the tensor end before its last chunk does."""
    metadata.state_dict_metadata[NORM].size = torch.Size([64])
    metadata.state_dict_metadata[NORM].chunks[0].offsets = torch.Size([1])
    info = entry_of(metadata, NORM)
    index = next(index for index in metadata.storage_data if index.fqn == NORM)
    del metadata.storage_data[index]
    metadata.storage_data[type(index)(NORM, torch.Size([1]))] = info


def swap_entries(metadata: Any) -> None:  # noqa: ANN401  (torch's record)
    """Let a chunk point to the archive of another."""
    entry_of(metadata, NORM).__dict__.update(vars(entry_of(metadata, FC1)))


def set_entry(**values: object) -> Callable[[Any], None]:
    """An edit of the place of the final norm."""
    return lambda metadata: vars(entry_of(metadata, NORM)).update(values)


def set_size(size: object) -> Callable[[Any], None]:
    """An edit of the shape of the final norm."""
    return lambda metadata: setattr(metadata.state_dict_metadata[NORM], "size", size)


def set_dtype(dtype: torch.dtype) -> Callable[[Any], None]:
    """An edit of the dtype of the final norm."""
    return lambda metadata: setattr(metadata.state_dict_metadata[NORM].properties, "dtype", dtype)


def test_all_chunks_that_are_wrong_are_listed(genuine: Path, tmp_path: Path) -> None:
    """One line tells of gaps and overlaps in several tensors, or of chunks stored nowhere and described twice."""
    whole = (genuine / ".metadata").read_bytes()
    arguments = ("to-hf", genuine, tmp_path / "out", "--config", tmp_path / "config.json")
    with edited_metadata(genuine) as metadata:
        gone = [metadata.state_dict_metadata[FC2].chunks.pop(number).offsets for number in (5, 2)]
        metadata.storage_data = {
            index: info
            for index, info in metadata.storage_data.items()
            if (index.fqn, index.offset) not in {(FC2, offset) for offset in gone}
        }
        move_chunk(metadata)
    line = refusal(tmp_path, *arguments)
    assert all(repr(key) in line for key in (FC1, FC2))
    assert line.count("nothing is stored for") == 3
    assert line.count("2 boxes overlap") == 1
    (genuine / ".metadata").write_bytes(whole)
    with edited_metadata(genuine) as metadata:
        drop_storage(metadata)
        double_chunk(metadata)
        metadata.state_dict_metadata[FC1].chunks.append(metadata.state_dict_metadata[FC1].chunks[1])
        first, second = (list(chunk.offsets) for chunk in metadata.state_dict_metadata[FC1].chunks[:2])
    line = refusal(tmp_path, *arguments)
    assert f"chunks of {NORM!r}: 1 stored nowhere, at [0]" in line
    assert f"chunks of {FC1!r}: 2 described more than once, at {first}, {second}" in line


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (drop_chunk, (repr(FC1), "nothing is stored for [")),
        (drop_storage, (repr(NORM), "stored nowhere")),
        (double_chunk, (repr(FC1), "1 described more than once, at [")),
        (move_chunk, (repr(FC1), "47:48", "overlap")),
        (move_outside, (repr(NORM), "[1:65] lies outside the tensor of shape [64]")),
        (swap_entries, (repr(NORM), "__", "expected float32 [64], got bfloat16 [1, 48, 64]")),
        (set_entry(relative_path="../__0_0.distcp"), ("'../__0_0.distcp'", "expected the plain name of a file")),
        (set_entry(relative_path="/etc/passwd"), ("'/etc/passwd'", "expected the plain name of a file")),
        (set_entry(relative_path=".."), ("'..'", "expected the plain name of a file")),
        (set_entry(relative_path=""), ("''", "expected the plain name of a file")),
        (set_entry(relative_path=7), ("file 7:", "expected the plain name of a file")),
        (set_entry(relative_path="nul\0name"), ("error: ",)),
        (set_entry(offset=-1), (".metadata", "-1")),
        (set_entry(offset=True), (".metadata", "True")),
        (set_entry(offset=2**58), ("truncated", "expected at least 2882303761517")),
        (set_entry(offset=2**62), (".metadata", "it places an archive at 46116860184")),
        (set_entry(length=0), (repr(NORM), "truncated")),
        (set_entry(length=100), (repr(NORM), "not a torch.save archive, or it is truncated")),
        (set_entry(offset=64), (repr(NORM), "at byte 64 of")),
        (set_entry(transform_descriptors=["zstd"]), ("transformed data (['zstd'])", "not supported")),
        (set_size(torch.Size([65])), (NORM, "expected [64], got [65]")),
        (set_size(torch.Size([64, 1])), (repr(NORM), "a chunk", "has 1 axes, the tensor has 2")),
        (set_size([64]), (".metadata", "expected sizes, got [64]")),
        (set_size((64.0,)), (".metadata", "expected sizes, got (64.0,)")),
        (set_size(None), (".metadata", "expected sizes, got None")),
        (set_dtype(torch.complex64), (repr(NORM), "unknown dtype", "got 'complex64'")),
        (set_dtype(torch.float16), (repr(NORM), "expected float16 [64], got float32 [64]")),
        (lambda metadata: setattr(metadata, "storage_data", []), (".metadata",)),
        (lambda metadata: delattr(metadata, "state_dict_metadata"), (".metadata",)),
    ],
)
def test_damaged_metadata(
    edit: Callable[[Any], None], expected: tuple[str, ...], genuine: Path, tmp_path: Path
) -> None:
    """Chunks that are missing, doubled, moved, misplaced or of another type: refused, with the tensor or the value."""
    with edited_metadata(genuine) as metadata:
        edit(metadata)
    line = refusal(tmp_path, "to-hf", genuine, tmp_path / "out", "--config", tmp_path / "config.json")
    assert [text for text in expected if text not in line] == [], line


# Pickles that want to run something


class Payload:
    """Unpickles into a call."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        """Call ``function(*arguments)`` when unpickled."""
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        """Tell pickle what to call."""
        return self.call


def payloads(sentinel: Path) -> dict[str, tuple[bytes, str]]:
    """Pickles that create ``sentinel`` where an ordinary unpickler reads them, and the name that each asks for."""
    touch = f"touch {sentinel}"
    write = f"open({str(sentinel)!r}, 'w').close()"
    calls = {
        "os.system": Payload(os.system, touch),
        "eval": Payload(builtins.eval, write),
        "exec": Payload(builtins.exec, write),
        "check_call": Payload(subprocess.check_call, ["touch", str(sentinel)]),
        "partial": Payload(functools.partial(os.system, touch)),
        "attrgetter": Payload(operator.methodcaller("system", touch), os),
        "inside a dict": {"args": [Payload(os.system, touch)]},
    }
    asked = {"eval": "builtins.eval", "exec": "builtins.exec", "check_call": "subprocess.check_call"}
    asked |= {"partial": "functools.partial", "attrgetter": "operator.methodcaller"}
    result = {}
    for name, call in calls.items():
        if name != "attrgetter":  # modules cannot be pickled
            result[name] = (pickle.dumps(call), asked.get(name, f"{os.system.__module__}.system"))
    line = touch.encode()
    result["INST opcode"] = (b"(S'" + line + b"'\nios\nsystem\n.", "the opcode STRING")
    result["dotted name"] = (
        b"\x80\x04\x8c\x13torch.serialization\x8c\x09os.system\x93\x8c" + bytes([len(line)]) + line + b"\x85R.",
        "torch.serialization.os.system",
    )
    return result


KINDS = [*payloads(Path("x"))]


def archive(pickled: bytes, **records: bytes) -> bytes:
    """A torch.save archive as torch would write it around a pickle, made by Python's zipfile."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as zipped:
        for name, content in {"data.pkl": pickled, "byteorder": b"little", **records, "version": b"3\n"}.items():
            zipped.writestr(f"archive/{name}", content)
    return buffer.getvalue()


@pytest.fixture(params=KINDS)
def payload(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, str, Path]:
    """A pickle that is shown to be dangerous, the name it asks for, and the file that must not appear."""
    sentinel = tmp_path_factory.mktemp("danger") / "x"
    pickled, asked = payloads(sentinel)[request.param]
    pickle.loads(pickled)  # noqa: S301  (to see that it would do it)
    assert sentinel.exists()
    sentinel.unlink()
    return pickled, asked, sentinel


@pytest.mark.parametrize("place", [".metadata", "planner_data", "common.pt", "chunk", "common state in shards"])
def test_nothing_of_a_pickle_is_executed(
    place: str, payload: tuple[bytes, str, Path], genuine: Path, tmp_path: Path
) -> None:
    """Wherever a checkpoint has a pickle, one that wants to run something is refused by the name that it asks for."""
    pickled, asked, sentinel = payload
    if place == ".metadata":
        (genuine / ".metadata").write_bytes(pickled)
    elif place == "common.pt":
        (genuine / "common.pt").write_bytes(archive(pickled))
    elif place == "planner_data":
        with edited_metadata(genuine) as metadata:
            metadata.planner_data = "planned"
        content = (genuine / ".metadata").read_bytes()
        head, body = (b"\x80\x04", pickled[2:-1]) if pickled[:1] == b"\x80" else (b"", pickled[:-1])
        body = body[9:] if body[:1] == b"\x95" else body  # the frame of protocol 4
        # the payload is put onto the stack and popped again, before the genuine record
        (genuine / ".metadata").write_bytes(head + body + b"0" + content[2:])
    else:
        blob = archive(pickled, **{"data/0": bytes(256)})
        (genuine / "more.distcp").write_bytes(blob)
        with edited_metadata(genuine) as metadata:
            if place == "chunk":
                set_entry(relative_path="more.distcp", offset=0, length=len(blob))(metadata)
            else:
                (genuine / "common.pt").unlink()
                objects = [index for index in metadata.storage_data if "_extra_state" in index.fqn]
                info = metadata.storage_data.pop(objects[0])
                vars(info).update(relative_path="more.distcp", offset=0, length=len(blob))
                metadata.storage_data[type(objects[0])("common_state/shard_0_1")] = info
                described = metadata.state_dict_metadata.pop(objects[0].fqn)
                metadata.state_dict_metadata["common_state/shard_0_1"] = described
    line = refusal(tmp_path, "to-hf", genuine, tmp_path / "out", "--config", tmp_path / "config.json")
    assert f"asks for {asked}, which is outside the allowlist. Nothing of it was executed." in line
    assert str(genuine) in line
    assert not sentinel.exists()


# Hugging Face files


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda h: h["model.norm.weight"].update(dtype="F4"), "unknown dtype for 'model.norm.weight'"),
        (lambda h: h["model.norm.weight"].update(dtype=None), "got None"),
        (lambda h: h["model.norm.weight"].update(shape=[12, -2]), "bad shape or data_offsets of 'model.norm.weight'"),
        (lambda h: h["model.norm.weight"].update(shape=[24.0]), "got [24.0]"),
        (lambda h: h["model.norm.weight"].update(shape=[True] * 24), "bad shape or data_offsets"),
        (lambda h: h["model.norm.weight"].update(shape=[12]), "expected 24 bytes (bfloat16 [12])"),
        (lambda h: h["model.norm.weight"].update(data_offsets=[0]), "got [24] and [0]"),
        (lambda h: h["model.norm.weight"].update(data_offsets=[8, 0]), "size mismatch for 'model.norm.weight'"),
        (lambda h: h.update({"model.norm.weight": "x"}), "bad header entry of 'model.norm.weight'"),
        (lambda h: shift(h, -48), "'model.norm.weight' in {path} overlap or leave a gap"),
        (lambda h: shift(h, 48), "'model.norm.weight' in {path} overlap or leave a gap"),
    ],
)
def test_damaged_headers(edit: Callable[[dict[str, Any]], object], expected: str, hf: Path, tmp_path: Path) -> None:
    """Unknown dtypes, sizes that are none, overlaps and gaps in a safetensors header: the tensor and file are named."""
    edit_header(hf / "model.safetensors", edit)
    line = refusal(tmp_path, "from-hf", hf, tmp_path / "out")
    assert str(hf / "model.safetensors") in line
    assert expected.replace("{path}", str(hf / "model.safetensors")) in line


def shift(header: dict[str, Any], num_bytes: int) -> None:
    """Move the last tensor of a file."""
    entry = header["model.norm.weight"]
    assert entry["data_offsets"][1] == max(e["data_offsets"][1] for n, e in header.items() if n != "__metadata__")
    entry["data_offsets"] = [at + num_bytes for at in entry["data_offsets"]]


def test_names_that_stand_twice(hf: Path, many: Path, tmp_path: Path) -> None:
    """JSON with a key twice is refused, wherever it stands: which one holds is anybody's guess."""
    content = (hf / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].rstrip()
    double = (
        header[:-1] + b',"model.norm.weight":' + json.dumps(json.loads(header)["model.norm.weight"]).encode() + b"}"
    )
    (hf / "model.safetensors").write_bytes(len(double).to_bytes(8, "little") + double + content[8 + length :])
    line = refusal(tmp_path, "from-hf", hf, tmp_path / "out")
    assert f"duplicate JSON keys 'model.norm.weight' in {hf / 'model.safetensors'}" in line
    for name, key in (("model.safetensors.index.json", "weight_map"), ("config.json", "vocab_size")):
        text = (many / name).read_text()
        (many / name).write_text(text.rstrip()[:-1] + f', "{key}": 1}}')
        assert f"duplicate JSON keys '{key}' in {many / name}" in refusal(tmp_path, "from-hf", many, tmp_path / "out")
        (many / name).write_text(text)


def test_an_index_that_names_absent_files(many: Path, tmp_path: Path) -> None:
    """All files that the index names and that are not there are listed."""
    gone = sorted(many.glob("*.safetensors"))[1:3]
    for path in gone:
        path.unlink()
    line = refusal(tmp_path, "from-hf", many, tmp_path / "out")
    assert f"names files that are absent: {gone[0].name}, {gone[1].name}. Get them first." in line


@pytest.mark.parametrize(
    ("weight_map", "expected"),
    [
        ({"model.norm.weight": "../hf/model.safetensors"}, "'../hf/model.safetensors'"),
        ({"model.norm.weight": "/etc/passwd"}, "'/etc/passwd'"),
        ({"model.norm.weight": "config.json"}, "'config.json'"),
        ({"model.norm.weight": 3}, "names 3"),
        ({"model.norm.weight": None}, "names None"),
        ({}, "has no weight_map"),
        (["model.safetensors"], "has no weight_map"),
        ({"model.norm.weight": "model-00001-of-00007.safetensors"}, "disagree about"),
    ],
)
def test_an_index_that_names_other_files(weight_map: object, expected: str, many: Path, tmp_path: Path) -> None:
    """Only plain names of .safetensors files beside the index are followed, and they must hold what it says."""
    edit_json(many / "model.safetensors.index.json", weight_map=weight_map)
    line = refusal(tmp_path, "from-hf", many, tmp_path / "out")
    assert str(many) in line
    assert expected in line


def test_element_types_that_do_not_go_together(hf: Path, tmp_path: Path) -> None:
    """Queries, keys and values become one tensor, so they must be of one dtype, or ``--dtype`` chooses one."""
    tensors = load_file(hf / "model.safetensors")
    tensors["model.layers.1.self_attn.v_proj.weight"] = tensors["model.layers.1.self_attn.v_proj.weight"].half()
    save_file(tensors, hf / "model.safetensors")
    line = refusal(tmp_path, "from-hf", hf, tmp_path / "out")
    assert "'decoder.layers.self_attention.linear_qkv.weight'" in line
    assert "float16: model.layers.1.self_attn.v_proj.weight. Give --dtype" in line
    assert run("from-hf", hf, tmp_path / "out", "--dtype", "float32").code == 0
    dcm.to_hf(tmp_path / "out", tmp_path / "exported")
    found = load_file(tmp_path / "exported" / "model.safetensors")
    assert all(found[name].equal(tensor.float()) for name, tensor in tensors.items())


def test_element_types_that_no_archive_has(hf: Path, tmp_path: Path) -> None:
    """float8 numbers that no scales make weights are refused: torch's typed storages cannot say them."""
    tensors = load_file(hf / "model.safetensors")
    save_file({name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items()}, hf / "model.safetensors")
    line = refusal(tmp_path, "from-hf", hf, tmp_path / "out")
    assert (
        f"the FP8 weights (float8_e4m3fn) in {hf} cannot be dequantized: {len(tensors)} of them have no scales" in line
    )


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda record: record.update(version=99), "has version 99: this release reads version 1. Update it."),
        (lambda record: record.pop("hf_config"), "has no hf_config"),
        (lambda record: record.update(hf_config={"model_type": "llama"}), "model_type 'llama'"),
        (lambda record: record.update(hf_files=[1]), "the layout of the Hugging Face files"),
        (lambda record: rename_file(record, "../model.safetensors"), "names '../model.safetensors'"),
        (lambda record: rename_file(record, "/tmp/model.safetensors"), "names '/tmp/model.safetensors'"),  # noqa: S108
        (lambda record: rename_file(record, "config.json"), "names 'config.json'"),
        (
            lambda record: record["hf_files"]["headers"].update({"model.safetensors": "{"}),
            "the header of model.safetensors",
        ),
    ],
)
def test_damaged_memory_of_the_import(
    edit: Callable[[dict[str, Any]], object], expected: str, ckpt: Path, tmp_path: Path
) -> None:
    """What an import left in the common state is checked like any input: nothing is written where it says."""
    common_file = ckpt / "release" / "common.pt"
    common = torch.load(common_file, weights_only=False)
    edit(common["content_metadata"]["dist_ckpt_mistral"])
    torch.save(common, common_file)
    assert expected in refusal(tmp_path, "to-hf", ckpt, tmp_path / "out")


def rename_file(record: dict[str, Any], name: str) -> None:
    """Give the only file another name."""
    headers = record["hf_files"]["headers"]
    headers[name] = headers.pop("model.safetensors")


# Configurations


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"hidden_size": 24.0}, "hidden_size must be a positive integer, got 24.0"),
        ({"hidden_size": math.nan}, "hidden_size must be a positive integer, got nan"),
        ({"vocab_size": True}, "vocab_size must be a positive integer, got True"),
        ({"vocab_size": "50"}, "vocab_size must be a positive integer, got '50'"),
        ({"intermediate_size": -20}, "intermediate_size must be a positive integer, got -20"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive integer, got 0"),
        ({"num_attention_heads": [4]}, "num_attention_heads must be a positive integer, got [4]"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 must be a multiple of num_key_value_heads=3"),
        ({"head_dim": 2.5}, "head_dim must be a positive integer, got 2.5"),
        ({"head_dim": ..., "hidden_size": 26}, "hidden_size=26 is not a multiple of num_attention_heads=4"),
        ({"sliding_window": 0}, "sliding_window must be a positive integer or null, got 0"),
        ({"sliding_window": False}, "sliding_window must be a positive integer or null, got False"),
        ({"max_position_embeddings": None}, "max_position_embeddings must be a positive integer, got None"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps must be a positive number, got nan"),
        ({"rms_norm_eps": math.inf}, "rms_norm_eps must be a positive number, got inf"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps must be a positive number, got '1e-5'"),
        ({"rope_parameters": {"rope_theta": 10**400}}, "rope_theta must be a positive number, got 1000"),
        ({"rope_parameters": {"rope_theta": -1}}, "rope_theta must be a positive number, got -1"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings must be true or false, got 'no'"),
        ({"dtype": "float99"}, "dtype must be one of"),
        ({"dtype": ["bfloat16"]}, "dtype must be one of"),
        ({"vocab_size": ..., "hidden_size": None}, "lacks vocab_size, hidden_size"),
        (
            {"vocab_size": -1, "head_dim": 0, "sliding_window": -2},
            "vocab_size must be a positive integer, got -1; head_dim must be a positive integer, got 0; sliding_window",
        ),
    ],
)
def test_configs_whose_sizes_do_not_fit(
    changes: dict[str, object], expected: str, hf: Path, genuine: Path, tmp_path: Path
) -> None:
    """Every size that is none, contradicts another or is missing is named, all of a config together."""
    edit_json(hf / "config.json", **changes)
    for arguments in (("from-hf", hf, tmp_path / "out"), ("to-hf", genuine, tmp_path / "out", "--config", hf)):
        line = refusal(tmp_path, *arguments)
        assert expected in line
        assert str(hf / "config.json") in line


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"null", b'{"a": 1, "a": 2}', b"[" * 100_000])
def test_configs_that_are_no_json(content: bytes, hf: Path, tmp_path: Path) -> None:
    """A config.json that is no JSON object is named."""
    (hf / "config.json").write_bytes(content)
    line = refusal(tmp_path, "from-hf", hf, tmp_path / "out")
    assert f"in {hf / 'config.json'}" in line
    assert "JSON" in line


def test_layouts_that_do_not_fit(hf: Path, tmp_path: Path) -> None:
    """A cut that Megatron could not load is refused with its reasons."""
    line = refusal(tmp_path, "from-hf", hf, tmp_path / "out", "--tp", 3, "--pp", 3, "--ep", 2)
    assert "num_attention_heads=4 is not divisible by tp=3" in line
    assert "num_hidden_layers=2 is not divisible by 3 pipeline stages" in line
    assert "ep=2 needs experts" in line


# Outputs


def both_ways(hf: Path, ckpt: Path) -> list[tuple[str, Path]]:
    """The two commands that write, with their input."""
    return [("from-hf", hf), ("to-hf", ckpt)]


def test_existing_outputs_are_kept(hf: Path, ckpt: Path, tmp_path: Path) -> None:
    """A directory with content, a file or a broken link in the way stays unless asked; an empty directory is used."""
    for command, source in both_ways(hf, ckpt):
        output = tmp_path / command
        output.mkdir()
        (output / "precious").write_text("old")
        line = refusal(tmp_path, command, source, output)
        assert f"the output {output} exists. Choose another name or give --overwrite." in line
        assert run(command, source, output, "--overwrite").code == 0
        assert not (output / "precious").exists()
        shutil.rmtree(output)
        output.mkdir()
        assert run(command, source, output).code == 0
        for obstacle in (tmp_path / "file", tmp_path / "link"):
            if obstacle.name == "file":
                obstacle.write_text("old")
            else:
                obstacle.symlink_to("nowhere")
            assert "exists" in refusal(tmp_path, command, source, obstacle)
            obstacle.unlink()
    assert contents(tmp_path / "to-hf") == contents(hf)


def test_a_training_is_never_replaced(hf: Path, ckpt: Path, tmp_path: Path) -> None:
    """A root with several iterations is refused, also with --overwrite; an import replaces only another import."""
    for command, source in both_ways(hf, ckpt):
        output = tmp_path / command
        for step in ("iter_0000010", "iter_0000020"):
            (output / step).mkdir(parents=True)
        line = refusal(tmp_path, command, source, output, "--overwrite")
        assert "holds 2 checkpoints (iter_0000010 to iter_0000020), which --overwrite would all remove" in line
        (output / "iter_0000020").rmdir()
        if command == "from-hf":
            assert "holds iter_0000010, which an import" in refusal(tmp_path, command, source, output, "--overwrite")
            (output / "iter_0000010").rename(output / "release")
        assert run(command, source, output, "--overwrite").code == 0


def test_an_old_output_survives_a_failing_run(hf: Path, ckpt: Path, tmp_path: Path) -> None:
    """With --overwrite, what was there stays as it was until the new one is complete, here: for ever."""
    (hf / "model.safetensors").write_bytes((hf / "model.safetensors").read_bytes()[:-1])
    (ckpt / "release" / "__3_0.distcp").unlink()
    for command, source in both_ways(hf, ckpt):
        output = tmp_path / command
        output.mkdir()
        (output / "precious").write_text("old")
        refusal(tmp_path, command, source, output, "--overwrite")
        assert contents(output) == {"precious": b"old"}


def test_outputs_in_inputs(hf: Path, ckpt: Path, tmp_path: Path) -> None:
    """An output that is the input, lies in it or around it is refused, also with --overwrite and through a link."""
    (tmp_path / "link").symlink_to(tmp_path)
    for command, source in both_ways(hf, ckpt):
        for output in (source, source / "out", source.parent, tmp_path / "link" / source.name / "a" / "b"):
            line = refusal(tmp_path, command, source, output, "--overwrite")
            assert f"the output {output} and the input {source} must lie apart" in line
            line = refusal(tmp_path, command, source, output)
            assert "must lie apart" in line or (output.exists() and "exists" in line)


def test_an_output_appears_whole(ckpt: Path, hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While data is written there is no output yet, and what makes it readable is written after all data."""
    seen = []
    write = local.TargetFile.write

    def spy(target: local.TargetFile, position: int, data: memoryview | bytes) -> None:
        seen.append((tmp_path / "out").exists())
        names = {path.name for path in target.path.parent.iterdir()}
        assert names.isdisjoint({".metadata", "model.safetensors.index.json", "latest_checkpointed_iteration.txt"})
        write(target, position, data)

    monkeypatch.setattr(local.TargetFile, "write", spy)
    for command, source in both_ways(hf, ckpt):
        assert run(command, source, tmp_path / "out").code == 0
        shutil.rmtree(tmp_path / "out")
    assert len(seen) > 20
    assert not any(seen)


def test_too_little_space(ckpt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is too small is refused before the first byte."""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    outcome = run("to-hf", ckpt, tmp_path / "out")
    assert outcome.code == 1
    assert "bytes are needed, 1000 are free" in outcome.err[-1]
    assert not (tmp_path / "out").exists()


# Usage and comparison


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("frobnicate",),
        ("to-hf",),
        ("to-hf", "a"),
        ("to-hf", "a", "b", "c"),
        ("to-hf", "a", "b", "--dtype", "float64"),
        ("to-hf", "a", "b", "--max-file-size", "big"),
        ("to-hf", "a", "b", "--max-file-size", "0"),
        ("to-hf", "a", "b", "--max-file-size", "9" * 400),
        ("to-hf", "a", "b", "--workers", "0"),
        ("from-hf", "a", "b", "--tp", "0"),
        ("from-hf", "a", "b", "--tp", "1.5"),
        ("from-hf", "a", "b", "--iteration", "-1"),
        ("inspect",),
        ("verify",),
        ("verify", "a", "b", "--nonsense"),
    ],
    ids=" ".join,
)
def test_wrong_usage(arguments: tuple[str, ...]) -> None:
    """Wrong usage exits with 2 and shows how it is meant."""
    outcome = run(*arguments)
    assert (outcome.code, outcome.out) == (2, [])
    assert outcome.err[0].startswith("usage: dist-ckpt-mistral")


def test_verify_names_what_differs(hf: Path, ckpt: Path, tmp_path: Path) -> None:
    """Equal models exit with 0; one flipped bit, another dtype or shape exits with 3 and names the tensor."""
    assert run("verify", hf, ckpt).code == 0
    content = bytearray((hf / "model.safetensors").read_bytes())
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    name = "model.layers.1.mlp.down_proj.weight"
    at = 8 + int.from_bytes(content[:8], "little") + header[name]["data_offsets"][1] - 1
    content[at] ^= 1
    (hf / "model.safetensors").write_bytes(content)
    outcome = run("verify", hf, ckpt)
    assert (outcome.code, outcome.err) == (3, [])
    last = header[name]["data_offsets"][1] - header[name]["data_offsets"][0] - 1
    assert outcome.out[0] == f"{name}: bits differ from byte {last} of the bfloat16 data on"
    assert outcome.out[1].startswith("DIFFERENT in 1 tensor: 21 tensors")
    told = json.loads("\n".join(run("verify", ckpt, hf, "--json").out))
    assert (told["equal"], [each["hf_name"] for each in told["differences"]]) == (False, [name])
    other = saved(
        random_model(torch.float16, **SIZES | {"intermediate_size": 12, "num_hidden_layers": 1}), tmp_path / "b"
    )
    outcome = run("verify", ckpt, other)
    assert outcome.code == 3
    assert "model.norm.weight: bfloat16 [24] in A, float16 [24] in B" in outcome.out
    assert "model.layers.0.mlp.down_proj.weight: bfloat16 [24, 20] in A, float16 [24, 12] in B" in outcome.out
    assert f"{name}: only in A" in outcome.out


def test_verify_of_what_cannot_be_read(hf: Path, genuine: Path, tmp_path: Path) -> None:
    """Comparing exits with 1, not 3, where there is nothing to compare."""
    assert "there is no such directory" in refusal(tmp_path, "verify", hf, tmp_path / "none")
    line = refusal(tmp_path, "verify", genuine, genuine)
    assert "neither a Hugging Face configuration nor Megatron's args" in line
    assert "does not hold the model that its configuration describes" in refusal(tmp_path, "verify", hf, genuine)


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    """With --debug the error itself comes out, for its traceback."""
    with pytest.raises(Exception, match="there is no such directory"):
        run("inspect", tmp_path / "none", "--debug")
