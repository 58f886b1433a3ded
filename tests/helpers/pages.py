"""HTML pages and SVG pictures, as a program reads them."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree as ET


class Page(HTMLParser):
    """The text of an HTML page, and every address in it."""

    def __init__(self, path: Path) -> None:
        """Parse the page at ``path``."""
        super().__init__()
        self.text = ""
        self.addresses: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_data(self, data: str) -> None:
        """Collect text."""
        self.text += data

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect addresses."""
        self.addresses += [f"{tag}:{value}" for name, value in attrs if name in ("src", "href") and value]


SVG = "{http://www.w3.org/2000/svg}"


class Picture:
    """A parsed SVG picture: its title and description, the identifiers and tooltips of its marks, and its texts."""

    def __init__(self, path: Path) -> None:
        """Parse the file at ``path``, which must be well-formed."""
        root = ET.fromstring(path.read_text(encoding="utf-8"))  # noqa: S314  (our own)
        assert root.tag == f"{SVG}svg"
        assert root.get("role") == "img"
        by_id = {each.get("id"): each for each in root}
        names = str(root.get("aria-labelledby")).split()
        self.title, self.description = ("".join(by_id[name].itertext()) for name in names)
        self._tooltips = {each.get("id", ""): each.findtext(f"{SVG}title") for each in root.iter(f"{SVG}g")}
        self.ids = [name for each in root.iter() if (name := each.get("id"))]
        self.texts = ["".join(each.itertext()) for each in root.iter(f"{SVG}text")]
        assert len(set(self.ids)) == len(self.ids)

    def marks(self, kind: str) -> list[int]:
        """The numbers of the marks called ``kind-N``."""
        return [int(name.removeprefix(f"{kind}-")) for name in self.ids if name.startswith(f"{kind}-")]

    def tooltips(self, kind: str) -> list[str]:
        """The tooltips of the marks called ``kind-N`` that have one, in order."""
        return [text for name, text in self._tooltips.items() if text and name.startswith(f"{kind}-")]
