"""The page of ``inspect --html``: one file that needs nothing else, for people, keyboards and screen readers."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Final, Literal

import pytest
from command_line import run
from genuine import folder
from pages import Page

#: A browser for the tests that need one; CHROME names another.
_BROWSER: Final = os.environ.get("CHROME") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome-headless-shell"))), None
)

#: What a browser without a desktop or a GPU may need.
_FLAGS: Final = ("--single-process", "--no-zygote", "--disable-gpu")
_BACKGROUND: Final = {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 28)"}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a genuine checkpoint with optimizer state."""
    path = tmp_path_factory.mktemp("page") / "page.html"
    case = folder("opt_fr_0192")
    assert run("inspect", case / "checkpoint", "--config", case, "--html", path).code == 0
    return path


def test_the_page_needs_nothing_else(page: Path) -> None:
    """It has no address of a script, style, picture or font, a title, a viewport, and both colour schemes."""
    text = page.read_text()
    assert Page(page).addresses == []
    assert "url(" not in text
    assert "@import" not in text
    assert re.search(r"<title>.*: no problems</title>", text)
    for part in ('<html lang="en">', 'name="viewport"', "prefers-color-scheme: dark", 'aria-sort="none"'):
        assert part in text


def test_problems_come_first(tmp_path: Path) -> None:
    """What is wrong stands above what the checkpoint is, and in the title."""
    path = tmp_path / "page.html"
    assert run("inspect", folder("td_0161") / "checkpoint", "--html", path).code == 1
    text = path.read_text()
    assert ": 1 problem</title>" in text
    assert text.index("Give the model&#39;s config.json") < text.index("What it is") < text.index("Sizes by layer")


def test_tensors_in_missing_files_are_marked(tmp_path: Path) -> None:
    """A tensor with data in a file that is not there says so, in its row and for the search; no other does."""
    case, path = tmp_path / "td_0161", tmp_path / "page.html"
    shutil.copytree(folder("td_0161"), case)
    found = json.loads("\n".join(run("inspect", case / "checkpoint", "--config", case, "--json").out))
    hit = {tensor["name"] for tensor in found["tensors"] if "__3_0.distcp" in tensor["files"]}
    assert 0 < len(hit) < len(found["tensors"])
    (file,) = case.rglob("__3_0.distcp")
    file.unlink()
    assert run("inspect", case / "checkpoint", "--config", case, "--html", path).code == 1
    text = path.read_text()
    marked = re.findall(r'<tr class="bad"><td class="name">(.*?)</td>.*?missing: __3_0.distcp</td>', text)
    assert set(marked) == hit
    assert "<title>td_0161/checkpoint: 1 problem</title>" in text
    assert len(re.findall('<tr class="bad">', text)) == text.count(", missing: __3_0.distcp</td>") == len(hit)


def test_sizes_add_up(page: Path) -> None:
    """The layers, and what comes before and after them, have all bytes of the tensors, optimizer state included."""
    case = folder("opt_fr_0192")
    told = json.loads("\n".join(run("inspect", case / "checkpoint", "--config", case, "--json").out))
    tensors = told["tensors"]
    assert {tensor["kind"] for tensor in tensors} == {
        *("embedding", "attention", "MLP", "norms", "output layer", "optimizer state")
    }
    assert all(len(tensor["cut"]) == len(tensor["shape"]) and tensor["files"] for tensor in tensors)
    rows = re.findall(r'role="rowheader">(.*?)</span>', page.read_text())
    assert rows == ["before the layers", "layer 0", "layer 1", "layer 2", "layer 3", "after the layers"]
    shown = re.findall(r'<span class="size">(.*?)</span>', page.read_text())
    unit = {"B": 1, "kB": 1e3, "MB": 1e6}
    total = sum(float(number) * unit[name] for number, name in (size.split() for size in shown))
    assert total == pytest.approx(sum(tensor["num_bytes"] for tensor in tensors), rel=0.01)


def test_json_and_html_at_once(tmp_path: Path) -> None:
    """``--json`` with ``--html`` gives both: the JSON alone on standard output."""
    case, path = folder("td_0161"), tmp_path / "page.html"
    done = run("inspect", case / "checkpoint", "--config", case, "--json", "--html", path)
    assert json.loads("\n".join(done.out))["problems"] == []
    assert path.stat().st_size


@pytest.mark.parametrize("width", [380, 800, 1440])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_runs_the_page(width: int, scheme: Literal["light", "dark"], page: Path) -> None:
    """It fits the window, the search finds tensors by all their names, and the console stays empty."""
    playwright = pytest.importorskip("playwright.sync_api")
    if _BROWSER is None:
        pytest.skip("no Chromium or Chrome is installed, and CHROME names none")
    errors: list[str] = []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=_BROWSER, args=["--no-sandbox", *_FLAGS])
        view = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        view.on("console", lambda message: errors.append(message.text))
        view.on("pageerror", lambda error: errors.append(str(error)))
        view.goto(f"file://{page}#exp_avg_sq%20fc1")
        assert view.inner_text("#count") == "2 of 36 tensors"
        view.fill("#search", "q_proj")
        assert view.inner_text("#count") == "1 of 36 tensors"
        view.fill("#search", "")
        view.click("th:nth-child(7) button")
        view.click("th:nth-child(7) button")
        assert view.get_attribute("th:nth-child(7)", "aria-sort") == "descending"
        assert view.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert view.evaluate("getComputedStyle(document.body).backgroundColor") == _BACKGROUND[scheme]
        browser.close()
    assert errors == []
