"""Exit codes: 2 for wrong usage, 3 for models that differ, 1 for what cannot be read; --debug shows the whole error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command_line import refusal, run
from hf_models import random_model, saved
from plain_models import SIZES


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
