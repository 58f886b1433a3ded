"""The report of ``inspect`` as one HTML page that needs nothing else: no network, no other file."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from dist_ckpt_mistral.analysis.report import Report, TensorReport
from dist_ckpt_mistral.analysis.report_table import facts, shortened
from dist_ckpt_mistral.messages import human_bytes, printable
from dist_ckpt_mistral.model.table.entries import split_state_key
from dist_ckpt_mistral.storage import documents

_TEMPLATE: Final = "page.html.j2"
#: Kinds of tensors in the order of the map, and one colour each for light and dark pages (Okabe and Ito's, so that
#: people who see colours differently can tell them apart).
_KINDS: Final = ("embedding", "attention", "MLP", "experts", "norms", "output layer", "vision", "optimizer state")
_OTHER: Final = "other"
_LIGHT: Final = ("#0072b2", "#009e73", "#e69f00", "#d55e00", "#56b4e9", "#cc79a7", "#7a5195", "#9aa5b4", "#d5dae1")
_DARK: Final = ("#4aa3df", "#2fc79a", "#f0b93a", "#ff8a4c", "#7cc8f5", "#e39cc4", "#a884c9", "#5a6472", "#343b45")
_COLUMNS: Final = ("Tensor", "Kind", "Dtype", "Shape", "Saved in", "Chunks", "Size", "Files", "Hugging Face names")
_NUMBERS: Final = (5, 6)
#: Rows that the page has at first, and that "Show more" adds.
_SHOWN: Final = 300
_LAYER: Final = re.compile(r"(?<!transformer\.)\blayers\.(\d+)\.")
_BEFORE, _AFTER = -1, 1 << 30


def save_html(report: Report, path: Path) -> None:
    """Write the report as one self-contained HTML page, or replace an old one. Raises OutputError."""
    import jinja2  # noqa: PLC0415  (only pages need it)

    documents.require_own_kind(path, b"<!doctype html>", "an HTML page")
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(autoescape=True, loader=loader, undefined=jinja2.StrictUndefined)
    text = environment.get_template(_TEMPLATE).render(
        name=printable(_name(report.path)),
        path=printable(report.path),
        problems=[printable(problem) for problem in report.problems],
        facts=[(what, printable(value)) for what, value in facts(report)],
        map=_size_map(report),
        columns=_COLUMNS,
        numbers=_NUMBERS,
        files_column=_COLUMNS.index("Files") + 1,
        rows=[[printable(cell) for cell in _cells(tensor, report.files)] for tensor in report.tensors],
        keys=[_sort_keys(tensor) for tensor in report.tensors],
        lost_rows={number for number, tensor in enumerate(report.tensors) if _missing(tensor, report.files)},
        more=[printable(" ".join(tensor.hf_names[1:])) for tensor in report.tensors],
        shown=_SHOWN,
        files=[(printable(name), _size(size)) for name, size in report.files.items()],
        light=_LIGHT,
        dark=_DARK,
    )
    documents.write_whole(path, text.encode())


def _size(num_bytes: int | None) -> str:
    return "missing" if num_bytes is None else human_bytes(num_bytes)


def _name(path: str) -> str:
    """What tells a directory from others: an iteration stands with its root."""
    return "/".join((path if "://" in path else str(Path(path).absolute())).rstrip("/").split("/")[-2:])


def _missing(tensor: TensorReport, files: Mapping[str, int | None]) -> list[str]:
    """The files with data of a tensor that are not there."""
    return [file for file in tensor.files if files.get(file, 0) is None]


def _cells(tensor: TensorReport, files: Mapping[str, int | None]) -> tuple[str, ...]:
    missing = _missing(tensor, files)
    return (
        tensor.name,
        tensor.kind if tensor.ignored is None or tensor.kind != _OTHER else tensor.ignored,
        tensor.dtype,
        " x ".join(map(str, tensor.shape)),
        " x ".join(map(str, tensor.cut)) if any(parts > 1 for parts in tensor.cut) else "one piece",
        str(tensor.num_chunks),
        human_bytes(tensor.num_bytes),
        shortened(tensor.files) + (f", missing: {shortened(missing)}" if missing else ""),
        shortened(tensor.hf_names),
    )


def _sort_keys(tensor: TensorReport) -> list[int | None]:
    """What sorts a cell, where that is not its text."""
    keys: dict[int, int] = {5: tensor.num_chunks, 6: tensor.num_bytes}
    return [keys.get(column) for column in range(len(_COLUMNS))]


class _Place(NamedTuple):
    """A row of the map: embedding (``_BEFORE`` all layers), a layer, or what comes after them (``_AFTER``)."""

    number: int
    label: str


def _size_map(report: Report) -> dict[str, Any]:
    """The rows of the map of sizes, and the size of each kind."""
    sizes: dict[_Place, Counter[str]] = defaultdict(Counter)
    hf_names = {tensor.name: tensor.hf_names for tensor in report.tensors}
    for tensor in report.tensors:
        places = _places(tensor, hf_names)
        for place in places:
            sizes[place][tensor.kind] += tensor.num_bytes // len(places)
    kinds = (*_KINDS, _OTHER)
    most = max((row.total() for row in sizes.values()), default=0) or 1
    rows = [_row(place, row, kinds, most) for place, row in sorted(sizes.items()) if row.total()]
    totals = Counter[str]()
    for row in sizes.values():
        totals.update(row)
    legend = [(number, kind, human_bytes(totals[kind])) for number, kind in enumerate(kinds) if totals[kind]]
    return {"rows": rows, "kinds": legend}


def _row(place: _Place, sizes: Mapping[str, int], kinds: Sequence[str], most: int) -> dict[str, Any]:
    parts = [(number, kind, sizes[kind]) for number, kind in enumerate(kinds) if sizes.get(kind)]
    words = [f"{kind} {human_bytes(size)}" for _, kind, size in parts]
    return {
        "label": place.label,
        "size": human_bytes(sum(sizes.values())),
        "words": f"{place.label}: {', '.join(words)}",
        "parts": [
            {"kind": number, "percent": f"{100 * size / most:.3f}", "words": text}
            for (number, _, size), text in zip(parts, words, strict=True)
        ],
    }


def _places(tensor: TensorReport, hf_names: Mapping[str, Iterable[str]]) -> list[_Place]:
    """The rows that share a tensor's bytes: its layers, as its Hugging Face names or those of its parameter say."""
    state = split_state_key(tensor.name)
    names = tensor.hf_names or (hf_names.get(state[1], ()) if state else ())
    layers = sorted({int(match[1]) for name in names if (match := _LAYER.search(name))})
    if layers:
        return [_Place(layer, f"layer {layer}") for layer in layers]
    parameter = state[1] if state else tensor.name
    if not names:
        return [_Place(_AFTER + 1, "not in the model")]
    is_first = any("embed" in name for name in names) or tensor.kind == "vision" or "vision" in parameter
    return [_Place(_BEFORE, "before the layers") if is_first else _Place(_AFTER, "after the layers")]
