"""Headers of safetensors files against the library: laid out, taken and refused as it does."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st
from random_tensors import random_tensor
from safetensors.torch import save

from dist_ckpt_mistral.errors import FormatError
from dist_ckpt_mistral.formats.safetensors import new_file, parse_header
from dist_ckpt_mistral.gather.dtypes import KNOWN_DTYPES, to_safetensors

NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6).filter(lambda n: n != "__metadata__")
TENSORS = st.dictionaries(
    NAMES,
    st.tuples(st.sampled_from([*KNOWN_DTYPES]), st.lists(st.integers(0, 3), max_size=3).map(tuple)),
    max_size=6,
)


@settings(max_examples=200)
@given(TENSORS)
def test_headers_are_laid_out_as_the_library_does(tensors: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    """For any names, dtypes and shapes the planned head of a file is, byte for byte, what safetensors writes."""
    written = save({name: random_tensor(*kind) for name, kind in tensors.items()}, metadata={"format": "pt"})
    planned = new_file((name, *kind) for name, kind in tensors.items())
    assert written[: planned.data_start] == planned.head
    assert planned.num_bytes == len(written)


deserialize: Callable[[bytes], list[tuple[str, dict[str, Any]]]] = safetensors.deserialize


def library_reads(content: bytes) -> dict[str, tuple[str, list[int], bytes]] | None:
    """Name -> (dtype, shape, bytes) as the safetensors library reads a file; None if it refuses it."""
    try:
        found = deserialize(content)
    except safetensors.SafetensorError:
        return None
    return {name: (entry["dtype"], entry["shape"], bytes(entry["data"])) for name, entry in found}


def we_read(text: bytes, data: bytes) -> dict[str, tuple[str, list[int], bytes]] | None:
    """The same as the package reads it."""
    try:
        file = parse_header(text, "it", data_bytes=len(data))
    except FormatError:
        return None
    assert file.head == len(text).to_bytes(8, "little") + text
    return {t.name: (to_safetensors(t.dtype), list(t.shape), data[t.begin : t.end]) for t in file.tensors}


VALUES: st.SearchStrategy[Any] = st.sampled_from(
    [0, 1, 2, 4, 8, 16, -1, 2**40, 2**63, 2**64, 1.0, 4.5, True, None, "4", [], [4], {}]
)
VALUE_LISTS: st.SearchStrategy[Any] = st.lists(VALUES, max_size=3)
ENDINGS: st.SearchStrategy[bytes] = st.sampled_from([b"", b"", b"x"])


@st.composite
def spoiled_entries(draw: st.DrawFn, entry: dict[str, Any]) -> dict[str, Any]:
    """A header entry with one thing changed, left out, or added."""
    key = draw(st.sampled_from(["dtype", "shape", "data_offsets", "more"]))
    if key == "more":
        return entry | {key: draw(VALUES)}
    if draw(st.integers(0, 4)) == 0:
        return {name: value for name, value in entry.items() if name != key}
    if key == "dtype":
        return entry | {key: draw(st.sampled_from(["F32", "BF16", "I8", "X9", "f32", "", None, 3]))}
    values = list(entry[key])
    if bool(values) and draw(st.booleans()):
        values[draw(st.integers(0, len(values) - 1))] = draw(VALUES)
        return entry | {key: values}
    return entry | {key: draw(st.one_of(VALUES, VALUE_LISTS))}


@settings(max_examples=500)
@given(data=st.data(), tensors=TENSORS)
def test_headers_are_taken_and_refused_as_the_library_does(
    data: st.DataObject, tensors: dict[str, tuple[str, tuple[int, ...]]]
) -> None:
    """Headers with anything wrong or odd in them: what the library refuses is refused, what it takes is read alike."""
    content = save({name: random_tensor(*kind) for name, kind in tensors.items()})
    length = int.from_bytes(content[:8], "little")
    header, raw = json.loads(content[8 : 8 + length]), content[8 + length :]
    for name in data.draw(st.sets(st.sampled_from(sorted(header)), max_size=2)) if header else ():
        header[name] = data.draw(spoiled_entries(header[name]))
    raw = raw[: len(raw) - data.draw(st.sampled_from([0, 0, 1]))] + data.draw(ENDINGS)
    text = json.dumps(header, ensure_ascii=data.draw(st.booleans())).encode() + b" " * data.draw(st.integers(0, 9))
    assert we_read(text, raw) == library_reads(len(text).to_bytes(8, "little") + text + raw)


@pytest.mark.parametrize(
    "shape", ["[0, 18446744073709551616]", "[9223372036854775808, 2, 0]", "[0, 9223372036854775808]"]
)
def test_empty_tensors_with_absurd_axes(shape: str) -> None:
    """Axes and products that 64 bits cannot hold are refused as by the library, even where nothing is stored."""
    text = f'{{"a":{{"dtype":"U8","shape":{shape},"data_offsets":[0,0]}}}}'.encode()
    assert we_read(text, b"") == library_reads(len(text).to_bytes(8, "little") + text)


@pytest.mark.parametrize(
    "text",
    [
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}',
        b'[{"dtype":"U8","shape":[1],"data_offsets":[0,1]}]',
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}x',
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}\0',
        '{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'.encode("utf-16-le"),
        b'\xef\xbb\xbf{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        b'{"\xff":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,1]}}',
        b"",
    ],
)
def test_headers_that_are_no_json_are_refused(text: bytes) -> None:
    """Other encodings, rubbish behind, no object: refused by the library and here."""
    assert library_reads(len(text).to_bytes(8, "little") + text + b"x") is None
    assert we_read(text, b"x") is None
