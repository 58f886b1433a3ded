"""What matplotlib leaves out of an SVG: a title and a description, tooltips, and colours for dark backgrounds."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Final, TypeAlias
from xml.etree import ElementTree as ET

from dist_ckpt_mistral.analysis.picture import style

#: Identifier of a mark -> its tooltip. A collection of marks has one tooltip for each of them.
Tooltips: TypeAlias = Mapping[str, str | Sequence[str]]

_SVG: Final = "http://www.w3.org/2000/svg"
_NAMESPACES: Final = {
    "": _SVG,
    "xlink": "http://www.w3.org/1999/xlink",
    "rdf": "http://www.w3.org/1999/02/22-rdf-syntax-ns#",
    "cc": "http://creativecommons.org/ns#",
    "dc": "http://purl.org/dc/elements/1.1/",
}


def completed(svg: bytes, title: str, description: str, tooltips: Tooltips) -> bytes:
    """Matplotlib's SVG with these texts for screen readers and pointers, and its colours for dark backgrounds.

    matplotlib writes colours into each mark (backend_svg.py, 3.10), so the rules for dark backgrounds select marks by
    the colour that they have.
    """
    for prefix, namespace in _NAMESPACES.items():
        ET.register_namespace(prefix, namespace)
    root = ET.fromstring(svg)  # noqa: S314  (our own)
    root.set("role", "img")
    root.set("aria-labelledby", "title description")
    for element in root.iter(f"{{{_SVG}}}g"):
        tooltip = tooltips.get(element.get("id", ""))
        if isinstance(tooltip, str):
            _add_title(element, tooltip)
        elif tooltip is not None:
            marks = [child for child in element if child.tag != f"{{{_SVG}}}defs"]
            for mark, text in zip(marks, tooltip, strict=True):
                _add_title(mark, text)
    for name, text in (("style", _dark_rules()), ("desc", description), ("title", title)):
        element = ET.Element(f"{{{_SVG}}}{name}")
        element.text = text
        if name != "style":
            element.set("id", {"desc": "description"}.get(name, name))
        root.insert(0, element)
    content = io.BytesIO()
    ET.ElementTree(root).write(content, encoding="utf-8", xml_declaration=True)
    return content.getvalue()


def _add_title(element: ET.Element, text: str) -> None:
    title = ET.Element(f"{{{_SVG}}}title")
    title.text = text
    element.insert(0, title)


def _dark_rules() -> str:
    rules = [
        f'[style*="{what}: {light}"] {{ {what}: {dark} !important }}'
        for light, dark in style.DARK.items()
        for what in ("fill", "stroke")
    ]
    return "\n".join(["@media (prefers-color-scheme: dark) {", ":root { color-scheme: dark }", *rules, "}"])
