"""The public names: their signatures mention only public types, and each has a docstring with its sections."""

from __future__ import annotations

import dataclasses
import enum
import importlib
import importlib.metadata
import importlib.util
import inspect
import re
import typing
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import pytest

import dist_ckpt_mistral

#: Public functions and classes, by name, as the stub lists them: the module that defines each.
_MODULES: Final = {
    name: f"{dist_ckpt_mistral.__name__}.{module}"
    for module, name in re.findall(
        r"^from \.([\w.]+) import (\w+) as \2$",
        Path(dist_ckpt_mistral.__file__).with_suffix(".pyi").read_text(),
        re.MULTILINE,
    )
    if name not in {"__version__", "GivenConfig"}  # a string, and a union of public types
}
#: Module -> what it imports, where that is not installed with all.
_NEEDED: Final = {"views.torch_dcp": "torch", "views.zarr_store": "zarr", "views.hf_files": "fsspec"}


def _is_absent(needed: str | None) -> bool:
    return needed is not None and importlib.util.find_spec(needed) is None


def _marks(module: str) -> tuple[pytest.MarkDecorator, ...]:
    needed = _NEEDED.get(module.removeprefix(f"{dist_ckpt_mistral.__name__}."))
    return (
        *((pytest.mark.megatron,) if ".megatron." in module else ()),
        pytest.mark.skipif(_is_absent(needed), reason=f"{needed} is not installed"),
    )


_OBJECTS: Final = tuple(pytest.param(name, marks=_marks(module)) for name, module in _MODULES.items())


def test_the_stub_names_all() -> None:
    """The stub has a line for every public name, and no other form of import; what lacks a library is not listed."""
    here = {
        name
        for name, module in _MODULES.items()
        if not _is_absent("megatron" if ".megatron." in module else _NEEDED.get(module.partition(".")[2]))
    }
    assert {*here, "__version__", "GivenConfig"} == set(dir(dist_ckpt_mistral))


def _signatures(public: Any) -> Iterator[tuple[str, Any]]:  # noqa: ANN401  (a function or class)
    """Yield (where, resolved annotation) of a function, or of a class's public fields, properties and methods."""
    for_type_checkers = {} if "torch" in vars(inspect.getmodule(public)) else {"torch": SimpleNamespace(Tensor=object)}
    hints = typing.get_type_hints(public, localns=for_type_checkers)
    yield from ((where, hint) for where, hint in hints.items() if not where.startswith("_"))
    for name in dir(public) if inspect.isclass(public) else ():
        member = inspect.getattr_static(public, name)
        for inner in ("fget", "func", "__func__"):  # of properties, cached properties, class and static methods
            member = getattr(member, inner, member)
        if not name.startswith("_") and inspect.isfunction(member) and _is_ours(member):
            yield from ((f"{name}: {where}", hint) for where, hint in _signatures(member))


def _types(annotation: Any) -> Iterator[type]:  # noqa: ANN401  (any annotation)
    """Yield the classes in an annotation."""
    if isinstance(annotation, list | tuple):
        for each in annotation:
            yield from _types(each)
    elif isinstance(annotation, type):
        yield annotation
    yield from (each for part in typing.get_args(annotation) for each in _types(part))


def _is_ours(named: Any) -> bool:  # noqa: ANN401  (a function or class)
    return str(named.__module__).startswith(f"{dist_ckpt_mistral.__name__}.")


def _public(name: str) -> Any:  # noqa: ANN401  (a function or class)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Megatron warns that Transformer Engine is missing
        return getattr(importlib.import_module(_MODULES[name]), name)


@pytest.mark.parametrize("name", _OBJECTS)
def test_what_a_signature_mentions_is_public(name: str) -> None:
    """Every type of this package in the annotations of a public function, field, property or method is exported."""
    hidden = {
        f"{where}: {kind.__qualname__}"
        for where, annotation in _signatures(_public(name))
        for kind in _types(annotation)
        if _is_ours(kind) and _MODULES.get(kind.__qualname__) != kind.__module__
    }
    assert hidden == set()


def _sections(docstring: str) -> dict[str, str]:
    """The Google sections of a docstring by title; the text before the first one has the title ''."""
    parts = re.split(r"^(Args|Returns|Yields|Raises|Example):\n", inspect.cleandoc(docstring), flags=re.MULTILINE)
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def _problems(public: Any) -> Iterator[str]:  # noqa: ANN401  (a function or class)
    """Yield what a docstring lacks."""
    sections = _sections(public.__doc__ or "")
    if not sections[""].strip():
        yield "no description"
    if re.search(r"\bRaises? [A-Z]\w*Error\b", sections[""]):
        yield "errors outside of Raises"
    if inspect.isclass(public) and issubclass(public, enum.Enum):
        yield from (f"{member.name} is not described" for member in public if member.name not in sections[""])
        return
    described = re.findall(r"^ {4}(\w+): ", sections.get("Args", ""), re.MULTILINE)
    expected = []
    if dataclasses.is_dataclass(public):
        expected = [field.name for field in dataclasses.fields(public) if not field.name.startswith("_")]
    elif inspect.isfunction(public):
        expected = list(inspect.signature(public).parameters)
    elif "__init__" in vars(public):
        expected = list(inspect.signature(public.__init__).parameters)[1:]  # fsspec's metaclass hides those of a class
    if inspect.isfunction(public):
        result = str(inspect.signature(public).return_annotation)
        needed = {"Yields"} if result.startswith("Iterator") else {"Returns"} if result != "None" else set()
        if {"Returns", "Yields"} & sections.keys() != needed:
            yield f"expected the section {needed or 'neither Returns nor Yields'}"
    if described != expected:
        yield f"Args: expected {expected}, got {described}"


@pytest.mark.parametrize("name", _OBJECTS)
def test_docstrings_have_their_sections(name: str) -> None:
    """A docstring has Args for every parameter or field, in order, Returns for a result, and errors under Raises."""
    assert list(_problems(_public(name))) == []


def test_the_version_is_the_installed_one() -> None:
    """``__version__``, which pyproject.toml reads, is the version in the metadata of the installed package."""
    assert dist_ckpt_mistral.__version__ == importlib.metadata.version("dist-ckpt-mistral")
