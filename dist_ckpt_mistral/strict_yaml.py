"""YAML as Megatron-Bridge writes it: plain values only, no duplicate keys, an object at the top, of a sane size."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from dist_ckpt_mistral import storage
from dist_ckpt_mistral.errors import FormatError

#: A run_config.yaml has some 20 kB; PyYAML takes seconds for a megabyte.
_MAX_BYTES: Final = 1 << 17
#: Of a number. YAML 1.1 has numbers of base 60, as in 1:30:00, which take long if they are long.
_MOST_DIGITS: Final = 100
#: What PyYAML lets through where a value is not what its tag says: numbers, dates and truth values that are none.
_UNTOLD: Final = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


def read_object(path: Path) -> dict[str, Any]:
    """Parse the file at ``path``, which must be one YAML mapping. Raises FormatError.

    Nothing but PyYAML's safe types is made. Aliases share what they stand for, so that they cost nothing until the
    result is printed or copied.
    """
    import yaml  # noqa: PLC0415  (only Megatron-Bridge's checkpoints need it)

    content = storage.read_bytes(path, most_bytes=_MAX_BYTES)
    try:
        value = yaml.load(content.decode(), Loader=_loader(yaml))  # noqa: S506  (a subclass of SafeLoader)
    except (yaml.YAMLError, *_UNTOLD) as error:
        raise FormatError(f"invalid YAML in {path}: {' '.join(str(error).split())}") from error
    if not isinstance(value, dict):
        raise FormatError(f"invalid YAML in {path}: expected a mapping, got {type(value).__name__}")
    return value


def dumps(value: Mapping[str, Any]) -> bytes:
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
