"""YAML as Megatron-Bridge writes it: plain values only, no duplicate keys, an object at the top, of a sane size."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, Final

from dist_ckpt_mistral import storage
from dist_ckpt_mistral.errors import FormatError

#: A run_config.yaml has some 20 kB.
_MAX_BYTES: Final = 1 << 20


def read_object(path: Path) -> dict[str, Any]:
    """Parse the file at ``path``, which must be one YAML mapping. Raises FormatError.

    Nothing but PyYAML's safe types is made. Aliases share what they stand for, so that they cost nothing until the
    result is printed or copied.
    """
    import yaml  # noqa: PLC0415  (only Megatron-Bridge's checkpoints need it)

    content = _small(path)
    try:
        value = yaml.load(content.decode(), Loader=_loader(yaml))  # noqa: S506  (a subclass of SafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: numbers and dates that are none
        raise FormatError(f"invalid YAML in {path}: {' '.join(str(error).split())}") from error
    if not isinstance(value, dict):
        raise FormatError(f"invalid YAML in {path}: expected a mapping, got {type(value).__name__}")
    return value


def _small(path: Path) -> bytes:
    """The content, read only where it is of a sane size."""
    with storage.SourceFiles([path]) as files:
        size_bytes = files.size_bytes(0)
        if size_bytes > _MAX_BYTES:
            raise FormatError(f"{path} is too large: expected at most {_MAX_BYTES} bytes, got {size_bytes}")
        return files.read(0, 0, size_bytes)


def _loader(yaml: Any) -> Any:  # noqa: ANN401  (the module, and a class of it)
    """PyYAML's SafeLoader that refuses duplicate keys, of which it would silently take the last, and merge keys."""

    class Strict(yaml.SafeLoader):  # type: ignore[misc]  # yaml is imported late
        def flatten_mapping(self, node: Any) -> None:  # noqa: ANN401
            """Merging copies what aliases only share: a few lines could fill the memory."""
            keys = Counter((key.tag, key.value) for key, _ in node.value if key.id == "scalar")
            wrong = [value for (tag, value), count in keys.items() if count > 1 or tag.endswith(":merge")]
            if wrong:
                problem = f"duplicate keys or merge keys {', '.join(map(repr, wrong))}"
                raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)

    return Strict
