"""FP8 releases become what transformers makes of them, and scales that do not belong are refused by name."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import refusal, run
from family_models import FAMILY, family_model
from fp8_models import PER_BLOCK, PER_TENSOR, WEIGHTS, Q, Tensors, edit, in_transformers, is_quantized, save_fp8, tell
from plain_models import contents
from safetensors.torch import load_file
from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight

import dist_ckpt_mistral as dcm
from dist_ckpt_mistral.analysis.compare import compare_sources
from dist_ckpt_mistral.gather.execute import Effort
from dist_ckpt_mistral.mapping.source import open_hf
from dist_ckpt_mistral.model.config.quantization import described_method, is_readable, unquantized, weight_block_size

Q_SCALE = f"{Q}_scale_inv"


def assert_same(found: Tensors, expected: Tensors) -> None:
    """The same names, dtypes and bits."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(
    ("told", "options"),
    [
        (PER_TENSOR, {}),
        (PER_TENSOR, {"scale_dtype": torch.bfloat16, "scale_shape": (1,)}),
        (PER_TENSOR, {"scale_shape": (1, 1), "tie_word_embeddings": True}),
        (PER_BLOCK, {}),
        (PER_BLOCK, {"scale_dtype": torch.bfloat16}),
    ],
)
@pytest.mark.parametrize("dtype", [None, "float32", "float16"])
def test_import_and_export_give_what_transformers_loads(
    told: dict[str, Any],
    options: dict[str, Any],
    dtype: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Any scales, any dtype, cut for several ranks: from-hf and to-hf give the bits that transformers loads."""
    hf = save_fp8(tmp_path / "hf", told, **options)
    expected = in_transformers(hf, monkeypatch, getattr(torch, dtype or "bfloat16"))
    dcm.from_hf(hf, tmp_path / "ckpt", tp=2, pp=2, dtype=dtype)
    dcm.to_hf(tmp_path / "ckpt", tmp_path / "out")
    with dcm.open_checkpoint(tmp_path / "ckpt") as checkpoint:
        stored = dict(checkpoint)
    kept = {name: tensor for name, tensor in expected.items() if name in stored}  # a tied head is stored once
    assert expected.keys() - kept.keys() <= {"lm_head.weight"}
    assert_same(stored, kept)
    assert_same(load_file(tmp_path / "out" / WEIGHTS), kept)


@pytest.mark.parametrize("case", FAMILY)
@pytest.mark.parametrize("told", [PER_TENSOR, PER_BLOCK], ids=["per tensor", "per block"])
def test_the_whole_family(case: str, told: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts one by one and packed, with a scale or a grid for each, and MLA: numbers times scales, as in FP8 kernels.

    transformers 5.23 itself loads packed experts without their scales where it dequantizes.
    """
    hf = save_fp8(tmp_path / "hf", told, model=family_model(case))
    stored, block = load_file(hf / WEIGHTS), told["weight_block_size"]
    expected = {
        name: _dequantize_fp8_weight(tensor, stored[f"{name}_scale_inv"], block, torch.float32).bfloat16()
        if f"{name}_scale_inv" in stored
        else tensor
        for name, tensor in stored.items()
        if not name.endswith(("_scale_inv", "_scale"))
    }
    assert any(tensor.dtype == torch.float8_e4m3fn for tensor in stored.values())
    dcm.from_hf(hf, tmp_path / "ckpt", tp=2, pp=2)
    dcm.to_hf(tmp_path / "ckpt", tmp_path / "out")
    assert_same(load_file(tmp_path / "out" / WEIGHTS), expected)
    if "mistral4" not in case:
        assert_same(in_transformers(tmp_path / "out", monkeypatch), in_transformers(hf, monkeypatch))


def test_what_becomes_of_the_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is done is said; neither checkpoint nor export says FP8, and transformers loads the export as it is."""
    hf = save_fp8(tmp_path / "hf", PER_TENSOR)
    done = run("from-hf", hf, tmp_path / "ckpt")
    assert done.code == 0
    assert done.err[0] == (
        f"{hf}: 14 FP8 weights with scales, read as bfloat16: each number times its scale, as transformers does; "
        "14 scales of activations stay behind. What is written of them, config.json included, is not quantized"
    )
    assert done.out[0].endswith("28 stored entries are not weights and stayed behind")
    assert run("to-hf", tmp_path / "ckpt", tmp_path / "out").code == 0
    original = json.loads((hf / "config.json").read_bytes())
    del original["quantization_config"]
    for config in (tmp_path / "ckpt" / "release" / "hf" / "config.json", tmp_path / "out" / "config.json"):
        assert json.loads(config.read_bytes()) == original
    for name, content in contents(tmp_path / "ckpt").items():
        assert b"weight_scale_inv" not in content, name
        assert b"quantization_config" not in content, name
    assert_same(load_file(tmp_path / "out" / WEIGHTS), in_transformers(hf, monkeypatch))


def test_verify_compares_values(tmp_path: Path) -> None:
    """A release equals what was made of it, byte for byte of the values, and no longer once a scale changes."""
    hf = save_fp8(tmp_path / "hf", PER_BLOCK)
    dcm.from_hf(hf, tmp_path / "ckpt")
    for other in (tmp_path / "ckpt", hf):
        done = run("verify", hf, other)
        assert (done.code, done.out) == (0, ["equal: 21 tensors, 22.3 kB compared bit for bit"])

    def double(tensors: Tensors) -> None:
        tensors[Q_SCALE][1, 2] *= 2

    edit(hf, double)
    done = run("verify", hf, tmp_path / "ckpt", "--json")
    assert done.code == 3
    (difference,) = json.loads("".join(done.out))["differences"]
    columns, row, column = 24, 4, 8  # where the block begins
    assert difference == {
        "hf_name": Q,
        "what": f"bits differ from byte {2 * (row * columns + column)} of the bfloat16 data on",
    }
    source, wider = open_hf(hf), open_hf(hf, dtype="float32")
    assert compare_sources(source, source, Effort()).is_equal
    what = {each.name: each.what for each in compare_sources(source, wider, Effort()).differences}
    assert what[Q] == "bfloat16 [40, 24] in A, float32 [40, 24] in B"


def test_values_are_read_lazily(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``open_checkpoint`` gives the values of a release, and only those of its tensors; a copy does, too."""
    hf = save_fp8(tmp_path / "hf", PER_TENSOR)
    expected = in_transformers(hf, monkeypatch)
    with dcm.open_checkpoint(hf) as release, copy.copy(release) as another:
        assert release.dtype(Q) == "bfloat16"
        assert_same(dict(release), expected)
        assert_same(dict(another), expected)


def test_what_a_release_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A query projection in bfloat16 beside FP8 keys and values: one Megatron tensor takes them all."""
    hf = save_fp8(tmp_path / "hf", PER_TENSOR)

    def undo(tensors: Tensors) -> None:
        tensors[Q] = torch.randn(tensors[Q].shape).bfloat16()
        del tensors[Q_SCALE]

    edit(hf, undo)
    tell(hf, quantization_config=PER_TENSOR | {"modules_to_not_convert": ["lm_head", Q.removesuffix(".weight")]})
    dcm.from_hf(hf, tmp_path / "ckpt")
    with dcm.open_checkpoint(tmp_path / "ckpt") as checkpoint:
        assert_same(dict(checkpoint), in_transformers(hf, monkeypatch))


@pytest.mark.parametrize(("told", "expected"), [(None, "bfloat16"), ("float16", "float16"), ("float32", "float32")])
def test_the_dtype_of_values(told: str | None, expected: str, tmp_path: Path) -> None:
    """Values have the dtype that config.json names, and bfloat16 where it names none; other tensors keep theirs."""
    hf = save_fp8(tmp_path / "hf", PER_TENSOR)
    tell(hf, dtype=told)
    with dcm.open_checkpoint(hf) as release:
        assert {release.dtype(name) for name in release if is_quantized(name)} == {expected}
        assert {release.dtype(name) for name in release if not is_quantized(name)} == {"bfloat16"}


@pytest.mark.parametrize(
    "told",
    [
        {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]},  # AutoFP8
        {"quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ["lm_head"]},
        {"quant_method": "compressed-tensors", "format": "naive-quantized", "ignore": ["lm_head"]},
    ],
)
@pytest.mark.parametrize("per_row", [False, True])
def test_scales_of_other_names(told: dict[str, Any], per_row: bool, tmp_path: Path) -> None:
    """``weight_scale`` and ``input_scale`` of other writers, per tensor and per row: number times scale."""
    hf = save_fp8(tmp_path / "hf", PER_TENSOR)
    expected = {}

    def rename(tensors: Tensors) -> None:
        for name in [*filter(is_quantized, tensors)]:
            if name.endswith("weight_scale_inv"):
                scale = tensors.pop(name)
                scale = (torch.rand(len(tensors[name.removesuffix("_scale_inv")]), 1) if per_row else scale).bfloat16()
                tensors[name.removesuffix("_inv")] = scale
            elif name.endswith("activation_scale"):
                tensors[name.replace("activation", "input")] = tensors.pop(name)
        for name in [name for name in tensors if not name.endswith("_scale")]:
            scale = tensors.get(f"{name}_scale", torch.ones(()))
            expected[name] = (tensors[name].bfloat16() * scale.bfloat16()).bfloat16()

    edit(hf, rename)
    tell(hf, quantization_config=told)
    with dcm.open_checkpoint(hf) as release:
        assert_same(dict(release), expected)


def test_inspect_says_what_a_release_is(tmp_path: Path) -> None:
    """``inspect`` names the weights, their stored dtype, and why the other tensors are none."""
    hf = save_fp8(tmp_path / "hf", PER_TENSOR)
    report = dcm.inspect(hf)
    assert report.format == "safetensors, 14 FP8 weights with scales, read as bfloat16"
    assert report.problems == ()
    by_name = {tensor.name: tensor for tensor in report.tensors}
    assert (by_name[Q].dtype, by_name[Q].hf_names) == ("float8_e4m3fn", (Q,))
    assert by_name[Q_SCALE].ignored == "scales of FP8 weights, multiplied into them"
    activation = by_name[Q.replace("weight", "activation_scale")]
    assert activation.ignored == "scales of activations, which only FP8 kernels use"
    done = run("inspect", hf)
    assert done.code == 0
    assert "ignored        14 entries: scales of FP8 weights, multiplied into them" in done.out


def test_the_config_of_a_release_serves_an_export(tmp_path: Path) -> None:
    """A checkpoint that lost its configuration is exported with that of an FP8 directory, which then says no FP8."""
    hf = save_fp8(tmp_path / "hf", PER_TENSOR)
    dcm.from_hf(hf, tmp_path / "ckpt")
    dcm.to_hf(tmp_path / "ckpt", tmp_path / "out", config=hf)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_bytes())
    assert dcm.compare(hf, tmp_path / "out").is_equal


def test_a_multimodal_config_may_say_it_inside() -> None:
    """What text_config says of quantization counts, and goes; ``null`` says nothing and stays as it is."""
    raw = {"text_config": {"hidden_size": 8, "quantization_config": PER_BLOCK}, "quantization_config": None}
    assert is_readable(raw)
    assert weight_block_size(raw, "config.json") == (4, 4)
    assert unquantized(raw) == {"text_config": {"hidden_size": 8}, "quantization_config": None}
    awq = {"text_config": {"quantization_config": {"quant_method": "awq"}}}
    assert (is_readable(awq), described_method(awq)) == (False, "quant_method 'awq'")


def missing(tensors: Tensors) -> None:
    """No scale."""
    del tensors[Q_SCALE]


def orphan(tensors: Tensors) -> None:
    """A scale too many."""
    tensors["model.layers.7.weight_scale_inv"] = torch.ones(())


def of_no_number(tensors: Tensors) -> None:
    """A scale of a tensor that is not FP8."""
    tensors[Q] = tensors[Q].bfloat16()


def twice(tensors: Tensors) -> None:
    """Scales of two names."""
    tensors[f"{Q}_scale"] = torch.ones(())


def misshapen(tensors: Tensors) -> None:
    """Half the blocks."""
    tensors[Q_SCALE] = tensors[Q_SCALE][:, :4].contiguous()


def of_bytes(tensors: Tensors) -> None:
    """Exponents, not scales, as MXFP8 has them."""
    tensors[Q_SCALE] = tensors[Q_SCALE].to(torch.uint8)


def not_finite(tensors: Tensors) -> None:
    """A scale of NaN."""
    tensors[Q_SCALE][0, 1] = torch.nan


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (missing, f"1 of them have no scales: {Q}"),
        (orphan, "1 tensors of scales have no FP8 weight: model.layers.7.weight_scale_inv"),
        (of_no_number, f"1 tensors of scales have no FP8 weight: {Q_SCALE}"),
        (twice, f"1 of them have two tensors of scales: {Q}"),
        (
            misshapen,
            f"shape of {Q_SCALE!r}: expected one scale, or one for each of blocks of [4, 4] of [40, 24], got [10, 4]",
        ),
        (of_bytes, f"dtype of {Q_SCALE!r}: expected one of bfloat16, float16, float32, got uint8"),
        (not_finite, f"bad scale of {Q!r}: expected finite numbers that are not negative, got nan in {Q_SCALE!r} of "),
    ],
)
def test_scales_that_do_not_belong(change: Callable[[Tensors], None], expected: str, tmp_path: Path) -> None:
    """A scale that is missing, left over, there twice, misshapen, of another dtype or no number is refused by name."""
    hf = save_fp8(tmp_path / "hf", PER_BLOCK)
    edit(hf, change)
    line = refusal(tmp_path, "from-hf", hf, tmp_path / "out")
    assert expected in line
    assert str(hf) in line
    if change is not not_finite:  # whose data inspect does not read
        assert [expected in problem for problem in dcm.inspect(hf).problems] == [True]


def test_a_scale_of_zero_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zero is a scale, of a block of zeros: its values are zeros, also to transformers."""
    hf = save_fp8(tmp_path / "hf", PER_BLOCK)

    def empty(tensors: Tensors) -> None:
        tensors[Q_SCALE][2, 3] = 0

    edit(hf, empty)
    with dcm.open_checkpoint(hf) as release:
        assert not release[Q][8:12, 12:16].any()
        assert_same(dict(release), in_transformers(hf, monkeypatch))
