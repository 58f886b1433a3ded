"""Hypothesis strategies that spoil genuine files: bytes, JSON values, YAML lines, pickle opcodes, zip fields."""

from __future__ import annotations

import io
import json
import os
import pickletools
import re
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from hypothesis import strategies as st

#: Numbers at the edges of what counts them.
NUMBERS: Final = (
    *(0, 1, 2, -1, 127, 255, 65535, 10**6, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**63 - 1, 2**63, 2**64, 10**30),
)
#: Texts that lead elsewhere, steer a terminal, or cannot be encoded.
TEXTS: Final = (
    *("", ".", "..", "../x", "/etc/passwd", "a/b", "\0", "\x1b[2J\x1b[31m", "\ud800", "\u202e", "x" * 5000, "1" * 5000),
)
VALUES: Final[tuple[Any, ...]] = (
    *(*NUMBERS, *TEXTS, True, False, None, 0.5, float("nan"), float("inf"), 1e400, [], {}, [[]], {"a": {}}),
    *([0] * 3, [2**62, 0], ["x"], {"quant_method": "fp8"}, {"rope_type": "yarn", "factor": 2.0}, "bfloat16", "F32"),
)
_FIELDS: Final = ((b"PK\1\2", 46), (b"PK\3\4", 30), (b"PK\5\6", 22), (b"PK\6\6", 56), (b"PK\6\7", 20))
#: Opcodes, most with arguments.
_SNIPPETS: Final = (
    *(
        b"2",
        b"0",
        b"1",
        b"(",
        b")",
        b"]",
        b"}",
        b".",
        b"N",
        b"K\0",
        b"M\xff\xff",
        b"J\xff\xff\xff\xff",
        b"\x8a\2\xff\x7f",
    ),
    *(b"h\0", b"j\xff\xff\xff\x7f", b"q\0", b"r\xff\xff\xff\x7f", b"\x94", b"p9999999999\n", b"\x85", b"\x86", b"t"),
    *(b"l", b"d", b"R", b"b", b"s", b"u", b"e", b"a", b"\x81", b"\x92", b"\x90", b"\x8f", b"o", b"Q", b"\x93"),
    *(b"\x8c\2os", b"\x8c\6system", b"cos\nsystem\n", b"ctorch\nSize\n", b"\x8e" + b"\xff" * 8, b"\x95" + b"\xff" * 8),
    *(b"G" + b"\xff" * 8, b"\x80\x05"),
)

Draw = st.DrawFn


@st.composite
def spoiled(draw: Draw, path: Path) -> bytes:
    """The content of a genuine file with one to three things wrong, in the way of its format or of no format."""
    content = path.read_bytes()
    ways = [_BYTES, *(way for suffix, way in _WAYS.items() if re.search(suffix, path.name))]
    for _ in range(draw(st.integers(1, 3))):
        content = draw(st.sampled_from(ways))(draw, content)
    return content


def _bytes(draw: Draw, content: bytes) -> bytes:
    """A piece is cut out, doubled, overwritten or moved."""
    edges = st.integers(0, len(content)) | st.integers(0, min(len(content), 300))
    start, end = sorted((draw(edges), draw(edges)))
    end = min(end, start + draw(st.sampled_from([0, 1, 2, 8, 64, len(content)])))
    piece = content[start:end]
    kind = draw(st.sampled_from(["cut", "double", "flip", "overwrite", "insert", "truncate"]))
    if kind == "truncate":
        return content[:start]
    if kind == "flip" and start < len(content):
        return content[:start] + bytes([content[start] ^ (1 << draw(st.integers(0, 7)))]) + content[start + 1 :]
    new = {"cut": b"", "double": piece * 2, "insert": piece + draw(st.binary(max_size=16))}.get(kind)
    return (
        content[:start] + (draw(st.sampled_from([b"\xff", b"\0"])) * len(piece) if new is None else new) + content[end:]
    )


def _json(draw: Draw, content: bytes) -> bytes:
    """A value is replaced, a key removed, renamed or doubled."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return content
    holders = [each for each in _walk(value) if each]
    if not holders:
        return content
    holder: Any = draw(st.sampled_from(holders))
    key = draw(st.sampled_from(sorted(holder) if isinstance(holder, dict) else range(len(holder))))
    kind = draw(st.sampled_from(["replace", "remove", "rename", "double", "deep"]))
    if kind == "remove":
        del holder[key]
    elif kind == "rename" and isinstance(holder, dict):
        holder[draw(st.sampled_from(TEXTS) | st.just(str(key) + "x"))] = holder.pop(key)
    elif kind == "deep":
        holder[key] = "DEEP"
    else:
        holder[key] = draw(st.sampled_from(VALUES))
    try:
        text = json.dumps(value)
    except RecursionError:
        return content
    if kind == "deep":
        text = text.replace('"DEEP"', "[" * 3000 + "]" * 3000)
    if kind == "double" and text.endswith("}"):
        text = text[:-1] + f", {json.dumps(str(key))}: 1}}"
    return text.encode()


def _walk(value: Any) -> list[Any]:  # noqa: ANN401  (JSON)
    """All objects and lists in a value, level by level: there may be more levels than Python recurses."""
    found: list[Any] = []
    level = [value]
    while level := [each for each in level if isinstance(each, dict | list)]:
        found += level
        level = [inner for each in level for inner in (each.values() if isinstance(each, dict) else each)]
    return found


def _safetensors(draw: Draw, content: bytes) -> bytes:
    """The header is spoiled as JSON, or its length is another."""
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length]
    if draw(st.booleans()):
        header = _json(draw, header)
        length = len(header)
    else:
        length = draw(st.sampled_from([0, 1, 7, length - 1, length + 1, 10**8, 2**32, 2**63, 2**64 - 1]))
    return (length % 2**64).to_bytes(8, "little") + header + content[8 + int.from_bytes(content[:8], "little") :]


def _pickle(draw: Draw, content: bytes) -> bytes:
    """An opcode is removed, doubled, replaced or preceded by another, or exchanged with one elsewhere."""
    try:
        starts = [at for _, _, at in pickletools.genops(content) if at is not None]
    except Exception:  # noqa: BLE001  (it is spoiled already)
        return content
    codes = [content[start:end] for start, end in zip(starts, [*starts[1:], len(content)], strict=True)]
    at, other = draw(st.integers(0, len(codes) - 1)), draw(st.integers(0, len(codes) - 1))
    kind = draw(st.sampled_from(["remove", "double", "replace", "insert", "exchange", "copy"]))
    snippet = draw(st.sampled_from(_SNIPPETS))
    if kind == "exchange":
        codes[at], codes[other] = codes[other], codes[at]
    elif kind == "copy":
        codes[at] = codes[other]
    else:
        new = {"remove": b"", "double": codes[at] * 2, "replace": snippet, "insert": snippet + codes[at]}
        codes[at] = new[kind]
    return _framed_anew(b"".join(codes)) if draw(st.booleans()) else b"".join(codes)


def _framed_anew(pickled: bytes) -> bytes:
    """With the length of the first frame as it is now."""
    if pickled[2:3] != b"\x95" or len(pickled) > 65536:
        return pickled
    return pickled[:3] + (len(pickled) - 11).to_bytes(8, "little") + pickled[11:]


def _archive(draw: Draw, content: bytes) -> bytes:
    """A record of a torch.save archive is spoiled, and the archive made again around it, checksums and all."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as zipped:
            records = {info.filename: zipped.read(info) for info in zipped.infolist()}
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError, struct.error, RuntimeError):
        return content
    name = draw(st.sampled_from(sorted(records)))
    way = _pickle if name.endswith("data.pkl") else _bytes
    records[name] = way(draw, records[name])
    packing = draw(st.sampled_from([zipfile.ZIP_STORED] * 4 + [zipfile.ZIP_DEFLATED]))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", packing) as zipped:
        for each, record in records.items():
            zipped.writestr(each, record)
    return buffer.getvalue()


def _zip_field(draw: Draw, content: bytes) -> bytes:
    """A number in one of the headers of a zip archive is another."""
    places = [(at.start(), size) for mark, size in _FIELDS for at in re.finditer(re.escape(mark), content)]
    if not places:
        return content
    start, size = draw(st.sampled_from(places))
    at, width = start + draw(st.integers(0, size - 1)), draw(st.sampled_from([1, 2, 4, 8]))
    number: int = draw(st.sampled_from(NUMBERS))
    return content[:at] + (number % (1 << 8 * width)).to_bytes(width, "little") + content[at + width :]


def _yaml(draw: Draw, content: bytes) -> bytes:
    """A value is replaced, a line doubled, removed, or a few aliases added."""
    lines = content.decode(errors="replace").split("\n")
    at = draw(st.integers(0, len(lines) - 1))
    key = lines[at].partition(":")[0]
    values = [
        "!!int ''",
        "!!float x",
        "!!bool x",
        "!!timestamp x",
        "&a [*a]",
        "*a",
        "[[[",
        "{? {}}",
        "1:2:3",
        ".inf",
        ".nan",
    ]
    values += [
        "!!python/object/apply:os.system [x]",
        "!!binary x",
        "!!set {a, b}",
        "0x" + "f" * 300,
        "9" * 5000,
        "2026-99-99",
    ]
    new = {
        "replace": [f"{key}: {draw(st.sampled_from(values) | st.sampled_from(NUMBERS).map(str))}"],
        "double": [lines[at], lines[at]],
        "remove": [],
        "merge": [f"{key}: &m {{a: 1}}", f"{key}x: {{<<: *m}}"],
    }
    return "\n".join([*lines[:at], *new[draw(st.sampled_from(sorted(new)))], *lines[at + 1 :]]).encode()


def _tracker(draw: Draw, _: bytes) -> bytes:
    """Another text, whatever was there."""
    text: str = draw(st.sampled_from([*TEXTS, *map(str, NUMBERS), "release", "\u0663", "1e3"]))
    return text.encode(errors="surrogatepass")


_Way = Callable[[Draw, bytes], bytes]
_BYTES: Final[_Way] = _bytes
#: Pattern of a file's name -> what else can be wrong with it.
_WAYS: Final[dict[str, _Way]] = {
    r"\.json$|^\.zarray$": _json,
    r"\.safetensors$": _safetensors,
    r"^\.metadata$": _pickle,
    r"^(common|latest_train_state|shard_.*)\.pt$": _archive,
    r"\.(pt|distcp)$": _zip_field,
    r"\.yaml$": _yaml,
    r"^latest.*txt$": _tracker,
}


def misplace(path: Path, kind: str, elsewhere: Path) -> None:
    """Put something else in the place of a file. ``elsewhere`` is a file that is none of the tool's business."""
    path.unlink()
    if kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "empty":
        path.touch()
    elif kind != "nothing":
        targets: dict[str, str | Path] = {"device": "/dev/zero", "loop": path, "dangling": "nowhere"}
        path.symlink_to(targets.get(kind, elsewhere))


PLACES: Final = ("directory", "pipe", "empty", "nothing", "device", "loop", "dangling", "elsewhere")


def restore(path: Path, content: bytes) -> None:
    """Undo what was done to a file."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    path.write_bytes(content)
