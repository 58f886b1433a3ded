"""Models that tests write without torch are what transformers writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from plain_models import contents, save_model
from torch_reading import hf_tensors
from transformers import AutoConfig, AutoModelForCausalLM


@pytest.mark.parametrize("max_shard_size", [5_000_000_000, 6000, 4000])
def test_transformers_writes_the_same_files(max_shard_size: int, tmp_path: Path) -> None:
    """Transformers saves a model with the same values in the same bytes; only its version may differ."""
    ours = contents(save_model(tmp_path / "ours", max_shard_size=max_shard_size))
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "ours")).bfloat16()
    model.load_state_dict(hf_tensors(tmp_path / "ours"))
    model.save_pretrained(tmp_path / "theirs", max_shard_size=max_shard_size)
    theirs = contents(tmp_path / "theirs")
    for name in ("config.json", "generation_config.json"):
        assert unversioned(ours.pop(name)) == unversioned(theirs.pop(name))
    assert ours == theirs


def unversioned(content: bytes) -> dict[str, Any]:
    """A JSON file without the version of the transformers that wrote it."""
    value: dict[str, Any] = json.loads(content)
    value.pop("transformers_version")
    return value
