"""What real Megatron releases wrote is exported bit for bit: without torch, as on a machine that only converts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from genuine import FSDP, GENUINE, LEGACY, ZARR, described_file, folder, true_bytes

import dist_ckpt_mistral as dcm


@pytest.mark.parametrize("case", [*GENUINE, *ZARR, *LEGACY, *FSDP])
def test_export_equals_the_live_model(case: str, tmp_path: Path) -> None:
    """Every genuine checkpoint exports to the tensors of the live model: names, dtypes, shapes and bits."""
    dcm.to_hf(folder(case) / "checkpoint", tmp_path / "hf", config=folder(case) / "config.json")
    assert described_file(tmp_path / "hf" / "model.safetensors") == true_bytes(case)
    config = (tmp_path / "hf" / "config.json").read_bytes()
    assert json.loads(config) == json.loads((folder(case) / "config.json").read_bytes())
