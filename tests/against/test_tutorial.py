"""Hugging Face through Megatron-LM and back with no flags, as ``tools/tutorial.py`` runs it on four gloo ranks."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from plain_models import contents

pytestmark = [
    pytest.mark.megatron,
    pytest.mark.ranks,
    pytest.mark.slow,
    pytest.mark.skipif(
        sys.version_info < (3, 12),
        reason="megatron-core 0.16, the last line for Python 3.11, ships no megatron.training",
    ),
]


def test_megatron_lm_saves_what_exports_by_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """After two saves by Megatron-LM at other layouts, to-hf without flags gives all that was imported but values."""
    import tutorial  # noqa: PLC0415  (its ranks need megatron)

    assert tutorial.main(["--keep", str(tmp_path / "kept")]) == 0
    folder = tmp_path / "kept"
    assert sorted(path.name for path in (folder / "root").glob("iter_*")) == [
        "iter_0000000",
        "iter_0000002",
        "iter_0000003",
    ]
    hf, out = contents(folder / "hf"), contents(folder / "out")
    trained = {name for name in out if out[name] != hf.get(name)}
    assert trained == {"model.safetensors"}
    assert out.keys() == hf.keys()
    said = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall(r"\b\d\.\d{4}\b", said)]
    assert len(losses) == 3
    assert losses == sorted(losses, reverse=True)  # it learns
    assert f"The configuration is from {folder / 'root' / 'hf' / 'config.json'}." in said
    assert "the chat template says 'user: a b\\n'" in said
    assert re.findall(r"^(\d)\. ", said, re.MULTILINE) == ["1", "2", "3", "4", "5", "6"]
