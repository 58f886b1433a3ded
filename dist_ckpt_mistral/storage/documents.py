"""Small files, read and written whole: bytes, JSON as the formats define it, and YAML as Megatron-Bridge writes it.

Both are strict: UTF-8, no duplicate keys, one object at the top, of a sane size.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from dist_ckpt_mistral.errors import FormatError, OutputError
from dist_ckpt_mistral.storage.local import SourceFiles, Sources, Stamp, changed, open_to_read

_BLOCK_BYTES: Final = 1 << 20
#: More than any index, configuration or tracker has: what is larger is not read whole.
SMALL_BYTES: Final = 64 << 20
#: How a pointer begins (git-lfs 3.7, docs/spec.md).
_LFS_POINTER: Final = b"version https://git-lfs.github.com/spec/v1"
#: Objects and lists in each other. The formats need five; what is said of values recurses into them.
_MOST_JSON_LEVELS: Final = 100
#: A run_config.yaml has some 20 kB; PyYAML takes seconds for a megabyte.
_MAX_BYTES: Final = 1 << 17
#: Of a number. YAML 1.1 has numbers of base 60, as in 1:30:00, which take long if they are long.
_MOST_DIGITS: Final = 100
#: What PyYAML lets through where a value is not what its tag says: numbers, dates and truth values that are none.
_UNTOLD: Final = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


def read_bytes(path: Path, *, most_bytes: int | None = SMALL_BYTES) -> bytes:
    """The whole content of a small file. Raises FormatError where it is no file, or larger than ``most_bytes``."""
    with SourceFiles([path]) as files:
        size_bytes = files.size_bytes(0)
        if most_bytes is not None and size_bytes > most_bytes:
            raise FormatError(f"{path} is too large: expected at most {most_bytes} bytes, got {size_bytes}")
        return files.read(0, 0, size_bytes)


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file is what a clone has where Git LFS did not fetch the file itself."""
    with SourceFiles([path]) as files:
        return files.read(0, 0, min(files.size_bytes(0), len(_LFS_POINTER))) == _LFS_POINTER


def write_bytes(path: Path, data: bytes) -> None:
    """Write a small file, which must not exist. ``publish`` makes it durable."""
    with path.open("xb") as file:
        file.write(data)


def write_link(path: Path, sibling: str) -> None:
    """Make ``path`` a link to ``sibling`` beside it, in place of an old one. Raises OSError if it cannot be."""
    path.unlink(missing_ok=True)
    path.symlink_to(sibling)


def write_whole(path: Path, data: bytes) -> None:
    """Write a small file whole or not at all: under another name beside it, then renamed; an old one is replaced.

    What is no regular file, such as a pipe, is written to as it is. Raises OutputError.
    """
    try:
        if path.exists() and not path.is_file():
            path.write_bytes(data)
            return
        target = path.resolve()  # a link stays one
        staging = target.parent / f".{target.name}.incomplete-{os.getpid()}-{os.urandom(4).hex()}"
        try:
            write_bytes(staging, data)
            staging.replace(target)
        finally:
            staging.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error


def copy_file(source: Path, target: Path) -> None:
    """Copy a file of any size, content only, in blocks. The target must not exist."""
    with target.open("xb") as file:
        file.writelines(_blocks(source))


def total_bytes(paths: Sequence[Path]) -> int:
    """How much space the content of files takes. Raises FormatError where one of them cannot be opened to be read."""
    with SourceFiles(paths) as files:
        return sum(map(files.size_bytes, range(len(paths))))


def _blocks(path: Path) -> Iterator[bytes]:
    try:
        with open(open_to_read(path, Sources.active()), "rb") as file:  # noqa: PTH123  (a descriptor)
            before = Stamp.of(os.fstat(file.fileno()))
            while block := file.read(_BLOCK_BYTES):
                yield block
            if Stamp.of(os.fstat(file.fileno())) != before:
                raise changed(path)
    except OSError as error:
        raise FormatError(f"cannot read {path}: {error.strerror or error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The one JSON object in a small file. Raises FormatError."""
    return parse_json(read_bytes(path), str(path))


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = sorted({key for key, _ in pairs if key in seen or seen.add(key)})  # type: ignore[func-returns-value]
        raise FormatError(f"duplicate JSON keys {', '.join(map(repr, twice))}")
    return result


def parse_json(text: bytes | str, where: str) -> dict[str, Any]:
    """Parse ``text``, which must be one JSON object; ``where`` names the file for the error."""
    try:
        text = text if isinstance(text, str) else text.decode()  # json itself would take UTF-16 and UTF-32 too
        value = json.loads(text, object_pairs_hook=_refuse_duplicates)
    except FormatError as error:
        raise FormatError(f"{error} in {where}. Nothing was read from it.") from error
    except (ValueError, RecursionError) as error:
        raise FormatError(f"invalid JSON in {where}: {error}") from error
    if _levels(value) > _MOST_JSON_LEVELS:
        limit = f"expected at most {_MOST_JSON_LEVELS} levels of objects and lists, got more"
        raise FormatError(f"invalid JSON in {where}: {limit}")
    if not isinstance(value, dict):
        raise FormatError(f"invalid JSON in {where}: expected an object, got {type(value).__name__}")
    return value


def _levels(value: object) -> int:
    """How many objects and lists lie in each other at most; counted to one more than is allowed."""
    level, count = [value], 0
    while (level := [each for each in level if isinstance(each, dict | list)]) and count <= _MOST_JSON_LEVELS:
        level = [inner for each in level for inner in (each.values() if isinstance(each, dict) else each)]
        count += 1
    return count


def read_yaml(path: Path) -> dict[str, Any]:
    """Parse the file at ``path``, which must be one YAML mapping. Raises FormatError.

    Nothing but PyYAML's safe types is made. Aliases share what they stand for, so that they cost nothing until the
    result is printed or copied.
    """
    import yaml  # noqa: PLC0415  (only Megatron-Bridge's checkpoints need it)

    content = read_bytes(path, most_bytes=_MAX_BYTES)
    try:
        value = yaml.load(content.decode(), Loader=_loader(yaml))  # noqa: S506  (a subclass of SafeLoader)
    except (yaml.YAMLError, *_UNTOLD) as error:
        raise FormatError(f"invalid YAML in {path}: {' '.join(str(error).split())}") from error
    if not isinstance(value, dict):
        raise FormatError(f"invalid YAML in {path}: expected a mapping, got {type(value).__name__}")
    return value


def yaml_bytes(value: Mapping[str, Any]) -> bytes:
    """The content of a YAML file that says ``value``: plain values, mappings and lists."""
    import yaml  # noqa: PLC0415  (only Megatron-Bridge's checkpoints need it)

    return bytes(yaml.safe_dump(dict(value), encoding="utf-8"))


def _loader(yaml: Any) -> Any:  # noqa: ANN401  (the module, and a class of it)
    """PyYAML's SafeLoader that refuses duplicate keys, of which it would silently take the last, and merge keys."""

    class Strict(yaml.SafeLoader):  # type: ignore[misc]  # yaml is imported late
        def construct_scalar(self, node: Any) -> Any:  # noqa: ANN401
            """Every value passes here before it becomes a number."""
            if node.tag.endswith((":int", ":float")) and len(node.value) > _MOST_DIGITS:
                problem = f"a number of {len(node.value)} digits"
                raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
            return super().construct_scalar(node)

        def flatten_mapping(self, node: Any) -> None:  # noqa: ANN401
            """Merging copies what aliases only share: a few lines could fill the memory."""
            keys = Counter((key.tag, key.value) for key, _ in node.value if key.id == "scalar")
            wrong = [value for (tag, value), count in keys.items() if count > 1 or tag.endswith(":merge")]
            if wrong:
                problem = f"duplicate keys or merge keys {', '.join(map(repr, wrong))}"
                raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)

    return Strict
