"""Small files, read and written whole: bytes, JSON, and YAML as Megatron-Bridge writes it.

JSON and YAML are parsed strictly: UTF-8, no duplicate keys, one mapping at the top level, of limited size.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from dist_ckpt_mistral.errors import FormatError, OutputError, SourceError
from dist_ckpt_mistral.storage.local import SourceFiles
from dist_ckpt_mistral.storage.paths import is_file, require_writable_scheme
from dist_ckpt_mistral.storage.remote_path import WEB_SCHEMES, RemotePath
from dist_ckpt_mistral.storage.sources import Sources, Stamp, changed, open_to_read
from dist_ckpt_mistral.storage.store import Store

#: Larger than any index, configuration or tracker; larger files are not read whole.
SMALL_BYTES: Final = 64 << 20
#: First bytes of a pointer file (git-lfs 3.7, docs/spec.md).
_LFS_POINTER: Final = b"version https://git-lfs.github.com/spec/v1"
#: Objects and lists inside one another. The formats need five; code that handles the values recurses into them.
_MOST_JSON_LEVELS: Final = 100
_BLOCK_BYTES: Final = 1 << 20
_REMOTE_BLOCK_BYTES: Final = 16 << 20
#: A run_config.yaml has about 20 kB; PyYAML takes seconds for a megabyte.
_MAX_YAML_BYTES: Final = 1 << 17
#: PyYAML's errors for a value that does not match its tag: an invalid number, date or boolean.
_YAML_VALUE_ERRORS: Final = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
#: Of one number. YAML 1.1 has base-60 numbers such as 1:30:00, whose conversion takes quadratic time.
_MAX_DIGITS: Final = 100


def read_bytes(path: Path, *, most_bytes: int | None = SMALL_BYTES) -> bytes:
    """Read a small file. Raises FormatError if it is not a regular file or larger than ``most_bytes``."""
    with SourceFiles([path]) as files:
        size_bytes = files.size_bytes(0)
        if most_bytes is not None and size_bytes > most_bytes:
            raise FormatError(f"{path} is too large: expected at most {most_bytes} bytes, got {size_bytes}")
        return files.read(0, 0, size_bytes)


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file is a Git LFS pointer, which a clone contains if the file itself was not fetched."""
    with SourceFiles([path]) as files:
        return files.read(0, 0, min(files.size_bytes(0), len(_LFS_POINTER))) == _LFS_POINTER


def write_bytes(path: Path, data: bytes) -> None:
    """Write a small file, which must not exist. ``Staging.publish`` makes it durable."""
    with path.open("xb") as file:
        file.write(data)


def write_link(path: Path, sibling: str) -> None:
    """Make ``path`` a symbolic link to ``sibling`` in the same directory; an old link is replaced. Raises OSError."""
    path.unlink(missing_ok=True)
    path.symlink_to(sibling)


def require_own_kind(path: Path, start: bytes, what: str) -> None:
    """Raise OutputError if a file with content is there that does not begin with ``start``, as ``what`` does.

    A report or index is written where the user says, and must not take the place of a file of the model by a slip.
    """
    is_only_read = isinstance(path, RemotePath) and path.base.partition(":")[0] in WEB_SCHEMES  # so it is not asked
    if is_only_read or not is_file(path) or path.stat().st_size == 0:
        return
    with SourceFiles([path]) as files:
        found = files.read(0, 0, min(files.size_bytes(0), len(start)))
    if found.lower() != start.lower():
        raise OutputError(f"{path} exists and is not {what}: it is not replaced. Choose another name.")


def write_whole(path: Path, data: bytes) -> None:
    """Write a small file atomically: under a temporary name in the same directory, then renamed over an old one.

    A pipe or device is written in place, and an object of a store appears whole anyway. Raises OutputError.
    """
    if isinstance(path, RemotePath):
        path.snapshot.store.write(path.key, data)
        return
    require_writable_scheme(path)
    try:
        if path.exists() and not path.is_file():
            path.write_bytes(data)
            return
        target = path.resolve()  # a link stays a link
        staging = target.parent / f".{target.name}.incomplete-{os.getpid()}-{os.urandom(4).hex()}"
        try:
            write_bytes(staging, data)
            staging.replace(target)
        finally:
            staging.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:  # a loop of links is a RuntimeError up to Python 3.12
        raise OutputError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from error


def remove(path: Path) -> None:
    """Remove a file, if it is there. Raises OutputError."""
    if isinstance(path, RemotePath):
        path.snapshot.store.delete([path.key])
        return
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"cannot remove {path}: {error.strerror or error}") from error


def copy_file(source: Path, target: Path) -> None:
    """Copy the content of a file of any size. The target must not exist. Raises FormatError and OSError."""
    with target.open("xb") as file:
        file.writelines(_blocks(source))


def put_file(path: Path, store: Store, key: str, part_bytes: int) -> None:
    """Write the content of a local file as an object, in parts if it is longer than one. Raises OutputError."""
    if path.stat().st_size <= part_bytes:
        store.write(key, read_bytes(path, most_bytes=None))
        return
    with path.open("rb") as file:
        store.upload(key, iter(lambda: file.read(part_bytes), b""), part_bytes)


def total_bytes(paths: Sequence[Path]) -> int:
    """Return the total size of files in bytes. Raises FormatError if one of them cannot be opened."""
    with SourceFiles(paths) as files:
        return sum(map(files.size_bytes, range(len(paths))))


def _blocks(path: Path) -> Iterator[bytes]:
    """Yield the content of a file in blocks. Raises FormatError if it changes meanwhile."""
    if isinstance(path, RemotePath):
        yield from _blocks_of_object(path)
        return
    try:
        with open(open_to_read(path, Sources.active()), "rb") as file:  # noqa: PTH123  (a descriptor)
            before = Stamp.of(os.fstat(file.fileno()))
            while block := file.read(_BLOCK_BYTES):
                yield block
            if Stamp.of(os.fstat(file.fileno())) != before:
                raise changed(path)
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror or error}") from error


def _blocks_of_object(path: RemotePath) -> Iterator[bytes]:
    """Yield the content of an object in blocks, all of one version."""
    with SourceFiles([path]) as files:
        size_bytes = files.size_bytes(0)
        for start in range(0, size_bytes, _REMOTE_BLOCK_BYTES):
            yield files.read(0, start, min(_REMOTE_BLOCK_BYTES, size_bytes - start))


def read_json(path: Path) -> dict[str, Any]:
    """Read a small file that contains one JSON object. Raises FormatError."""
    return parse_json(read_bytes(path), str(path))


def parse_json(text: bytes | str, where: str) -> dict[str, Any]:
    """Parse one JSON object. ``where`` names the file in errors. Raises FormatError."""
    try:
        text = text if isinstance(text, str) else text.decode()  # ``json.loads`` would accept UTF-16 and UTF-32, too
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
    """The deepest nesting of objects and lists in ``value``; counting stops above the limit."""
    level, count = [value], 0
    while (level := [each for each in level if isinstance(each, dict | list)]) and count <= _MOST_JSON_LEVELS:
        level = [inner for each in level for inner in (each.values() if isinstance(each, dict) else each)]
        count += 1
    return count


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        duplicates = sorted(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise FormatError(f"duplicate JSON keys {', '.join(map(repr, duplicates))}")
    return result


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a small file that contains one YAML mapping. Raises FormatError.

    Only PyYAML's safe types are constructed. Aliases share one object, so they take no memory until the result is
    printed or copied.
    """
    import yaml  # noqa: PLC0415  (slow; only Megatron-Bridge checkpoints need it)

    content = read_bytes(path, most_bytes=_MAX_YAML_BYTES)
    try:
        value = yaml.load(content.decode(), Loader=_strict_loader(yaml))  # noqa: S506  (a subclass of SafeLoader)
    except (yaml.YAMLError, *_YAML_VALUE_ERRORS) as error:
        raise FormatError(f"invalid YAML in {path}: {' '.join(str(error).split())}") from error
    if not isinstance(value, dict):
        raise FormatError(f"invalid YAML in {path}: expected a mapping, got {type(value).__name__}")
    return value


def yaml_bytes(value: Mapping[str, Any]) -> bytes:
    """Return a mapping of plain values, mappings and lists as the UTF-8 content of a YAML file."""
    import yaml  # noqa: PLC0415  (slow; only Megatron-Bridge checkpoints need it)

    return bytes(yaml.safe_dump(dict(value), encoding="utf-8"))


def _strict_loader(yaml: Any) -> Any:  # noqa: ANN401  (the module, and a class of it)
    """Return a SafeLoader that refuses long numbers, merge keys, and duplicate keys, where PyYAML takes the last.

    It parses with libyaml if PyYAML was built with it: 2 ms instead of 25 for the run_config.yaml of an import.
    """
    safe_loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

    class Strict(safe_loader):  # type: ignore[misc]  # yaml is imported late
        def construct_scalar(self, node: Any) -> Any:  # noqa: ANN401
            """Refuse a long number before PyYAML converts it."""
            if node.tag.endswith((":int", ":float")) and len(node.value) > _MAX_DIGITS:
                problem = f"a number of {len(node.value)} digits"
                raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
            return super().construct_scalar(node)

        def flatten_mapping(self, node: Any) -> None:  # noqa: ANN401
            """Refuse duplicate keys, and merge keys: merging copies shared values, so a few lines could fill memory."""
            keys = Counter((key.tag, key.value) for key, _ in node.value if key.id == "scalar")
            refused = [value for (tag, value), count in keys.items() if count > 1 or tag.endswith(":merge")]
            if refused:
                problem = f"duplicate keys or merge keys {', '.join(map(repr, refused))}"
                raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)

    return Strict
