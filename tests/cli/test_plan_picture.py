"""The picture in README.md: that it is the one which ``tools/plan_picture.py`` draws."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="matplotlib is not installed")
pytest.importorskip("torch", reason="torch, as whose pickle the checkpoint is written, is not installed")


def _words(svg: str) -> list[str]:
    """Every text in a picture, in order; lines and curves depend on the version of matplotlib."""
    return re.findall(r"<text[^>]*>([^<]+)</text>", svg)


def test_the_picture_is_current(tmp_path: Path) -> None:
    """The committed picture has the words and numbers that are drawn today; else run tools/plan_picture.py."""
    import plan_picture  # noqa: PLC0415  (needs matplotlib)

    plan_picture.main([str(tmp_path / "plan.svg")])
    drawn, committed = _words((tmp_path / "plan.svg").read_text()), _words(plan_picture.FILE.read_text())
    assert "reads 7.2 GB, 2.0 times the 3.6 GB it needs" in drawn
    assert committed == drawn
