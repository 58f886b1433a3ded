"""Pictures and pages go into a store as into a directory; what can be written to no URL is refused in one line."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
from command_line import run
from plain_models import save_model
from remote_folders import get_folder

pytestmark = pytest.mark.usefixtures("empty_stores")

_STORE = "memory://bucket"


@pytest.fixture
def ckpt(tmp_path: Path) -> str:
    """A checkpoint in a store."""
    assert run("from-hf", save_model(tmp_path / "hf"), f"{_STORE}/ckpt").code == 0
    return f"{_STORE}/ckpt"


def test_a_page_and_a_list_of_references(ckpt: str, tmp_path: Path) -> None:
    """A page and what kerchunk reads are the same bytes in a store and in a directory."""
    for place in (f"{_STORE}/out", str(tmp_path)):
        assert run("inspect", ckpt, "--html", f"{place}/page.html").code == 0
        assert run("index", ckpt, "--kerchunk", f"{place}/k.json").code == 0
    assert get_folder(f"{_STORE}/out") == {name: (tmp_path / name).read_bytes() for name in ("page.html", "k.json")}


def test_what_is_not_replaced(ckpt: str, tmp_path: Path) -> None:
    """A page or list of references replaces its like, or an empty file, and no other file, such as one of the model."""
    local = tmp_path / "ckpt"
    assert run("from-hf", tmp_path / "hf", local).code == 0
    for root, page, references in (
        (ckpt, f"{_STORE}/p.html", f"{_STORE}/k.json"),
        (local, tmp_path / "p", tmp_path / "k"),
    ):
        for _ in range(2):
            assert run("inspect", root, "--html", page).code == 0
            assert run("index", root, "--kerchunk", references).code == 0
        for words, what in (
            (("inspect", root, "--html"), "an HTML page"),
            (("index", root, "--kerchunk"), "references of kerchunk"),
        ):
            for victim in (f"{root}/release/metadata.json", f"{root}/release/common.pt"):
                line = f"error: {victim} exists and is not {what}: it is not replaced. Choose another name."
                outcome = run(*words, victim)
                assert (outcome.code, outcome.err[-1]) == (1, line)
        assert run("verify", root).code == 0
    (tmp_path / "empty").touch()
    assert run("inspect", local, "--html", tmp_path / "empty").code == 0


def test_a_picture(ckpt: str) -> None:
    """Plan --svg writes its picture into a store."""
    pytest.importorskip("matplotlib")
    assert run("plan", ckpt, "--tp", "2", "--svg", f"{_STORE}/out/plan.svg").code == 0
    assert get_folder(f"{_STORE}/out")["plan.svg"].startswith(b"<?xml")


@pytest.mark.parametrize(("words", "says"), [
    (("inspect", f"{_STORE}/ckpt", "--html", "hf://org/name/page.html"), "page.html is a URL of a kind that"),
    pytest.param(
        ("inspect", f"{_STORE}/ckpt", "--html", "http://127.0.0.1:9/page.html"), "a web server is only read",
        marks=pytest.mark.skipif(find_spec("obstore") is None, reason="URLs of web servers need obstore"),
    ),
    (("to-hf", f"{_STORE}/ckpt", "hf://org/name"), "hf://org/name is a URL of a kind that"),
    (("demo", "--keep", f"{_STORE}/demo"), "the demo works on this machine"),
])  # fmt: skip
def test_what_cannot_be_written(words: tuple[str, ...], says: str, ckpt: str) -> None:  # noqa: ARG001  (must be there)
    """The hub and web servers are only read, and the demo needs a directory."""
    outcome = run(*words)
    assert outcome.code == 1
    assert says in outcome.err[-1]
    assert not [path for path in Path().iterdir() if ":" in path.name]
