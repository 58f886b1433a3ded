"""Conversions of element types that would destroy values: refused by name, counted, or allowed with a warning."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from command_line import run, tree
from fp8_models import PER_TENSOR, save_fp8
from hf_models import random_model, saved
from safetensors.torch import load_file, save_file

import dist_ckpt_mistral as dcm
from dist_ckpt_mistral.errors import OutputError
from dist_ckpt_mistral.gather.casts import cast

DOWN = "model.layers.1.mlp.down_proj.weight"
KEYS = "model.layers.0.self_attn.k_proj.weight"
NORM = "model.norm.weight"


@pytest.fixture
def original(tmp_path: Path) -> Path:
    """A bfloat16 model with five values too large for float16 in two tensors, and three too small in a third."""
    folder = saved(random_model(), tmp_path / "hf")
    tensors = load_file(folder / "model.safetensors")
    tensors[DOWN][3, :4] = torch.tensor([1e5, -1e30, 65520.0, torch.inf])
    tensors[KEYS][0, :2] = -3e38
    tensors[NORM][:4] = torch.tensor([1e-8, -1e-30, 1e-20, 0.0])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


TOLD = re.compile(
    rf"the conversion destroys values that float16 cannot hold: {re.escape(DOWN)}: 3 become infinite; "
    rf".*{re.escape(KEYS)}.*: 2 become infinite; {re.escape(NORM)}: 3 become zero\. .*--allow-lossy"
)


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("command", ["from-hf", "to-hf"])
def test_destroyed_values_are_refused_by_name(command: str, workers: int, original: Path, tmp_path: Path) -> None:
    """Nothing is published where values would be destroyed: the error counts them, tensor by tensor."""
    source = original
    if command == "to-hf":
        source = tmp_path / "ckpt"
        dcm.from_hf(original, source)
    arguments = (command, source, tmp_path / "out", "--dtype", "float16", "--workers", workers)
    outcome = run(*arguments)
    assert outcome.code == 1
    assert TOLD.search("".join(outcome.err))
    assert not (tmp_path / "out").exists()
    assert run(*arguments[:-3], "bfloat16").code == 0


@pytest.mark.parametrize("command", ["from-hf", "to-hf"])
def test_a_resumed_run_knows_what_was_lost_before(command: str, original: Path, tmp_path: Path) -> None:
    """What the first run converted is not converted again, and its losses are still refused, then let through."""
    source = original
    if command == "to-hf":
        source = tmp_path / "ckpt"
        dcm.from_hf(original, source)
    arguments = (command, source, tmp_path / "out", "--dtype", "float16")
    assert TOLD.search("".join(run(*arguments).err))
    (kept,) = (tmp_path).glob(".out.incomplete*")
    before = {name: data for name, data in tree(kept).items() if "copied" in name}
    assert any(before.values())
    again = run(*arguments, "--resume")
    assert TOLD.search("".join(again.err))
    assert {name: data for name, data in tree(kept).items() if "copied" in name} == before  # no part was copied again
    allowed = run(*arguments, "--resume", "--allow-lossy")
    assert allowed.code == 0
    assert any(f"{DOWN}: 3 become infinite" in line and "the conversion lost" in line for line in allowed.err)
    fresh = run(command, source, tmp_path / "fresh", "--dtype", "float16", "--allow-lossy")
    assert fresh.code == 0
    assert dcm.compare(tmp_path / "out", tmp_path / "fresh").is_equal


def test_what_is_allowed_is_what_torch_makes(original: Path, tmp_path: Path) -> None:
    """With ``allow_lossy`` the values are torch's, and the result lists the losses, the worst first."""
    dcm.from_hf(original, tmp_path / "ckpt")
    done = dcm.to_hf(tmp_path / "ckpt", tmp_path / "out", dtype="float16", allow_lossy=True)
    told = [(loss.tensors, loss.overflowed, loss.vanished) for loss in done.losses]
    assert told == [((DOWN,), 3, 0), ((KEYS,), 2, 0), ((NORM,), 0, 3)]
    expected = load_file(original / "model.safetensors")
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.equal(tensor, expected[name].half())


def test_only_what_was_finite_can_be_lost(tmp_path: Path) -> None:
    """Values that were infinite, NaN or zero before are no loss; rounding is none either."""
    folder = saved(random_model(torch.float32), tmp_path / "hf")
    tensors = load_file(folder / "model.safetensors")
    tensors[DOWN][0, :5] = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert dcm.from_hf(folder, tmp_path / "ckpt", dtype="bfloat16").losses == ()
    tensors[DOWN][1, :2] = torch.tensor([3.4e38, 1e-42])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(OutputError, match=re.escape(f"cannot hold: {DOWN}: 1 become infinite, 1 become zero.")):
        dcm.from_hf(folder, tmp_path / "again", dtype="bfloat16")


@pytest.mark.parametrize("target", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("source", ["bfloat16", "float16", "float32", "float64"])
def test_values_are_those_of_torch(source: str, target: str) -> None:
    """All values of 16 bits, and of more bits those between any two of these, become what torch makes of them."""
    patterns = torch.arange(1 << 16).to(torch.int16)
    values = torch.cat([patterns.view(each).to(getattr(torch, source)) for each in (torch.float16, torch.bfloat16)])
    if "16" not in source:  # halfway to the next, and just beside that
        half = (values[:-1] + values[1:]) / 2
        values = torch.cat([values, half, half * (1 + 2.0**-22), half * (1 - 2.0**-22), half * (1 + 2.0**-40)])
    expected = values.to(getattr(torch, target))
    stored, lost = cast(values.view(torch.uint8).numpy().data, source, target)
    made = torch.frombuffer(bytearray(stored), dtype=expected.dtype)
    assert torch.equal(made.isnan(), expected.isnan())
    bits = getattr(torch, f"int{8 * expected.element_size()}")
    assert torch.equal(made[~made.isnan()].view(bits), expected[~made.isnan()].view(bits))
    assert lost.overflowed == int((values.isfinite() & ~expected.isfinite()).sum())
    assert lost.vanished == int(((values != 0) & (expected == 0)).sum())


@pytest.mark.parametrize(("vanished", "code"), [(1, 0), (2, 1)])
def test_a_value_next_to_zero_may_become_zero(vanished: int, code: int, tmp_path: Path) -> None:
    """One value in 10,000 that rounds to zero is a warning; more are a tensor that is destroyed."""
    folder = saved(random_model(intermediate_size=500), tmp_path / "hf")
    tensors = load_file(folder / "model.safetensors")
    tensors[DOWN] = tensors[DOWN].sign().add(0.5)  # no value of its own is near zero
    assert 10_000 <= tensors[DOWN].numel() < 20_000
    tensors[DOWN].view(-1)[:vanished] = 1e-20
    for name in tensors.keys() - {DOWN}:
        tensors[name] = torch.ones_like(tensors[name])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    outcome = run("from-hf", folder, tmp_path / "ckpt", "--dtype", "float16")
    assert outcome.code == code
    assert any(f"{DOWN}: {vanished} become zero" in line for line in outcome.err)


def test_values_of_fp8_numbers_are_counted_too(tmp_path: Path) -> None:
    """Numbers times scales that are too large for the dtype that was asked for are refused, as stored values are."""
    folder = save_fp8(tmp_path / "hf", PER_TENSOR)
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{DOWN}_scale_inv"] *= 1e6
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    values = tensors[DOWN].float() * tensors[f"{DOWN}_scale_inv"].float()
    count = int((values.isfinite() & values.half().isinf()).sum())
    assert count > 0
    with pytest.raises(OutputError, match=re.escape(f"float16 cannot hold: {DOWN}: {count} become infinite")):
        dcm.from_hf(folder, tmp_path / "ckpt", dtype="float16")
