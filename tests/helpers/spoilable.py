"""Inputs for tests to spoil: two Hugging Face directories and two checkpoints, a copy for each test, and edits of them.

``conftest.py`` makes the fixtures known to all tests. What they import is not installed everywhere.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

FC1 = "decoder.layers.mlp.linear_fc1.weight"
NORM = "decoder.final_layernorm.weight"


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model: ``hf`` in one file, ``many`` in many files, ``ckpt`` its import."""
    from plain_models import save_model  # noqa: PLC0415  (needs safetensors)

    from dist_ckpt_mistral.convert.from_hf import from_hf  # noqa: PLC0415  (only these tests need it)

    where = tmp_path_factory.mktemp("pristine")
    save_model(where / "hf")
    save_model(where / "many", max_shard_size=4000)
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
    from genuine import folder  # noqa: PLC0415  (needs safetensors)

    shutil.copy(folder("td_0161") / "config.json", tmp_path / "config.json")
    return shutil.copytree(folder("td_0161") / "checkpoint", tmp_path / "genuine")


def edit_json(path: Path, **changes: object) -> None:
    """Change or, with ``...``, remove keys of a JSON file."""
    content = json.loads(path.read_bytes()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def entry_of(metadata: Any, fqn: str, number: int = 0) -> Any:  # noqa: ANN401  (torch's record)
    """The place of one stored entry, to edit."""
    return sorted(
        ((index, info) for index, info in metadata.storage_data.items() if index.fqn == fqn),
        key=lambda pair: tuple(pair[0].offset or ()),
    )[number][1]


def set_entry(**values: object) -> Callable[[Any], None]:
    """An edit of the place of the final norm."""
    return lambda metadata: vars(entry_of(metadata, NORM)).update(values)
