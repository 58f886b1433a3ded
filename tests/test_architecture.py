"""The rules of the house, read off the syntax trees of the package: who may import whom, and what stands where."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Final

import pytest

import dist_ckpt_mistral
from dist_ckpt_mistral.model.config.mistral_config import MistralConfig
from dist_ckpt_mistral.model.config.parts import Vision
from dist_ckpt_mistral.model.table.table import OLD_EXTRA_STATES, tensor_table

ROOT: Final = Path(dist_ckpt_mistral.__file__).parent
#: Every file of the package but those that are nothing but their docstring.
MODULES: Final = tuple(
    sorted(
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in ROOT.rglob("*.py")
        if path.name != "__init__.py"
    )
)
#: Where ``read_bytes`` is an amount, and not Path's method.
AMOUNTS: Final = tuple(
    name for name in MODULES if name.startswith(("gather.", "analysis.", "mapping.read_plan", "cli.convert"))
)
#: Where names of tensors stand: the tables, and what tells its keys from other entries of a checkpoint.
NAMING: Final = tuple(name for name in MODULES if name.startswith("model.table."))
#: Views for one library each, which is theirs to import: nothing else imports them.
VIEWS: Final = {
    "views.torch_dcp": {"torch"},
    "views.zarr_store": {"zarr", "ml_dtypes"},
    "views.hf_files": {"fsspec"},
}
#: Packages that are nothing but their docstring; the topmost one only points to where its names live.
PACKAGES: Final = tuple(
    sorted(".".join(path.relative_to(ROOT).with_suffix("").parts) for path in ROOT.rglob("__init__.py"))
)


@cache
def tree_of(module: str) -> ast.Module:
    """The syntax tree of a module of the package."""
    return ast.parse((ROOT / Path(*module.split("."))).with_suffix(".py").read_text())


def imports(module: str) -> Iterator[tuple[str, bool]]:
    """Every module that is imported, and whether that happens when the importing module itself is imported."""
    at_once = {id(node) for node in tree_of(module).body}
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in at_once) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"a relative import in {module}"
            for alias in node.names:
                path = Path(f"{node.module}.{alias.name}".replace(".", "/"))
                is_module = (ROOT.parent / path).with_suffix(".py").is_file()
                yield f"{node.module}.{alias.name}" if is_module else str(node.module), id(node) in at_once


def strings(module: str) -> Iterator[str]:
    """Every string of a module that is not a docstring."""
    docstrings = set()
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstrings |= {id(statement.value) for statement in node.body[:1] if isinstance(statement, ast.Expr)}
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value


@pytest.mark.parametrize("package", [name for name in PACKAGES if name != "__init__"])
def test_packages_hold_nothing(package: str) -> None:
    """Subpackages run nothing when imported: there is only their docstring."""
    assert [type(node) for node in tree_of(package).body] == [ast.Expr]


@pytest.mark.parametrize("module", MODULES)
def test_who_needs_what(module: str) -> None:
    """Megatron and torch are imported by megatron/ and the views for torch; what else is optional waits for its use."""
    foreign = [
        (name.partition(".")[0], at_once)
        for name, at_once in imports(module)
        if name.partition(".")[0] not in {*sys.stdlib_module_names, "dist_ckpt_mistral"}
    ]
    if module.startswith("megatron."):
        assert {name for name, _ in foreign} <= {"megatron", "torch", "transformers", "safetensors"}
        return
    assert {name for name, at_once in foreign if at_once} <= {"numpy", "zlib_ng"} | VIEWS.get(module, set())
    own = {name.removeprefix("dist_ckpt_mistral.") for name, at_once in imports(module) if at_once}
    assert own.isdisjoint(VIEWS)
    assert "megatron" not in {name for name, _ in foreign}


def names_of_tensors() -> set[str]:
    """What the names of tensors consist of, in both worlds, without words that mean other things too."""
    config = MistralConfig(
        vocab_size=1,
        hidden_size=1,
        intermediate_size=1,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=1,
        vision=Vision(
            hidden_size=1,
            intermediate_size=1,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_channels=1,
            patch_size=1,
            merged_patches=1,
            feature_layers=1,
            projector_bias=True,
        ),
    )
    table = tensor_table(config)
    names = [*table.hf_tensors(), *OLD_EXTRA_STATES]
    for rule in table.rules:
        names += [
            *rule.keys,
            *(name for module in (rule.local, rule.te) for name in (module.name, *(module.extra_state or ()))),
        ]
    words = {word for name in names for word in name.split(".")}
    other_meanings = {"weight", "bias", "model", "decoder", "transformer", "attention", "layers", "norm", "embedding"}
    return words - other_meanings - {"{layer}", "0"}


@pytest.mark.parametrize("module", [each for each in MODULES if each not in NAMING])
def test_tensor_names_stand_in_the_table_alone(module: str) -> None:
    """No string outside the tables contains a word that tensor names are made of."""
    words = names_of_tensors()
    assert {"q_proj", "linear_qkv", "mlp", "self_attn", "lm_head", "_extra_state"} <= words
    assert {"vision_tower", "multi_modal_projector", "language_model", "patch_conv"} <= words
    pattern = re.compile(rf"\b({'|'.join(map(re.escape, sorted(words)))})\b")
    assert [text for text in strings(module) if pattern.search(text)] == []


@pytest.mark.parametrize("module", [*MODULES, *PACKAGES])
def test_what_only_one_room_does(module: str) -> None:
    """Only the command line prints; only pickles.reader unpickles, nothing evaluates; only few open or make files."""
    names = {node.id for node in ast.walk(tree_of(module)) if isinstance(node, ast.Name)}
    attributes = {
        (node.value.id if isinstance(node.value, ast.Name) else "", node.attr)
        for node in ast.walk(tree_of(module))
        if isinstance(node, ast.Attribute)
    }
    assert names.isdisjoint({"eval", "exec", "compile", "__import__"})
    assert "print" not in names or module == "cli.output"
    unpicklers = {("pickle", name) for name in ("load", "loads", "Unpickler")} | {("torch", "load")}
    assert attributes.isdisjoint(unpicklers) or module == "formats.pickles.reader"
    touching = {"open", "read_bytes", "read_text", "write_bytes", "write_text", "unlink", "rename", "rmtree"}
    touched = {attribute for owner, attribute in attributes if owner not in {"local", "documents"}} | names
    calls = {node.func for node in ast.walk(tree_of(module)) if isinstance(node, ast.Call)}
    if "read_bytes" not in {node.attr for node in calls if isinstance(node, ast.Attribute)}:
        touched -= {"read_bytes"} if module in AMOUNTS else set()
    allowed = ("convert.journal", "libraries", "cli.demo", "cli.processes", "megatron.load_check", "cli.output")
    assert touched.isdisjoint(touching) or module.startswith("storage.") or module in allowed


def test_asserts_check_no_data() -> None:
    """``python -O`` drops them: the package has none."""
    found = [module for module in MODULES for node in ast.walk(tree_of(module)) if isinstance(node, ast.Assert)]
    assert found == []
