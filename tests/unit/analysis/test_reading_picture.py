"""The picture of a reading plan: what is in it, and that it is always the same."""

from __future__ import annotations

import json
import logging
import re
import shlex
import shutil
import sys
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import matplotlib as mpl
import matplotlib.image
import numpy as np
import pytest
from absent_modules import without
from command_line import refusal, run
from genuine import folder
from hf_models import random_model, saved
from hypothesis import given
from hypothesis import strategies as st
from pages import SVG, Picture

from dist_ckpt_mistral.analysis.picture.matrix import bins
from dist_ckpt_mistral.analysis.picture.picture import save_picture
from dist_ckpt_mistral.analysis.picture.ribbons import apart
from dist_ckpt_mistral.analysis.picture.style import DARK, FAINT, INK, KINDS, PAPER
from dist_ckpt_mistral.analysis.read_planner import plan_reading
from dist_ckpt_mistral.convert.from_hf import from_hf
from dist_ckpt_mistral.errors import OutputError
from dist_ckpt_mistral.messages import human_bytes, spans
from dist_ckpt_mistral.model.config.mistral_config import MistralConfig
from dist_ckpt_mistral.model.layout.layout import ParallelLayout
from dist_ckpt_mistral.model.table.entries import kind_of
from dist_ckpt_mistral.model.table.rules import ParamState
from dist_ckpt_mistral.model.table.table import tensor_table


def test_ribbons_join_every_chunk_and_every_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mark for each stored chunk and each group of ranks that read the same; files, ranks and verdict are text."""
    svg = tmp_path / "plan.svg"
    monkeypatch.chdir(folder("td_0161"))
    outcome = run(*("plan", "checkpoint", "--config", ".", "--tp", 4, "--pp", 2, "--dp", 2, "--json", "--svg", svg))
    assert (outcome.code, outcome.err) == (0, [f"wrote {svg}"])
    told, picture = json.loads("\n".join(outcome.out)), Picture(svg)
    assert picture.marks("chunk") == list(range(told["total"]["num_chunks"]))
    assert picture.marks("ranks") == [each["rank"] for each in told["ranks"] if each["rank"] == each["reads_like"]]
    assert len(picture.marks("ranks")) == 8
    assert set(told["total"]["files"]) <= set(picture.texts)
    assert {"ranks 0, 4, layers 0, 1", "ranks 11, 15, layers 2, 3", "norms", "chunk needed whole"} <= set(picture.texts)
    verdict, _, advice = told["verdict"].replace("`", "").partition("; ")
    shared = "Up to 2 ranks read the same; with Megatron's --ckpt-fully-parallel-load they would share the work."
    assert {verdict, advice[0].upper() + advice[1:], shared, told["remedy"]} <= set(picture.texts)
    assert picture.title == told["verdict"].replace("`", "")
    assert picture.description.endswith(f"{shared} {told['remedy']}")
    assert len(picture.tooltips("chunk")) == told["total"]["num_chunks"]
    assert picture.tooltips("ranks")[0] == "ranks 0, 4, layers 0, 1: " + next(
        text for text in picture.texts if text.startswith("reads ")
    )
    read = [text.partition(" to rank")[0] for text in picture.tooltips("ribbon")]
    assert set(read) == set(told["total"]["files"])


def test_a_long_command_is_folded(tmp_path: Path) -> None:
    """A command that is longer than a line stands on several, which a shell takes for the one that the table gives."""
    case = folder("td_0161")
    deep = tmp_path / ("a long name of a directory " * 5).strip() / "checkpoint"
    shutil.copytree(case / "checkpoint", deep)
    plan = plan_reading(deep, ParallelLayout(tp=8, pp=2), config=case)
    assert plan.remedy is not None
    save_picture(plan, tmp_path / "plan.svg")
    texts = Picture(tmp_path / "plan.svg").texts
    first = next(number for number, text in enumerate(texts) if text.startswith("dist-ckpt-mistral reshard"))
    lines = [*takewhile(lambda text: text.endswith("\\"), texts[first:])]
    lines.append(texts[first + len(lines)])
    assert len(lines) > 1
    as_a_shell_joins_them = "\n".join(lines).replace("\\\n", "")
    assert shlex.split(as_a_shell_joins_them) == shlex.split(plan.remedy)


def test_the_name_of_a_picture_says_its_format(tmp_path: Path) -> None:
    """A name in .png gives a PNG of the same picture, one without an ending an SVG; others are refused at once."""
    case = folder("td_0161")
    arguments = ("plan", case / "checkpoint", "--config", case, "--tp", 2, "--svg")
    assert run(*arguments, tmp_path / "plan.PNG").code == 0
    pixels = mpl.image.imread(tmp_path / "plan.PNG")
    assert pixels.shape[1] == 1950
    assert len(np.unique(pixels[..., :3].reshape(-1, 3), axis=0)) > 100
    assert run(*arguments, tmp_path / "plan").code == 0
    assert Picture(tmp_path / "plan").title == "Every rank reads only what it needs: whole chunks."
    refused = run(*arguments, tmp_path / "plan.jpg")
    assert refused.code == 2
    assert "expected a name that ends in .svg or .png" in refused.err[-1]
    assert not (tmp_path / "plan.jpg").exists()
    with pytest.raises(OutputError, match=r"expected a name that ends in \.svg or \.png, got \.jpg"):
        save_picture(plan_reading(case / "checkpoint", ParallelLayout(), config=case), tmp_path / "plan.jpg")


def test_dark_backgrounds(tmp_path: Path) -> None:
    """Each text and the background have another colour where the reader prefers dark ones, with enough contrast."""
    case = folder("td_0161")
    save_picture(plan_reading(case / "checkpoint", ParallelLayout(tp=2), config=case), tmp_path / "plan.svg")
    svg = (tmp_path / "plan.svg").read_text()
    rules = dict(re.findall(r'\[style\*="fill: (#\w+)"\] \{ fill: (#\w+) !important', svg))
    assert rules == DARK
    texts = set(re.findall(r'<text style="[^"]*fill: (#\w+)', svg))
    assert texts == {INK, FAINT}
    for colour in texts:
        assert contrast(colour, PAPER) > 4.4
        assert contrast(DARK[colour], DARK[PAPER]) > 7


def contrast(one: str, other: str) -> float:
    """The contrast of two colours, as WCAG 2.2 defines it: from 1 to 21."""
    luminances = []
    for colour in (one, other):
        shares = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
        luminances.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(luminances) + 0.05) / (min(luminances) + 0.05)


def test_a_picture_is_always_the_same(tmp_path: Path) -> None:
    """The bytes don't depend on the time, on the name of the file, or on how matplotlib is configured."""
    case = folder("td_0192")
    arguments = ("plan", case / "checkpoint", "--config", case, "--tp", 2, "--svg")
    assert run(*arguments, tmp_path / "a.svg").code == 0
    configured: dict[Any, Any] = {
        "font.size": 30,
        "svg.fonttype": "path",
        "svg.hashsalt": "x",
        "figure.dpi": 300,
        "lines.linewidth": 9,
    }
    with mpl.rc_context(configured):
        assert run(*arguments, tmp_path / "b.svg").code == 0
        assert mpl.rcParams["font.size"] == 30
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert "<dc:date>" not in (tmp_path / "a.svg").read_text()


def test_drawing_leaves_the_callers_logging_alone(tmp_path: Path) -> None:
    """Matplotlib is quiet while it draws; then its logger has the level that it had."""
    case = folder("td_0161")
    plan = plan_reading(case / "checkpoint", ParallelLayout(), config=case)
    logger = logging.getLogger("matplotlib")
    before = logger.level
    try:
        logger.setLevel(logging.INFO)
        save_picture(plan, tmp_path / "plan.svg")
        assert logger.level == logging.INFO
    finally:
        logger.setLevel(before)


def test_many_files_and_ranks_become_a_matrix(tmp_path: Path) -> None:
    """Beyond 16 files or ranks there is a row for each file, a column for each rank, and a mark where it reads."""
    from_hf(saved(random_model(num_hidden_layers=16), tmp_path / "hf"), tmp_path / "ckpt", tp=2, pp=16)
    svg = tmp_path / "plan.svg"
    assert run("plan", tmp_path / "ckpt", "--tp", 1, "--pp", 8, "--dp", 3, "--svg", svg).code == 0
    picture = Picture(svg)
    assert picture.marks("file") == list(range(32))
    assert picture.marks("ranks") == list(range(0, 24, 3))
    assert picture.marks("chunk") == []
    assert {
        "__0_0.distcp",
        "__31_0.distcp",
        "each file is read",
        "up to 3.0 times",
        "needed",
        "read, but not needed",
    } <= set(picture.texts)
    assert "rank, for 3 ranks each that read the same; lines part pipeline stages" in picture.texts
    root = ET.fromstring(svg.read_text())  # noqa: S314  (our own)
    (cells,) = (each for each in root.iter(f"{SVG}g") if each.get("id") == "reads")
    plan = plan_reading(tmp_path / "ckpt", ParallelLayout(pp=8, dp=3))
    assert len(list(cells)) == sum(len(amount.file_bytes) for amount in plan.amounts)
    tooltips = [str(cell.findtext(f"{SVG}title")) for cell in cells]
    first, most = plan.groups[0], plan.amounts[0].file_bytes["__0_0.distcp"]
    expected = f"__0_0.distcp to ranks {spans(first.ranks)}: {human_bytes(most)} read each, 100 % of it needed"
    assert expected in tooltips


@pytest.mark.parametrize("count", [1, 2, 63, 64, 65, 128, 129, 1000, 4097])
def test_a_matrix_stays_readable(count: int) -> None:
    """However many files or ranks there are, at most 64 rows or columns hold each of them once, in order."""
    found = bins(count)
    assert len(found) <= 64
    assert [number for each in found for number in each] == list(range(count))


@given(st.lists(st.floats(0, 1), max_size=16))
def test_labels_do_not_overlap(centres: list[float]) -> None:
    """However small and close the blocks are, labels keep their order and a distance, and stay inside."""
    labels = apart(sorted(centres))
    assert all(after - before > 0.0559 for before, after in pairwise(labels))
    assert all(0.027 < label < 0.973 for label in labels)


def test_every_kind_of_tensor_has_a_colour() -> None:
    """Whatever the table calls a tensor, the picture has a colour for it, and for no other."""
    table = tensor_table(MistralConfig.from_hf(folder("td_0161")))
    kinds = {kind_of(rule, state) for rule in table.rules for state in ParamState}
    assert kinds | {"experts"} == set(KINDS)


def test_only_a_picture_needs_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where matplotlib, torch and megatron are absent the plan is told all the same; --svg says what to install."""
    arguments = ["plan", str(folder("td_0161") / "checkpoint"), "--config", str(folder("td_0161")), "--tp", "2"]
    ((code, out, _),) = without(["matplotlib", "torch", "megatron"], [arguments])
    assert (code, "Every rank reads only what it needs" in out) == (0, True)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    told = refusal(tmp_path, *arguments, "--svg", tmp_path / "plan.svg")
    assert told.startswith("error: a picture needs matplotlib, not installed here. Run: ")
