"""views/README.md: every example runs on a small model as it stands, and every name in it exists."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from command_line import run
from plain_models import save_model
from safetensors.torch import load_file

import dist_ckpt_mistral as dcm

_PAGE = (Path(dcm.__file__).parent / "views" / "README.md").read_text()
_TITLES = re.findall(r"^## (.*)$", _PAGE, re.MULTILINE)
#: Title of a section -> its example.
_EXAMPLES = {
    title: blocks[0]
    for title in _TITLES
    if (
        blocks := re.findall(
            r"```python\n(.*?)```", _PAGE.partition(f"## {title}\n")[2].partition("\n## ")[0], re.DOTALL
        )
    )
}
_NEEDED = {"TensorStore": "tensorstore", "zarr-python": "zarr", "Megatron": "megatron"}


@pytest.fixture
def expected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """A directory with what the page calls ``hf_dir`` and ``ckpt``, and the tensors in both."""
    dcm.from_hf(save_model(tmp_path / "hf_dir"), tmp_path / "ckpt")
    monkeypatch.chdir(tmp_path)
    tensors: dict[str, torch.Tensor] = load_file(tmp_path / "hf_dir" / "model.safetensors")
    return tensors


def example(title: str) -> dict[str, Any]:
    """Run the example of a section; the names that it leaves."""
    if (needed := _NEEDED.get(title)) is not None and find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed")
    names: dict[str, Any] = {}
    exec(compile(_EXAMPLES[title], f"views/README.md: {title}", "exec"), names)  # noqa: S102  (what a reader would paste)
    return names


def test_every_section_has_its_example() -> None:
    """The sections are those that are tested here."""
    assert set(_EXAMPLES) == {*_CHECKS, "vLLM"} == set(_TITLES)


def _of_transformers(names: dict[str, Any], expected: dict[str, torch.Tensor]) -> bool:
    state = names["model"].state_dict()
    return all(state[name].equal(tensor.to(state[name].dtype)) for name, tensor in expected.items())


def _raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.view(torch.uint8).numpy().tobytes())


_NORM = "model.norm.weight"
#: Section -> whether what its example leaves is the model's.
_CHECKS: dict[str, Callable[[dict[str, Any], dict[str, torch.Tensor]], bool]] = {
    "A mapping": lambda names, expected: names["whole"].equal(expected["model.embed_tokens.weight"]),
    "transformers": _of_transformers,
    "Megatron": lambda names, expected: names["tensors"]["decoder.final_layernorm.weight"].equal(expected[_NORM]),
    "torch DCP": lambda names, expected: names["state"][_NORM].equal(expected[_NORM]),
    "TensorStore": lambda names, expected: (
        names["values"].tobytes() == names["stored"].read().result().tobytes() == _raw(expected[_NORM])
    ),
    "zarr-python": lambda names, expected: names["values"].tobytes() == _raw(expected[_NORM]),
    "The files of an export, without the export": lambda names, expected: (
        names["tensors"].keys() == expected.keys()
        and all(names["tensors"][name].equal(expected[name]) for name in expected)
    ),
}


@pytest.mark.filterwarnings(
    "ignore"
)  # Megatron's when it is imported without Transformer Engine; torch's, without ranks
@pytest.mark.parametrize("title", _CHECKS)
def test_examples(title: str, expected: dict[str, torch.Tensor]) -> None:
    """The example of a section runs, and leaves the bits of the model."""
    assert _CHECKS[title](example(title), expected)


def test_the_loader_of_vllm(expected: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of vLLM would be given every tensor by its Hugging Face name; vLLM's two names are stand-ins."""
    registered: dict[str, Any] = {}
    module = ModuleType("vllm.model_executor.model_loader")
    monkeypatch.setattr(module, "BaseModelLoader", _BaseModelLoader, raising=False)
    monkeypatch.setattr(
        module, "register_model_loader", lambda name: lambda kind: registered.setdefault(name, kind), raising=False
    )
    for name in ("vllm", "vllm.model_executor"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    example("vLLM")
    loader = registered["megatron"](SimpleNamespace(model_loader_extra_config={"checkpoint": "ckpt"}))
    loader.download_model(None)
    given: dict[str, torch.Tensor] = {}
    loader.load_weights(SimpleNamespace(load_weights=given.update), None)
    assert given.keys() == expected.keys()
    assert all(given[name].equal(expected[name]) for name in expected)


class _BaseModelLoader:
    """What vLLM's base class does when it is made (vllm 0.9.2 to 0.32, model_executor/model_loader/base_loader.py)."""

    def __init__(self, load_config: object) -> None:
        self.load_config = load_config


def test_commands(expected: dict[str, torch.Tensor]) -> None:
    """The command of the page runs, and its options exist."""
    assert expected
    (command,) = re.findall(r"```sh\ndist-ckpt-mistral (.*)\n```", _PAGE)
    assert run(*command.split()).code == 0
    text = " ".join(run("index", "--help").out)
    assert all(option in text for option in re.findall(r"`(?:index )?(--[a-z]+)", _PAGE))


def test_names_exist() -> None:
    """Every ``dcm.`` name of the page is public, and every module in its table exists."""
    assert {name for name in re.findall(r"dcm\.(\w+)", _PAGE) if name not in dir(dcm)} == set()
    folder = Path(dcm.__file__).parent / "views"
    modules = re.findall(r"\| `([\w./]+\.py)` \|", _PAGE)
    assert len(modules) == 7
    assert all((folder / module).is_file() for module in modules)
