"""LoRA adapters, their base models and what is made of them may each lie in a store or in a directory."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import run
from peft_adapters import save_adapter
from plain_models import save_model
from remote_folders import files_of, get_folder, put_folder

import dist_ckpt_mistral as dcm

pytestmark = pytest.mark.usefixtures("empty_stores")

_STORE = "memory://bucket"


@pytest.fixture
def local(tmp_path: Path) -> Path:
    """A model, an adapter of it, both as checkpoints, and what is exported of them, all in directories."""
    model = save_model(tmp_path / "model")
    adapter = save_adapter(tmp_path / "adapter", model, shared_a=True)
    dcm.from_hf(model, tmp_path / "base", tp=2)
    dcm.from_hf(adapter, tmp_path / "ckpt", tp=2)
    dcm.to_hf(tmp_path / "ckpt", tmp_path / "peft")
    assert run("to-hf", tmp_path / "ckpt", tmp_path / "merged", "--merge-adapter", "--base", model).code == 0
    return tmp_path


@pytest.fixture
def stored(local: Path) -> str:
    """The same sources in a store."""
    for name in ("model", "adapter", "base", "ckpt"):
        put_folder(local / name, f"{_STORE}/{name}")
    return _STORE


def made(place: Path | str) -> dict[str, bytes]:
    """The files of a directory or of a folder in the store."""
    return files_of(place) if isinstance(place, Path) else get_folder(place)


@pytest.mark.parametrize("to_store", [False, True], ids=["to disk", "to store"])
@pytest.mark.parametrize("from_store", [False, True], ids=["from disk", "from store"])
def test_there_and_back(local: Path, stored: str, from_store: bool, to_store: bool) -> None:
    """An adapter is imported and exported, byte for byte as between directories; every question has its answer."""
    source: str | Path = stored if from_store else local
    target: str | Path = f"{stored}/new" if to_store else local / "new"
    for command, name, out, options in (
        ("from-hf", "adapter", "ckpt", ("--tp", "2")),
        ("to-hf", "ckpt", "peft", ()),
    ):
        done = run(command, f"{source}/{name}", f"{target}/{out}", *options)
        assert done.code == 0, done
        assert made(target / out if isinstance(target, Path) else f"{target}/{out}") == files_of(local / out)
    assert run("verify", f"{source}/adapter", f"{target}/ckpt").code == 0
    assert run("verify", f"{target}/peft").code == 0
    for command in ("inspect", "plan"):
        assert run(command, f"{target}/ckpt").code == 0


@pytest.mark.parametrize("to_store", [False, True], ids=["to disk", "to store"])
@pytest.mark.parametrize("base", ["model", "base"])
@pytest.mark.parametrize("base_in_store", [False, True], ids=["base on disk", "base in store"])
@pytest.mark.parametrize("from_store", [False, True], ids=["from disk", "from store"])
def test_the_merged_model(
    local: Path, stored: str, from_store: bool, base_in_store: bool, base: str, to_store: bool
) -> None:
    """The merged model is the same, wherever adapter, base model and output lie."""
    source, of = stored if from_store else local, stored if base_in_store else local
    target: str | Path = f"{stored}/new" if to_store else local / "new"
    done = run("to-hf", f"{source}/ckpt", target, "--merge-adapter", "--base", f"{of}/{base}")
    assert done.code == 0, done
    expected, found = files_of(local / "merged"), made(target)
    assert found["model.safetensors"] == expected["model.safetensors"]
    assert found["config.json"] == expected["config.json"]
    assert run("verify", target).code == 0


def test_an_import_of_an_adapter_with_its_base_in_a_store(local: Path, stored: str) -> None:
    """--base tells the model of a PEFT directory, from wherever it is."""
    done = run("from-hf", f"{stored}/adapter", f"{stored}/new", "--base", f"{stored}/model", "--tp", "2")
    assert done.code == 0, done
    assert get_folder(f"{stored}/new") == files_of(local / "ckpt")
