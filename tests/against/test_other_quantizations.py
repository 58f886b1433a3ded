"""Quantized releases that are not FP8, and block sizes that are none, are refused by name; leftovers do no harm."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command_line import refusal, run
from fp8_models import PER_BLOCK, PER_TENSOR, WEIGHTS, Q, Tensors, edit, save_fp8, tell
from hf_models import random_model, saved

import dist_ckpt_mistral as dcm

OTHER_METHODS: list[tuple[object, str]] = [
    *(
        ({"quant_method": method}, f"quant_method {method!r}")
        for method in (
            *("awq", "gptq", "bitsandbytes", "eetq", "fbgemm_fp8", "mxfp4", "torchao", "hqq", "quanto", "aqlm"),
            *("modelopt", "auto-round", "fp_quant"),
        )
    ),
    ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "format 'pack-quantized'"),
    ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, "format 'nvfp4-pack-quantized'"),
    ({"quant_method": "compressed-tensors"}, "quant_method 'compressed-tensors'"),
    ({"load_in_4bit": True}, "quant_method None"),
    ({"quant_method": ["fp8"]}, "quant_method ['fp8']"),
    ("int4", "quant_method 'int4'"),
]


@pytest.mark.parametrize(("told", "expected"), OTHER_METHODS)
def test_other_methods_are_refused_by_name(told: object, expected: str, tmp_path: Path) -> None:
    """Where tensors are quantized, what config.json says of it and cannot be read is named, with what to do."""
    hf = save_fp8(tmp_path / "hf", PER_TENSOR)
    tell(hf, quantization_config=told)
    line = refusal(tmp_path, "from-hf", hf, tmp_path / "out")
    assert f"{hf} holds weights that are quantized (quant_method " in line
    assert f"{expected} in config.json), which cannot be read: only FP8" in line
    assert line.endswith("Start from the unquantized release.")
    assert len(dcm.inspect(hf).problems) == 1
    assert refusal(tmp_path, "megatron-args", hf) == line
    tell(hf, quantization_config=None, compression_config=told)  # as compressed-tensors called it once
    assert refusal(tmp_path, "from-hf", hf, tmp_path / "out") == line
    tell(hf, _name_or_path="mistralai/Mistral-7B-v0.3")
    line = refusal(tmp_path, "from-hf", hf, tmp_path / "out")
    assert line.endswith(
        "Start from the unquantized release: config.json names mistralai/Mistral-7B-v0.3 as its origin."
    )
    tell(hf, _name_or_path="/home/somebody/model")
    assert refusal(tmp_path, "from-hf", hf, tmp_path / "out").endswith("Start from the unquantized release.")


@pytest.mark.parametrize(("told", "expected"), [*OTHER_METHODS, (PER_TENSOR, "quant_method 'fp8'")])
@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_what_was_left_over_in_config_json(told: object, expected: str, key: str, tmp_path: Path) -> None:
    """A merged model, no tensor of which is quantized, is read as it is; the key goes, and one line says so."""
    hf = saved(random_model(), tmp_path / "hf")
    original = json.loads((hf / "config.json").read_bytes())
    tell(hf, **{key: told})
    done = run("from-hf", hf, tmp_path / "ckpt")
    assert done.code == 0
    (line,) = [line for line in done.err if "quantiz" in line]
    assert line.startswith(f"{hf}: config.json describes quantized weights (")
    assert f"{expected}), but no tensor is quantized: " in line
    assert run("inspect", hf).code == run("megatron-args", hf).code == 0
    dcm.to_hf(tmp_path / "ckpt", tmp_path / "out")
    dcm.to_hf(tmp_path / "ckpt", tmp_path / "again", config=hf)
    for out in (tmp_path / "out", tmp_path / "again"):
        assert json.loads((out / "config.json").read_bytes()) == original
        assert (out / WEIGHTS).read_bytes() == (hf / WEIGHTS).read_bytes()


def test_flags_for_a_config_json_alone(tmp_path: Path) -> None:
    """Without weights nobody knows whether they are quantized: the flags are the model's, and a line says so."""
    hf = saved(random_model(), tmp_path / "hf")
    expected = run("megatron-args", hf)
    (hf / WEIGHTS).unlink()
    tell(hf, quantization_config={"quant_method": "awq"})
    alone = run("megatron-args", hf)
    assert (alone.code, alone.out) == (0, expected.out)
    assert "leaves open whether weights are quantized (quant_method 'awq'): taken as not quantized" in str(alone.err)


MODULE = Q.removesuffix(".weight")


@pytest.mark.parametrize(
    ("name", "dtype", "expected"),
    [
        (f"{MODULE}.qweight", torch.int32, "by GPTQ or AWQ"),
        (f"{MODULE}.qzeros", torch.int32, "by GPTQ or AWQ"),
        (f"{MODULE}.weight_packed", torch.int32, "by compressed-tensors to integers"),
        (f"{MODULE}.weight_zero_point", torch.float32, "by compressed-tensors to integers"),
        (f"{MODULE}.weight_global_scale", torch.float32, "to NVFP4"),
        (f"{MODULE}.weight_scale_2", torch.float32, "to NVFP4"),
        (f"{MODULE}.weight.absmax", torch.float32, "by bitsandbytes"),
        (f"{MODULE}.weight.quant_state.bitsandbytes__nf4", torch.uint8, "by bitsandbytes"),
        (f"{MODULE}.SCB", torch.float32, "by bitsandbytes"),
        (f"{MODULE}.weight_scales", torch.float32, "by EETQ"),
        ("model.layers.0.mlp.experts.gate_up_proj_blocks", torch.uint8, "to MXFP4"),
        (Q, torch.int8, "to int8"),
        (Q, torch.float8_e5m2, "to float8_e5m2"),
    ],
)
def test_other_methods_are_known_by_their_tensors(name: str, dtype: torch.dtype, expected: str, tmp_path: Path) -> None:
    """Without a word in config.json the tensors tell which method it was."""
    hf = saved(random_model(), tmp_path / "hf")

    def replace(tensors: Tensors) -> None:
        del tensors[Q]
        tensors[name] = torch.zeros(40, 24).to(dtype)

    edit(hf, replace)
    line = refusal(tmp_path, "from-hf", hf, tmp_path / "out")
    assert f"{hf} holds weights that are quantized {expected} ({name!r}), which cannot be read: only FP8" in line
    assert line.endswith("Start from the unquantized release.")


def test_gguf_files_are_known(tmp_path: Path) -> None:
    """A GGUF file, and a directory of them, are called that."""
    folder = saved(random_model(), tmp_path / "hf")
    (folder / WEIGHTS).rename(folder / "model-Q4_K_M.gguf")
    line = refusal(tmp_path, "from-hf", folder / "model-Q4_K_M.gguf", tmp_path / "out")
    assert "model-Q4_K_M.gguf is not a Hugging Face model directory: it is a GGUF file, of quantized weights." in line
    line = refusal(tmp_path, "from-hf", folder, tmp_path / "out")
    assert "GGUF files, of quantized weights (model-Q4_K_M.gguf). Give the directory of the original release" in line


@pytest.mark.parametrize("size", [[128], [0, 128], ["a", 1], 128, [128, 128, 128]])
def test_block_sizes_that_are_none(size: object, tmp_path: Path) -> None:
    """A weight_block_size that is not two numbers is refused by name."""
    hf = save_fp8(tmp_path / "hf", PER_BLOCK)
    tell(hf, quantization_config=PER_BLOCK | {"weight_block_size": size})
    line = refusal(tmp_path, "from-hf", hf, tmp_path / "out")
    assert f"weight_block_size in {hf}: expected two positive integers or null, got {size!r}" in line
