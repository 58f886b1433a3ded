"""Every README of this repository: each command and each line of Python runs, and prints what is shown.

A block that is not run here says why in a comment (``helpers/readme_pages.py``); ``test_readme_names.py`` checks it.
``UPDATE_READMES=1 pytest tests/cli/test_readme.py -k shown`` puts what the commands print today into the pages.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Final

import pytest
from command_line import shown
from readme_pages import LANGUAGES, ROOT, Block, all_blocks, blocks, is_shown, modules_of_names, pages, rewrite

import dist_ckpt_mistral as dcm
from dist_ckpt_mistral.cli.demo_model import make_model
from dist_ckpt_mistral.convert.from_hf import from_hf

_PROGRAM: Final = "dist-ckpt-mistral"
#: Modules that an example needs because of the extra that a name of the package needs.
_OF_ROOM: Final = {"megatron": "megatron", "views.torch_dcp": "torch", "views.hf_files": "fsspec"}


# What examples find beside them.


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The demo's model, and the checkpoint that ``from-hf`` makes of it."""
    folder = tmp_path_factory.mktemp("models")
    make_model(folder / "hf_dir")
    from_hf(folder / "hf_dir", folder / "ckpt")
    return folder / "hf_dir", folder / "ckpt"


def _training(models: tuple[Path, Path]) -> None:
    """The root of a training that has lost what describes it."""
    from_hf(models[0], "training", iteration=500)
    shutil.rmtree("training/hf")


def _old(_: tuple[Path, Path]) -> None:
    """A checkpoint of Megatron's format zarr, with optimizer state."""
    import genuine  # noqa: PLC0415  (needs safetensors)

    shutil.copytree(genuine.folder("optzarr_0123") / "checkpoint", "old")


def _adapter(_: tuple[Path, Path]) -> None:
    """A LoRA of Megatron-Bridge, and the model that it adapts."""
    import genuine  # noqa: PLC0415  (needs safetensors)

    shutil.copytree(genuine.folder("lora_0062") / "checkpoint", "adapter_ckpt")
    dcm.to_hf(genuine.shards("bridge_0062"), "adapter_base")


def _linked(model: Path, name: str) -> None:
    """A copy whose files are links to the originals: no example changes one in place."""
    shutil.copytree(model, name, symlinks=True, copy_function=os.link)


#: Name in a comment ``given`` -> what makes it in the working directory.
GIVEN: Final[Mapping[str, Callable[[tuple[Path, Path]], object]]] = {
    "hf_dir": lambda models: _linked(models[0], "hf_dir"),
    "ckpt": lambda models: _linked(models[1], "ckpt"),
    "training": _training,
    "old": _old,
    "adapter_ckpt": _adapter,
    "adapter_base": lambda _: None,  # _adapter makes it
}


def _give(names: list[str], models: tuple[Path, Path]) -> None:
    for name in names:
        if not Path(name).exists():
            GIVEN[name](models)


def _needs(block: Block) -> set[str]:
    """The modules that a block needs besides a plain install."""
    needed = set(block.listed("needs"))
    if block.language == "python":
        for node in ast.walk(ast.parse(block.text)):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [each.name for each in node.names]
                needed |= {name.partition(".")[0] for name in names}
        needed |= {"torch"} if "safetensors.torch" in block.text else set()
        for name in re.findall(r"dcm\.(\w+)", block.text):
            module = modules_of_names().get(name, "")
            needed |= {need for room, need in _OF_ROOM.items() if module == room or module.startswith(f"{room}.")}
    needed |= {"megatron"} if "ranks" in block.comments or "model" in block.listed("given") else set()
    return needed - {"dist_ckpt_mistral", "vllm"} - set(sys.stdlib_module_names)


def _parametrized(found: list[Block]) -> list[Any]:
    marks = {"megatron": [pytest.mark.megatron, pytest.mark.slow], "transformers": [pytest.mark.slow]}
    return [
        pytest.param(block, id=block.name, marks=[mark for name in _needs(block) for mark in marks.get(name, [])])
        for block in found
    ]


def _skip_without(modules: set[str]) -> None:
    absent = sorted(name for name in modules if find_spec(name) is None)
    if absent:
        pytest.skip(f"not installed: {', '.join(absent)}")


def _is_run_alone(block: Block) -> bool:
    return "ranks" in block.comments or bool(_needs(block))


# Commands.


def _pages_with_commands() -> list[Path]:
    return [page for page in pages() if _commands_of(page)]


def _commands_of(page: Path) -> list[Block]:
    found = [block for block in blocks(page) if block.language in {"sh", "console"} and block.is_run_by_its_page]
    return [block for block in found if not _is_run_alone(block)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "page", [pytest.param(page, id=str(page.relative_to(ROOT))) for page in _pages_with_commands()]
)
def test_commands_print_what_is_shown(
    page: Path, models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commands of a page, one after another in one directory, end well and print what the page shows."""
    monkeypatch.chdir(tmp_path)
    for block in _commands_of(page):
        _give(block.listed("given") or ["hf_dir"], models)
        outputs = [_output(block, command) for command, _ in block.commands()]
        if block.language == "sh":
            continue
        if os.environ.get("UPDATE_READMES"):
            rewrite(block, outputs)
            continue
        for (command, expected), actual in zip(block.commands(), outputs, strict=True):
            assert is_shown(expected, actual), f"{block.name}: {command} prints\n" + "\n".join(actual)


def _output(block: Block, command: str) -> list[str]:
    program, *words = shlex.split(command, comments=True)
    assert program == _PROGRAM, f"{block.name}: {command} is not ours; say in a comment which test runs it"
    code, lines = shown(*words)
    assert code == 0, f"{block.name}: {command} ends with {code}:\n" + "\n".join(lines)
    return lines


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "block",
    _parametrized(
        [
            block
            for block in all_blocks("sh", "console")
            if block.is_run_by_its_page and _is_run_alone(block) and "ranks" not in block.comments
        ]
    ),
)
def test_commands_that_need_libraries(
    block: Block, models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command that a plain install cannot run ends well where its libraries are installed."""
    _skip_without(_needs(block))
    monkeypatch.chdir(tmp_path)
    _give(block.listed("given"), models)
    for command, _ in block.commands():
        _output(block, command)


# Python.


class _Engine:
    """Takes weights as vLLM and SGLang do."""

    def __init__(self) -> None:
        self.tensors: dict[str, Any] = {}

    def load_weights(self, named: list[tuple[str, Any]]) -> None:
        self.tensors |= dict(named)


class _BaseModelLoader:
    """What vLLM's base class does when it is made (vllm 0.9.2 to 0.32, model_executor/model_loader/base_loader.py)."""

    def __init__(self, load_config: object) -> None:
        self.load_config = load_config


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stand-ins for the two names of vLLM that an example imports. Gives the loaders that it registers."""
    registered: dict[str, Any] = {}
    module = ModuleType("vllm.model_executor.model_loader")
    monkeypatch.setattr(module, "BaseModelLoader", _BaseModelLoader, raising=False)
    monkeypatch.setattr(
        module, "register_model_loader", lambda name: lambda kind: registered.setdefault(name, kind), raising=False
    )
    for name in ("vllm", "vllm.model_executor"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return registered


def _expected(folder: str = "hf_dir") -> dict[str, bytes]:
    """The bytes of every tensor of a model, as the safetensors library reads it."""
    import genuine  # noqa: PLC0415  (needs safetensors)

    files = sorted(Path(folder).glob("*.safetensors"))
    return {name: content for file in files for name, (_, _, content) in genuine.described_file(file).items()}


def _bytes(tensor: Any) -> bytes:  # noqa: ANN401  (a tensor of torch, or an array)
    if hasattr(tensor, "numpy"):
        import torch  # noqa: PLC0415  (not everywhere)

        tensor = tensor.detach().contiguous().view(torch.uint8).numpy()
    return bytes(tensor.tobytes())


def _all_equal(tensors: Mapping[str, Any]) -> bool:
    expected = _expected()
    return tensors.keys() == expected.keys() and all(_bytes(tensors[name]) == expected[name] for name in expected)


def _is(tensor: Any, hf_name: str) -> bool:  # noqa: ANN401  (as in _bytes)
    return _bytes(tensor) == _expected()[hf_name]


def _of_transformers(names: Mapping[str, Any]) -> bool:
    import torch  # noqa: PLC0415  (not everywhere)

    state, expected = names["model"].state_dict(), _expected()
    return state.keys() >= expected.keys() and all(
        _bytes(state[name].to(torch.bfloat16)) == expected[name] for name in expected
    )


def _of_vllm(names: Mapping[str, Any]) -> bool:
    loader = names["registered"]["megatron"](SimpleNamespace(model_loader_extra_config={"checkpoint": "ckpt"}))
    loader.download_model(None)
    given: dict[str, Any] = {}
    loader.load_weights(SimpleNamespace(load_weights=given.update), None)
    return _all_equal(given)


def _of_live_model(names: Mapping[str, Any]) -> bool:
    return _expected("out") == _expected() and _all_equal(names["engine"].tensors)


_NORM: Final = "model.norm.weight"
#: Page and section -> whether what its example leaves is the model's.
_CHECKS: Final[Mapping[tuple[str, str], Callable[[Mapping[str, Any]], bool]]] = {
    ("README.md", "In Python"): lambda names: _is(names["q"], "model.layers.0.self_attn.q_proj.weight"),
    ("README.md", "In a training loop"): _of_live_model,
    ("dist_ckpt_mistral/megatron/README.md", "Export a live model"): _of_live_model,
    ("dist_ckpt_mistral/megatron/README.md", "Keep the configuration in every save"): lambda names: (
        json.loads(json.dumps(names["record"]))["dist_ckpt_mistral"]["hf_config"]
        == json.loads(Path("hf_dir/config.json").read_bytes())
    ),
    ("dist_ckpt_mistral/convert/README.md", "In Python"): lambda _: dcm.compare("hf_dir", "out").is_equal,
    ("dist_ckpt_mistral/views/README.md", "A mapping"): lambda names: _is(names["whole"], "model.embed_tokens.weight"),
    ("dist_ckpt_mistral/views/README.md", "transformers"): _of_transformers,
    ("dist_ckpt_mistral/views/README.md", "Megatron"): lambda names: _is(
        names["tensors"]["decoder.final_layernorm.weight"], _NORM
    ),
    ("dist_ckpt_mistral/views/README.md", "torch DCP"): lambda names: _is(names["state"][_NORM], _NORM),
    ("dist_ckpt_mistral/views/README.md", "TensorStore"): lambda names: (
        _is(names["values"], _NORM) and _is(names["stored"].read().result(), _NORM)
    ),
    ("dist_ckpt_mistral/views/README.md", "zarr-python"): lambda names: _is(names["values"], _NORM),
    ("dist_ckpt_mistral/views/README.md", "The files of an export, without the export"): lambda names: _all_equal(
        names["tensors"]
    ),
    ("dist_ckpt_mistral/views/README.md", "vLLM"): _of_vllm,
}


def _python_here() -> list[Block]:
    return [block for block in all_blocks("python") if block.is_run_by_its_page and "ranks" not in block.comments]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("block", _parametrized(_python_here()))
def test_python(
    block: Block, models: tuple[Path, Path], vllm: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An example runs in a directory with ``hf_dir`` and ``ckpt``, and leaves the bits of the model."""
    _skip_without(_needs(block))
    monkeypatch.chdir(tmp_path)
    given = block.listed("given") or ["hf_dir", "ckpt"]
    names: dict[str, Any] = {"dcm": dcm, "registered": vllm}
    _give([name for name in given if name in GIVEN], models)
    if "model" in given:
        names |= {"model": dcm.load_model("hf_dir", device="cpu"), "engine": _Engine()}
    exec(compile(block.text, block.name, "exec"), names)  # noqa: S102  (what a reader would paste)
    assert _CHECKS[str(block.page.relative_to(ROOT)), block.section](names)


def test_every_check_has_its_example() -> None:
    """No check of an example is left over."""
    assert {(str(block.page.relative_to(ROOT)), block.section) for block in _python_here()} == {*_CHECKS}


def test_on_ranks(
    launch_ranks: Callable[..., list[dict[str, Any]]],
    models: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the pages start with torchrun runs on as many ranks."""
    jobs: dict[str, dict[str, Any]] = {}
    for number, block in enumerate(block for block in all_blocks(*LANGUAGES) if "ranks" in block.comments):
        assert block.comments["ranks"] == "4"
        folder = tmp_path / str(number)
        folder.mkdir()
        monkeypatch.chdir(folder)
        _give(block.listed("given"), models)
        if block.language == "python":
            jobs[block.name] = {"task": "run_python", "layout": {}, "code": block.text, "folder": str(folder)}
            continue
        ((command, _),) = block.commands()
        words = shlex.split(command)
        start = ["torchrun", "--nproc-per-node", "4", "-m", "dist_ckpt_mistral"]
        assert words[: len(start)] == start
        arguments = [str(folder / word) if word == "ckpt" else word for word in words[len(start) :]]
        jobs[block.name] = {"task": "run_command", "layout": {}, "arguments": arguments}
    results = launch_ranks(4, jobs)
    codes = {name: [rank[name]["code"] for rank in results] for name, job in jobs.items() if "arguments" in job}
    assert codes == {name: [0] * 4 for name in codes}
    assert {job["task"] for job in jobs.values()} == {"run_python", "run_command"}
